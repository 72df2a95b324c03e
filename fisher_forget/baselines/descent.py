"""The training loop that the methods share: gradient descent on any loss of any batches, on a copy of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood import Likelihood

Loss = Callable[[nn.Module], Tensor]  # scalar to be minimised by one step
Epoch = Callable[[int, np.random.Generator], Iterable[Loss]]  # (epoch, generator) -> the losses of its steps


@dataclass(frozen=True)
class Descent:
    """How to descend.

    Attributes:
        epochs: Calls of the epoch function.
        lr: Learning rate, constant.
        momentum: Of SGD.
        weight_decay: L2 coefficient in the gradient, for Adam too.
        optimizer: "sgd" or "adam".
        clip: Largest gradient norm; `None` does not clip.
        frozen_statistics: Leave BatchNorm and Dropout in eval mode.

    Raises:
        ConfigError: If a value is out of range.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    clip: float | None = None
    frozen_statistics: bool = False

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("epochs", self.epochs >= 0, "a number of at least 0"),
            ("lr", 0 < self.lr < math.inf, "a positive learning rate"),
            ("momentum", 0 <= self.momentum < 1, "a value in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a value of at least 0"),
            ("optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)!r}", expected, "Correct the method's settings.")


def descend(
    model: nn.Module,
    settings: Descent,
    epoch: Epoch,
    *,
    seed: int,
    mask: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Minimise the losses step by step on a copy of the model, which is returned in eval mode.

    Args:
        model: Untouched; parameters without `requires_grad` stay frozen.
        settings: See `Descent`.
        epoch: Called with the number of the epoch and a generator; yields one loss function a step.
        seed: Of the generator, and of dropout.
        mask: Multiplies the gradients, name by name; a parameter that it does not name moves freely.

    Raises:
        NumericalError: If a loss or a weight leaves the finite numbers.
    """
    twin = copy.deepcopy(model)
    twin.train(not settings.frozen_statistics)
    weights = P.trainable(twin)
    values = list(weights.values())
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(values, lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(values, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for number in range(settings.epochs):
            for loss in epoch(number, rng):
                optimizer.zero_grad(set_to_none=True)
                value = loss(twin)
                if not math.isfinite(float(value.detach())):
                    raise _diverged(f"the loss {float(value.detach())} in epoch {number + 1}")
                value.backward()
                if mask is not None:
                    for name, p in weights.items():
                        if p.grad is not None and name in mask:
                            p.grad.mul_(mask[name])
                if settings.clip is not None:
                    torch.nn.utils.clip_grad_norm_(values, settings.clip)
                optimizer.step()
    twin.zero_grad(set_to_none=True)
    if not P.finite(dict(twin.named_parameters())):
        raise _diverged("NaN or infinite weights")
    return twin.eval()


def shuffled(split: Split, chosen: Indices, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """The chosen samples once, in random order, in batches whose sizes differ by one sample at most."""
    order = rng.permutation(chosen)
    for rows in np.array_split(order, max(1, -(-len(order) // batch_size))):
        if len(rows):
            yield from replace(split, batch_size=len(rows)).batches(rows)


def each(batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> Iterator[Loss]:
    """One step a batch: the loss of the model on it."""
    for batch in batches:
        yield partial(_swapped, loss, batch)


def _swapped(loss: Callable[[nn.Module, Batch], Tensor], batch: Batch, model: nn.Module) -> Tensor:
    return loss(model, batch)


def mean_loss(model: nn.Module, likelihood: Likelihood, batch: Batch) -> Tensor:
    """Mean loss per scored position, nats, with its graph."""
    batch = batch.on(model)
    outputs = P.call(model, {}, batch.args, batch.kwargs)
    likelihood.check(outputs.detach(), batch.targets)
    return likelihood.losses(outputs, batch.targets).sum() / likelihood.counts(batch.targets).sum().clamp(min=1)


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs [B, ...] with their graph."""
    batch = batch.on(model)
    return P.call(model, {}, batch.args, batch.kwargs)


def _diverged(got: str) -> NumericalError:
    return NumericalError(got, "finite numbers", "Lower the method's learning rate.")
