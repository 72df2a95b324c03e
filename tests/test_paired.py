"""Ratios of KL over the same originals, and which ratio could have been told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fisher_forget.evaluate.paired import geometric, ratio, smallest_ratio, told
from fisher_forget.evaluate.scale import LEAST


def test_by_hand() -> None:
    """Two originals: ln(2) and ln(8) on average ln(4), t = 12.7062 of one degree of freedom."""
    found = ratio([2.0, 8.0], [1.0, 1.0])
    half = 12.706205 * math.log(2)  # s / sqrt(2) of ln(2), ln(8)
    assert found.value == pytest.approx(4)
    assert (found.low, found.high) == pytest.approx((4 / math.exp(half), 4 * math.exp(half)))
    assert geometric([2.0, 8.0]).value == pytest.approx(4)


def test_what_is_common_to_both_cancels() -> None:
    hard = np.exp(np.random.default_rng(0).normal(0, 3, 8))
    found = ratio(2 * hard, hard)
    assert (found.low, found.value, found.high) == pytest.approx((2, 2, 2))
    backwards = ratio(hard, 2 * hard)
    assert backwards.value == pytest.approx(0.5)


def test_intervals_cover_the_ratio_as_often_as_they_claim() -> None:
    """95 % of 4,000 draws; three standard deviations of a binomial are 1 point."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        common = rng.normal(0, 1, 5)
        found = ratio(
            np.exp(common + rng.normal(0.7, 0.4, 5)), np.exp(common + rng.normal(0, 0.4, 5))
        )
        covered += found.low <= math.exp(0.7) <= found.high
    assert abs(covered / 4000 - 0.95) < 0.011


def test_what_has_no_interval() -> None:
    for found in (
        ratio([1.0], [2.0]),
        ratio([1.0, 1.0], [2.0]),
        ratio([1.0, math.inf], [1.0, 1.0]),
    ):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert ratio([1.0, 4.0], [1.0]).value == pytest.approx(2)
    assert math.isnan(ratio([math.inf] * 2, [math.inf] * 2).value)
    assert geometric([0.0]).value == pytest.approx(LEAST)


@pytest.mark.parametrize("models", [2, 3, 5, 10, 30])
def test_the_smallest_ratio_is_found_in_80_per_cent_of_cases(models: int) -> None:
    """By simulated paired tests of SciPy: 20,000, three standard deviations are .0085."""
    shift = math.log(smallest_ratio(0.5, models))
    differences = np.random.default_rng(models).normal(shift, 0.5, (20_000, models))
    found = float((stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05).mean())
    assert found == pytest.approx(0.8, abs=0.009)


def test_the_smallest_ratio_of_a_published_table() -> None:
    """80 % power at 5 %, two-sided: a mean of 0.996 sd for ten pairs, of 0.66 for twenty."""
    assert math.log(smallest_ratio(1.0, 10)) == pytest.approx(0.996, abs=0.002)
    assert math.log(smallest_ratio(1.0, 20)) == pytest.approx(0.66, abs=0.005)


def test_nothing_is_told_by_one_or_by_what_is_not_finite() -> None:
    assert math.isnan(smallest_ratio(1.0, 1))
    assert math.isnan(smallest_ratio(math.nan, 5))
    assert smallest_ratio(0.0, 5) == 1.0
    assert smallest_ratio(1e4, 2) == math.inf


def test_what_could_have_been_told_goes_by_the_paired_spread() -> None:
    hard = np.exp(np.random.default_rng(0).normal(0, 3, 4))  # common to both: it cancels
    other = hard * np.exp([0.1, 0.3, -0.2, 0.4])
    spread = float(np.std([0.1, 0.3, -0.2, 0.4], ddof=1))
    assert told(other, hard) == pytest.approx(smallest_ratio(spread, 4))
    assert told([1.0, 2.0], [0.5, 1.0]) == 1.0
    for values, reference in (([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([math.inf, 1.0], [1.0, 1.0])):
        assert math.isnan(told(values, reference))
