"""The training loop of the methods: gradient descent on any loss of any batches, on a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded_rng
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.unlearn.batch_norm import train_mode

Loss = Callable[[nn.Module], Tensor]  # scalar to be minimised by one step
# (number of the epoch, generator) -> the losses of its steps
Epoch = Callable[[int, np.random.Generator], Iterable[Loss]]


@dataclass(frozen=True)
class Descent:
    """How to descend.

    Attributes:
        epochs: Calls of the epoch function.
        lr: Learning rate, constant.
        momentum: Of SGD.
        weight_decay: L2 coefficient in the gradient, for Adam too.
        optimizer: "sgd" or "adam".
        milestones: Epochs, counted from 0, from which on the learning rate is divided by ten.
        masked_decay: Whether weights that a mask holds back decay all the same.
    """

    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    milestones: tuple[int, ...] = ()
    masked_decay: bool = False


def descend(
    model: nn.Module,
    settings: Descent,
    epoch: Epoch,
    *,
    seed: int,
    mask: Mapping[str, Tensor] | None = None,
    kept: Collection[str] = (),
) -> nn.Module:
    """Minimise the losses step by step on a copy of the model, which is returned in eval mode.

    Args:
        model: Untouched; parameters without `requires_grad` stay frozen.
        settings: See `Descent`.
        epoch: Called with the number of the epoch and a generator; yields one loss function a step.
        seed: Of the generator, and of dropout; the global random states are put back at the end.
        mask: Multiplies the gradients, weight decay included unless settings.masked_decay, name by
            name, so that a weight of mask 0 stays where it is; a parameter that it does not name
            moves freely.
        kept: Norm layers that keep their running statistics, and normalise by them.

    Raises:
        NumericalError: If a loss or a weight leaves the finite numbers.
    """
    twin = train_mode(copy_model(model), kept)
    weights = P.trainable(twin)
    # the optimizer's own weight decay would move masked weights
    within = settings.weight_decay if mask is not None and not settings.masked_decay else 0.0
    optimizer = _optimizer(list(weights.values()), settings, settings.weight_decay - within)
    rng, moved = np.random.default_rng(seed), False
    with seeded_rng(seed), torch.enable_grad():
        for number in range(settings.epochs):
            for group in optimizer.param_groups:
                # counted from the start, so that it holds no state
                group["lr"] = settings.lr * 0.1 ** sum(number >= m for m in settings.milestones)
            for loss in epoch(number, rng):
                optimizer.zero_grad(set_to_none=True)
                try:
                    value = loss(twin)
                except NumericalError as error:
                    if not moved:
                        raise
                    raise _diverged(f"{error.got}, in epoch {number + 1}") from error
                if not math.isfinite(float(value.detach())):
                    raise _diverged(f"the loss {float(value.detach())} in epoch {number + 1}")
                value.backward()
                if mask is not None:  # after backward: momentum and Adam see masked gradients alone
                    _masked(weights, mask, within)
                optimizer.step()
                moved = True
    twin.zero_grad(set_to_none=True)
    if not P.finite(dict(twin.named_parameters())):
        raise _diverged("NaN or infinite weights")
    return twin.eval()


def _optimizer(values: list[Tensor], settings: Descent, decay: float) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(values, lr=settings.lr, weight_decay=decay)
    return torch.optim.SGD(values, settings.lr, momentum=settings.momentum, weight_decay=decay)


def _masked(weights: P.Params, mask: Mapping[str, Tensor], weight_decay: float) -> None:
    """m (grad + wd w) in place of the gradients."""
    for name, p in weights.items():
        if p.grad is not None:
            p.grad.add_(p.detach(), alpha=weight_decay)
            p.grad.mul_(mask.get(name, torch.ones((), device=p.device)))


def shuffled(
    split: Split, samples: Indices, batch_size: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """The samples once, in random order, in batches whose sizes differ by one sample at most."""
    for _, batch in numbered(split, samples, batch_size, rng):
        yield batch


def numbered(
    split: Split, samples: Indices, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Indices, Batch]]:
    """As `shuffled`, with the index of every sample of the batch."""
    order = rng.permutation(samples)
    # as many batches as are needed, then as even as they get: no small last batch
    parts = np.array_split(order, max(1, -(-len(order) // batch_size)))
    plan = [rows for rows in parts if len(rows)]
    yield from zip(plan, split.read(plan), strict=True)


def each(batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> Iterator[Loss]:
    """One step a batch: the loss of the model on it, where the model is."""
    for batch in batches:
        yield partial(lambda batch, model: loss(model, batch.on(model)), batch)


def distillation(
    likelihood: Likelihood, teacher: Tensor, student: Tensor, targets: Tensor, temperature: float
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


def require(
    settings: object,
    *,
    at_least: Mapping[str, float] | None = None,
    above: Mapping[str, float] | None = None,
    **others: tuple[bool, str],
) -> None:
    """Refuse settings that are out of range.

    Args:
        settings: What has them as attributes.
        at_least: Setting -> smallest value; it must be finite.
        above: Setting -> value that it must exceed; it must be finite.
        **others: Setting -> (whether it is good, what was expected).

    Raises:
        ConfigError: For the first that is not good.
    """
    checks = [(name, *check) for name, check in others.items()]
    for name, least in (at_least or {}).items():
        good = least <= _number(getattr(settings, name)) < math.inf
        checks.append((name, good, f"a number of at least {least}"))
    for name, bound in (above or {}).items():
        good = bound < _number(getattr(settings, name)) < math.inf
        checks.append((name, good, f"a number above {bound}"))
    for name, good, expected in checks:
        if not good:
            owner = getattr(settings, "name", type(settings).__name__)
            got = f"{name}={getattr(settings, name)!r}"
            raise ConfigError(got, expected, f"Correct the settings of {owner!r}.")


def _number(value: object) -> float:
    """NaN for what is no number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _diverged(got: str) -> NumericalError:
    return NumericalError(got, "finite numbers", "Lower the learning rate.")
