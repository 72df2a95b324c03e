r"""Two methods on the same originals: the ratio of their KL, and which ratio could have been told.

With d_i = ln KL_i - ln KL'_i over the originals i = 1 ... K, mean m and standard deviation s:

    ratio = exp(m),   95 % interval exp(m ± t_{K-1} s / sqrt(K))

Logarithms, since a KL is positive and what differs between originals is a factor. An original that
is hard to forget from is hard for both methods, and cancels.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special, stats

from fisher_forget.evaluate.intervals import Array, Interval, Values, as_array, t_interval
from fisher_forget.evaluate.scale import LOG
from fisher_forget.evaluate.verdict import ALARM, POWER

NODES = 1000  # of an integral over quantiles


def log_ratios(values: Values, reference: Values) -> Array:
    """ln KL - ln KL' [K] on the same originals."""
    with np.errstate(invalid="ignore"):  # two infinite ones differ by NaN
        return LOG.forward(as_array(values)) - LOG.forward(as_array(reference))


def geometric(values: Values) -> Interval:
    """Geometric mean [nats] of KL [K] over models, and its 95 % interval; NaN bounds for one model,
    or where a KL is not finite."""
    return _exp(LOG.forward(as_array(values)))


def ratio(values: Values, reference: Values) -> Interval:
    """KL of a method over that of another on the same originals, and its 95 % interval.

    Where they have not equally many models the ratio of geometric means, with NaN bounds.

    Args:
        values: [K] nats, one an original.
        reference: [K] nats, in the same order.
    """
    if np.size(values) != np.size(reference):
        values, reference = ([geometric(x).value] for x in (values, reference))
    return _exp(log_ratios(values, reference))


def told(values: Values, reference: Values) -> float:
    """The smallest ratio that these originals would have told, by the spread of their own paired
    differences; NaN where the two cannot be paired, or a KL is not finite.

    Args:
        values: [K] nats, one an original.
        reference: [K] nats, in the same order.
    """
    if np.size(values) != np.size(reference) or np.size(values) < 2:
        return math.nan
    logs = log_ratios(values, reference)
    spread = float(np.std(logs, ddof=1)) if np.isfinite(logs).all() else math.nan
    return smallest_ratio(spread, len(logs))


def smallest_ratio(spread: float, models: int) -> float:
    r"""The smallest ratio above 1 that a paired t-test at 5 % finds in 80 % of cases.

    It solves P(|Z + shift| > t sqrt(C / (K - 1))) = 0.8 for shift = sqrt(K) ln(ratio) / spread,
    with Z normal, C of the chi-squared distribution of K - 1 degrees of freedom and t the two-sided
    limit of Student's: the power of the noncentral t-distribution.

    Args:
        spread: Standard deviation of the paired differences of ln KL.
        models: K; NaN is returned for one.
    """
    if models < 2 or not math.isfinite(spread):
        return math.nan
    df = models - 1
    # quantiles of C, since the library's noncentral t is NaN far out
    quantiles = stats.chi2.ppf((np.arange(NODES) + 0.5) / NODES, df)
    limits = special.stdtrit(df, 1 - ALARM / 2) * np.sqrt(quantiles / df)

    def missing(shift: float) -> float:
        return POWER - float(np.mean(special.ndtr(shift - limits) + special.ndtr(-shift - limits)))

    shift = float(optimize.brentq(missing, 0.0, limits[-1] + 1))  # Phi(1) is more than 0.8
    with np.errstate(over="ignore"):
        return float(np.exp(shift * spread / math.sqrt(models)))


def _exp(logs: Array) -> Interval:
    """Their mean and its interval, no longer as logarithms."""
    found = Interval(float(np.mean(logs)), math.nan, math.nan)
    if np.isfinite(logs).all():
        found = t_interval(logs)
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(x)) for x in (found.value, found.low, found.high)))
