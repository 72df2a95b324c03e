"""Intervals: equal to SciPy's, with the coverage they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fisher_forget import ConfigError, DataError, NumericalError
from fisher_forget.evaluate import intervals
from fisher_forget.evaluate.intervals import Interval, bootstrap, t_interval


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(1)


def difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.mean(1) - y.mean(1)


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


class TestBootstrap:
    def test_agrees_with_scipy(self) -> None:
        rng = np.random.default_rng(2)
        x, y = rng.exponential(size=60), rng.normal(size=40)
        for paired, data in ((False, (x, y)), (True, (x[:40], y))):
            theirs = stats.bootstrap(
                data,
                lambda a, b, axis=-1: a.mean(axis) - b.mean(axis),
                n_resamples=20000,
                method="percentile",
                paired=paired,
                vectorized=True,
                rng=np.random.default_rng(3),
            ).confidence_interval
            ours = bootstrap(difference, *data, draws=20000, paired=paired)
            # Quantiles of 20000 draws have a standard error near 0.02 standard deviations (0.2):
            # 0.02 is 5 of them.
            assert ours.low == pytest.approx(theirs.low, abs=0.02)
            assert ours.high == pytest.approx(theirs.high, abs=0.02)
            assert ours.value == pytest.approx(data[0].mean() - data[1].mean())

    def test_the_mean_of_many_is_normal(self) -> None:
        x = np.random.default_rng(4).normal(size=400)
        found = bootstrap(mean, x, draws=8000, level=0.9)
        half = 1.6449 * x.std() / 20
        assert found.high - found.value == pytest.approx(half, rel=0.06)
        assert found.value - found.low == pytest.approx(half, rel=0.06)

    def test_paired_rows_stay_together(self) -> None:
        x = np.random.default_rng(5).normal(size=50)
        together = bootstrap(difference, x, x + 1, paired=True)
        assert (together.low, together.high) == pytest.approx((-1.0, -1.0))
        apart = bootstrap(difference, x, x + 1)
        assert apart.high - apart.low > 0.5

    def test_rows_of_a_matrix_are_resampled_whole(self) -> None:
        x = np.arange(30.0)
        rows = np.stack([x, 2 * x], 1)

        def gap(stack: np.ndarray) -> np.ndarray:
            return np.abs(stack[..., 1] - 2 * stack[..., 0]).max(1)

        assert bootstrap(gap, rows) == Interval(0.0, 0.0, 0.0)

    def test_does_not_depend_on_the_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = np.arange(20.0), np.arange(7.0) ** 2
        whole = bootstrap(difference, x, y, draws=101, seed=6)
        monkeypatch.setattr(intervals, "CHUNK", 100)
        assert bootstrap(difference, x, y, draws=101, seed=6) == whole
        assert bootstrap(difference, x, y, draws=101, seed=7) != whole

    def test_one_row_has_no_bounds(self) -> None:
        found = bootstrap(difference, [1.0], [2.0, 3.0])
        assert found.value == -1.5
        assert math.isnan(found.low)
        assert math.isnan(found.high)

    def test_leaves_the_global_state_alone(self) -> None:
        before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is tested
        bootstrap(mean, [1.0, 2.0])
        assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_readable() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="level=95"):
        t_interval([1.0, 2.0], 95)
    with pytest.raises(ConfigError, match="at least 40"):
        bootstrap(mean, [1.0, 2.0], draws=39)
    with pytest.raises(DataError, match="shape"):
        t_interval([])
    with pytest.raises(DataError, match="shape"):
        t_interval([[1.0, 2.0]])
    with pytest.raises(NumericalError, match="NaN"):
        t_interval([1.0, math.nan])
    with pytest.raises(DataError, match="rows"):
        bootstrap(difference, [1.0, 2.0], [1.0, 2.0, 3.0], paired=True)
    with pytest.raises(DataError, match="rows"):
        bootstrap(mean, [])
    with pytest.raises(DataError, match="rows"):
        bootstrap(mean)
