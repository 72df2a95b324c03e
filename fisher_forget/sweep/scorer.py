"""Scores of the models of a sweep; what does not change from cell to cell is computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import truediv
from typing import Any

import numpy as np
import pandas as pd
import torch

from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.closeness import Closeness, Outputs, Reference, kl_each
from fisher_forget.evaluate.gap import gap_closed
from fisher_forget.evaluate.intervals import Array, Interval
from fisher_forget.likelihood import Score
from fisher_forget.sweep.table import DONE, RUINED

PARTS = ("forget", "retain", "test")  # that a reference must have


def column(part: str) -> str:
    """A part of the data as the end of a column's name.

    Example:
        >>> column("test, retained classes")
        'test_retained_classes'
    """
    return "_".join("".join(c if c.isalnum() else " " for c in part).split())


@dataclass(frozen=True)
class Scorer:
    """Holds models against a reference.

    Attributes:
        reference: Retrained models' outputs.
        original: The original's scores against them.
        marks: See `SweepTable`.
        ruin: See `SweepTable`.
    """

    reference: Reference
    original: Closeness
    marks: dict[str, dict[str, float]]
    ruin: float | None

    @classmethod
    def of(cls, reference: Reference, ruin: float | None) -> Scorer:
        """Score the original and the retrained models.

        Raises:
            ConfigError: If a part is missing.
        """
        if missing := [part for part in PARTS if part not in reference.targets]:
            fix = "Give them to Reference(parts=...)."
            raise ConfigError(f"a reference without {missing}", f"the parts {PARTS}", fix)
        original = reference.score(reference.original)
        losses = _losses(reference, reference.original)
        members = pd.DataFrame([_losses(reference, outputs) for outputs in reference.retrained])
        mean, std = (
            {str(name): float(value) for name, value in values.items()}
            for values in (members.mean(), members.std())
        )
        marks = {
            "original": _columns(original, "kl_original", "score_original") | losses,
            "retrained": _columns(original, "floor", "score_retrained") | mean,
            "retrained_std": _columns(original, "floor_std", "score_retrained_std") | std,
        }
        return cls(reference, original, marks, ruin)

    @property
    def score(self) -> Score:
        """What the scores are."""
        return self.original.score

    def row(self, outputs: Outputs) -> dict[str, Any]:
        """status, and kl_<part>, score_<part>, loss_<part>, gap_closed, gap_low and gap_high;
        without these where outputs overflow."""
        if not all(bool(torch.isfinite(values).all()) for values in outputs.values()):
            return {"status": RUINED}
        likelihood, row = self.reference.likelihood, {}
        for part, y in self.reference.targets.items():
            members = [member[part] for member in self.reference.retrained]
            kl = kl_each(likelihood, members, outputs[part], y)
            row[f"kl_{column(part)}"] = float(kl.mean())
            if part == "forget":
                row |= self._gap(kl)
            row[f"score_{column(part)}"] = float(likelihood.scores(outputs[part], y).mean())
        row |= _losses(self.reference, outputs)
        most = math.inf if self.ruin is None else self.marks["original"]["loss_retain"] + self.ruin
        return {"status": DONE if row["loss_retain"] <= most else RUINED} | row

    def _gap(self, kl: Array) -> dict[str, float]:
        """gap_closed of KL(member || model) [M] on the forget set, with its interval."""
        scores = self.original.parts["forget"]
        found = gap_closed(
            np.array([scores.original_each]),
            kl[None],
            np.array(scores.to_each),
            np.array(scores.from_each),
        )
        closed = found or Interval(math.nan, math.nan, math.nan)
        return {"gap_closed": closed.value, "gap_low": closed.low, "gap_high": closed.high}


def _losses(reference: Reference, outputs: Outputs) -> dict[str, float]:
    """loss_<part>: mean loss, nats a scored position."""
    likelihood = reference.likelihood
    return {
        f"loss_{column(part)}": truediv(*likelihood.loss_totals([(outputs[part], y)]))
        for part, y in reference.targets.items()
    }


def _columns(scores: Closeness, kl: str, score: str) -> dict[str, float]:
    """kl_<part> and score_<part> from the attributes of `PartScores` of these names."""
    parts = {column(part): values for part, values in scores.parts.items()}
    kls = {f"kl_{name}": float(getattr(values, kl)) for name, values in parts.items()}
    return kls | {f"score_{name}": float(getattr(v, score)) for name, v in parts.items()}
