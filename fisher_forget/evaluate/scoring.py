"""The rows of one metric: what models score, what retrained models score, and the verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fisher_forget.evaluate.intervals import Interval, t_interval
from fisher_forget.evaluate.metric import LEAST, Context, Metric, Subject
from fisher_forget.evaluate.scale import LINEAR, LOG, Scale
from fisher_forget.evaluate.verdict import (
    ALARM,
    ALIKE,
    UNDECIDED,
    Verdict,
    different,
    round_robin,
    verdict,
)

RELABELLINGS = 99  # drawn at most for a permutation test
UNDEFINED = "undefined"
TOO_FEW = (
    f"it takes {LEAST} models of a method and, the control aside, {LEAST} more retrained ones than "
    "these"
)
# a difference that counts where all retrained models score the same; in %, 1.5 samples at least
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
        low: Lower end of the 95 % confidence interval of `value` over them, for a true positive
            rate over samples; NaN for a single one.
        high: Upper end.
        target: Mean over the retrained models of what they score themselves.
        target_low: Lower end of the range in which one more retrained model lies with 95 %; it is
            that of the retrained models alone, the same for every method. NaN for metrics of
            several models at once.
        target_high: Upper end.
        label: "not forgotten", "as retrained", "over-forgotten", "undecided", "farther than the
            original" (see `verdict`) or "undefined" where a value is not finite.
        reason: Why, and what would have been told apart.
        values: Of every model of the method.
        target_std: Standard deviation over the retrained models.
        p_value: Of "these are retrained models", for this row by itself: different below .05.
        distance: From the retrained models, in multiples of the least distance that is different.
        detectable: Score that would be told apart with a power of 80 %.
        primary: Whether the row is one of those that decide (`Evaluation.conclusion`).
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
    p_value: float = math.nan
    distance: float = math.nan
    detectable: float = math.nan
    primary: bool = False


@dataclass(frozen=True)
class Permutation:
    """A permutation test.

    Attributes:
        p_value: Share of the relabellings whose statistic is at least as large as the observed one,
            which is one of them.
        distance: The observed statistic less the median, over the least one that is different less
            the median.
        relabellings: How many.
    """

    p_value: float
    distance: float
    relabellings: int


def score_metric(
    metric: Metric,
    part: str,
    groups: Mapping[str, Sequence[Subject]],
    retrained: Sequence[Subject],
    context: Context,
) -> list[EvaluationRow]:
    """The rows of one metric on one part, one a method.

    Args:
        metric: What is computed.
        part: Of the data.
        groups: Method -> its models; the original comes first.
        retrained: The models that make the target.
        context: What is the same for all models.
    """
    if metric.group is not None:
        return _group_rows(metric, part, groups, retrained, context)
    rows: list[EvaluationRow] = []
    original: list[float] | None = None
    scale = metric.scale_in(context, part)
    targets, alike = _targets(metric, retrained, part, context, scale)
    scores = {
        method: [_value(metric, a, retrained, part, context) for a in group]
        for method, group in groups.items()
    }
    # the loss of a density has no lower end
    if scale is LOG and any(x < 0 for x in itertools.chain(targets, *scores.values())):
        scale, alike = LINEAR, targets
    for method, values in scores.items():
        if original is None:
            original = [v for v in values if math.isfinite(v)]
        key = method, metric.name, part, metric.unit_in(context)
        if not np.isfinite([*values, *targets]).all():
            row = _undefined(key, metric, values, "A value is not finite.")
            if np.isfinite(targets).all():  # what retrained models score is known all the same
                alone = verdict(alike, alike, original=alike, scale=scale)
                mean = float(np.mean(targets))
                row = replace(row, target=mean, target_low=alone.low, target_high=alone.high)
            rows.append(row)
            continue
        margin = _margin(metric, part, context) if np.ptp(targets) == 0 else None
        # where the metric is not defined for the original itself, such as the direction of no
        # step, any side is off
        before = original or values
        judged = verdict(
            *(values, alike), original=before, scale=scale, far=metric.far, margin=margin
        )
        rows.append(_row(key, metric, values, targets, scale, judged))
    return rows


def permutation_test(
    statistic: Callable[[Tensor, Tensor], float], ours: Tensor, retrained: Tensor, seed: int
) -> Permutation:
    """Whether K models are told from M retrained ones by a statistic of both.

    If they are such models, all K + M are exchangeable: among the statistics of all ways to call K
    of them "ours" the observed one is as likely to have any rank, for every statistic and every
    distribution. Up to 100 ways are gone through, else 99 are drawn beside the observed one.

    Args:
        statistic: Of ours [K, N] and retrained [M, N]; large where they differ.
        ours: [K, N], a row a model.
        retrained: [M, N].
        seed: Of the drawn relabellings.
    """
    pool, size = torch.cat([ours, retrained]), len(ours)
    count, rng = len(pool), np.random.default_rng(seed)
    # the order of the others is drawn, too: a statistic may pair the first of them with ours
    if math.comb(count, size) <= RELABELLINGS + 1:
        _, *subsets = itertools.combinations(range(count), size)  # the observed one is first
        ways = [
            np.append(subset, rng.permutation(np.setdiff1d(range(count), subset)))
            for subset in subsets
        ]
    else:
        ways = [rng.permutation(count) for _ in range(RELABELLINGS)]
    numbers = [statistic(pool[way[:size]], pool[way[size:]]) for way in (np.arange(count), *ways)]
    found, middle = np.array(numbers), float(np.median(numbers))
    p = float(np.mean(found >= found[0]))
    # the least value that so few reach; ties count as larger
    limit = np.nextafter(np.sort(found)[::-1][int(ALARM * len(found))], math.inf)
    distance = (found[0] - middle) / (limit - middle)
    return Permutation(p, float(distance), len(found))


def _group_rows(
    metric: Metric,
    part: str,
    groups: Mapping[str, Sequence[Subject]],
    retrained: Sequence[Subject],
    context: Context,
) -> list[EvaluationRow]:
    """The rows of a metric of several models at once, each judged by a permutation test.

    Such numbers depend on how many models there are: value and target are those of K models against
    M - K, the target's by turns over the retrained ones.
    """
    assert metric.group is not None
    rows: list[EvaluationRow] = []
    first: EvaluationRow | None = None  # of the original
    members = metric.grouped(retrained, part, context)
    for method, group in groups.items():
        key = method, metric.name, part, metric.unit_in(context)
        size, rest = len(group), len(retrained) - len(group)
        if min(size, rest) < LEAST:
            rows.append(_undefined(key, metric, [], TOO_FEW))
            continue
        ours = metric.grouped(group, part, context)
        value = metric.group(ours, members[:rest])
        rings = [members.roll(-i, 0) for i in range(len(members))]
        target = float(np.mean([metric.group(ring[:size], ring[size:]) for ring in rings]))
        if not math.isfinite(value + target):
            rows.append(_undefined(key, metric, [value], "A value is not finite."))
            continue
        test = permutation_test(metric.group, ours, members, context.seed)
        before, visible = value - target, test.p_value <= ALARM
        if first is not None:
            before, visible = first.value - target, first.p_value <= ALARM
        label, reason = UNDECIDED, "A difference is not shown."
        if test.p_value <= ALARM:
            alike = ALIKE * abs(before)
            label, reason = different(value - target, before, "high", visible, alike)
        reason += f" Rank of {test.relabellings} relabellings of all models."
        nan = math.nan
        over = metric.bounds(ours, members[:rest]) if metric.bounds else Interval(value, nan, nan)
        row = EvaluationRow(
            *(*key, value, 1, over.low, over.high, target, nan, nan, label, reason),
            values=(value,),
            p_value=test.p_value,
            distance=test.distance,
            primary=metric.is_primary(part),
        )
        first = first or row
        rows.append(row)
    return rows


def _row(
    key: tuple[str, str, str, str],
    metric: Metric,
    values: Sequence[float],
    targets: Sequence[float],
    scale: Scale,
    judged: Verdict,
) -> EvaluationRow:
    """The row of (method, metric, part, unit)."""
    interval = t_interval(scale.forward(np.array(values)))
    capped = max([*values, *targets]) >= metric.cap
    return EvaluationRow(
        *key,
        value=judged.value,
        models=len(values),
        low=scale.score(interval.low),
        high=scale.score(interval.high),
        target=float(np.mean(targets)),
        target_low=judged.low,
        target_high=judged.high,
        label=judged.label,
        reason=judged.reason + f" Counting ended at {metric.cap:g}." * capped,
        values=tuple(values),
        target_std=float(np.std(targets, ddof=1)),
        p_value=judged.p_value,
        distance=judged.distance,
        detectable=judged.detectable,
        primary=metric.is_primary(key[2]),
    )


def _undefined(
    key: tuple[str, str, str, str], metric: Metric, values: Sequence[float], why: str
) -> EvaluationRow:
    nan = math.nan
    primary = metric.is_primary(key[2])
    return EvaluationRow(
        *(*key, nan, len(values), nan, nan, nan, nan, nan, UNDEFINED, why),
        values=tuple(values),
        primary=primary,
    )


def _targets(
    metric: Metric,
    retrained: Sequence[Subject],
    part: str,
    context: Context,
    scale: Scale,
) -> tuple[list[float], list[float]]:
    """What retrained models score, each for itself or beside the others; and the same as a further
    model's score is, beside all."""
    if metric.pair is None:
        own = [_value(metric, a, [], part, context) for a in retrained]
        return own, own
    beside = np.full((len(retrained), len(retrained)), math.nan)
    if all(_defined(metric, a) for a in retrained):
        for (i, a), (j, b) in itertools.permutations(enumerate(retrained), 2):
            beside[i, j] = metric.pair(a, b, part, context)
    off = ~np.eye(len(retrained), dtype=bool)
    rows, columns = (
        np.array([x[k] for x, k in zip(d, off, strict=True)]).mean(1) for d in (beside, beside.T)
    )
    alike = scale.back(round_robin(scale.forward(rows), scale.forward(columns)))
    return [float(v) for v in rows], [float(v) for v in alike]


def _margin(metric: Metric, part: str, context: Context) -> float | None:
    unit = metric.unit_in(context)
    if unit == "%":
        return max(ENOUGH[unit], 150 / context.samples(part))
    return ENOUGH.get(unit)


def _value(
    metric: Metric, a: Subject, others: Sequence[Subject], part: str, context: Context
) -> float:
    if not _defined(metric, a):
        return math.nan
    if metric.solo is not None:
        return metric.solo(a, part, context)
    assert metric.pair is not None
    return float(np.mean([metric.pair(a, b, part, context) for b in others]))


def _defined(metric: Metric, a: Subject) -> bool:
    """Whether it is: a model of another architecture has no direction and no distance."""
    if "weights" not in metric.needs:
        return True
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (a.model, a.original)]
    return shapes[0] == shapes[1]
