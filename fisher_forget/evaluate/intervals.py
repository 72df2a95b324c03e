"""Confidence intervals over models (seeds), of which there are few: Student's t; and over
samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError, NumericalError

NORMAL = 1.959963984540054  # 97.5 % quantile
Array = NDArray[np.float64]
Values = ArrayLike | Tensor


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


def interval_of_one_more(values: Values, level: float = 0.95) -> Interval:
    """Student's interval of one more value like these, independent and roughly normal: mean ±
    t_{n-1} s sqrt(1 + 1 / n).

    Args:
        values: [n], at least two.
        level: Probability that the interval covers it.

    Raises:
        ConfigError, DataError, NumericalError: As for `t_interval`.
    """
    mean = t_interval(values, level)
    half = (mean.high - mean.value) * math.sqrt(len(finite_vector(values, "values")) + 1)
    return Interval(mean.value, mean.value - half, mean.value + half)


def paired_interval(differences: Values) -> Interval:
    """95 % interval for the mean of paired differences, over samples like these.

    Of shares (differences of -1, 0 and 1: which of two is right) that of Agresti and Min, which
    adds half a pair to each of the four cells; of other scores, Student's.

    Args:
        differences: [n], one a sample.

    Source: Agresti & Min 2005, doi:10.1002/sim.1781.
    """
    x = finite_vector(differences, "differences")
    if not set(np.unique(x)) <= {-1.0, 0.0, 1.0}:
        return t_interval(x)
    won, lost = (float((x == sign).sum()) + 0.5 for sign in (1.0, -1.0))
    size = len(x) + 2
    centre = (won - lost) / size
    spread = math.sqrt((won + lost - (won - lost) ** 2 / size) / size**2)
    low, high = max(-1.0, centre - NORMAL * spread), min(1.0, centre + NORMAL * spread)
    return Interval(float(x.mean()), low, high)


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
        got = f"{name} of shape {x.shape}"
        raise DataError(got, "one number for each model", "Pass a flat, non-empty list.")
    if not np.isfinite(x).all():
        got = f"{name} with NaN or infinite entries"
        raise NumericalError(got, "finite numbers", "Leave failed runs out.")
    return x


def check_level(level: float) -> None:
    """Refuse a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        got = f"level={level}"
        raise ConfigError(got, "a probability between 0 and 1", "For 95 % pass level=0.95.")
