"""What the rows that decide say of a method, together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_forget.evaluate.scoring import EvaluationRow
from fisher_forget.evaluate.verdict import ALARM, AS_RETRAINED, DIFFERENT, UNDECIDED, holm

BLIND = (
    "Nothing to forget is visible here: the original is not told apart from retrained models "
    "either, so no method can be shown to work"
)


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
        visible: Whether the original is told apart from retrained models by these rows together.
            Where it is not, no method can be shown to work, and none is "as retrained".
    """

    label: str
    p_value: float
    different: tuple[EvaluationRow, ...]
    rows: tuple[EvaluationRow, ...]
    visible: bool

    @property
    def word(self) -> str:
        """The label, or "not as retrained" where the rows that are different have several."""
        several = len({row.label for row in self.different}) > 1
        return "not as retrained" if several else self.label

    @property
    def blind(self) -> bool:
        """Whether nothing is shown because there is nothing to forget that these rows can see."""
        return bool(self.rows) and not self.different and not self.visible

    @property
    def findings(self) -> str:
        """The rows, grouped by what each of them says, and the evidence of a difference."""
        if not self.rows:
            return f"{self.label}: none of the rows that decide can be computed"
        groups: dict[str, list[EvaluationRow]] = {}
        for row in self.different:
            groups.setdefault(row.label, []).append(row)
        for row in (row for row in self.rows if row not in self.different):
            alone = f"{row.label} (by itself only)" if row.label in DIFFERENT else row.label
            groups.setdefault(alone, []).append(row)
        first = [self.label] * (self.label in groups)
        found = "; ".join(
            f"{label} in {', '.join(_named(groups[label]))}"
            for label in dict.fromkeys([*first, *groups])
        )
        shown = "" if self.different else "no difference shown, "
        return f"{found} ({shown}smallest p of a difference {self.p_value:.2g} after Holm)"

    def __str__(self) -> str:
        return self.findings + f". {BLIND}" * self.blind

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        rows = {"different": _named(self.different), "rows": _named(self.rows)}
        p_value = self.p_value if self.rows else None
        return {"label": self.label, "p_value": p_value, "visible": self.visible} | rows


def conclude(rows: Sequence[EvaluationRow], original: Sequence[EvaluationRow]) -> Conclusion:
    """Judge a method by its rows.

    Args:
        rows: Those that decide; none of them undefined.
        original: The same of the original.
    """
    together = holm([row.p_value for row in rows])
    ranked = sorted(zip(together, rows, strict=True), key=lambda pair: pair[0])
    wrong = tuple(row for p, row in ranked if p < ALARM)
    # NaN where the original's row is undefined
    before = holm([1.0 if math.isnan(row.p_value) else row.p_value for row in original])
    visible = min(before, default=1.0) < ALARM
    target = [a for a, b in zip(rows, original, strict=True) if b.label in DIFFERENT]
    same = visible and all(row.label == AS_RETRAINED for row in target)
    alone = any(row.label in DIFFERENT for row in rows)
    label = wrong[0].label if wrong else AS_RETRAINED if same and not alone else UNDECIDED
    return Conclusion(label, min(together, default=math.nan), wrong, tuple(rows), visible)


def _named(rows: Iterable[EvaluationRow]) -> list[str]:
    return [f"{row.metric} on {row.part}" for row in rows]
