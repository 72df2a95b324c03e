"""The few checkpoints of a training that forgetting can start from: kept, listed, read.

A checkpoint lies at a *point* of the training, the share of its steps that are done: .75 is three
quarters. What follows a point costs 1 - point of a training.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget._util.checks import is_number, is_whole
from fisher_forget._util.copies import unwrapped
from fisher_forget._util.files import (
    ensure_folder,
    fill_model,
    load_tensors,
    read_metadata,
    save_model,
)
from fisher_forget.errors import ConfigError, StorageError

FORMAT = "fisher_forget checkpoint 1"
SUFFIX = ".safetensors"
# Half, a quarter and a tenth of a training are left: what people are ready to pay. Later ones help
# little, because learning rates that end near zero do not move the weights any more.
POINTS = (0.5, 0.75, 0.9)
NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model in the course of its training.

    Attributes:
        point: Share of the training's steps that were done, in [0, 1).
        source: Its file, or the weights themselves.
    """

    point: float
    source: Path | State = field(repr=False)

    @property
    def rest(self) -> float:
        """Share of the training that was still to come."""
        return 1 - self.point

    @property
    def where(self) -> str:
        """Where it lies, in words."""
        return str(self.source) if isinstance(self.source, Path) else "in memory"

    def without_weights(self) -> Checkpoint:
        """The same, without the weights that it has in memory."""
        return self if isinstance(self.source, Path) else replace(self, source={})

    def model(self, like: nn.Module) -> nn.Module:
        """A copy of the model, in eval mode, with the weights and buffers of the checkpoint.

        No code of the file runs: it is a safetensors file, or is read by
        `torch.load(weights_only=True)`.

        Args:
            like: Gives the architecture; untouched.

        Raises:
            StorageError: If it cannot be read, or is of another model.
        """
        read = _read(self.source) if isinstance(self.source, Path) else self.source
        return fill_model(like, _named_like(unwrapped(like).state_dict(), read))


class CheckpointKeeper:
    """Keeps the checkpoints of a training loop that forgetting can start from.

    A checkpoint is a safetensors file, which appears whole or not at all. It holds weights and
    buffers, and no optimizer state. It was made from all samples, those too that are forgotten
    later: keep it as safe as the data, and see `list_checkpoints`.

    Args:
        folder: Where they go; made if need be. A training has a folder for itself.
        total_steps: Optimizer steps of the whole training.
        points: Shares of the training after which a checkpoint is kept.

    Raises:
        ConfigError: If there are no such steps or points.
        StorageError: If the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> keeper = CheckpointKeeper(folder, total_steps=8, points=(0.5, 0.75))
        >>> for step in range(8):
        ...     keeper.step(torch.nn.Linear(2, 2))
        >>> [checkpoint.point for checkpoint in list_checkpoints(folder)]
        [0.5, 0.75]
    """

    def __init__(
        self, folder: str | Path, total_steps: int, points: Sequence[float] = POINTS
    ) -> None:
        if not is_whole(total_steps, 1):
            fix = "Pass epochs * len(loader), over the steps of gradient accumulation."
            raise ConfigError(f"total_steps={total_steps!r}", "a whole number of at least 1", fix)
        if not len(points) or not all(is_number(p) and 0 < p < 1 for p in points):
            got, expected = f"points={points!r}", "at least one, each above 0 and below 1"
            raise ConfigError(got, expected, "Pass points=(0.5, 0.75, 0.9), say.")
        self.folder, self.total_steps = ensure_folder(folder), int(total_steps)
        # up, so that no more than 1 - p is left to train; .9 * 10 is a little more than 9
        self._marks = {min(math.ceil(p * total_steps - 1e-9), total_steps - 1) for p in points}
        self._done: int | None = None

    def step(self, model: nn.Module, done: int | None = None) -> None:
        """Call it after each optimizer step.

        Args:
            model: In training; untouched.
            done: Optimizer steps that are done; by default as many as there were calls. A training
                that goes on after an interruption has to say it.

        Raises:
            StorageError: At the first call, if checkpoints in the folder are of another training;
                or if the file cannot be written.
        """
        first = self._done is None
        self._done = (self._done or 0) + 1 if done is None else done
        if first:
            self._check_folder(self._done)
        if self._done in self._marks:
            path = self.folder / f"step-{self._done}-of-{self.total_steps}{SUFFIX}"
            notes = {"format": FORMAT, "step": str(self._done), "steps": str(self.total_steps)}
            save_model(path, unwrapped(model), notes)

    def _check_folder(self, done: int) -> None:
        """Checkpoints of steps to come, or of a training of another length, are of another one."""
        for path, step, steps in _kept_in(self.folder):
            if steps != self.total_steps or step >= done:
                got = f"{path} after {done} of {self.total_steps} steps"
                expected = "no checkpoint of another training"
                raise StorageError(got, expected, "Remove it, or name another folder.")


def list_checkpoints(folder: str | Path) -> tuple[Checkpoint, ...]:
    """The checkpoints that a `CheckpointKeeper` has left in a folder, early ones first.

    All of them hold what the training saw, the samples that are forgotten later too.

    Raises:
        StorageError: If there is no such folder, they are of different trainings, or one is
            damaged.
    """
    if not Path(folder).is_dir():
        fix = "Name the folder of a CheckpointKeeper."
        raise StorageError(f"no folder {folder}", "a folder with checkpoints", fix)
    kept = sorted(_kept_in(Path(folder)), key=lambda one: one[1])
    lengths = sorted({steps for _, _, steps in kept})
    if len(lengths) > 1:
        got = f"checkpoints of trainings of {lengths} steps in {folder}"
        raise StorageError(got, "those of one training", "Remove those of the others.")
    return tuple(Checkpoint(step / steps, path) for path, step, steps in kept)


def checkpoints_of(given: Any) -> tuple[Checkpoint, ...]:
    """What a user has in place of checkpoints, early ones first.

    Args:
        given: A folder of a `CheckpointKeeper`; checkpoints; or files and state dicts by their
            points, {0.75: "epoch-30.pt"}.

    Raises:
        ConfigError: If it is something else, or there is none.
        StorageError: As `list_checkpoints`.
    """
    if isinstance(given, str | Path):
        found = list_checkpoints(given)
    elif isinstance(given, Mapping):
        found = tuple(_at(point, source) for point, source in given.items())
    elif isinstance(given, Sequence):
        found = tuple(given)
    else:
        found = ()
    if not found or not all(isinstance(one, Checkpoint) for one in found):
        what = "no checkpoint" if isinstance(given, str | Path) else type(given).__name__
        got = f"checkpoints={given!r} with {what}" if not found else f"checkpoints of {what}"
        expected = "the folder of a CheckpointKeeper, or {point: file or state dict}"
        fix = "Say how much of the training each has behind it: {0.75: 'epoch-30.pt'}."
        raise ConfigError(got[:200], expected, fix)
    return tuple(sorted(found, key=lambda one: one.point))


def _at(point: Any, source: Any) -> Checkpoint:
    fix = "Say how much of the training each has behind it: {0.75: 'epoch-30.pt'}."
    if not is_number(point) or not point < 1:
        got = f"a checkpoint at {point!r}"
        raise ConfigError(got, "a share of the training of at least 0 and below 1", fix)
    if isinstance(source, str | Path):
        return Checkpoint(float(point), Path(source))
    if not isinstance(source, Mapping):
        raise ConfigError(f"a checkpoint of {type(source).__name__}", "a path or state dict", fix)
    return Checkpoint(float(point), _weights(source, "the state dict"))


def _kept_in(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, step, steps of the training) of every checkpoint of a keeper."""
    for path in folder.glob(f"*{SUFFIX}"):
        notes = read_metadata(path)
        if notes.get("format") == FORMAT:
            yield path, int(notes["step"]), int(notes["steps"])


def _read(path: Path) -> State:
    if path.suffix == SUFFIX:
        return load_tensors(path, foreign=True)[0]
    if not path.is_file():
        raise StorageError(f"no file {path}", "a checkpoint", "Check the path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        got, expected = f"{path}: {first}", "a file of tensors, which needs no code to be read"
        raise StorageError(got, expected, "Save model.state_dict() alone.") from error
    return _weights(content, str(path))


def _weights(content: Any, where: str) -> State:
    """The state dict in what a training script has saved."""
    while isinstance(content, Mapping):
        tensors = {name: x for name, x in content.items() if isinstance(x, Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors
        content = next((content[key] for key in NESTED if key in content), None)
    got = f"{where} without a state dict"
    expected = f"tensors by name, alone or under one of {NESTED}"
    raise StorageError(got, expected, "Save model.state_dict() alone.")


def _named_like(own: State, given: State) -> State:
    """The given tensors by the model's names: without what wrappers put before them ("module.",
    "_orig_mod.", the attribute of a LightningModule), and twice where two names share a tensor of
    which only one was saved."""
    first = next(iter(own), "")
    prefixes = [name.removesuffix(first) for name in given if name.endswith(first)]
    for prefix in prefixes:
        found = {name: given[prefix + name] for name in own if prefix + name in given}
        for name in own.keys() - found.keys():
            twin = next((n for n in found if own[n].data_ptr() == own[name].data_ptr()), None)
            if twin is not None:
                found[name] = found[twin]
        if len(found) == len(own):
            return found
    return given
