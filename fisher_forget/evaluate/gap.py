r"""Whether there is a gap between an original and retrained models, and how much of it is closed.

Of K originals, each scrubbed, and M retrained models r_i:

    gap_closed = sum_k (KL_original_k - KL_scrubbed_k) / sum_k (KL_original_k - floor),

    KL_k = mean_i KL(r_i || model_k),   floor = mean_{i != j} KL(r_i || r_j)              [nats]

A ratio of means, not a mean of ratios: where the gap of one original is small, its own ratio can be
anything. Its interval is Fieller's (1954): all shares rho at which the numerator less rho times the
denominator is not told from zero. The covariance of both is that of a jackknife over the retrained
models, since all KLs share them and the floor is a U-statistic of their pairs. It is the interval
for these originals: how much others would differ is their spread.

The share is defined only where there is a gap: where the originals are told apart from retrained
models at 5 %, and the interval has two ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from fisher_forget.evaluate.intervals import Array, Interval
from fisher_forget.evaluate.scale import LOG
from fisher_forget.evaluate.verdict import ALARM, Yardstick, round_robin

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
    models = len(to_each)
    above, below = (original - scrubbed).mean(), original.mean() - to_each.mean()
    # [2, M]: both without retrained model i
    rest = [
        _without_each((original - scrubbed).mean(0)),
        _without_each(original.mean(0))
        - (models * to_each.mean() - to_each - from_each) / (models - 2),
    ]
    jackknife = (models - 1) ** 2 / models * np.cov(np.stack(rest))
    spread = float(special.stdtrit(models - 1, (1 + level) / 2)) ** 2 * jackknife
    # (above - rho below)^2 <= spread_00 - 2 rho spread_01 + rho^2 spread_11
    a, b, c = below**2 - spread[1, 1], above * below - spread[0, 1], above**2 - spread[0, 0]
    if not (below > 0 and a > 0):
        return None
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(above / below), float((b - root) / a), float((b + root) / a))


def p_value(kl: Array, to_each: Array, from_each: Array) -> float:
    """Probability that retrained models differ from the others as much as these K models, which are
    farther away; 1 where they are not.

    As in `verdict`: Student's test of the mean logarithm of KL_k against those of the retrained
    models, with the spread of these alone, whose mean KL to the others is taken for that to all M
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
    rod = Yardstick(float(z.mean()), float(z.std(ddof=1)), models)
    off = float(x.mean()) - rod.mean
    if off <= ROUNDING:
        return 1.0
    # without a spread whatever is farther is apart
    return rod.p_value(off, len(x)) if rod.std > ROUNDING else 0.0


def _without_each(values: Array) -> Array:
    """Means [M] without one of the values each."""
    return np.asarray((values.sum() - values) / (len(values) - 1))
