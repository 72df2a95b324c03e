r"""Was it forgotten? A two-sided verdict on one score of a scrubbed model, held against retrained
models.

Both too little and too much forgetting are failures: a model that does worse on the forgotten
samples than any retrained one gives them away, too. So the scores r_1..r_M of M retrained models
are the target, and two questions are asked of the scores x_1..x_K of K scrubbed models, made from K
independent originals. All is computed on a scale on which the r_i are roughly N(mu, sigma^2)
(`scale`), with their mean rbar and standard deviation s:

1. *Is it different?* If the scrubbed models were retrained ones,

       t = (xbar - rbar) / (s sqrt(1/K + 1/M))

   would be Student's with M - 1 degrees of freedom. s is that of the retrained models alone: a
   method's own spread cannot widen what it has to meet. |t| is too large at 5 % in 5 % of cases
   where nothing is wrong, for every M and K. For K = 1 that is a score outside the range in which
   one more retrained model lies with 95 %.
2. *Is it the same?* Not to be rejected proves nothing: with few models everything passes. As in
   trials of non-inferiority, a treatment has to keep a part of a known effect: the scrubbed models
   are *as retrained* if what is left of the original's distance is shown to be less than a half,
   |xbar - mu| < 1/2 |o - mu|, where mu is known to rbar ± t_{M-1, 0.95} s / sqrt(M) only. That is
   so if it holds at both ends: two one-sided tests at 5 % (Schuirmann 1987), each linear in mu and
   thus exact (Fieller 1954). The models are judged as they are; those of the method that were not
   made are not judged. Where the original is not different itself, there is nothing to show.

A *distance* to retrained models (KL, of the weights) has no other side. It is different only where
it is larger than theirs to each other: not all was forgotten, or, where it is shown to be larger
than the original's, too, the scrub led away. Likenesses (agreement) are the same upside down.

Of 20 scores one rejects a perfect scrub. Those few that decide are judged together by `holm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, Values, check_level, finite_vector
from fisher_forget.evaluate.scale import LINEAR, Scale

Far = Literal["high", "low"]
NOT_FORGOTTEN = "not forgotten"
AS_RETRAINED = "as retrained"
OVER_FORGOTTEN = "over-forgotten"
FARTHER = "farther than the original"
UNDECIDED = "undecided"
DIFFERENT = (NOT_FORGOTTEN, OVER_FORGOTTEN, FARTHER)

REMAINDER = 0.5  # of the original's distance, which has to be ruled out
ALARM = 0.05  # chance that models which are retrained ones are told apart
POWER = 0.8  # of the differences that are said to be told
EXACT = 1e-12  # relative, up to which scores are equal
ALIKE = 0.01  # of the original's distance, by which a model has not moved
NOTHING = "Nothing to forget is visible in this score."


@dataclass(frozen=True)
class Verdict:
    """What one score says about forgetting. All but rates is in the unit of the score.

    Attributes:
        label: "not forgotten", "as retrained", "over-forgotten", "undecided", or, of a distance,
            "farther than the original".
        value: Mean score of the scrubbed models.
        target: Mean score of the retrained models.
        low: Lower end of the range in which one more retrained model lies, with the probability
            `level`; it depends on the retrained models alone.
        high: Its upper end.
        p_value: Probability that retrained models differ as much; of a distance, that they are as
            far. Where all retrained models score the same it is 0 or 1, by the margin, and without
            one by rounding.
        distance: (xbar - rbar) on the scale over the least one that is different: beyond ±1 it is.
        detectable: Score, on the original's side, that is told apart with a power of 80 %; NaN
            where the retrained models do not differ at all.
        reason: Why, in one or two sentences.
    """

    label: str
    value: float
    target: float
    low: float
    high: float
    p_value: float
    distance: float
    detectable: float
    reason: str

    def __str__(self) -> str:
        where = f"{self.value:.4g}, retrained {self.target:.4g} [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.label}: {where}, p = {self.p_value:.2g}. {self.reason}"


@dataclass(frozen=True)
class Yardstick:
    """M retrained models on a scale, and what they tell apart.

    Attributes:
        mean: rbar.
        std: s.
        models: M >= 2.
        level: 1 - false-alarm rate.
    """

    mean: float
    std: float
    models: int
    level: float = 0.95

    def error(self, runs: int) -> float:
        """Standard error of the mean of `runs` retrained models about that of these."""
        return self.std * math.sqrt(1 / runs + 1 / self.models)

    def p_value(self, gap: float, runs: int) -> float:
        """Probability that the mean of so many retrained models is as far off, two-sided."""
        return float(2 * stats.t.sf(abs(gap) / self.error(runs), self.models - 1))

    def limit(self, runs: int) -> float:
        """Least distance that is different."""
        return self._quantile((1 + self.level) / 2) * self.error(runs)

    def detectable(self, runs: int, models: int | None = None) -> float:
        """Distance that is told apart with a power of 80 % by so many retrained models, by default
        by these."""
        count = self.models if models is None else models
        error = self.std * math.sqrt(1 / runs + 1 / count)
        return _noncentrality(count - 1, self.level) * error

    def mean_ends(self) -> tuple[float, float]:
        """Ends of the interval that two one-sided tests of mu go by."""
        half = self._quantile(self.level) * self.std / math.sqrt(self.models)
        return self.mean - half, self.mean + half

    def _quantile(self, probability: float) -> float:
        return float(special.stdtrit(self.models - 1, probability))


def verdict(
    values: Values,
    retrained: Values,
    *,
    original: Values,
    scale: Scale = LINEAR,
    far: Far | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> Verdict:
    """Judge one score of a scrubbed model (see the module).

    Different, between the retrained models and the original or beyond the original: "not
    forgotten". Different, on the side away from the original: "over-forgotten". Not different, and
    what is left of the original's distance shown to be less than a half: "as retrained". Neither:
    "undecided". Where the original itself is no different there was nothing to forget that this
    score can see, and nothing is "as retrained" but by a given margin; a scrubbed model that is
    different is then "over-forgotten", since the scrub alone moved it, unless it lies where the
    original does: "not forgotten". A distance that is different is "farther than the original"
    where it is larger than the original's, and else "not forgotten".

    Larger than the original's is what exceeds it by more than 1 % of its distance from the
    retrained models, on the scale, and, where the original is different, too, and there are as many
    models as originals (K >= 2, in the same order), is so in a one-sided paired t-test at 5 %.

    Args:
        values: The score of the scrubbed model, or of K scrubbed models of independent originals
            [K].
        retrained: Scores of independently retrained models [M], M >= 2.
        original: The score of the original, or of the K originals.
        scale: On which scores are roughly normal.
        far: Of a distance to retrained models "high", of a likeness "low": the values that lie far
            from them. `None` for scores that retrained models have as well, which have two sides.
        margin: Distance that still counts as the same, in the unit of the score; by default half
            the original's, on the scale.
        level: 1 - false-alarm rate, of each of the two tests.

    Raises:
        ConfigError: If the margin is not positive or the level not between 0 and 1.
        DataError: If there are fewer than two retrained models, or no value.
        NumericalError: If a score is NaN or infinite.
    """
    x, r = finite_vector(values, "values"), finite_vector(retrained, "retrained")
    o = finite_vector(original, "original")
    _check(r, margin, level)
    z = scale.forward(r)
    std = float(z.std(ddof=1))
    if std <= EXACT * max(1.0, float(np.abs(z).max())):  # rounding of equal numbers leaves a trace
        return _without_spread(x, r, o, margin, far)
    rod = Yardstick(float(z.mean()), std, len(r), level)
    gap, before = (float(scale.forward(v).mean()) - rod.mean for v in (x, o))
    visible = _is_far(before, far) and abs(before) > rod.limit(len(o))
    if _is_far(gap, far) and abs(gap) > rod.limit(len(x)):
        moved = scale.forward(x), scale.forward(o)
        tolerance = _tolerance(*moved, before, visible)
        label, reason = different(gap, before, far, visible, tolerance)
    elif (visible or margin is not None) and _same(gap, before, rod, scale, far, margin):
        left = "half of the original's distance" if margin is None else "the margin"
        label, reason = AS_RETRAINED, f"A difference of {left} is ruled out."
    else:
        label, reason = UNDECIDED, "Neither a difference nor its absence is shown."
    side = -1 if far == "low" or (visible and before < 0) else 1
    seen, more = (
        scale.score(rod.mean + side * rod.detectable(len(x), count))
        for count in (rod.models, 2 * rod.models)
    )
    if label == UNDECIDED:
        reason += f" {seen:.3g} would be told apart with 80 % power, {more:.3g}"
        reason += f" with {2 * rod.models} retrained models."
    return Verdict(
        label,
        value=float(x.mean()),
        target=float(r.mean()),
        low=scale.score(rod.mean - rod.limit(1)),
        high=scale.score(rod.mean + rod.limit(1)),
        p_value=rod.p_value(gap, len(x)) if _is_far(gap, far) else 1.0,
        distance=gap / rod.limit(len(x)),
        detectable=seen,
        reason=reason if visible else f"{reason} {NOTHING}",
    )


def round_robin(rows: Array, columns: Array) -> Array:
    r"""Scores of M models that were each compared with the M - 1 others, as if each had been
    compared with all M.

    A model is not compared with itself, so it lacks in its own mean and is in everybody else's. A
    model that lies off is far from the others in both directions: it raises their means and not its
    own, and the spread comes out too small for a further model, which is compared with all M. With
    d_ij = mu + a_i + b_j + e_ij of model i beside model j, least squares give

        a_i = (M-1)^2 / (M (M-2)) R_i + (M-1) / (M (M-2)) C_i - (M-1) / (M-2) Rbar

    and Rbar + a_i is returned. (To count the further model among the others instead would let a
    wrecked one raise what it is held against.)

    Args:
        rows: R_i [M], M >= 3: what model i scores beside the others, on the scale.
        columns: C_i [M]: what the others score beside model i.

    Source: Warner, Kenny & Stoto 1979, A new round robin analysis of variance for social
    interaction data, eq. 4.
    """
    models, mean = len(rows), rows.mean()
    weighted = (models - 1) ** 2 * rows + (models - 1) * columns
    return np.asarray(mean + (weighted - models * (models - 1) * mean) / (models * (models - 2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all together, whatever their dependence: each is at most 5 % with at
    most that probability that any true hypothesis is rejected.

        p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order, together, largest = np.argsort(p_values), [1.0] * len(p_values), 0.0
    for passed, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - passed) * p_values[index]))
        together[index] = largest
    return together


def different(
    gap: float, before: float, far: Far | None, visible: bool, tolerance: float
) -> tuple[str, str]:
    """Label and reason of a score that is different.

    Args:
        gap: How far it is off the retrained ones, on the scale.
        before: How far the original is.
        far: As for `verdict`.
        visible: Whether the original is different itself.
        tolerance: By how much more than the original's a distance may be and still count as that.
    """
    side = math.copysign(1.0, gap) if far is None else 1.0 if far == "high" else -1.0
    beyond = side * (gap - before) > tolerance
    if far is not None:
        reason = "Farther from the retrained models than these are from each other,"
        if beyond:
            return FARTHER, f"{reason} and than the original is."
        return NOT_FORGOTTEN, f"{reason} and not shown to be farther than the original is."
    if side * before < 0:
        return OVER_FORGOTTEN, "Off the retrained models, on the side away from the original."
    if beyond and not visible:
        return OVER_FORGOTTEN, "Off the retrained models, which the original is not."
    return NOT_FORGOTTEN, "Off the retrained models, on the side of the original."


def _tolerance(x: Array, o: Array, before: float, visible: bool) -> float:
    """By how much more than the original's a distance may be without being shown to be larger."""
    least = ALIKE * abs(before)
    if not visible or len(x) != len(o) or len(x) < 2:
        return least
    error = float((x - o).std(ddof=1)) / math.sqrt(len(x))
    return max(least, float(special.stdtrit(len(x) - 1, 0.95)) * error)


def _is_far(gap: float, far: Far | None) -> bool:
    """Whether it lies on a side that counts: a distance less than retrained ones' is no failure."""
    return far is None or (gap > 0) == (far == "high")


def _same(
    gap: float,
    before: float,
    rod: Yardstick,
    scale: Scale,
    far: Far | None,
    margin: float | None,
) -> bool:
    """Whether it is within the margin of mu at both ends of what mu may be."""
    for end in rod.mean_ends():
        off, left = rod.mean + gap - end, REMAINDER * abs(rod.mean + before - end)
        if margin is not None:
            value, mu = scale.score(end + off), scale.score(end)
            off, left = value - mu, margin
        if _is_far(off, far) and not abs(off) < left:
            return False
    return True


@lru_cache(maxsize=4096)  # slow, and the same for all scores of as many models
def _noncentrality(df: int, level: float) -> float:
    """At which |t| exceeds its two-sided limit with a probability of 80 %."""
    limit = float(special.stdtrit(df, (1 + level) / 2))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(limit, df, shift)) - POWER

    return float(optimize.brentq(lacking, 0.0, 4 * limit + 4))


def _without_spread(x: Array, r: Array, o: Array, margin: float | None, far: Far | None) -> Verdict:
    """All retrained models score the same: whatever is off by more than the margin is different,
    and without a margin whatever is off by more than rounding. Nothing is as retrained where the
    original is not different."""
    value, target = float(x.mean()), float(r.mean())
    tolerance = EXACT * max(1.0, abs(target)) if margin is None else margin
    gap, before = value - target, float(o.mean()) - target
    visible = abs(before) > tolerance and _is_far(before, far)
    same = "All retrained models score the same"
    reason = f"{same}." if margin is None else f"{same}: a difference counts beyond {margin:.3g}."
    p, label = 1.0, AS_RETRAINED if visible else UNDECIDED
    if abs(gap) > tolerance and _is_far(gap, far):
        p = 0.0
        least = _tolerance(x, o, before, visible)
        label, side = different(gap, before, far, visible, least)
        reason = f"{side} {reason}"
    if not visible:
        reason += f" {NOTHING}"
    distance = gap / tolerance
    return Verdict(label, value, target, target, target, p, distance, math.nan, reason)


def _check(retrained: Array, margin: float | None, level: float) -> None:
    check_level(level)
    if len(retrained) < 2:
        got = "one retrained model"
        raise DataError(got, "at least 2, whose spread is the yardstick", "Retrain more seeds.")
    if margin is not None and not margin > 0:
        expected = "a positive number in the unit of the score"
        fix = "Leave it out for half of the original's distance."
        raise ConfigError(f"margin={margin}", expected, fix)
    if margin is not None and not math.isfinite(margin):
        fix = "Leave it out for half of the original's distance."
        raise NumericalError("an infinite margin", "a finite one", fix)
