"""What the rows that decide say of a method, together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_forget.evaluate.scoring import ALARM, EvaluationRow
from fisher_forget.evaluate.verdict import AS_RETRAINED, DIFFERENT, UNDECIDED, holm


@dataclass(frozen=True)
class Conclusion:
    """What the rows that decide say of a method, together.

    Attributes:
        label: That of the row of least p-value, where it is different; "as retrained" where no row
            is different, not even by itself, and every one in which the original is different is as
            retrained; else "undecided".
        p_value: Least of the p-values after Holm: for all these rows together, it is below 5 % in
            at most 5 % of cases where nothing is wrong.
        different: The rows that are different after Holm.
        rows: Those that decide.
    """

    label: str
    p_value: float
    different: tuple[EvaluationRow, ...]
    rows: tuple[EvaluationRow, ...]

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.label}: none of the rows that decide can be computed"
        rows = _named(self.different or self.rows)
        return f"{self.label} by {', '.join(rows)} (p = {self.p_value:.2g} after Holm)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        rows = {"different": _named(self.different), "rows": _named(self.rows)}
        return {"label": self.label, "p_value": self.p_value if self.rows else None} | rows


def conclude(rows: Sequence[EvaluationRow], original: Sequence[EvaluationRow]) -> Conclusion:
    """Judge a method by its rows.

    Args:
        rows: Those that decide; none of them undefined.
        original: The same of the original.
    """
    together = holm([row.p_value for row in rows])
    ranked = sorted(zip(together, rows, strict=True), key=lambda pair: pair[0])
    wrong = tuple(row for p, row in ranked if p < ALARM)
    visible = [a for a, b in zip(rows, original, strict=True) if b.label in DIFFERENT]
    same = visible and all(row.label == AS_RETRAINED for row in visible)
    alone = any(row.label in DIFFERENT for row in rows)
    label = wrong[0].label if wrong else AS_RETRAINED if same and not alone else UNDECIDED
    return Conclusion(label, min(together, default=math.nan), wrong, tuple(rows))


def _named(rows: Iterable[EvaluationRow]) -> list[str]:
    return [f"{row.metric} on {row.part}" for row in rows]
