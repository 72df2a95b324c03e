"""Scores of one model of a sweep; what does not change from cell to cell is computed once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from operator import truediv
from typing import Any

import pandas as pd
import torch

from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.closeness import Closeness, Outputs, Reference, gap_closed, mean_kl
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
class Judge:
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
    def of(cls, reference: Reference, ruin: float | None) -> Judge:
        """Score the original and the retrained models.

        Raises:
            ConfigError: If a part is missing.
        """
        if missing := [part for part in PARTS if part not in reference.targets]:
            raise ConfigError(
                f"a reference without {missing}",
                f"the parts {PARTS}",
                "Give them to Reference(parts=...).",
            )
        own = reference.original
        original = reference.score(own)
        members = pd.DataFrame([_losses(reference, outputs) for outputs in reference.retrained])
        marks = {
            "original": _columns(original, "kl_original", "score_original")
            | _losses(reference, own),
            "retrained": _columns(original, "floor", "score_retrained") | _plain(members.mean()),
            "retrained_std": _columns(original, "floor_std", "score_retrained_std")
            | _plain(members.std()),
        }
        return cls(reference, original, marks, ruin)

    @property
    def score(self) -> Score:
        """What the scores are."""
        return self.original.score

    def row(self, outputs: Outputs) -> dict[str, Any]:
        """status, and kl_<part>, score_<part>, loss_<part> and gap_closed; without these where
        outputs overflow."""
        if not all(bool(torch.isfinite(values).all()) for values in outputs.values()):
            return {"status": RUINED}
        likelihood, found = self.reference.likelihood, {}
        for part, y in self.reference.targets.items():
            kl = [
                mean_kl(likelihood, member[part], outputs[part], y)
                for member in self.reference.retrained
            ]
            found[f"kl_{column(part)}"] = math.fsum(kl) / len(kl)
            found[f"score_{column(part)}"] = float(likelihood.scores(outputs[part], y).mean())
        found |= _losses(self.reference, outputs)
        scores = self.original.parts["forget"]
        gap = gap_closed(scores.kl_original, found["kl_forget"], scores.floor, scores.floor_std)
        found["gap_closed"] = math.nan if gap is None else gap
        most = math.inf if self.ruin is None else self.marks["original"]["loss_retain"] + self.ruin
        return {"status": DONE if found["loss_retain"] <= most else RUINED} | found


def _plain(values: pd.Series[float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}


def _losses(reference: Reference, outputs: Outputs) -> dict[str, float]:
    """loss_<part>: mean loss, nats a scored position."""
    likelihood = reference.likelihood
    return {
        f"loss_{column(part)}": truediv(*likelihood.loss_totals([(outputs[part], y)]))
        for part, y in reference.targets.items()
    }


def _columns(scores: Closeness, kl: str, score: str) -> dict[str, float]:
    parts = {column(part): asdict(values) for part, values in scores.parts.items()}
    return {f"kl_{name}": values[kl] for name, values in parts.items()} | {
        f"score_{name}": values[score] for name, values in parts.items()
    }
