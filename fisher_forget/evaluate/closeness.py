r"""Scores of a scrubbed model against models retrained without the forgotten data.

    KL(part)   = mean over members i and samples n of KL(retrained_i(x_n) || model(x_n))    [nats]
    floor      = the same between two different retrained models, mean over ordered pairs   [nats]
    gap_closed = (KL_original - KL_scrubbed) / (KL_original - floor), see `gap`

The target of every score is the retrained value: a KL below the floor is not better, gap_closed
above 1 neither.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget._util.isolation import isolated
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.batches import Unpack
from fisher_forget.errors import DataError, NumericalError
from fisher_forget.evaluate.gap import Gap
from fisher_forget.evaluate.intervals import Array, Interval
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
        floor_std: Standard deviation over members of KL(the others || member), as of kl_scrubbed.
        gap: Whether the original is told apart from retrained models, and how much of its gap to
            them is closed.
        score_original: Quality of the original (accuracy, or squared error for regression).
        score_scrubbed: Quality of the scrubbed model.
        score_retrained: Mean quality of the retrained models: the target of score_scrubbed.
        score_retrained_std: Its standard deviation over members.
        original_each: KL(retrained_i || original) of every member i, nats.
        scrubbed_each: KL(retrained_i || scrubbed).
        to_each: Mean over the other members j of KL(retrained_j || retrained_i).
        from_each: Mean over the other members j of KL(retrained_i || retrained_j).
    """

    samples: int
    kl_original: float
    kl_scrubbed: float
    kl_scrubbed_std: float
    floor: float
    floor_std: float
    gap: Gap
    score_original: float
    score_scrubbed: float
    score_retrained: float
    score_retrained_std: float
    original_each: tuple[float, ...]
    scrubbed_each: tuple[float, ...]
    to_each: tuple[float, ...]
    from_each: tuple[float, ...]


# the single numbers of `PartScores`
MEANS = tuple(f.name for f in fields(PartScores) if f.type in ("int", "float"))


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

    def __str__(self) -> str:
        rows = [
            [name, *(f"{x:.3g}" for x in (p.kl_original, p.kl_scrubbed, p.floor)), _closed(p.gap)]
            for name, p in self.parts.items()
        ]
        header = ["KL(retrained || .), nats", "original", "scrubbed", "floor", "gap closed"]
        return f"{markdown_table(header, rows)}\n\n{self.members} retrained models."

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        parts = {
            name: {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(part).items()}
            for name, part in self.parts.items()
        }
        return {"members": self.members, **self.score.stored(), "parts": parts}

    def to_pandas(self) -> pd.DataFrame:
        """One row a part: its means and spreads, and gap_closed with its interval (NaN where no gap
        is shown)."""
        rows = []
        for name, part in self.parts.items():
            closed = part.gap.closed or Interval(math.nan, math.nan, math.nan)
            gap = {"gap_closed": closed.value, "gap_low": closed.low, "gap_high": closed.high}
            rows.append({"part": name} | {key: getattr(part, key) for key in MEANS} | gap)
        return pd.DataFrame(rows)


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


def kl_each(likelihood: Likelihood, members: Sequence[Tensor], q: Tensor, targets: Tensor) -> Array:
    """KL(member || q) of every member [M], nats.

    Raises:
        DataError, NumericalError: As for `mean_kl`.
    """
    return np.array([mean_kl(likelihood, p, q, targets) for p in members])


@dataclass(frozen=True)
class Bar:
    """What every retrained model scores on one part of the data.

    Attributes:
        to_each: Mean KL of the others to it [M], nats; the floor is their mean.
        from_each: Mean KL of it to the others [M], nats.
        score: Accuracy, or squared error for regression [M].
    """

    to_each: Array
    from_each: Array
    score: Array


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
        # in both directions: KL is not symmetric
        kl = np.array([kl_each(likelihood, members, q, y) for q in members])
        np.fill_diagonal(kl, 0.0)
        to_each, from_each = (kl.sum(axis) / (len(members) - 1) for axis in (1, 0))
        standard[part] = Bar(
            to_each, from_each, np.array([_score(likelihood, m, y) for m in members])
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
        to_original = kl_each(likelihood, members, original[part], y)
        to_scrubbed = kl_each(likelihood, members, scrubbed[part], y)
        parts[part] = PartScores(
            samples=len(y),
            kl_original=float(to_original.mean()),
            kl_scrubbed=float(to_scrubbed.mean()),
            kl_scrubbed_std=float(to_scrubbed.std(ddof=1)),
            floor=float(bar.to_each.mean()),
            floor_std=float(bar.to_each.std(ddof=1)),
            gap=Gap.of(to_original[None], to_scrubbed[None], bar.to_each, bar.from_each),
            score_original=_score(likelihood, original[part], y),
            score_scrubbed=_score(likelihood, scrubbed[part], y),
            score_retrained=float(bar.score.mean()),
            score_retrained_std=float(bar.score.std(ddof=1)),
            original_each=tuple(to_original.tolist()),
            scrubbed_each=tuple(to_scrubbed.tolist()),
            to_each=tuple(bar.to_each.tolist()),
            from_each=tuple(bar.from_each.tolist()),
        )
    return Closeness(parts, len(retrained), likelihood.score)


def _closed(gap: Gap) -> str:
    """The share that is closed, with its interval."""
    if gap.closed is None:
        return "no clear gap"
    return f"{gap.closed.value:.3g} ({gap.closed.low:.3g} to {gap.closed.high:.3g})"


def _score(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> float:
    return float(likelihood.scores(outputs, targets).mean()) if len(targets) else math.nan


def summarise(evaluations: Sequence[Closeness]) -> dict[str, dict[str, Any]]:
    """All originals of the same retrained models together: part -> score -> {mean, std, n} over the
    originals, and the `Gap` of all."""
    summary: dict[str, dict[str, Any]] = {}
    for name in evaluations[0].parts:
        parts = [evaluation.parts[name] for evaluation in evaluations]
        summary[name] = {key: _statistic([getattr(p, key) for p in parts]) for key in MEANS}
        original, scrubbed = (
            np.array([getattr(p, f"{model}_each") for p in parts])
            for model in ("original", "scrubbed")
        )
        beside = np.array(parts[0].to_each), np.array(parts[0].from_each)
        summary[name]["gap"] = asdict(Gap.of(original, scrubbed, *beside))
    return summary


def _statistic(values: Sequence[float]) -> dict[str, float | int | None]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}
