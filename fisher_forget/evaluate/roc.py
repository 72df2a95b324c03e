"""How well scores tell positives from negatives."""

from __future__ import annotations

import numpy as np
from scipy import stats

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Array, Values, as_array


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


def tpr_at_fpr(positive: Values, negative: Values, fpr: float) -> Array:
    """The largest true positive rate of a threshold whose false positive rate is at most `fpr`:
    [..., P] -> [...].

    Nothing is interpolated between thresholds: of Q negatives, floor(fpr Q) may be false positives.

    Raises:
        ConfigError: If fpr is not in [0, 1].
        DataError: If a side is empty.
        NumericalError: If a score is NaN.
    """
    if not 0 <= fpr <= 1:
        raise ConfigError(f"fpr={fpr}", "a rate between 0 and 1", "For 1 % pass 0.01.")
    a, b = _scores(positive, negative)
    allowed = int(fpr * b.shape[-1] + 1e-9)
    if allowed == b.shape[-1]:
        return np.ones(a.shape[:-1])
    cutoff = np.sort(b, -1)[..., -1 - allowed]  # the highest negative that must not pass
    return as_array((a > cutoff[..., None]).mean(-1))


def _scores(positive: Values, negative: Values) -> tuple[Array, Array]:
    a, b = as_array(positive), as_array(negative)
    if not a.ndim or not b.ndim or not a.shape[-1] or not b.shape[-1]:
        got = f"scores of shapes {a.shape} and {b.shape}"
        raise DataError(got, "some on either side", "Pass both sides' scores.")
    if np.isnan(a).any() or np.isnan(b).any():
        got = "scores that are NaN"
        raise NumericalError(got, "numbers, infinite ones included", "Check the model's outputs.")
    return a, b
