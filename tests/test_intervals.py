"""Intervals: equal to SciPy's, with the coverage they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fisher_forget import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.intervals import Interval, interval_of_one_more, t_interval


class TestStudent:
    @pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
    def test_equals_scipy(self, level: float) -> None:
        x = np.random.default_rng(0).normal(3.0, 2.0, size=7)
        low, high = stats.ttest_1samp(x, 0.0).confidence_interval(level)
        found = t_interval(x, level)
        assert (found.value, found.low, found.high) == pytest.approx((x.mean(), low, high))

    def test_by_hand(self) -> None:
        # 1, 2, 3: mean 2, s = 1, t_{2, 0.975} = 4.302653, half width 4.302653 / sqrt(3)
        found = t_interval([1.0, 2.0, 3.0])
        assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
        assert found.high == pytest.approx(2 + 2.484138, abs=1e-6)

    def test_one_value_has_no_bounds(self) -> None:
        found = t_interval(torch.tensor([0.25]))
        assert found.value == 0.25
        assert math.isnan(found.low)
        assert math.isnan(found.high)

    def test_covers_at_the_stated_rate(self) -> None:
        # 2000 intervals at 90 %: misses ~ B(2000, 0.1); the bounds below are passed with
        # probability 1e-4.
        rng = np.random.default_rng(1)
        misses = 0
        for _ in range(2000):
            found = t_interval(rng.normal(size=4), 0.9)
            misses += not found.low <= 0 <= found.high
        assert stats.binom.ppf(5e-5, 2000, 0.1) <= misses <= stats.binom.ppf(1 - 5e-5, 2000, 0.1)


def test_readable() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="level=95"):
        t_interval([1.0, 2.0], 95)
    with pytest.raises(DataError, match="shape"):
        t_interval([])
    with pytest.raises(DataError, match="shape"):
        t_interval([[1.0, 2.0]])
    with pytest.raises(NumericalError, match="NaN"):
        t_interval([1.0, math.nan])


def test_one_more_lies_in_its_interval_as_often_as_it_says() -> None:
    """Of 4,000 draws of five values and one more, 95 % (3.5 standard errors: 1 in 2,000); and the
    ends are those of the textbook."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 6))
    found = [interval_of_one_more(row[:5]) for row in draws]
    covered = np.mean([x.low <= row[5] <= x.high for x, row in zip(found, draws, strict=True)])
    assert abs(covered - 0.95) < 3.5 * (0.95 * 0.05 / 4000) ** 0.5
    first = draws[0, :5]
    scale = first.std(ddof=1) * np.sqrt(1 + 1 / 5)
    low, high = stats.t.interval(0.95, 4, loc=first.mean(), scale=scale)
    assert (found[0].low, found[0].high) == pytest.approx((low, high))
