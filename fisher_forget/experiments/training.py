"""The small trainer of originals and retrained models: one seed in, one model out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from fisher_forget._util.checks import is_number
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded, seeded_rng
from fisher_forget.data.batches import Batch, make_batch
from fisher_forget.data.samples import KeywordDataset
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import finite, first_call, trainable
from fisher_forget.unlearn.batch_norm import frozen_statistics, train_mode
from fisher_forget.unlearn.training_time import TrainingTime

Rows = Sequence[int] | NDArray[np.int64] | Tensor
AfterStep = Callable[[nn.Module], object]

MAX_SHIFT = 4  # pixels, for 32-pixel images (He et al. 2016, section 4.2)

# Learning rate over its peak at the fraction t in [0, 1) of the run.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    # up from 1/25 within the first 0.3 and down to 0, both along a cosine (Smith & Topin 2017,
    # arXiv:1708.07120)
    "onecycle": lambda t: (
        1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * t / 0.3)) / 2
        if t < 0.3
        else (1 + math.cos(math.pi * (t - 0.3) / 0.7)) / 2
    ),
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the objective is the mean loss plus (weight_decay / 2) |w|^2 over all trainable
    parameters.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples per step at most; the batches of an epoch differ in size by one sample
            at most.
        lr: Peak learning rate.
        momentum: Of SGD; Adam does not use it.
        weight_decay: Coefficient of the L2 term, for Adam too (not decoupled as in AdamW).
        optimizer: "sgd" or "adam".
        schedule: "onecycle", "cosine" or "constant", step by step.
        augment: Shift images at random, and flip those with three channels.
        channels_last: Keep images and convolutions in that memory layout while training: the same
            mathematics, up to twice as fast on a CPU.

    Raises:
        ConfigError: If a value is out of range or a name unknown.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Literal["onecycle", "cosine", "constant"] = "cosine"
    augment: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("epochs", self.epochs >= 0, "a number of at least 0"),
            ("batch_size", self.batch_size >= 1, "a number of at least 1"),
            ("lr", 0 < self.lr < math.inf, "a positive learning rate"),
            ("momentum", 0 <= self.momentum < 1, "a value in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a value of at least 0"),
            ("optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'"),
            ("schedule", self.schedule in SCHEDULES, f"one of {sorted(SCHEDULES)}"),
        ):
            if not good:
                got = f"{name}={getattr(self, name)!r}"
                raise ConfigError(got, expected, "Correct the training settings.")

    def steps(self, samples: int) -> int:
        """Steps of an epoch over so many samples."""
        return -(-samples // self.batch_size)

    def total_steps(self, samples: int) -> int:
        """Steps of the whole training on so many samples."""
        return self.epochs * self.steps(samples)

    def training_time(self, samples: int) -> TrainingTime:
        """What `train` with these settings is in units of gradient flow.

        Args:
            samples: That it trains on.
        """
        decay, steps = self.weight_decay, self.total_steps(samples)
        if self.optimizer == "adam" or not steps:
            told = f"{self.optimizer}, {steps:,} steps, which are no time of gradient flow"
            return TrainingTime(None, decay, told)
        schedule = SCHEDULES[self.schedule]
        rates = [self.lr * schedule(step / steps) for step in range(steps)]
        return TrainingTime.of_rates(rates, momentum=self.momentum, weight_decay=decay)


def train(
    model: nn.Module,
    data: TensorDataset,
    settings: TrainSettings,
    *,
    seed: int,
    indices: Rows | None = None,
    likelihood: Likelihood | str = "categorical",
    progress: bool | str = True,
    after_step: AfterStep | None = None,
) -> nn.Module:
    """Train a copy of `model`, from the weights it has, and return the copy in eval mode.

    Batch order, augmentation and dropout come from `seed`. On the CPU, with one number of threads,
    two calls give the same bits; the given model and the global random state stay as they are.

    Args:
        model: Any module; parameters without `requires_grad` stay frozen, and so do the running
            statistics of a frozen norm layer that other data set.
        data: Inputs [N, ...], or several by name in a `KeywordDataset`, and targets [N, ...].
        settings: See `TrainSettings`.
        seed: Of everything random.
        indices: Samples to train on; all of them if `None`. A repeated index counts as often as it
            occurs.
        likelihood: Name or instance; the loss is its sum over the batch divided by its sum of
            counts, in nats. A name gives way to the loss that a model which takes `labels` has.
        progress: Show a progress bar with the loss; a text stands before it.
        after_step: Called with the model after each step, to be left as it is:
            `CheckpointKeeper.step`.

    Raises:
        DataError: If `data` or `indices` cannot be used, or the targets do not fit the outputs.
        ModelError: If nothing is trainable, or forward fails.
        NumericalError: If the loss or the weights leave the finite numbers.
        ConfigError: If augmentation is asked for inputs that are not images [N, C, H, W].
    """
    run = _Run(model, data, settings, seed, _rows(indices, len(data)), likelihood)
    return run(0, progress, after_step or (lambda model: None))


def resume(
    model: nn.Module,
    data: TensorDataset,
    settings: TrainSettings,
    point: float,
    *,
    seed: int,
    indices: Rows | None = None,
    likelihood: Likelihood | str = "categorical",
    progress: bool | str = True,
) -> nn.Module:
    """The rest of a training by `train`, from a point of it on; the optimizer begins anew.

    The learning rate goes on where it was. With the same seed and samples, no momentum and nothing
    random but the order of the samples, this ends where an uninterrupted training does.

    Args:
        model: With the weights of that point.
        data: See `train`.
        settings: Of the whole training.
        point: Share of its steps that are done, in [0, 1].
        seed: See `train`.
        indices: See `train`.
        likelihood: See `train`.
        progress: See `train`.

    Raises:
        ConfigError: If the point is no such share.
        DataError, ModelError, NumericalError: As `train`.
    """
    if not is_number(point) or point > 1:
        fix = "Pass the share of the training's steps that are done."
        raise ConfigError(f"point={point!r}", "a number from 0 to 1", fix)
    run = _Run(model, data, settings, seed, _rows(indices, len(data)), likelihood)
    return run(round(point * run.total), progress, lambda model: None)


@dataclass(frozen=True)
class _Run:
    """One training, and where it takes place."""

    model: nn.Module
    data: TensorDataset
    settings: TrainSettings
    seed: int
    rows: Tensor
    likelihood: Likelihood | str

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.settings.total_steps(len(self.rows))

    def __call__(self, done: int, progress: bool | str, after_step: AfterStep) -> nn.Module:
        """The copy of the model after all steps but the first `done`."""
        settings = self.settings
        _check_inputs(self.data, settings)
        twin, kind = self._begun()
        optimizer = _optimizer(list(trainable(twin).values()), settings)
        schedule = SCHEDULES[settings.schedule]
        title = progress if isinstance(progress, str) else "train"
        look: dict[str, Any] = {"unit": "step", "leave": False, "dynamic_ncols": True}
        bar = tqdm(total=self.total - done, desc=title, disable=not progress, **look)
        with seeded_rng(self.seed), bar:  # dropout draws from the global generators
            for step, batch in enumerate(self._batches(done), done):
                batch = batch.on(twin)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * schedule(step / self.total)
                outputs = first_call(twin, batch.args, batch.kwargs)
                if step == done:
                    kind.check(outputs, batch.targets)
                loss = kind.mean_loss(outputs, batch.targets)
                if not math.isfinite(value := loss.item()):
                    raise _diverged(f"the loss {value} at step {step + 1} of {self.total}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                after_step(twin)
                bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
                bar.update()
        if not finite(dict(twin.named_parameters())):
            raise _diverged("NaN or infinite weights after training")
        twin.zero_grad(set_to_none=True)
        return (_laid_out(twin, torch.contiguous_format) if settings.channels_last else twin).eval()

    def _begun(self) -> tuple[nn.Module, Likelihood]:
        """The copy to be trained, in train mode, and whose loss it has."""
        seen, none = np.unique(self.rows.numpy()), np.zeros(0, np.int64)
        samples = Split(self.data, seen, none, self.settings.batch_size)
        kind = trained_likelihood(self.model, samples, self.likelihood)
        twin = train_mode(copy_model(self.model), frozen_statistics(self.model, samples))
        return (_laid_out(twin, torch.channels_last) if self.settings.channels_last else twin), kind

    def _batches(self, done: int) -> Iterator[Batch]:
        """The batches of all epochs but the first `done`, in an order and with an augmentation that
        the seed decides."""
        settings, generator, rows = self.settings, seeded(self.seed), self.rows
        for epoch in range(settings.epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            # equal batches rather than a small last one: BatchNorm cannot train on a single sample
            parts = order.tensor_split(settings.steps(len(rows)))
            for members in parts[max(0, done - epoch * len(parts)) :]:
                inputs, targets = self.data[members][:2]
                if settings.augment:
                    inputs = augmented(inputs, generator)
                if settings.channels_last:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                yield make_batch((inputs, targets))


def _check_inputs(data: TensorDataset, settings: TrainSettings) -> None:
    if len(data.tensors) < 2:
        got = f"a data set of {len(data.tensors)} tensors"
        raise DataError(got, "inputs and targets", "Add the targets.")
    images = not isinstance(data, KeywordDataset) and data.tensors[0].dim() == 4
    for name in ("augment", "channels_last"):
        if getattr(settings, name) and not images:
            got = f"{name}=True for inputs {tuple(data.tensors[0].shape)}"
            raise ConfigError(got, "images [N, C, H, W]", f"Unset {name}.")


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by its own random offset over zeros, and flipped left-right half the time
    if in colour.

    Offsets reach an eighth of the side, at most 4 pixels, in both directions.

    Args:
        images: [B, C, H, W].
        generator: On the CPU.
    """
    count, channels, height, width = images.shape
    reach = min(MAX_SHIFT, min(height, width) // 8)
    down, right = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(
        images.device
    )
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    if channels == 3:
        flip = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (reach, reach, reach, reach))
    sample = torch.arange(count, device=images.device)
    # one gather for the whole batch; indexing around the slice puts the channels last
    moved = padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    # torch's overloads lack it
    moved: nn.Module = model.to(memory_format=layout)  # type: ignore[call-overload]
    return moved


def _optimizer(weights: list[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        weights, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _rows(indices: Rows | None, total: int) -> Tensor:
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu().numpy()
    rows = np.arange(total) if indices is None else np.asarray(indices)
    expected = f"integers from 0 to {total - 1}"
    fix = "Pass the indices of the samples to train on."
    if not rows.size:
        raise DataError("no samples to train on", expected, fix)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise DataError(f"indices with dtype {rows.dtype} and shape {rows.shape}", expected, fix)
    if rows.min() < 0 or rows.max() >= total:
        raise DataError(f"indices from {rows.min()} to {rows.max()}", expected, fix)
    return torch.from_numpy(rows.astype(np.int64))


def _diverged(got: str) -> NumericalError:
    return NumericalError(got, "finite numbers", "Lower lr, and check the inputs for NaN.")
