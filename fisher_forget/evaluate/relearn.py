r"""How quickly a model learns the forgotten samples again: what it still knows, it learns fast.

    w <- w - lr (gradient of the mean loss of a batch + wd w)

on the full data D, until the forgotten samples are as good as they were before forgetting. The
target of every count is that of a retrained model: fewer means traces are left, more means the
model was pushed too far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

import numpy as np
from torch import nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_names
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import isolated
from fisher_forget.data.batches import Batch
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Split, check_scored
from fisher_forget.errors import ConfigError, NumericalError, SplitError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

Measure = Callable[[Objective, Params], float]


@dataclass(frozen=True)
class RelearnTime:
    """Epochs until the forget loss is back.

    Attributes:
        epochs: Epochs taken; where the target was not reached, the cap, and the true number is
            larger.
        reached: Whether the loss came down to the target.
        target: Mean loss of D_f to come down to, nats.
        losses: Mean loss of D_f before the first epoch and after each [epochs + 1], nats.
    """

    epochs: int
    reached: bool
    target: float
    losses: tuple[float, ...]

    @property
    def published(self) -> int:
        """The number as Golatkar et al. count it: the check that is passed counts, too, so 1 means
        no training."""
        return self.epochs + 1


@dataclass(frozen=True)
class RelearnSteps:
    """Steps until the forget accuracy is back.

    Attributes:
        steps: Batches taken; where the target was not reached, the cap, and the true number is
            larger.
        reached: Whether the accuracy came up to the target.
        target: Accuracy on D_f to come up to, a share.
        accuracies: Accuracy on D_f before the first step and after each [steps + 1].
    """

    steps: int
    reached: bool
    target: float
    accuracies: tuple[float, ...]


class SgdOptions(TypedDict, total=False):
    """How a model learns again.

    Attributes:
        batch_size: Samples a step, 128 by default; the last batch of an epoch may be smaller.
        lr: Learning rate, 0.01 by default; constant, without momentum.
        weight_decay: L2 coefficient, 0 by default.
    """

    batch_size: int
    lr: float
    weight_decay: float


SGD: SgdOptions = {"batch_size": 128, "lr": 0.01, "weight_decay": 0.0}


def relearn_time(
    model: nn.Module,
    split: Split,
    original: nn.Module | float,
    likelihood: Likelihood | str = "categorical",
    *,
    samples: int = 500,
    max_epochs: int = 100,
    seed: int = 0,
    **sgd: Unpack[SgdOptions],
) -> RelearnTime:
    """Epochs of SGD on D until the mean loss of D_f is at most the original model's.

    The protocol of Golatkar et al. 2020 (arXiv:1911.04933): an epoch is `samples` samples drawn
    with replacement from all data, forgotten samples included, and the loss is checked before each.
    Statistics of BatchNorm stay as they are and nothing is dropped out, so the count depends on the
    seed alone.

    Args:
        model: Scrubbed or retrained; untouched. Parameters without `requires_grad` stay frozen.
        split: Gives D and D_f.
        original: The model before forgetting, or its mean loss of D_f, nats per scored position.
        likelihood: Name or instance.
        samples: Samples an epoch.
        max_epochs: Cap.
        seed: Of the draws.
        **sgd: `batch_size`, `lr`, `weight_decay`, see `SgdOptions`.

    Raises:
        ConfigError: If an option is out of range.
        SplitError: If nothing is forgotten.
        NumericalError: If learning diverges.
    """
    sgd = SGD | sgd
    check_names(sgd, SgdOptions.__annotations__)
    _check(samples=samples, max_epochs=max_epochs, seed=seed, **sgd)
    likelihood = trained_likelihood(model, split, likelihood)
    _check_forget(split, likelihood)

    def loss_of(objective: Objective, at: Params) -> float:
        return objective.mean_loss(split.batches("forget"), at)

    with isolated():
        target = _measured(original, likelihood, loss_of)
        rounds = _epochs(split, samples, sgd["batch_size"], np.random.default_rng(seed))
        objective = Objective(model, likelihood)
        losses = _learn(objective, rounds, loss_of, lambda x: x <= target, sgd, max_epochs)
    return RelearnTime(len(losses) - 1, losses[-1] <= target, target, losses)


def relearn_steps(
    model: nn.Module,
    split: Split,
    original: nn.Module | float,
    likelihood: Likelihood | str = "categorical",
    *,
    margin: float = 0.05,
    max_steps: int = 1000,
    seed: int = 0,
    **sgd: Unpack[SgdOptions],
) -> RelearnSteps:
    """Steps of SGD on D until the accuracy on D_f is at least (1 - margin) of the original model's.

    What the Anamnesis index compares: steps of the unlearned over those of the retrained model
    (Chundawat et al. 2023, arXiv:2201.05629). The accuracy is checked before each
    step; batches come from passes over all data in random order.

    Args:
        model: Scrubbed or retrained; untouched. Parameters without `requires_grad` stay frozen.
        split: Gives D and D_f.
        original: The model before forgetting, or its accuracy on D_f as a share.
        likelihood: Name or instance; one that scores by an accuracy.
        margin: Share of the original accuracy that may be missing.
        max_steps: Cap.
        seed: Of the order.
        **sgd: `batch_size`, `lr`, `weight_decay`, see `SgdOptions`.

    Raises:
        ConfigError: If an option is out of range, or the likelihood has no accuracy.
        SplitError: If nothing is forgotten.
        NumericalError: If learning diverges.
    """
    sgd = SGD | sgd
    check_names(sgd, SgdOptions.__annotations__)
    _check(max_steps=max_steps, seed=seed, **sgd)
    likelihood = trained_likelihood(model, split, likelihood)
    if not likelihood.score.higher_is_better:
        expected, fix = "one that scores by an accuracy", "Use relearn_time, which compares losses."
        raise ConfigError(f"a likelihood scored by {likelihood.score.name}", expected, fix)
    if not 0 <= margin < 1:
        got = f"margin={margin!r}"
        raise ConfigError(got, "a share in [0, 1)", "Pass margin=0.05, as the authors do.")
    _check_forget(split, likelihood)

    def score_of(objective: Objective, at: Params) -> float:
        pairs = objective.forward(split.batches("forget"), at)
        return float(np.concatenate([likelihood.scores(f, y).cpu() for f, y in pairs]).mean())

    with isolated():
        target = (1 - margin) * _measured(original, likelihood, score_of)
        rounds = _steps(split, sgd["batch_size"], np.random.default_rng(seed))
        objective = Objective(model, likelihood)
        accuracies = _learn(objective, rounds, score_of, lambda x: x >= target, sgd, max_steps)
    return RelearnSteps(len(accuracies) - 1, accuracies[-1] >= target, target, accuracies)


def _learn(
    objective: Objective,
    rounds: Iterator[Iterator[Batch]],
    measure: Measure,
    done: Callable[[float], bool],
    sgd: SgdOptions,
    cap: int,
) -> tuple[float, ...]:
    """What is measured before the first round and after each, until it is done or `cap` rounds are
    over."""
    at, lr, weight_decay = objective.start, sgd["lr"], sgd["weight_decay"]
    values = [measure(objective, at)]
    try:
        while not done(values[-1]) and len(values) <= cap:
            for batch in next(rounds):
                gradient = objective.gradient([batch], at).mean()
                # w - lr (gradient + wd w), weight decay as PyTorch's SGD has it
                at = P.add(P.scale(at, 1 - lr * weight_decay), gradient, -lr)
            values.append(measure(objective, at))
    except NumericalError as error:
        got = f"{error.got}, in round {len(values)} of learning again at lr={lr:g}"
        raise NumericalError(got, "finite numbers", "Lower lr.") from error
    return tuple(values)


def _epochs(
    split: Split, samples: int, batch_size: int, rng: np.random.Generator
) -> Iterator[Iterator[Batch]]:
    sample_idx, walk = split.indices("all"), replace(split, batch_size=batch_size)
    while True:
        yield walk.batches(rng.choice(sample_idx, samples, replace=True))


def _steps(split: Split, batch_size: int, rng: np.random.Generator) -> Iterator[Iterator[Batch]]:
    sample_idx, walk = split.indices("all"), replace(split, batch_size=batch_size)
    while True:
        for batch in walk.batches(rng.permutation(sample_idx)):
            yield iter([batch])


def _measured(original: nn.Module | float, likelihood: Likelihood, measure: Measure) -> float:
    """The measure of the original model, or the number itself."""
    if isinstance(original, nn.Module):
        # a copy that can be differentiated: the original may be frozen
        objective = Objective(copy_model(original).requires_grad_(), likelihood)
        return measure(objective, objective.start)
    if isinstance(original, bool) or not isinstance(original, Real) or not math.isfinite(original):
        expected = "the original model, or its value as a finite number"
        raise ConfigError(f"original={original!r}", expected, "Pass the model.")
    return float(original)


def _check_forget(split: Split, likelihood: Likelihood) -> None:
    if not len(split.forget):
        expected = "forgotten samples to learn again"
        raise SplitError(f"{split}", expected, "Name at least one sample to forget.")
    check_scored(split, likelihood, ["forget"])


def _check(**options: Any) -> None:
    for name, value in options.items():
        real = name in ("lr", "weight_decay")
        zero = name in ("weight_decay", "max_epochs", "max_steps", "seed")
        typed = isinstance(value, Real if real else Integral) and not isinstance(value, bool)
        if not typed or not 0 <= float(value) < math.inf or (value == 0 and not zero):
            least = "of at least" if zero else "above"
            expected = f"a {'finite' if real else 'whole'} number {least} 0"
            got = f"{name}={value!r}"
            raise ConfigError(got, expected, f"Correct {name}, or leave it at its default.")
