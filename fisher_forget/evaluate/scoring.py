"""The rows of one metric: what models score, what retrained models score, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fisher_forget.evaluate.intervals import t_interval
from fisher_forget.evaluate.metrics import LEAST, Context, Metric, Subject
from fisher_forget.evaluate.verdict import Verdict, verdict

OTHERS = 10  # retrained models that a retrained model is compared with at most, for a pair metric
UNDEFINED = "undefined"
TOO_FEW = (
    f"it takes {LEAST} models of a method and {LEAST} retrained ones beside as many for the target"
)
# a difference that counts where all retrained models score the same
ENOUGH = {"%": 1.0, "epochs": 1.0, "steps": 1.0}


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one method on one part of the data.

    Attributes:
        method: "original", "control (retrained)", or the name of a method.
        metric: Key of `METRICS`.
        part: Of the data.
        unit: Of the numbers below.
        value: Mean over the method's models.
        models: How many these are.
        low: Lower end of the 95 % confidence interval of `value` over them; NaN for a single one.
        high: Upper end.
        target: Mean over the retrained models of what they score themselves.
        target_low: Lower end of the range expected of (the mean of as many) retrained models; the
            ranges of all rows of a method hold together with 95 % (Bonferroni).
        target_high: Upper end.
        label: "not forgotten", "indistinguishable from retrained", "over-forgotten", "undecided",
            "farther than the original" (see `verdict`) or "undefined" where a value is not finite.
        reason: Why, and how many models would tell more.
        values: Of every model of the method.
        target_std: Standard deviation over the retrained models.
    """

    method: str
    metric: str
    part: str
    unit: str
    value: float
    models: int
    low: float
    high: float
    target: float
    target_low: float
    target_high: float
    label: str
    reason: str
    values: tuple[float, ...] = ()
    target_std: float = math.nan


def score_metric(
    metric: Metric,
    part: str,
    groups: Mapping[str, Sequence[Subject]],
    retrained: Sequence[Subject],
    context: Context,
    level: float,
) -> list[EvaluationRow]:
    """The rows of one metric on one part, one a method.

    Args:
        metric: What is computed.
        part: Of the data.
        groups: Method -> its models; the original comes first.
        retrained: The models that make the target.
        context: What is the same for all models.
        level: Of each row's tests.
    """
    rows: list[EvaluationRow] = []
    original: list[float] = []
    targets = _targets(metric, retrained, 1, part, context)
    for method, group in groups.items():
        if metric.group is None:
            values = [_value(metric, a, retrained, part, context) for a in group]
        else:
            targets = _targets(metric, retrained, len(group), part, context)
            # against as many as the groups of the target are: such numbers depend on how many
            # models there are
            others = retrained[: len(retrained) - len(group)]
            values = [metric.group(group, others, part, context)] if targets else []
        # where the metric is not defined for the original itself, such as the direction of no
        # step, any side is off
        original = original or [v for v in values if math.isfinite(v)]
        key = method, metric.name, part, metric.unit_in(context)
        if not values or not np.isfinite([*values, *targets]).all():
            why = "A value is not finite." if values else TOO_FEW
            nan, count, each = math.nan, len(values), tuple(values)
            row = EvaluationRow(*key, nan, count, nan, nan, nan, nan, nan, UNDEFINED, why, each)
            rows.append(row)
            continue
        # without a spread only a margin can judge
        margin = ENOUGH.get(key[-1]) if np.ptp(targets) == 0 else None
        before = original or values
        judged = verdict(
            values, targets, original=before, far=metric.far, margin=margin, level=level
        )
        rows.append(_row(key, metric, values, targets, judged))
    return rows


def _row(
    key: tuple[str, str, str, str],
    metric: Metric,
    values: Sequence[float],
    targets: Sequence[float],
    judged: Verdict,
) -> EvaluationRow:
    """The row of (method, metric, part, unit)."""
    interval = t_interval(values)
    capped = max([*values, *targets]) >= metric.cap
    return EvaluationRow(
        *key,
        *(interval.value, len(values), interval.low, interval.high),
        *(float(np.mean(targets)), judged.low, judged.high),
        judged.label,
        judged.reason + f" Counting ended at {metric.cap:g}." * capped,
        tuple(values),
        float(np.std(targets, ddof=1)),
    )


def _targets(
    metric: Metric, retrained: Sequence[Subject], size: int, part: str, context: Context
) -> list[float]:
    """What retrained models score: each for itself; for a group metric, as many as the method has
    models, by turns."""
    count = len(retrained)
    if metric.group is None:
        beside = ((a, _others(retrained, i)) for i, a in enumerate(retrained))
        return [_value(metric, a, others, part, context) for a, others in beside]
    if size < LEAST or count - size < LEAST:
        return []
    rings = [[retrained[(i + k) % count] for k in range(count)] for i in range(min(OTHERS, count))]
    return [metric.group(ring[:size], ring[size:], part, context) for ring in rings]


def _others(retrained: Sequence[Subject], index: int) -> list[Subject]:
    """The next few members after one, in a ring: each is compared with others, and others with it,
    equally often."""
    count = min(OTHERS, len(retrained) - 1)
    return [retrained[(index + k) % len(retrained)] for k in range(1, count + 1)]


def _value(
    metric: Metric, a: Subject, others: Sequence[Subject], part: str, context: Context
) -> float:
    if "weights" in metric.needs and not _alike(a.model, a.original):
        return math.nan
    if metric.solo is not None:
        return metric.solo(a, part, context)
    assert metric.pair is not None
    return float(np.mean([metric.pair(a, b, part, context) for b in others]))


def _alike(a: nn.Module, b: nn.Module) -> bool:
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (a, b)]
    return shapes[0] == shapes[1]
