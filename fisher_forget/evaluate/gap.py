r"""Whether there is a gap between an original and retrained models, and how much of it is closed.

Of K originals, each scrubbed, and M retrained models r_i:

    gap_closed = sum_k (KL_original_k - KL_scrubbed_k) / sum_k (KL_original_k - floor),

    KL_k = mean_i KL(r_i || model_k),   floor = mean_{i != j} KL(r_i || r_j)              [nats]

A ratio of means, not a mean of ratios: where the gap of one original is small, its own ratio can be
anything. Its interval is Fieller's (1954): all shares rho at which the numerator less rho times the
denominator is not told from zero. The covariance of both is that of a jackknife over the retrained
models, since all KLs share them and the floor is a U-statistic of their pairs, and, for K > 1, that
of the originals. Each counts with its own degrees of freedom (Cochran & Cox 1957). With one
original it is the interval for this original.

The share is defined only where there is a gap: where the original is told apart from a retrained
model at 5 %, and the interval has two ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from fisher_forget.evaluate.intervals import Array, Interval
from fisher_forget.evaluate.scale import LOG
from fisher_forget.evaluate.verdict import Yardstick, round_robin

ALARM = 0.05  # chance that a retrained model is told apart from the others
FEWEST = 3  # retrained models: the floor without one of them still needs a pair
ROUNDING = 1e-12  # of a logarithm


@dataclass(frozen=True)
class Gap:
    """The gap between originals and retrained models on one part of the data.

    Attributes:
        closed: Share of it that is closed, with its 95 % interval; `None` where there is no clear
            gap.
        p_original: Probability that retrained models are as far from the others as the originals
            are; NaN for fewer than three.
        p_scrubbed: The same of the scrubbed models.
    """

    closed: Interval | None
    p_original: float
    p_scrubbed: float

    @classmethod
    def of(cls, original: Array, scrubbed: Array, to_each: Array, from_each: Array) -> Gap:
        """The gap, from the KLs that `gap_closed` is of."""
        closed = gap_closed(original, scrubbed, to_each, from_each)
        return cls(closed, *(p_value(kl, to_each, from_each) for kl in (original, scrubbed)))

    @property
    def scrubbed_told_apart(self) -> bool:
        """Whether the scrubbed models are told apart from retrained ones at 5 %; not where these
        are too few."""
        return self.p_scrubbed <= ALARM


def gap_closed(
    original: Array, scrubbed: Array, to_each: Array, from_each: Array, level: float = 0.95
) -> Interval | None:
    """The share of the gap that is closed (see the module), or `None` where there is no clear gap.

    Args:
        original: KL(r_i || original_k) [K, M], nats.
        scrubbed: KL(r_i || scrubbed_k) [K, M].
        to_each: Mean over the others j of KL(r_j || r_i) [M].
        from_each: Mean over the others j of KL(r_i || r_j) [M].
        level: Of the interval.

    Source: Fieller 1954, J. R. Stat. Soc. B 16, 175; Efron & Stein 1981 for the jackknife of a
    U-statistic.
    """
    if not p_value(original, to_each, from_each) <= ALARM or not np.isfinite(scrubbed).all():
        return None
    runs, models = original.shape
    # [2, K]: numerator and denominator of each original; [2, M]: their means without retrained i
    parts = np.stack([(original - scrubbed).mean(1), original.mean(1) - to_each.mean()])
    rest = [
        _without_each((original - scrubbed).mean(0)),
        _without_each(original.mean(0))
        - (models * to_each.mean() - to_each - from_each) / (models - 2),
    ]
    jackknife = (models - 1) ** 2 / models * np.cov(np.stack(rest))
    spread = _quantile(models - 1, level) ** 2 * jackknife
    if runs > 1:
        spread = spread + _quantile(runs - 1, level) ** 2 * np.cov(parts) / runs
    above, below = parts.mean(1)
    # (above - rho below)^2 <= spread_00 - 2 rho spread_01 + rho^2 spread_11
    a, b, c = below**2 - spread[1, 1], above * below - spread[0, 1], above**2 - spread[0, 0]
    if not (below > 0 and a > 0):
        return None
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(above / below), float((b - root) / a), float((b + root) / a))


def p_value(kl: Array, to_each: Array, from_each: Array) -> float:
    """Probability that retrained models are as far from the others as these K models; one-sided.

    Student's test of the mean logarithms of KL_k against those of the retrained models, with the
    spread of the retrained models alone, whose mean KL to the others is taken for that to all M
    (`round_robin`). NaN for fewer than three retrained models, or where a KL is not finite.

    Args:
        kl: KL(r_i || model_k) [K, M], nats.
        to_each: As for `gap_closed`.
        from_each: As for `gap_closed`.
    """
    models = len(to_each)
    if models < FEWEST or not all(np.isfinite(x).all() for x in (kl, to_each, from_each)):
        return math.nan
    x, rows, columns = (LOG.forward(v) for v in (kl.mean(1), to_each, from_each))
    z = round_robin(rows, columns)
    error = Yardstick(float(z.mean()), float(z.std(ddof=1)), models).error(len(x))
    off = float(x.mean() - z.mean())
    if error <= ROUNDING:  # all retrained models alike
        return float(off <= ROUNDING)
    return float(special.stdtr(models - 1, -off / error))


def _without_each(values: Array) -> Array:
    """Means [M] without one of the values each."""
    return np.asarray((values.sum() - values) / (len(values) - 1))


def _quantile(df: int, level: float) -> float:
    return float(special.stdtrit(df, (1 + level) / 2))
