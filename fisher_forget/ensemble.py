"""Retrained ensembles: the models that forgetting is compared with; cached one by one, so a killed run resumes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fisher_forget import storage
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError

TrainFn = Callable[[int], nn.Module]


@dataclass(frozen=True)
class RetrainedEnsemble:
    """Models that differ by their seed alone.

    Attributes:
        models: In eval mode, in the order of `seeds`.
        seeds: One per model.
        seconds: Wall-clock time that each training took, when it was trained.
    """

    models: tuple[nn.Module, ...]
    seeds: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class _Cache:
    """`folder/seed-<s>.safetensors`, one file a member."""

    folder: Path
    fingerprint: str

    def path(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.safetensors"

    def save(self, seed: int, model: nn.Module, seconds: float) -> None:
        notes = {"fingerprint": self.fingerprint, "seed": str(seed), "seconds": repr(seconds), "version": _version()}
        storage.save_model(self.path(seed), model, notes)

    def load(self, seed: int, template: nn.Module) -> tuple[nn.Module, float]:
        model = storage.load_model(self.path(seed), template, {"fingerprint": self.fingerprint, "seed": str(seed)})
        return model, float(storage.read_metadata(self.path(seed)).get("seconds", "nan"))


def retrain_ensemble(
    train_fn: TrainFn,
    seeds: Sequence[int],
    *,
    template: nn.Module,
    folder: Path | None = None,
    fingerprint: str = "",
    jobs: int = 1,
    progress: bool = True,
    description: str = "retrain",
) -> RetrainedEnsemble:
    """Train one model per seed, or load it where an earlier run has stored it.

    Each model is stored as soon as it is trained: to resume a killed run, start it again. A stored model with another
    fingerprint, or a damaged file, is trained anew and overwritten, with a warning.

    Args:
        train_fn: Takes a seed and returns a trained model of the template's architecture.
        seeds: Distinct.
        template: Gives the architecture; untouched.
        folder: Where to store the models; `None` stores nothing.
        fingerprint: Of everything but the seed that the weights depend on; see `storage.fingerprint`.
        jobs: Worker processes. With more than one, each uses one torch thread and receives `train_fn`, with what it
            refers to, by copy. Sums are then added in another order than with several threads, so the weights may
            differ from those of `jobs=1` by rounding, which training amplifies; the number of workers alone changes
            nothing. With one job, training runs in this process and torch's threads are left alone.
        progress: Show a bar with the time left.
        description: Text of the bar.

    Raises:
        ConfigError: If `seeds` is empty or repeats one, or `jobs` is less than 1.
        StorageError: If the folder cannot be written, or `train_fn` returns another architecture than the template's.
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds {seeds}", "at least one seed, each once", "Correct `seeds`.")
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}", "at least 1", "Pass the number of worker processes.")
    cache = None if folder is None else _Cache(storage.ensure_folder(folder), fingerprint)
    members = _stored(cache, seeds, template)
    todo = [seed for seed in seeds if seed not in members]
    bar = tqdm(
        total=len(seeds), initial=len(members), desc=description, unit="model", disable=not progress, leave=False
    )
    with bar:
        for seed, state, seconds in _trained(train_fn, todo, cache, jobs):
            members[seed] = storage.fill_model(template, state), seconds
            bar.update()
    models, durations = zip(*(members[seed] for seed in seeds), strict=True)
    return RetrainedEnsemble(models, seeds, durations)


def _stored(cache: _Cache | None, seeds: Sequence[int], template: nn.Module) -> dict[int, tuple[nn.Module, float]]:
    members: dict[int, tuple[nn.Module, float]] = {}
    refused: dict[int, Exception] = {}
    for seed in seeds:
        if cache is None or not cache.path(seed).exists():
            continue
        try:
            members[seed] = cache.load(seed, template)
        except (StorageError, ValueError) as error:
            refused[seed] = error
    if cache is not None and refused:
        warnings.warn(
            f"Stored models of the seeds {list(refused)} in {cache.folder} cannot be used and are trained anew: "
            f"{next(iter(refused.values()))}",
            FisherForgetWarning,
            stacklevel=3,
        )
    return members


Member = tuple[int, dict[str, Tensor], float]


def _trained(train_fn: TrainFn, seeds: Sequence[int], cache: _Cache | None, jobs: int) -> Iterator[Member]:
    """Members in the order in which they are finished."""
    if jobs == 1 or len(seeds) < 2:
        # a single one left over from a killed run gets one thread too, so that resuming changes nothing
        threads = None if jobs == 1 else 1
        yield from (_member(train_fn, seed, cache, threads) for seed in seeds)
        return
    workers = joblib.Parallel(n_jobs=min(jobs, len(seeds)), backend="loky", return_as="generator_unordered")
    yield from workers(joblib.delayed(_member)(train_fn, seed, cache, threads=1) for seed in seeds)


def _member(train_fn: TrainFn, seed: int, cache: _Cache | None, threads: int | None = None) -> Member:
    """Train one member, and store it before anything else can go wrong."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        model = train_fn(seed)
        seconds = time.perf_counter() - start
    finally:
        if threads is not None:
            torch.set_num_threads(before)  # workers are reused, perhaps by someone else
    if cache is not None:
        cache.save(seed, model, seconds)
    return seed, {name: value.detach().cpu() for name, value in model.state_dict().items()}, seconds


def _version() -> str:
    try:
        return metadata.version("fisher_forget")
    except metadata.PackageNotFoundError:
        return "not installed"
