r"""Was it forgotten? A two-sided verdict on one score of a scrubbed model, held against retrained
models.

Both too little and too much forgetting are failures: a model that does worse on the forgotten
samples than any retrained one gives them away, too. So the scores r_1..r_M of M retrained models
are the target, and two questions are asked of the score x of the scrubbed model. The r_i are taken
as independent and roughly normal, N(mu, sigma^2) with estimates rbar, s: fair for a mean over many
samples, not for a rate near 0 or 1 on few.

1. *Is it different?* x is outside the range expected of one more retrained model (95 %),
   rbar ± t_{M-1, 0.975} s sqrt(1 + 1/M). This rejects a perfect scrub in 5 % of cases, for every M.
2. *Is it the same?* Not to be rejected proves nothing: with few models everything passes. x is
   equivalent if |x - mu| >= margin is rejected at 5 % (Schuirmann 1987). For a margin in the
   score's unit, two one-sided tests: |x - rbar| + t_{M-1, 0.95} s / sqrt(M) < margin. The default
   margin, 2 sigma, has to be estimated, and to put 2 s for it would pass up to 17 % of models at 2
   sigma; instead |x - rbar| sqrt(M) / s must be below the 5 % quantile of the noncentral t at
   2 sqrt(M), which is exact (Wellek 2010, Testing Statistical Hypotheses of Equivalence and
   Noninferiority).

Several values x_1..x_K are those of K *independent* originals, each scrubbed, and their mean is
judged: s^2 / M becomes s_x^2 / K + s^2 / M with Welch's degrees of freedom (1947), and "one more
retrained model" the mean of K. Both tests are approximate then: in simulations with K and M from 2
to 20 they are wrong in 2 to 8 % of cases. Scrubs of one original share its seed: average them to
one value. Of 20 scores one rejects a perfect scrub: for n scores judged together, pass level = 1 -
0.05 / n.

A *distance* to retrained models (KL, KLoM, of the weights) has no other side. It is different only
where it is larger than theirs to each other: not all was forgotten, or, where it is larger than the
original's, too, the scrub led away. Likenesses (agreement) are the same upside down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special, stats

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, Values, check_level, finite_vector

Far = Literal["high", "low"]
NOT_FORGOTTEN = "not forgotten"
INDISTINGUISHABLE = "indistinguishable from retrained"
OVER_FORGOTTEN = "over-forgotten"
FARTHER = "farther than the original"
UNDECIDED = "undecided"

MARGIN = 2.0  # standard deviations of the retrained models
POWER = 0.8
ROUNDING = 1e-6  # relative, by which a model may seem farther away that has not moved
MOST = 1000  # retrained models beyond which nobody will go


@dataclass(frozen=True)
class Verdict:
    """What one score says about forgetting. All but rates and counts is in the unit of the score.

    Attributes:
        label: "not forgotten", "indistinguishable from retrained", "over-forgotten", "undecided",
            or, of a distance, "farther than the original".
        value: Mean score of the scrubbed models.
        target: Mean score of the retrained models.
        low: Lower end of the range expected of (the mean of as many) retrained models.
        high: Its upper end.
        p_value: Of "it is a retrained model", two-sided; NaN where the retrained models do not
            differ at all.
        margin: Distance from the retrained mean that still counts as the same.
        power: Probability that a truly retrained model would have been shown to be the same.
        models_needed: Retrained models that would show with a power of 80 % that a score at this
            distance is the same; `None` if it is not within the margin, or more than 1000 are
            needed.
        reason: One sentence.
    """

    label: str
    value: float
    target: float
    low: float
    high: float
    p_value: float
    margin: float
    power: float
    models_needed: int | None
    reason: str

    def __str__(self) -> str:
        where = f"{self.value:.4g}, retrained {self.target:.4g} [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.label}: {where}, p = {self.p_value:.2g}. {self.reason}"


@dataclass(frozen=True)
class Design:
    """Numbers of models and their spreads, in standard deviations of the retrained models: all that
    both tests need to know.

    Attributes:
        models: M >= 2 retrained models.
        margin: Distance that still counts as the same.
        estimated: The margin is a multiple of the estimated s, not given in the unit of the score.
        level: 1 - false-alarm rate, of both tests.
        runs: K scrubbed models.
        ratio: s_x / s; irrelevant for K = 1, where x is judged as it is.

    Raises:
        ConfigError: If a value is out of range.
    """

    models: int
    margin: float = MARGIN
    estimated: bool = True
    level: float = 0.95
    runs: int = 1
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.models < 2 or not self.margin > 0:
            got = f"models={self.models}, margin={self.margin}"
            fix = "Give the margin in standard deviations of the retrained models."
            raise ConfigError(got, "at least two models and a positive margin", fix)

    @property
    def error(self) -> float:
        """Standard error of xbar - rbar about E[x] - mu; for K = 1, of x - rbar about x - mu."""
        return math.sqrt(1 / self.models + self._own)

    @property
    def novelty(self) -> float:
        """Standard deviation of xbar - rbar where every x is a retrained model."""
        return math.sqrt(1 + 1 / self.models) if self.runs == 1 else self.error

    @property
    def df(self) -> float:
        """Degrees of freedom, Welch's for K > 1."""
        if self.runs == 1:
            return self.models - 1
        parts = (1 / self.models) ** 2 / (self.models - 1) + self._own**2 / (self.runs - 1)
        return self.error**4 / parts

    @property
    def limit(self) -> float:
        """|xbar - rbar| from which on it is different."""
        return float(special.stdtrit(self.df, (1 + self.level) / 2)) * self.novelty

    @property
    def bound(self) -> float:
        """|xbar - rbar| up to which it is the same; not positive where nothing can be."""
        if self.estimated:
            # |x - rbar| sqrt(M) / s is noncentral t at the margin; s has M - 1 degrees of freedom
            # whatever K is
            shift = self.margin / self.error
            return _noncentral(1 - self.level, self.models - 1, shift) * self.error
        return self.margin - float(special.stdtrit(self.df, self.level)) * self.error

    @property
    def _own(self) -> float:
        return self.ratio**2 / self.runs if self.runs > 1 else 0.0

    def power(self, distance: float | None = None) -> float:
        """Probability that "the same" is shown at |E[x] - mu| = distance.

        Args:
            distance: At least 0; `None` for a model that is itself a retrained one, and so at a
                random distance.
        """
        bound = self.bound
        if bound <= 0:
            return 0.0
        if distance is None:
            return 2 * float(stats.t.cdf(bound / self.novelty, self.df)) - 1
        df = self.models - 1 if self.estimated else self.df
        shift, reach = distance / self.error, bound / self.error
        # NaN where it underflows
        low, high = np.nan_to_num(stats.nct.cdf([-reach, reach], df, shift))
        return max(0.0, float(high - low))

    def models_needed(self, distance: float | None = None, power: float = POWER) -> int | None:
        """Least number of retrained models at which the power is reached; `None` if 1000 do not.

        Args:
            distance: As for `power`.
            power: Wanted probability.
        """

        def reached(models: int) -> bool:
            return replace(self, models=models).power(distance) >= power

        low, high = 1, MOST
        if not reached(high):
            return None
        while high - low > 1:  # bisection: the power grows with the number of models
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


def verdict(
    values: Values,
    retrained: Values,
    *,
    original: Values,
    far: Far | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> Verdict:
    """Judge one score of a scrubbed model (see the module).

    Different, between the retrained models and the original or beyond the original: "not
    forgotten". Different, on the side away from the original: "over-forgotten". Not different, and
    equivalent: "indistinguishable from retrained". Neither: "undecided". Where the original itself
    is no different there was nothing to forget that this score can see; a scrubbed model that is
    different is then "over-forgotten", since the scrub alone moved it. A distance that is different
    is "farther than the original" where it is larger than the original's, and else "not forgotten".

    Args:
        values: The score of the scrubbed model, or of K scrubbed models of independent originals
            [K].
        retrained: Scores of independently retrained models [M], M >= 2.
        original: The score of the original, or of the K originals.
        far: Of a distance to retrained models "high", of a likeness "low": the values that lie far
            from them. `None` for scores that retrained models have as well, which have two sides.
        margin: Distance that still counts as the same, in the unit of the score; by default two
            standard deviations of the retrained models.
        level: 1 - false-alarm rate, of each of the two tests.

    Raises:
        ConfigError: If the margin is not positive or the level not between 0 and 1.
        DataError: If there are fewer than two retrained models, or no value.
        NumericalError: If a score is NaN or infinite.
    """
    x, r = finite_vector(values, "values"), finite_vector(retrained, "retrained")
    o = finite_vector(original, "original")
    _check(r, margin, level)
    value, target, std = float(x.mean()), float(r.mean()), float(r.std(ddof=1))
    if std <= 1e-12 * float(np.abs(r).max()):  # rounding of equal numbers leaves a trace
        return _without_spread(value, target, float(o.mean()), margin, far)

    def design(sample: Array) -> Design:
        ratio = float(sample.std(ddof=1)) / std if len(sample) > 1 else 1.0
        width = MARGIN if margin is None else margin / std
        return Design(len(r), width, margin is None, level, len(sample), ratio)

    # from here on in standard deviations of the retrained models
    plan, gap, before = design(x), (value - target) / std, (float(o.mean()) - target) / std
    visible = abs(before) > design(o).limit
    needed = plan.models_needed(abs(gap))
    label, reason = _judged(plan, gap, before if visible else 0.0, needed, far)
    return Verdict(
        label,
        value,
        target,
        low=target - plan.limit * std,
        high=target + plan.limit * std,
        p_value=float(2 * stats.t.sf(abs(gap) / plan.novelty, plan.df)),
        margin=plan.margin * std,
        power=plan.power(),
        models_needed=needed,
        reason=reason if visible else f"{reason} Nothing to forget is visible in this score.",
    )


def _judged(
    plan: Design, gap: float, before: float, needed: int | None, far: Far | None
) -> tuple[str, str]:
    """Label and reason of a score `gap` away from the retrained ones; `before` is the original's
    distance, 0 where it is no different."""
    same = abs(gap) <= plan.bound
    if abs(gap) > plan.limit:
        label, reason = _different(gap, before, far)
        return label, reason + " The difference is within the given margin." * same
    if same:
        return INDISTINGUISHABLE, "A difference beyond the margin is ruled out."
    if abs(gap) < plan.margin:
        count = f"about {needed}" if needed else f"over {MOST}"
        why = f"at this distance it needs {count} retrained models."
    else:
        why = "beyond the margin, more retrained models will rather show a difference."
    return UNDECIDED, f"Neither difference nor equivalence is shown: {why}"


@lru_cache(maxsize=4096)  # slow, and the same for all scores of as many models
def _noncentral(probability: float, df: int, shift: float) -> float:
    return float(stats.nct.ppf(probability, df, shift))


def _different(gap: float, before: float, far: Far | None) -> tuple[str, str]:
    """Label and reason of a score off the retrained ones; `before` is the original's, 0 where it is
    not off."""
    if far is not None:
        sign = 1 if far == "high" else -1
        return _distant(sign * gap, sign * before)
    reason = "No retrained model scores like this,"
    if gap * before > 0:
        return NOT_FORGOTTEN, f"{reason} and the original lies on the same side."
    if before:
        return OVER_FORGOTTEN, f"{reason} and the original lies on the other side."
    return OVER_FORGOTTEN, f"{reason} but the original does: scrubbing led away."


def _distant(gap: float, before: float) -> tuple[str, str]:
    """The same of a distance."""
    if gap < 0:
        return INDISTINGUISHABLE, "Closer to the retrained models than these are to each other."
    reason = "Farther from the retrained models than these are from each other,"
    if gap > before * (1 + ROUNDING):
        return FARTHER, f"{reason} and than the original is: scrubbing led away."
    return NOT_FORGOTTEN, f"{reason} as the original is."


def _without_spread(
    value: float, target: float, original: float, margin: float | None, far: Far | None
) -> Verdict:
    """All retrained models score the same: without a spread there is no test, only a margin if one
    was given."""
    tolerance = 1e-12 * abs(target) if margin is None else margin
    gap, before = value - target, original - target
    reason = "All retrained models score the same, so only a margin can judge."
    if abs(gap) <= tolerance:
        label = INDISTINGUISHABLE
    elif margin is None:
        label, reason = UNDECIDED, f"{reason} Give one in the unit of the score."
    else:
        label, side = _different(gap, before if abs(before) > tolerance else 0.0, far)
        reason = f"{side} {reason}"
    if abs(before) <= tolerance:
        reason += " Nothing to forget is visible in this score."
    nan = math.nan
    return Verdict(label, value, target, target, target, nan, margin or 0.0, nan, None, reason)


def _check(retrained: Array, margin: float | None, level: float) -> None:
    check_level(level)
    if len(retrained) < 2:
        got = "one retrained model"
        raise DataError(got, "at least 2, whose spread is the yardstick", "Retrain more seeds.")
    if margin is not None and not margin > 0:
        expected = "a positive number in the unit of the score"
        raise ConfigError(f"margin={margin}", expected, "Leave it out for 2 std.")
    if margin is not None and not math.isfinite(margin):
        raise NumericalError("an infinite margin", "a finite one", "Leave it out for 2 std.")
