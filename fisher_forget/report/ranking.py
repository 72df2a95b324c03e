"""Methods of a comparison in the order of how close they come, each held against the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from fisher_forget._util.files import read_json
from fisher_forget.evaluate.evaluation import CONTROL, MARKS, Evaluation
from fisher_forget.evaluate.intervals import Interval
from fisher_forget.evaluate.paired import geometric, ratio, told
from fisher_forget.likelihood.base import SHARE_LOSS
from fisher_forget.report.pages.evaluation import defined, within

REFERENCES = ("original", CONTROL, "retrain")  # rows to read the others against
MAY_LOSE = 100 * SHARE_LOSS  # percentage points below retrained, whatever these do themselves
TELLS = 2.0  # ratio to the first that must have been told, or "not told apart" says little
KEPT = ("test, retained classes", "test")  # where accuracy is read: the first that there is
Row = dict[str, Any]


def rows(table: Evaluation, seconds: Mapping[str, Sequence[float]], retraining: float) -> list[Row]:
    """One row a method: those as accurate as retrained models first, each group by its KL on the
    forgotten samples.

    What the methods are read against comes last.

    Args:
        table: Scores of all methods, the original and the control.
        seconds: Method -> wall time of each of its models.
        retraining: Wall time of training one model without the forget set.

    Returns:
        Rows with: method; models; kl, kl_low, kl_high (nats, forgotten samples, geometric mean over
        models and its 95 % interval); ratio, ratio_low, ratio_high (KL over that of the first,
        paired over the originals, 95 % interval); smallest_ratio (to the first, that its own spread
        would have told, see `told`); floor (what retrained models have among themselves);
        kl_retain (nats); accuracy, accuracy_low, accuracy_high (%, test data of what is retained);
        target (%, of retrained models); accurate (not below what 97.5 % of retrained models reach,
        or at most `MAY_LOSE` below the target); cost (seconds over those of retraining); mark
        (verdict of the KL); inside and scored (how many scores are not told apart from retrained
        models', and how many are defined); tied (the first, or as close: the interval of the ratio
        holds 1, and a ratio of `TELLS` would have been told); undecided (neither tied nor told to
        be farther; both False for a less accurate method).
    """
    parts = {s.part for s in table.scores}
    kept = next(part for part in KEPT if part in parts)
    unranked = [
        _row(table, name, kept, seconds, retraining)
        for name in dict.fromkeys(s.method for s in table.scores)
    ]

    def place(row: Row) -> tuple[bool, bool, float]:
        kl = row["kl"] if math.isfinite(row["kl"]) else math.inf
        return row["method"] in REFERENCES, not row["accurate"], kl

    ranked = sorted(unranked, key=place)
    rivals = [r for r in ranked if r["method"] not in REFERENCES]
    kls = {row["method"]: table.get("kl", "forget", row["method"]).values for row in ranked}
    first = kls[rivals[0]["method"]] if rivals else ()
    for row in ranked:
        own, leads = kls[row["method"]], bool(rivals) and row is rivals[0]
        ranks = row["accurate"] and row["method"] not in REFERENCES
        found = ratio(own, first) if first else Interval(*[math.nan] * 3)
        row |= {"ratio": found.value, "ratio_low": found.low, "ratio_high": found.high}
        row["smallest_ratio"] = math.nan if leads or not first else told(own, first)
        as_close = found.low <= 1 <= found.high and row["smallest_ratio"] <= TELLS
        row["tied"] = ranks and (leads or as_close)
        farther = found.low > 1 or found.value == math.inf
        row["undecided"] = ranks and not (row["tied"] or farther)
    return ranked


def read_rows(path: Path) -> dict[str, list[Row]]:
    """Forget set -> its `rows`, of the comparison.json in a finished comparison's folder, or of the
    file itself."""
    report = read_json(path / "comparison.json" if path.is_dir() else path)

    def row(entry: Row) -> Row:
        return {key: math.nan if value is None else value for key, value in entry.items()}

    return {name: [row(entry) for entry in case["rows"]] for name, case in report["cases"].items()}


def _row(
    table: Evaluation,
    name: str,
    kept: str,
    seconds: Mapping[str, Sequence[float]],
    retraining: float,
) -> Row:
    kl, score = table.get("kl", "forget", name), table.get("score", kept, name)
    typical, scores = geometric(kl.values), defined(table, name)
    spent = seconds.get(name, ())
    return {
        "method": name,
        "models": kl.models,
        "kl": typical.value,
        "kl_low": typical.low,
        "kl_high": typical.high,
        "floor": kl.target,
        "kl_retain": table.get("kl", "retain", name).value,
        "accuracy": score.value,
        "accuracy_low": score.low,
        "accuracy_high": score.high,
        "target": score.target,
        "accurate": bool(
            score.value >= score.target - max(MAY_LOSE, _usual(score.target_std, table.retrained))
        ),
        "cost": float(np.mean(spent)) / retraining if spent else (1.0 if name == CONTROL else 0.0),
        "mark": MARKS[kl.label],
        "inside": sum(within(s) for s in scores),
        "scored": len(scores),
    }


def _usual(std: float, models: int) -> float:
    """How far below the mean of retrained models one more of them may be, in 97.5 % of cases."""
    return float(student.ppf(0.975, models - 1)) * std * math.sqrt(1 + 1 / models)
