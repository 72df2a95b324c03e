"""The stored numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.forgetting.rows import Row
from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.numbers import MISSING, number, percent
from fisher_forget.evaluate.gap import Gap
from fisher_forget.evaluate.intervals import Array, Interval, t_interval

GOAL = 0.95  # of the gap
Cell = Mapping[str, Any]  # of `benchmarks.forgetting.cells.cell`
PARTS = ("forget", "retain", "test")
COLUMNS = (
    "forget",
    "trained by, epochs",
    "original",
    "floor",
    "before",
    "after (without noise)",
    "gap closed, %: before",
    "after",
    "retained: original / floor / before / after",
    "recognised, %: original / retrained / before / after",
    "% of a retraining: before / after",
    "misses",
)


@dataclass(frozen=True)
class Score:
    """All originals of a row and of one version of the package, on one part of the data; KLs in
    nats, means.

    Attributes:
        original: KL(retrained || original).
        scrubbed: KL(retrained || result).
        floor: KL between two retrained models.
        gap: See `Gap`.
        rise: By how much the result is farther away than the original, with its interval over the
            retrained models.
        recognised: Shares of the samples that original, retrained models and result get right.
    """

    original: float
    scrubbed: float
    floor: float
    gap: Gap
    rise: Interval
    recognised: tuple[float, float, float]

    @classmethod
    def of(cls, cells: Sequence[Cell], model: str, part: str) -> Score:
        """Of the results as they are returned, "noised", or without noise, "plain"."""
        scores = [cell[model]["parts"][part] for cell in cells]

        def each(name: str) -> Array:
            return np.array([score[name] for score in scores], float)

        original, scrubbed, to_each = each("original_each"), each("scrubbed_each"), each("to_each")
        right = (each(f"score_{name}").mean() for name in ("original", "retrained", "scrubbed"))
        return cls(
            float(original.mean()),
            float(scrubbed.mean()),
            float(to_each.mean()),
            Gap.of(original, scrubbed, to_each[0], each("from_each")[0]),
            t_interval((scrubbed - original).mean(0)),
            tuple(map(float, right)),  # type: ignore[arg-type]
        )


def misses(scores: Mapping[str, Score]) -> str:
    """The goals that are missed: 95 % of a clear gap is closed; the result is as close on retained
    samples as a retrained model is; no part of the data is farther away than before."""
    closed, missed = scores["forget"].gap.closed, []
    if closed is not None and closed.value < GOAL:
        missed.append("gap")
    if scores["retain"].gap.scrubbed_told_apart:
        missed.append("retained")
    missed += [f"{part} worse" for part, score in scores.items() if score.rise.low > 0]
    return ", ".join(missed) or "none"


def table(rows: Sequence[Row], report: Mapping[str, Any]) -> str:
    """Markdown: a line for each row that has cells.

    Args:
        rows: In their order.
        report: Label -> name of the row -> seed -> cell.
    """
    lines = []
    for row in rows:
        found = {
            label: list(report.get(label, {}).get(row.name, {}).values())
            for label in ("before", "after")
        }
        if any(found.values()):
            lines.append(_line(row, found["before"], found["after"]))
    return markdown_table(COLUMNS, lines)


def _line(row: Row, before: Sequence[Cell], after: Sequence[Cell]) -> list[str]:
    old, new, plain = _scores(before, "noised"), _scores(after, "noised"), _scores(after, "plain")
    base, training = new or old, row.setup.training

    def kl(scores: Mapping[str, Score], part: str = "forget", name: str = "scrubbed") -> str:
        return number(getattr(scores[part], name)) if scores else MISSING

    def right(scores: Mapping[str, Score], index: int = 2) -> str:
        return percent(scores["forget"].recognised[index]) if scores else MISSING

    retained = [kl(base, "retain", "original"), kl(base, "retain", "floor")]
    return [
        f"{row.setup.title}: {row.forgotten}{' *' * row.held_out}",
        f"{training.optimizer}, {training.epochs}{' (early)' * row.setup.early}",
        kl(base, name="original"),
        kl(base, name="floor"),
        kl(old),
        f"{kl(new)} ({kl(plain)})",
        _closed(old),
        _closed(new),
        " / ".join([*retained, kl(old, "retain"), kl(new, "retain")]),
        " / ".join([right(base, 0), right(base, 1), right(old), right(new)]),
        f"{_cost(before)} / {_cost(after)}",
        misses(new) if new else "fails" if after else MISSING,
    ]


def _scores(cells: Sequence[Cell], model: str) -> dict[str, Score]:
    """Part -> score; empty where a call failed, or none was made."""
    if not cells or any(cell["error"] for cell in cells):
        return {}
    return {part: Score.of(cells, model, part) for part in PARTS}


def _closed(scores: Mapping[str, Score]) -> str:
    closed = scores["forget"].gap.closed if scores else None
    if closed is None:
        return "no clear gap" if scores else MISSING
    return f"{percent(closed.value)} ({percent(closed.low)} to {percent(closed.high)})"


def _cost(cells: Sequence[Cell]) -> str:
    shares = [cell["seconds"] / cell["retraining"] for cell in cells if not cell["error"]]
    return number(100 * sum(shares) / len(shares)) if shares else MISSING
