r"""Membership by two releases: was a sample in the training data, and was it deleted?

The attack of Chen et al. 2021 (arXiv:2005.02205). An attacker trains *shadow* models on data of
the same kind, deletes samples from them, and learns from both models' posteriors p, q of a sample
whether it was deleted (a member of the first alone) or was never in (a member of neither):

    direct_diff     q - p                                      sorted_diff    the same, sorted by p
    direct_concat   (p, q)                                     sorted_concat  the same, sorted by p
    l2_distance     |q - p|_2

What the second release adds is told by comparison with the same attacker who has p alone: P_i is
the confidence in what sample i truly is, of both models, P'_i that of the first alone:

    DegCount = mean_i [P_i > P'_i],     DegRate = mean_i (P_i - P'_i)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_forget.attack.findings import Finding
from fisher_forget.attack.inference import check_enough, seen
from fisher_forget.attack.pairs import Pair, as_pairs, check_apart
from fisher_forget.attack.release import WHOLE, Observer, Release
from fisher_forget.errors import ConfigError, DataError, ModelError
from fisher_forget.evaluate.intervals import Array, as_array
from fisher_forget.evaluate.roc import auc, share_interval
from fisher_forget.likelihood import Likelihood

Feature = Callable[[Array, Array], Array]
Labels = NDArray[np.bool_]


def _sorted(p: Array, q: Array) -> tuple[Array, Array]:
    """Both in the order of p's classes, the most probable one first."""
    order = np.argsort(-p, axis=1, kind="stable")
    return np.take_along_axis(p, order, 1), np.take_along_axis(q, order, 1)


def _difference(p: Array, q: Array) -> Array:
    return q - p


def _both(p: Array, q: Array) -> Array:
    return np.concatenate([p, q], 1)


FEATURES: dict[str, Feature] = {
    "direct_diff": _difference,
    "sorted_diff": lambda p, q: _difference(*_sorted(p, q)),
    "direct_concat": _both,
    "sorted_concat": lambda p, q: _both(*_sorted(p, q)),
    "l2_distance": lambda p, q: np.linalg.norm(q - p, axis=1, keepdims=True),
}


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), regression)


def _tree() -> Any:
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(max_depth=5, class_weight="balanced", random_state=0)


ATTACKERS: dict[str, Callable[[], Any]] = {"logistic": _logistic, "tree": _tree}


@dataclass(frozen=True)
class ShadowInference:
    """An attacker who has learned one of the features on shadow models.

    Threat model: black box. The attacker has both releases' answers, and data of the same kind,
    model and training to make shadow models with; not the training data.

    Attributes:
        shadows: Pairs of the attacker's own: deleted samples, and others that neither model was
            trained on (`shadow_pairs` makes them).
        feature: A name of `FEATURES`.
        attacker: "logistic", a regression, which weighs classes the same for all samples and so
            learns little from features that are not sorted; or "tree", of depth 5.
        release: What is published of the answers; the shadow models' are cut in the same way.
        likelihood: What modules were trained with.

    Source: Chen et al. 2021, arXiv:2005.02205, sections 3.3 (features) and 4.1 (degradation).
    """

    shadows: Sequence[Pair]
    feature: str = "sorted_diff"
    attacker: str = "logistic"
    release: Release = WHOLE
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            got = f"feature={self.feature!r}"
            raise ConfigError(got, f"one of {list(FEATURES)}", "Pass one of these names.")
        if self.attacker not in ATTACKERS:
            got = f"attacker={self.attacker!r}"
            raise ConfigError(got, f"one of {list(ATTACKERS)}", "Pass one of these names.")
        object.__setattr__(self, "shadows", tuple(as_pairs(self.shadows)))

    def run(self, pairs: Pair | Iterable[Pair]) -> Finding:
        """Attack one pair of models, or many.

        The AUC is over the deleted samples and the others of all pairs together.

        Args:
            pairs: With `others` that neither model was trained on.

        Returns:
            The AUC, with DegCount, DegRate and the AUC of the first release alone as details.

        Raises:
            DataError: If a shadow model was asked about the same sample, there are no others, or
                too few samples for a perfect attack to be told from guessing.
            ModelError, ConfigError, NumericalError: As for `Pair`, and if the classes are not the
                shadow models'.
        """
        listed, both, first = as_pairs(pairs), *self._attackers
        queries, known = (
            [x for pair in side for x in (pair.deleted, pair.others) if x is not None]
            for side in (listed, self.shadows)
        )
        check_apart(queries, known, "attacked", "in the attacker's own data")
        asked = self._asked(listed)
        count, labels = check_enough(asked.pairs), asked.labels
        after, before = (attacker.told(asked) for attacker in (both, first))
        exact = None
        if listed[0].retrained:
            worlds = [replace(x, after=m, retrained=()) for x in listed for m in x.retrained]
            retrained = self._asked(worlds)
            exact = share_interval(retrained.auc(both.told(retrained)), count)
        gain = np.where(labels, after - before, before - after)
        return Finding(
            attack=f"shadow inference ({self.feature})",
            measure="AUC",
            found=share_interval(asked.auc(after), count),
            nothing=0.5,
            retrained=exact,
            samples=int(labels.sum()),
            meaning="someone with both models' answers and shadow models tells a deleted sample "
            "from one that was never in with",
            details={
                "AUC from the first release alone": asked.auc(before),
                "DegCount": float(np.mean(gain > 0)),
                "DegRate": float(np.mean(gain)),
            },
        )

    @cached_property
    def _attackers(self) -> tuple[_Attacker, _Attacker]:
        """The attacker of both releases, and that of the first alone."""
        asked = self._asked(self.shadows, stream=1)  # the noise under attack must not be known
        check_enough(asked.pairs)
        features = FEATURES[self.feature], lambda p, q: _sorted(p, p)[0]
        both, first = (_Attacker.of(self.attacker, feature, asked) for feature in features)
        return both, first

    def _asked(self, pairs: Sequence[Pair], stream: int = 0) -> _Asked:
        observer, labels, answers = Observer(self.release, self.likelihood, stream), [], []
        for pair in pairs:
            if pair.others is None:
                fix = "Pass Pair(before, after, deleted, others)."
                expected = "samples that neither model was trained on"
                raise DataError("a pair without others", expected, fix)
            for samples, deleted in ((pair.deleted, True), (pair.others, False)):
                answers.append(np.stack(seen(observer, pair.before, pair.after, samples)))
                labels += [deleted] * len(samples)
        if len({x.shape[2] for x in answers}) > 1:
            got = f"models of {sorted({x.shape[2] for x in answers})} classes"
            raise ModelError(got, "one set of labels", "Attack each set of labels by itself.")
        before, after = np.concatenate(answers, 1)
        return _Asked(np.array(labels), before, after)


@dataclass(frozen=True)
class _Asked:
    """Answers to samples.

    Attributes:
        labels: Whether each was deleted [N].
        before: Of the first release [N, C].
        after: Of the second.
    """

    labels: Labels
    before: Array
    after: Array

    @property
    def pairs(self) -> int:
        """Samples on the smaller side."""
        return int(min(self.labels.sum(), (~self.labels).sum()))

    def auc(self, scores: Array) -> float:
        """Of scores [N] for "deleted"."""
        return float(auc(scores[self.labels], scores[~self.labels]))


@dataclass(frozen=True)
class _Attacker:
    """A classifier of samples by a feature of both answers."""

    feature: Feature
    model: Any

    @classmethod
    def of(cls, kind: str, feature: Feature, asked: _Asked) -> _Attacker:
        """Deleted samples and others weigh the same, however many there are."""
        model = ATTACKERS[kind]()
        return cls(feature, model.fit(feature(asked.before, asked.after), asked.labels))

    def told(self, asked: _Asked) -> Array:
        """Probability that each sample was deleted [N].

        Raises:
            ModelError: If there are other classes than it has learned on.
        """
        x = self.feature(asked.before, asked.after)
        if x.shape[1] != self.model.n_features_in_:
            got = f"answers of {asked.before.shape[1]} classes, other than the shadow models'"
            raise ModelError(got, "the same classes", "Train shadow models on the same labels.")
        return as_array(self.model.predict_proba(x)[:, 1])
