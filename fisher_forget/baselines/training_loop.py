"""The training loop that the methods share: gradient descent on any loss of any batches, on a copy
of the model."""

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
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_forget import params as P
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood import Likelihood

Loss = Callable[[nn.Module], Tensor]  # scalar to be minimised by one step
Epoch = Callable[
    [int, np.random.Generator], Iterable[Loss]
]  # (epoch, generator) -> the losses of its steps


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
        milestones: Epochs, counted from 0, from which on the learning rate is a tenth of what it
            was.

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
    milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("epochs", self.epochs >= 0, "a number of at least 0"),
            ("lr", 0 < self.lr < math.inf, "a positive learning rate"),
            ("momentum", 0 <= self.momentum < 1, "a value in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a value of at least 0"),
            ("optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'"),
        ):
            require(name, getattr(self, name), good, expected)


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
        seed: Of the generator, and of dropout; the global random states are put back at the end.
        mask: Multiplies the gradients, weight decay included, name by name, so that a weight of
            mask 0 stays where it is; a parameter that it does not name moves freely.

    Raises:
        NumericalError: If a loss or a weight leaves the finite numbers.
    """
    twin = copy.deepcopy(model)
    twin.train(not settings.frozen_statistics)
    weights = P.trainable(twin)
    values = list(weights.values())
    decay = (
        0.0 if mask is not None else settings.weight_decay
    )  # the optimizer's own would move masked weights
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(values, lr=settings.lr, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(
            values, settings.lr, momentum=settings.momentum, weight_decay=decay
        )
    rng = np.random.default_rng(seed)
    with preserved_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for number in range(settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.1 ** sum(number >= m for m in settings.milestones)
            for loss in epoch(number, rng):
                optimizer.zero_grad(set_to_none=True)
                value = loss(twin)
                if not math.isfinite(float(value.detach())):
                    raise _diverged(f"the loss {float(value.detach())} in epoch {number + 1}")
                value.backward()
                if mask is not None:
                    for name, p in weights.items():
                        if p.grad is not None:
                            p.grad.add_(p.detach(), alpha=settings.weight_decay)
                            p.grad.mul_(mask.get(name, torch.ones((), device=p.device)))
                if settings.clip is not None:
                    torch.nn.utils.clip_grad_norm_(values, settings.clip)
                optimizer.step()
    twin.zero_grad(set_to_none=True)
    if not P.finite(dict(twin.named_parameters())):
        raise _diverged("NaN or infinite weights")
    return twin.eval()


def shuffled(
    split: Split, chosen: Indices, batch_size: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """The chosen samples once, in random order, in batches whose sizes differ by one sample at
    most."""
    for _, batch in numbered(split, chosen, batch_size, rng):
        yield batch


def numbered(
    split: Split, chosen: Indices, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Indices, Batch]]:
    """As `shuffled`, with the index of every sample of the batch.

    Raises:
        ConfigError: If the batch size is below 1.
    """
    require("batch_size", batch_size, batch_size >= 1, "a number of at least 1")
    order = rng.permutation(chosen)
    for rows in np.array_split(order, max(1, -(-len(order) // batch_size))):
        if len(rows):
            for batch in replace(split, batch_size=len(rows)).batches(rows):
                yield rows, batch


def each(batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> Iterator[Loss]:
    """One step a batch: the loss of the model on it."""
    for batch in batches:
        yield partial(_swapped, loss, batch)


def _swapped(loss: Callable[[nn.Module, Batch], Tensor], batch: Batch, model: nn.Module) -> Tensor:
    return loss(model, batch)


def mean_loss(model: nn.Module, likelihood: Likelihood, batch: Batch) -> Tensor:
    """Mean loss per scored position, nats, with its graph."""
    return mean_of(likelihood, *checked(model, likelihood, batch))


def mean_of(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss per scored position of outputs [B, ...], nats."""
    return likelihood.losses(outputs, targets).sum() / likelihood.counts(targets).sum().clamp(min=1)


def checked(model: nn.Module, likelihood: Likelihood, batch: Batch) -> tuple[Tensor, Tensor]:
    """Outputs [B, ...] with their graph, and targets that fit them, both where the model is.

    BatchNorm cannot normalise a sample by itself: for a batch of one, it uses its running
    statistics.
    """
    batch = batch.on(model)
    norms = (
        [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        if len(batch) == 1
        else []
    )
    for norm in norms:
        norm.eval()
    outputs = P.call(model, {}, batch.args, batch.kwargs)
    for norm in norms:
        norm.train()
    likelihood.check(outputs.detach(), batch.targets)
    return outputs, batch.targets


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    """Outputs [B, ...] with their graph."""
    batch = batch.on(model)
    return P.call(model, {}, batch.args, batch.kwargs)


def distillation(
    likelihood: Likelihood,
    teacher: Tensor,
    student: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 KL(teacher / T || student / T), mean over samples of nats per scored position.

    Args:
        likelihood: Gives the KL.
        teacher: Outputs [B, ...].
        student: Outputs [B, ...].
        targets: Say which positions are scored.
        temperature: T divides the outputs; T^2 keeps the size of the gradient (Hinton et al. 2015,
            arXiv:1503.02531).
    """
    kl = likelihood.kl(teacher / temperature, student / temperature, targets)
    return temperature * temperature * kl.mean()


def require(name: str, value: object, good: bool, expected: str) -> None:
    """Refuse a setting.

    Raises:
        ConfigError: If it is not good.
    """
    if not good:
        raise ConfigError(f"{name}={value!r}", expected, "Correct the method's settings.")


def _diverged(got: str) -> NumericalError:
    return NumericalError(got, "finite numbers", "Lower the method's learning rate.")
