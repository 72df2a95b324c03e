r"""How far a number could have come out otherwise: confidence intervals over models and over
samples.

Two sources of variation are kept apart. A score differs between *models* (seeds), of which there
are few: Student's t. A score of one model differs between the *samples* it was measured on, of
which there are many: the percentile bootstrap (Efron 1979). An interval of one kind says nothing
about the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError, NumericalError

Array = NDArray[np.float64]
Values = ArrayLike | Tensor

CHUNK = 2**21  # resampled numbers held at once: 16 MiB


@dataclass(frozen=True)
class Interval:
    """A number and its confidence interval, in the unit of the number; NaN bounds where they cannot
    be known.

    Attributes:
        value: The number itself.
        low: Lower bound.
        high: Upper bound.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def t_interval(values: Values, level: float = 0.95) -> Interval:
    r"""Student's interval for the mean of independent, roughly normal values: mean ± t_{n-1} s /
    sqrt(n).

    Args:
        values: [n], one a model or seed.
        level: Probability that the interval covers the mean.

    Returns:
        The mean and its bounds; NaN bounds for n = 1.

    Raises:
        ConfigError: If the level is not between 0 and 1.
        DataError: If there is no value, or more than one dimension.
        NumericalError: If a value is NaN or infinite.
    """
    check_level(level)
    x = finite_vector(values, "values")
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(special.stdtrit(len(x) - 1, (1 + level) / 2) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    statistic: Callable[..., Array],
    *samples: Values,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    paired: bool = False,
) -> Interval:
    """Percentile bootstrap over samples: the quantiles of the statistic over resampled data sets.

    Args:
        statistic: Takes stacks [draws, n, ...], one for each array, and returns [draws]: it reduces
            all axes but the first. For a function of one data set: `lambda x: np.array([f(row) for
            row in x])`.
        *samples: Arrays [n, ...], whose rows are resampled with replacement, each array
            independently of the others.
        level: Probability that the interval covers the statistic's value for unlimited samples.
        draws: Resampled data sets.
        seed: Of the resampling.
        paired: Resample the same rows of all arrays, which then describe the same samples.

    Returns:
        The statistic of the data as they are, and its bounds; NaN bounds where an array has one
        row.

    Raises:
        ConfigError: If the level is not between 0 and 1, or there are too few draws to reach its
            quantiles.
        DataError: If there is no array, an array is empty, or paired arrays differ in length.
    """
    check_level(level)
    if draws < (least := math.ceil(2 / (1 - level) - 1e-9)):
        raise ConfigError(
            f"{draws} draws for a level of {level}",
            f"at least {least}, one beyond either bound",
            "Raise `draws`.",
        )
    arrays = [as_array(s) for s in samples]
    lengths = [len(a) if a.ndim else 0 for a in arrays]
    if not arrays or min(lengths) == 0 or (paired and len(set(lengths)) > 1):
        raise DataError(
            f"arrays with {lengths} rows",
            "non-empty arrays, of one length if paired",
            "Pass the samples' rows.",
        )
    value = float(statistic(*(a[None] for a in arrays))[0])
    if min(lengths) == 1:  # resampling one row never varies, which would look like certainty
        return Interval(value, math.nan, math.nan)
    rngs = [np.random.default_rng([seed, 0 if paired else i]) for i in range(len(arrays))]
    step = max(1, CHUNK // max(sum(a.size for a in arrays), 1))
    found = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        stacks = [
            a[rng.integers(len(a), size=(size, len(a)))]
            for a, rng in zip(arrays, rngs, strict=True)
        ]
        found.append(statistic(*stacks))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def as_array(values: Values) -> Array:
    """The values as a float64 array that shares nothing with a graph or a device."""
    return np.asarray(
        values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64
    )


def finite_vector(values: Values, name: str) -> Array:
    """The values as [n]; a single number is a vector of one.

    Raises:
        DataError: If there is no value, or more than one dimension.
        NumericalError: If a value is NaN or infinite.
    """
    x = np.atleast_1d(as_array(values))
    if x.ndim > 1 or not len(x):
        raise DataError(
            f"{name} of shape {x.shape}",
            "one number for each model",
            "Pass a flat, non-empty list.",
        )
    if not np.isfinite(x).all():
        raise NumericalError(
            f"{name} with NaN or infinite entries", "finite numbers", "Leave failed runs out."
        )
    return x


def check_level(level: float) -> None:
    """Refuse a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        raise ConfigError(
            f"level={level}", "a probability between 0 and 1", "For 95 % pass level=0.95."
        )
