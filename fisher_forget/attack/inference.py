r"""Deletion inference: which of two samples was deleted between two releases?

The game of Gao et al. 2022 (arXiv:2202.03460): a model A is trained on S, one of e_0, e_1 in S is
deleted, A' results. The attacker has both samples, may ask both models, and guesses which one it
was. With m deleted samples against n others it is the AUC of the statistic; the game is m = n = 1.

    "loss"     loss(A', e) - loss(A, e)          example attack: knows the labels
    "output"   |p_{A'}(x) - p_A(x)|_2            instance attack: knows the inputs alone

Nobody is trained, so it costs four passes over the samples that are asked about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import TensorDataset

from fisher_forget.attack.findings import Finding
from fisher_forget.attack.pairs import Pair, as_pairs
from fisher_forget.attack.release import WHOLE, Model, Observer, Release
from fisher_forget.errors import ConfigError, DataError, ModelError
from fisher_forget.evaluate.intervals import Array, as_array
from fisher_forget.evaluate.roc import auc, needed_pairs, share_interval
from fisher_forget.likelihood import Likelihood

STATISTICS = {"loss": "the samples' labels", "output": "the samples without their labels"}


@dataclass(frozen=True)
class DeletionInference:
    """Example and instance attack, on one deletion of many samples or on many games.

    Threat model: black box. The attacker has both releases' answers and knows the samples; not the
    weights, nor other training data.

    Attributes:
        statistic: "loss" or "output", see the module.
        release: What is published of the answers.
        likelihood: What modules were trained with: "categorical", "bernoulli" or "gaussian".

    Source: Gao et al. 2022, arXiv:2202.03460, sections 3 and 4.

    Example:
        >>> x, y = np.eye(12), np.zeros(12, int)
        >>> def before(z): return np.stack([0.9 * z.max(1), 1 - 0.9 * z.max(1)], 1)
        >>> def after(z): return before(z * np.repeat([0, 1], 6))  # has forgotten the first six
        >>> pair = Pair(before, after, (x[:6], y[:6]), (x[6:], y[6:]))
        >>> print(DeletionInference("loss").run(pair).found)
        1 [0.5407, 1]
    """

    statistic: str = "loss"
    release: Release = WHOLE
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            got = f"statistic={self.statistic!r}"
            raise ConfigError(got, f"one of {list(STATISTICS)}", "Pass one of these names.")

    def run(self, pairs: Pair | Iterable[Pair]) -> Finding:
        """Attack one pair of models, or play one game with each of many.

        The AUC is within pairs, and its mean over them; pairs weigh as many as they have samples on
        their smaller side. Its interval is `roc.share_interval` of as many.

        Args:
            pairs: With `others`: retained samples, as in the game. Where two retrained models are
                compared as a control, both sides must be alike to them: both trained on or neither.

        Raises:
            DataError: If there are no others, or too few samples for a perfect attack to be told
                from guessing.
            ModelError, ConfigError, NumericalError: As for `Pair`, and if answers differ in shape.
        """
        listed, observer = as_pairs(pairs), Observer(self.release, self.likelihood)
        shares, yard, sizes = [], [], []
        for pair in listed:
            if pair.others is None:
                fix = "Pass Pair(before, after, deleted, others)."
                raise DataError("a pair without others", "samples that were not deleted", fix)
            shares.append(self._share(observer, pair, pair.after))
            yard.append(
                np.mean([self._share(observer, pair, model) for model in pair.retrained] or 0.0)
            )
            sizes.append(min(len(pair.deleted), len(pair.others)))
        total = check_enough(sum(sizes))
        found, exact = (
            share_interval(float(np.average(x, weights=sizes)), total) for x in (shares, yard)
        )
        return Finding(
            attack=f"deletion inference ({self.statistic})",
            measure="AUC",
            found=found,
            nothing=0.5,
            retrained=exact if listed[0].retrained else None,
            samples=sum(len(pair.deleted) for pair in listed),
            meaning=f"someone with both models' answers and {STATISTICS[self.statistic]} tells a "
            "deleted sample from another one with",
        )

    def scores(self, before: Model, after: Model, samples: TensorDataset) -> Array:
        """The statistic [N]; higher speaks for a deletion."""
        return self._scores(Observer(self.release, self.likelihood), before, after, samples)

    def _scores(
        self, observer: Observer, before: Model, after: Model, samples: TensorDataset
    ) -> Array:
        first, second = seen(observer, before, after, samples)
        if self.statistic == "output":
            return as_array(np.linalg.norm(second - first, axis=1))
        return observer.losses(second, samples) - observer.losses(first, samples)

    def _share(self, observer: Observer, pair: Pair, after: Model) -> float:
        sides = (pair.deleted, pair.others)
        return float(auc(*(self._scores(observer, pair.before, after, x) for x in sides)))


def seen(
    observer: Observer, before: Model, after: Model, samples: TensorDataset
) -> tuple[Array, Array]:
    """Answers of both models [N, C].

    Raises:
        ModelError: If they have not the same classes.
    """
    first, second = (observer.sees(model, samples) for model in (before, after))
    if first.shape != second.shape:
        got = f"answers of {first.shape[1]} and {second.shape[1]} classes"
        fix = "Train both on the same set of labels."
        raise ModelError(got, "two models with the same classes", fix)
    return first, second


def check_enough(samples: int, level: float = 0.95) -> int:
    """The number of samples, if so many can tell a perfect attack from guessing.

    Raises:
        DataError: If not.
    """
    if samples < (least := needed_pairs(level)):
        got = f"{samples} samples on the smaller side"
        expected = (
            f"at least {least}: of fewer, guessing gets all right in more than 2.5 % of cases"
        )
        raise DataError(got, expected, "Attack more deleted samples, or more pairs of models.")
    return samples
