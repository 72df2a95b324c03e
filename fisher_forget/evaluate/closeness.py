r"""Scores of a scrubbed model against models retrained without the forgotten data.

    KL(part)   = mean over members i and samples n of KL(retrained_i(x_n) || model(x_n))    [nats]
    floor      = the same between two different retrained models, mean over ordered pairs   [nats]
    gap_closed = (KL_original - KL_scrubbed) / (KL_original - floor)

The target of every score is the retrained value: a KL below the floor is not better, gap_closed
above 1 neither.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util.isolation import isolated
from fisher_forget.data.batches import Unpack
from fisher_forget.errors import DataError, NumericalError
from fisher_forget.evaluate.predictions import (
    check_scored_parts,
    predict,
    settled_by,
    whole_splits,
)
from fisher_forget.likelihood import Likelihood, Score

Outputs = Mapping[str, Tensor]  # part -> outputs [N, ...]


@dataclass(frozen=True)
class PartScores:
    """Scores on one part of the data ("forget", "retain", "test", ...).

    Attributes:
        samples: N.
        kl_original: KL(retrained || original), mean over members, nats.
        kl_scrubbed: KL(retrained || scrubbed), mean over members, nats.
        kl_scrubbed_std: Its standard deviation over the retrained members.
        floor: KL between two retrained models, nats; the target of kl_scrubbed.
        floor_std: Standard deviation over members of a member's mean KL to the others.
        gap_closed: See the module; `None` where the original is already within the floor's spread.
        score_original: Quality of the original (accuracy, or squared error for regression).
        score_scrubbed: Quality of the scrubbed model.
        score_retrained: Mean quality of the retrained models: the target of score_scrubbed.
        score_retrained_std: Its standard deviation over members.
    """

    samples: int
    kl_original: float
    kl_scrubbed: float
    kl_scrubbed_std: float
    floor: float
    floor_std: float
    gap_closed: float | None
    score_original: float
    score_scrubbed: float
    score_retrained: float
    score_retrained_std: float


@dataclass(frozen=True)
class Closeness:
    """Scores of one scrubbed model, part by part.

    Attributes:
        parts: Scores by part.
        members: Number of retrained models.
        score: What the score_* numbers are.
    """

    parts: dict[str, PartScores]
    members: int
    score: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return {"members": self.members, **self.score.stored(), "parts": parts}

    def to_pandas(self) -> pd.DataFrame:
        """One row a part."""
        return pd.DataFrame([{"part": name} | asdict(part) for name, part in self.parts.items()])


class Reference:
    """The retrained models' outputs and what they score themselves, computed once, to hold scrubbed
    models against.

    Args:
        original: The model before forgetting.
        retrained: Models trained without the forgotten data; at least two.
        parts: Data sets by name: "forget", "retain", "test", ...
        likelihood: Name or instance. A name gives way to the loss that a model which takes `labels`
            has itself; after `forget(loss_fn=...)`, pass `result.options.likelihood`.
        unpack: As for `forget`.

    Raises:
        DataError: If there are fewer than two retrained models.
    """

    @isolated()
    def __init__(
        self,
        original: nn.Module,
        retrained: Sequence[nn.Module],
        parts: Mapping[str, Dataset[Any]],
        likelihood: Likelihood | str = "categorical",
        *,
        unpack: Unpack | None = None,
    ) -> None:
        self._splits = whole_splits(parts, unpack)
        self.likelihood = settled_by(original, self._splits, likelihood)
        self.targets = {name: predict(original, split)[1] for name, split in self._splits.items()}
        check_scored_parts(self.likelihood, self.targets)
        self.original = self.outputs(original)
        self.retrained = tuple(self.outputs(model) for model in retrained)
        self._bars = bars(self.likelihood, self.targets, self.retrained)

    def of(self, original: nn.Module) -> Reference:
        """The same retrained models for another original; nothing of theirs is computed again."""
        other = copy.copy(self)
        other.original = self.outputs(original)
        return other

    @isolated()
    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Part -> outputs of a model."""
        return {name: predict(model, split)[0] for name, split in self._splits.items()}

    def closeness(self, model: nn.Module) -> Closeness:
        """Scores of a scrubbed model."""
        return self.score(self.outputs(model))

    def score(self, scrubbed: Outputs) -> Closeness:
        """Scores of the outputs of a scrubbed model."""
        return closeness(
            self.likelihood, self.targets, self.original, scrubbed, self.retrained, self._bars
        )


def mean_kl(likelihood: Likelihood, p: Tensor, q: Tensor, targets: Tensor) -> float:
    """Mean over samples of KL(p || q), nats.

    Raises:
        DataError: If the outputs do not describe the same samples and labels.
        NumericalError: If outputs are not finite.
    """
    if p.shape != q.shape or len(p) != len(targets):
        got = f"outputs of shapes {tuple(p.shape)} and {tuple(q.shape)} for {len(targets)} targets"
        fix = "Predict both on the same data set, and keep every class in the retrained models."
        raise DataError(got, "outputs of the same samples over the same labels", fix)
    if not bool((p < math.inf).all() and (q < math.inf).all()):  # -inf masks a class out
        got = "outputs that are NaN or infinite"
        raise NumericalError(got, "finite outputs", "Check the model that made them.")
    return float(likelihood.kl(p, q, targets).mean())


def gap_closed(kl_original: float, kl: float, floor: float, floor_std: float) -> float | None:
    """(KL_original - KL) / (KL_original - floor), or `None` where the original is within the
    floor's spread."""
    if not kl_original > floor + floor_std:
        return None
    return (kl_original - kl) / (kl_original - floor)


@dataclass(frozen=True)
class Bar:
    """What retrained models score on one part of the data: mean and standard deviation over them.

    Attributes:
        floor: Mean KL to the others, nats.
        floor_std: Its standard deviation.
        score: Accuracy, or squared error for regression.
        score_std: Its standard deviation.
    """

    floor: float
    floor_std: float
    score: float
    score_std: float


def bars(
    likelihood: Likelihood, targets: Mapping[str, Tensor], retrained: Sequence[Outputs]
) -> dict[str, Bar]:
    """Part -> what the retrained models score themselves.

    Raises:
        DataError: If there are fewer than two retrained models, or shapes do not match.
        NumericalError: If outputs are not finite.
    """
    if len(retrained) < 2:
        got = f"{len(retrained)} retrained model(s)"
        raise DataError(got, "at least 2, whose mutual KL is the floor", "Retrain more seeds.")
    standard = {}
    for part, y in targets.items():
        members = [r[part] for r in retrained]
        # of each member to all others, in both directions: KL is not symmetric
        floors = [
            float(np.mean([mean_kl(likelihood, a, b, y) for b in members if b is not a]))
            for a in members
        ]
        scores = [_score(likelihood, m, y) for m in members]
        standard[part] = Bar(
            *(float(f) for x in (floors, scores) for f in (np.mean(x), np.std(x, ddof=1)))
        )
    return standard


def closeness(
    likelihood: Likelihood,
    targets: Mapping[str, Tensor],
    original: Outputs,
    scrubbed: Outputs,
    retrained: Sequence[Outputs],
    standard: Mapping[str, Bar] | None = None,
) -> Closeness:
    """Score outputs that were computed once.

    Args:
        likelihood: Gives KL and score.
        targets: Part -> targets [N, ...].
        original: Part -> outputs of the model before forgetting.
        scrubbed: Part -> outputs after.
        retrained: One such mapping for each retrained model; at least two, since the floor needs a
            pair.
        standard: What `bars` has found for them; by default it is found here.

    Raises:
        DataError: If there are fewer than two retrained models, or shapes do not match.
        NumericalError: If outputs are not finite.
    """
    standard = bars(likelihood, targets, retrained) if standard is None else standard
    parts = {}
    for part, y in targets.items():
        members, bar = [r[part] for r in retrained], standard[part]
        to_original = float(np.mean([mean_kl(likelihood, m, original[part], y) for m in members]))
        to_scrubbed = [mean_kl(likelihood, m, scrubbed[part], y) for m in members]
        kl = float(np.mean(to_scrubbed))
        parts[part] = PartScores(
            samples=len(y),
            kl_original=to_original,
            kl_scrubbed=kl,
            kl_scrubbed_std=float(np.std(to_scrubbed, ddof=1)),
            floor=bar.floor,
            floor_std=bar.floor_std,
            gap_closed=gap_closed(to_original, kl, bar.floor, bar.floor_std),
            score_original=_score(likelihood, original[part], y),
            score_scrubbed=_score(likelihood, scrubbed[part], y),
            score_retrained=bar.score,
            score_retrained_std=bar.score_std,
        )
    return Closeness(parts, len(retrained), likelihood.score)


def _score(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> float:
    return float(likelihood.scores(outputs, targets).mean()) if len(targets) else math.nan


def summarise(
    evaluations: Sequence[Closeness],
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Mean and standard deviation over seeds: part -> score -> {mean, std, n}; undefined values are
    left out of n."""
    summary: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for part in evaluations[0].parts:
        rows = [asdict(evaluation.parts[part]) for evaluation in evaluations]
        summary[part] = {}
        for key in rows[0]:
            values = [float(row[key]) for row in rows if row[key] is not None]
            summary[part][key] = {
                "mean": float(np.mean(values)) if values else None,
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "n": len(values),
            }
    return summary
