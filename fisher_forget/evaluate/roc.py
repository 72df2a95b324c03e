"""How well scores tell positives from negatives."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, Interval, Values, as_array, check_level

ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def auc(positive: Values, negative: Values) -> Array:
    """Area under the ROC curve, P(positive > negative) + P(equal) / 2, over the last axis: [...,
    P], [..., Q] -> [...].

    Raises:
        DataError: If a side is empty.
        NumericalError: If a score is NaN.
    """
    a, b = _scores(positive, negative)
    p, q = a.shape[-1], b.shape[-1]
    # Mann-Whitney: the rank sum of the positives counts the pairs in order, ties by halves
    ranks = stats.rankdata(np.concatenate([a, b], -1), axis=-1)
    return as_array((ranks[..., :p].sum(-1) - p * (p + 1) / 2) / (p * q))


def tpr_at_fpr(positive: Values, negative: Values, fpr: float, level: float = 0.95) -> Interval:
    """The largest true positive rate of a threshold whose false positive rate is at most `fpr`:
    [..., P], [..., Q] -> its mean over the leading dimensions.

    Nothing is interpolated between thresholds: of Q negatives, floor(fpr Q) may be false positives.

    The interval is that of the rate at exactly `fpr`, whatever the scores' distributions are. The
    true threshold has a Binomial(Q, fpr) number of negatives above it, so it lies between two of
    them (error (1 - level) / 2), and Clopper and Pearson bound the rate at either (the other half).
    So it covers the rate more often than it says. Clopper and Pearson alone, at the threshold that
    was found, would take it for the true one: at a level of 95 % they cover 18 to 44 % of true
    rates at 0.1 % of 1,000 negatives. Ends are means over the leading dimensions, too.

    Raises:
        ConfigError: If fpr is not in (0, 1], or the level not between 0 and 1.
        DataError: If a side is empty, or there are fewer than 1 / fpr negatives: then no threshold
            is known to have so few false positives.
        NumericalError: If a score is NaN.

    Source: Clopper & Pearson 1934, doi:10.1093/biomet/26.4.404.
    """
    if not 0 < fpr <= 1:
        got = f"fpr={fpr}"
        raise ConfigError(got, "a rate above 0 and at most 1", "For 1 % pass 0.01.")
    check_level(level)
    a, b = _scores(positive, negative)
    p, q = a.shape[-1], b.shape[-1]
    allowed = int(fpr * q + ROUNDING)
    if allowed < 1:
        got = f"{q} negatives for a false positive rate of {fpr:g}"
        expected = f"at least {needed_negatives(fpr)}: fewer cannot show so small a rate"
        raise DataError(got, expected, "Score more negatives, or ask for a larger rate.")
    above = np.sort(b, -1)[..., ::-1]

    def passed(false_positives: int) -> Array:
        """Positives above the highest negative that must not pass."""
        if false_positives >= q:
            return np.full(a.shape[:-1], p)
        return as_array((a > above[..., false_positives, None]).sum(-1))

    side = (1 - level) / 4
    fewest, most = (int(stats.binom.ppf(share, q, fpr)) for share in (side, 1 - side))
    low = _clopper_pearson(passed(fewest - 1), p, side) if fewest else np.zeros(a.shape[:-1])
    high = 1 - _clopper_pearson(p - passed(most), p, side)
    return Interval(float((passed(allowed) / p).mean()), float(low.mean()), float(high.mean()))


def needed_negatives(fpr: float) -> int:
    """1 / fpr, rounded up: fewer negatives cannot show so small a false positive rate."""
    return math.ceil(1 / fpr - ROUNDING)


def share_interval(share: float, pairs: int, level: float = 0.95) -> Interval:
    """Interval of an AUC, or of a share of games won, as of so many independent pairs.

    Of P positives and Q negatives the variance of the AUC is at most a (1 - a) / min(P, Q), that of
    as many independent pairs, whatever the scores' distributions are (Birnbaum & Klose 1957,
    Ann. Math. Statist. 28, 933). Clopper and Pearson bound it with pairs = min(P, Q), a tie being
    half a success. So it stays in [0, 1], also where all pairs are in order, and it covers more
    often than it says: around 1/2 it is 1.2 times as wide as DeLong's.

    Args:
        share: The AUC.
        pairs: min(P, Q), or the number of games.
        level: Probability that the interval covers it.

    Raises:
        ConfigError: If the level is not between 0 and 1.
        DataError: If there is no pair.
    """
    check_level(level)
    if pairs < 1:
        raise DataError(f"{pairs} pairs", "at least one", "Score samples of both kinds.")
    wins, side = np.array(share * pairs), (1 - level) / 2
    low = float(_clopper_pearson(wins, pairs, side))
    high = 1 - float(_clopper_pearson(pairs - wins, pairs, side))
    return Interval(share, low, high)


def needed_pairs(level: float = 0.95) -> int:
    """The fewest pairs of which all in order are told from guessing: 2^-n at most (1 - level)/2."""
    return math.ceil(math.log2(2 / (1 - level)) - ROUNDING)


def _clopper_pearson(count: Array, total: int, error: float) -> Array:
    """Lower bound of a rate of which `count` of `total` were seen; too high with chance `error`."""
    return np.where(count > 0, stats.beta.ppf(error, count, total - count + 1), 0.0)


def _scores(positive: Values, negative: Values) -> tuple[Array, Array]:
    a, b = as_array(positive), as_array(negative)
    if not a.ndim or not b.ndim or not a.shape[-1] or not b.shape[-1]:
        got = f"scores of shapes {a.shape} and {b.shape}"
        raise DataError(got, "some on either side", "Pass both sides' scores.")
    if np.isnan(a).any() or np.isnan(b).any():
        got = "scores that are NaN"
        raise NumericalError(got, "numbers, infinite ones included", "Check the model's outputs.")
    return a, b
