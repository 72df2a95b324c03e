r"""What was forgotten may come back when someone changes the released model: do the models that
forgot know the deleted samples again sooner than retrained ones?

A change c is made to the released model and to M retrained ones alike. With k(w) the mean
probability that a model gives to the deleted samples' own classes (minus the mean squared error,
for numbers),

    gap before = k(model) - mean_m k(r_m),    gap after = k(c(model)) - mean_m k(c(r_m)):

above 0 the deleted samples are known better than after exact deletion. What has come back is above
0 after the change, and was not before: the smaller of the gap after and its growth, told by the
lower bound of its interval. So a model that forgot too much and returns to where retrained ones are
gives nothing away, and one that never forgot has nothing that could come back. Losses would not do:
from a probability of .01 to .9 there are fewer nats than from 1e-4 to .01.

Either interval is that of one model more against M models of the same kind. With s the standard
deviation over retrained models (of k(c(r_m)), or of its growth) and K pairs (the mean over them),

    gap +- t_{M-1} s sqrt(1/K + 1/M),

so that a retrained model in the place of the released one is said to give something away in 2.5 %
of cases at most. It holds the deleted samples fixed: it is over models, and pairs may share theirs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util.checks import is_whole
from fisher_forget._util.isolation import isolated
from fisher_forget.attack.findings import Finding
from fisher_forget.attack.pairs import Pair, as_pairs, check_apart
from fisher_forget.attack.release import WHOLE, Model, Observer
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.samples import read_samples, take
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, DataError, ModelError
from fisher_forget.evaluate.intervals import Array, Interval
from fisher_forget.likelihood import Likelihood

FEWEST_MODELS = 3  # retrained: of two, the spread is hardly known (t = 12.7)
FEWEST_SAMPLES = 6  # scored: the interval takes their mean for normal over models
STAGES = ("before", "after")
Told = dict[tuple[str, str], dict[str, Array]]  # (part, stage) -> score -> of each model [1 + M]


@dataclass(frozen=True, kw_only=True)
class AfterRelease(ABC):
    """A change to a released model, made to retrained models as well; see the module.

    Attributes:
        likelihood: What the modules were trained with: "categorical", "bernoulli" or "gaussian".
        seed: Of everything random; the same draws for all models.
    """

    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    @property
    @abstractmethod
    def name(self) -> str:
        """What the change is."""

    @abstractmethod
    def changed(self, model: nn.Module, deleted: TensorDataset | None) -> nn.Module:
        """A changed copy of a model.

        Args:
            model: Untouched.
            deleted: Deleted samples that the attacker has; `None` where none are needed.
        """

    @property
    def taken(self) -> int:
        """How many of the deleted samples the attacker has. They are not scored."""
        return 0

    @property
    def meaning(self) -> str:
        """What the number says."""
        return (
            "what came back of the deleted samples, beyond what retrained models know of them "
            "after the same change:"
        )

    def found(self, gap: Interval, growth: Interval) -> Interval:
        """What counts of the gap after the change and of its growth."""
        return min(gap, growth, key=lambda interval: interval.low)

    def run(self, pairs: Pair | Iterable[Pair]) -> Finding:
        """Change the second release of a pair, or of many, beside its retrained models.

        Args:
            pairs: Of modules, with `retrained`. `others`, where given, are scored as well; pass
                retained samples, to see what the change costs.

        Returns:
            What came back, a probability. In `details`: the gap before and after with their
            intervals, and "probability" and "accuracy" (of numbers: "error") of "released" and
            "retrained" models.

        Raises:
            DataError: If there are fewer than six samples to score.
            ModelError: If a model is no module, there are fewer than three retrained ones, or two
                of them are the same.
            ConfigError, NumericalError: If an option does not fit, or training diverges.
        """
        listed = as_pairs(pairs)
        with isolated():
            told = [self._told(pair) for pair in listed]
        (measure, *_) = told[0]["deleted", "before"]
        before, after = ([x["deleted", when][measure] for x in told] for when in STAGES)
        growth = [new - old for old, new in zip(before, after, strict=True)]
        gaps = {"before": gap_interval(before), "after": gap_interval(after)}
        details: dict[str, float] = {}
        for when, gap in gaps.items():
            bounds = {"": gap.value, ", lower bound": gap.low, ", upper bound": gap.high}
            details |= {f"gap {when}{bound}": value for bound, value in bounds.items()}
        for (part, when), scores in told[0].items():
            for score in scores:
                rows = [x[part, when][score] for x in told]
                place = f"{score} on {part}, {when}"
                details[f"released, {place}"] = float(np.mean([x[0] for x in rows]))
                details[f"retrained, {place}"] = float(np.mean([x[1:].mean() for x in rows]))
        return Finding(
            attack=self.name,
            measure=measure,
            found=self.found(gaps["after"], gap_interval(growth)),
            nothing=0.0,
            retrained=Interval(0.0, 0.0, 0.0),  # the gap is measured from there
            samples=sum(len(pair.deleted) - self.taken for pair in listed),
            meaning=self.meaning,
            details=details,
        )

    def _told(self, pair: Pair) -> Told:
        """What the released and the retrained models of a pair know, before and after."""
        models = _modules(pair)
        rows = np.random.default_rng(self.seed).permutation(len(pair.deleted))
        if len(rows) - self.taken < FEWEST_SAMPLES:
            got = f"{len(rows)} deleted samples, of which the attacker has {self.taken}"
            expected = f"at least {FEWEST_SAMPLES} others, to be scored"
            raise DataError(got, expected, "Pass more deleted samples, or a lower `samples`.")
        held = take(pair.deleted, np.sort(rows[: self.taken])) if self.taken else None
        parts = {"deleted": take(pair.deleted, np.sort(rows[self.taken :]))}
        if pair.others is not None:
            parts["retained"] = pair.others
        stages = dict(zip(STAGES, (models, [self.changed(x, held) for x in models]), strict=True))
        observer = Observer(WHOLE, self.likelihood)
        return {
            (part, when): _known([_asked(observer, model, samples) for model in stage])
            for when, stage in stages.items()
            for part, samples in parts.items()
        }


@dataclass(frozen=True, kw_only=True)
class StillKnown(AfterRelease):
    """Change nothing: what the released model knows of the deleted samples as it is.

    Threat model: black box. The attacker has the deleted samples, and asks for their probabilities.
    """

    @property
    def name(self) -> str:
        return "still known"

    @property
    def meaning(self) -> str:
        return "what the model knows of the deleted samples, beyond what retrained models do:"

    def found(self, gap: Interval, growth: Interval) -> Interval:
        return gap

    def changed(self, model: nn.Module, deleted: TensorDataset | None) -> nn.Module:
        return model


@dataclass(frozen=True, kw_only=True)
class Relearning(AfterRelease):
    """Train on a few of the deleted samples, and score the others.

    Threat model: white box. The attacker has the weights and a few deleted samples with labels.

    Attributes:
        samples: Deleted samples that the attacker has, drawn at random.
        epochs: Passes over them.
        lr: Learning rate of SGD without momentum.
        batch_size: Samples a step at most.

    Raises:
        ConfigError: If a value is out of range.

    Source: Hu et al. 2024, arXiv:2406.13356.
    """

    samples: int = 10
    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check_training(self)
        if not is_whole(self.samples, 1):
            got = f"samples={self.samples!r}"
            raise ConfigError(got, "a whole number of at least 1", "Pass samples=10, say.")

    @property
    def name(self) -> str:
        return f"relearning from {self.samples} sample{'s' * (self.samples > 1)}"

    @property
    def taken(self) -> int:
        return self.samples

    def changed(self, model: nn.Module, deleted: TensorDataset | None) -> nn.Module:
        assert deleted is not None  # by `taken`
        return _trained(self, model, deleted)


@dataclass(frozen=True, kw_only=True)
class FineTuning(AfterRelease):
    """Train on other data, as anyone does who puts a published model to use.

    Threat model: none is needed; an attacker has the weights and no deleted sample.

    Attributes:
        data: What is trained on: a data set of (inputs, target), or a tuple (inputs, targets), of
            the shapes and classes that the models know.
        epochs: Passes over them.
        lr: Learning rate of SGD without momentum.
        batch_size: Samples a step at most.

    Raises:
        ConfigError: If a value is out of range.
        DataError: In `run`, if a deleted sample is among the data.

    Source: Hu et al. 2024, arXiv:2406.13356, section 4, with public data.
    """

    data: Any
    epochs: int = 10
    lr: float = 0.01
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check_training(self)
        object.__setattr__(self, "data", read_samples(self.data))

    @property
    def name(self) -> str:
        return "fine-tuning on other data"

    def run(self, pairs: Pair | Iterable[Pair]) -> Finding:
        listed = as_pairs(pairs)
        check_apart([x.deleted for x in listed], [self.data], "deleted", "trained on")
        return super().run(listed)

    def changed(self, model: nn.Module, deleted: TensorDataset | None) -> nn.Module:
        return _trained(self, model, self.data)


def gap_interval(known: Iterable[Array], level: float = 0.95) -> Interval:
    """The gap and its interval (see the module).

    Args:
        known: For each pair [1 + M]: k of the released model, and of retrained ones.
        level: Probability that the interval covers.
    """
    rows = list(known)
    fewest = min(len(x) for x in rows) - 1
    gap = float(np.mean([x[0] - x[1:].mean() for x in rows]))
    # pairs may share retrained models: no more degrees of freedom than one of them has
    spread = math.sqrt(np.mean([x[1:].var(ddof=1) for x in rows]))
    t = float(special.stdtrit(fewest - 1, (1 + level) / 2))
    half = t * spread * math.sqrt(1 / len(rows) + 1 / fewest)
    return Interval(gap, gap - half, gap + half)


def _modules(pair: Pair) -> list[nn.Module]:
    """The released model and the retrained ones."""
    models: list[Model] = [pair.after, *pair.retrained]
    if len(pair.retrained) < FEWEST_MODELS:
        got = f"{len(pair.retrained)} retrained models"
        expected = f"at least {FEWEST_MODELS}, whose spread the interval is made of"
        raise ModelError(got, expected, "Train more of them, each from a seed of its own.")
    for model in models:
        if not isinstance(model, nn.Module):
            got = f"a {type(model).__name__}, whose weights cannot be changed"
            raise ModelError(got, "a torch.nn.Module", "Pass the module itself.")
    return [model for model in models if isinstance(model, nn.Module)]


def _asked(observer: Observer, model: nn.Module, samples: TensorDataset) -> dict[str, float]:
    """What a model knows of samples; first what the gap is made of."""
    answers = observer.sees(model, samples)
    losses, classes = observer.losses(answers, samples), observer.classes(samples)
    if classes is None:
        return {"error, negative": -float(losses.mean())}
    right = answers.argmax(1) == classes
    return {"probability": float(np.exp(-losses).mean()), "accuracy": float(right.mean())}


def _known(told: Sequence[Mapping[str, float]]) -> dict[str, Array]:
    """Scores of several models, [1 + M] each."""
    return {score: np.array([x[score] for x in told]) for score in told[0]}


def _trained(settings: Relearning | FineTuning, model: nn.Module, data: TensorDataset) -> nn.Module:
    """A copy, trained further."""
    options = {
        x: getattr(settings, x) for x in ("epochs", "lr", "batch_size", "seed", "likelihood")
    }
    return FineTune(**options).unlearn(model, resolve_split(data, [], allow_empty=True)).model


def _check_training(settings: Relearning | FineTuning) -> None:
    require(settings, at_least={"epochs": 1, "batch_size": 1}, above={"lr": 0})
