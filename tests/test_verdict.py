"""Verdicts: error rates at the stated level, SciPy's tests, and the order of the labels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fisher_forget import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.scale import LOG, logit
from fisher_forget.evaluate.verdict import (
    AS_RETRAINED,
    DIFFERENT,
    FARTHER,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    UNDECIDED,
    Yardstick,
    holm,
    verdict,
)

RETRAINED = [0.60, 0.64, 0.62, 0.66, 0.63]  # mean 0.63, s = 0.02236
WIDE = np.linspace(-1.6, 1.6, 20) / np.std(
    np.linspace(-1.6, 1.6, 20), ddof=1
)  # 20 models, mean 0, s = 1
WORLDS = 2000
GRID = tuple(itertools.product((3, 5, 10, 20), (1, 3, 5)))


def rates(models: int, runs: int, original: float, distance: float | None) -> dict[str, float]:
    """Shares of labels over worlds of M retrained models N(0, 1) and K scrubbed ones; no distance:
    these are retrained ones, too."""
    rng = np.random.default_rng([models, runs])
    labels = []
    for _ in range(WORLDS):
        r = rng.normal(size=models)
        x = rng.normal(size=runs) if distance is None else np.full(runs, distance)
        labels.append(verdict(x, r, original=original).label)
    return {label: labels.count(label) / WORLDS for label in set(labels)}


def likely(share: float, probability: float) -> bool:
    """Binomial over the worlds, false-alarm rate 1e-5."""
    low, high = stats.binom.ppf([5e-6, 1 - 5e-6], WORLDS, probability)
    return bool(low <= round(WORLDS * share) <= high)


class TestErrorRates:
    @pytest.mark.parametrize(("models", "runs"), GRID)
    def test_retrained_models_are_different_in_five_percent(self, models: int, runs: int) -> None:
        found = rates(models, runs, 1e3, None)
        assert likely(sum(found.get(label, 0.0) for label in DIFFERENT), 0.05)
        assert likely(found.get(OVER_FORGOTTEN, 0.0), 0.025)

    @pytest.mark.parametrize("models", [3, 5, 20])
    @pytest.mark.parametrize("side", [1, -1])
    def test_half_of_the_originals_distance_is_called_as_retrained_in_five_percent_at_most(
        self, models: int, side: int
    ) -> None:
        # an original so near that half of it is seldom called different
        found = rates(models, 1, 5.0, side * 2.5).get(AS_RETRAINED, 0.0)
        assert round(WORLDS * found) <= stats.binom.ppf(1 - 1e-5, WORLDS, 0.05)

    def test_where_the_original_is_far_off_few_retrained_models_show_it(self) -> None:
        for models, least in ((3, 0.85), (5, 0.9)):
            assert rates(models, 3, 30.0, None)[AS_RETRAINED] > least

    def test_what_is_said_to_be_told_apart_is_in_four_of_five_cases(self) -> None:
        for models, runs in GRID:
            edge = Yardstick(0.0, 1.0, models).detectable(runs)  # of the true spread
            rng = np.random.default_rng(models)
            r = rng.normal(size=(WORLDS, models))
            x = edge + rng.normal(size=(WORLDS, runs))
            gap = x.mean(1) - r.mean(1)
            told = np.abs(gap) > stats.t.ppf(0.975, models - 1) * r.std(1, ddof=1) * math.sqrt(
                1 / runs + 1 / models
            )
            assert likely(float(told.mean()), 0.8)

    def test_primary_rows_together(self) -> None:
        # four rows of one model that depend on each other: Holm holds whatever the dependence
        rng = np.random.default_rng(0)
        alarms = 0
        for _ in range(WORLDS):
            shared = rng.normal(size=(6, 1)) + 0.3 * rng.normal(size=(6, 4))
            p = [verdict(c[:1], c[1:], original=1e3).p_value for c in shared.T]
            alarms += min(holm(p)) < 0.05
        assert alarms <= stats.binom.ppf(1 - 1e-5, WORLDS, 0.05)
        assert alarms > 0


class TestLaws:
    @given(st.integers(3, 30), st.integers(1, 6))
    def test_more_retrained_models_make_it_stricter(self, models: int, runs: int) -> None:
        few, many = Yardstick(0.0, 1.0, models), Yardstick(0.0, 1.0, models + 1)
        assert many.limit(runs) < few.limit(runs)
        assert many.detectable(runs) < few.detectable(runs)
        assert few.detectable(runs, models + 1) == pytest.approx(many.detectable(runs))

    @given(st.floats(0, 1e3))
    def test_a_methods_own_spread_does_not_help_it(self, spread: float) -> None:
        steady = verdict([3.0, 3.0, 3.0], WIDE, original=9.0)
        unsteady = verdict([3.0 - spread, 3.0, 3.0 + spread], WIDE, original=9.0)
        assert unsteady.p_value == pytest.approx(steady.p_value, rel=1e-6)
        assert unsteady.label == steady.label == NOT_FORGOTTEN
        assert (unsteady.low, unsteady.high) == (steady.low, steady.high)

    @given(
        st.lists(st.floats(1e-6, 1e3), min_size=3, max_size=8, unique=True), st.floats(1e-6, 1e3)
    )
    def test_ranges_are_possible(self, retrained: list[float], x: float) -> None:
        found = verdict(x, retrained, original=1.0, scale=LOG)
        assert 0 <= found.low <= found.high
        assert found.detectable >= 0 or math.isnan(found.detectable)
        shares = [100 * v / 1e3 for v in retrained]
        found = verdict(x / 10, shares, original=1.0, scale=logit(200))
        assert 0 <= found.low <= found.high <= 100

    @given(st.floats(-6, 6), st.sampled_from([None, "high", "low"]))
    def test_label_p_and_distance_agree(self, x: float, far: Any) -> None:
        found = verdict(x, RETRAINED, original=1.0, far=far)
        different = found.label in DIFFERENT
        assert different == (found.p_value < 0.05)
        beyond = found.distance if far != "low" else -found.distance
        assert different == ((abs(beyond) if far is None else beyond) > 1)
        if far is None:
            assert different == (not found.low <= found.value <= found.high)


class TestAgainstScipy:
    def test_prediction_interval(self) -> None:
        found = verdict(0.65, RETRAINED, original=1.0)
        half = stats.t.ppf(0.975, 4) * np.std(RETRAINED, ddof=1) * math.sqrt(1.2)
        assert (found.low, found.high) == pytest.approx((0.63 - half, 0.63 + half))
        assert found.target == pytest.approx(0.63)
        # The same as a t-test with equal variances of one value against five.
        theirs = stats.ttest_ind([0.65], RETRAINED, equal_var=True)
        assert found.p_value == pytest.approx(theirs.pvalue)

    def test_on_a_scale_it_is_that_of_the_logarithms(self) -> None:
        x, r = np.array([0.60, 0.66, 0.69]), np.array(RETRAINED)
        ours = verdict(x, r, original=1.0, scale=LOG)
        theirs = verdict(np.log(x), np.log(r), original=0.0)
        assert (ours.p_value, ours.distance) == pytest.approx((theirs.p_value, theirs.distance))
        assert ours.high == pytest.approx(math.exp(theirs.high))
        assert (ours.value, ours.target) == pytest.approx((x.mean(), r.mean()))

    @pytest.mark.parametrize("x", [0.61, 0.65, 0.66, 0.67])
    @pytest.mark.parametrize("margin", [0.03, 0.045, 0.06])
    def test_two_one_sided_tests_of_a_given_margin(self, x: float, margin: float) -> None:
        below = stats.ttest_1samp(RETRAINED, x + margin, alternative="less").pvalue < 0.05
        above = stats.ttest_1samp(RETRAINED, x - margin, alternative="greater").pvalue < 0.05
        found = verdict(x, RETRAINED, original=1.0, margin=margin)
        assert found.label == (AS_RETRAINED if below and above else UNDECIDED)

    @pytest.mark.parametrize("x", np.linspace(0.57, 0.69, 13))
    @pytest.mark.parametrize("original", [0.72, 0.74, 0.8, 0.5])
    def test_two_one_sided_tests_of_half_of_the_originals_distance(
        self, x: float, original: float
    ) -> None:
        # x - mu < (o - mu) / 2 is mu > 2 x - o, and x - mu > -(o - mu) / 2 is mu < (2 x + o) / 3,
        # for an o above
        sign = 1 if original > 0.63 else -1
        r, x, original = sign * np.array(RETRAINED), sign * x, sign * original
        near = stats.ttest_1samp(r, 2 * x - original, alternative="greater").pvalue < 0.05
        away = stats.ttest_1samp(r, (2 * x + original) / 3, alternative="less").pvalue < 0.05
        found = verdict(x, r, original=original)
        if found.label not in DIFFERENT:
            assert found.label == (AS_RETRAINED if near and away else UNDECIDED)

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.6, 0.9]) == [1.0, 1.0]
        assert holm([]) == []

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    def test_holm_rejects_step_by_step(self, p: list[float]) -> None:
        rejected = set()
        for step, index in enumerate(np.argsort(p, kind="stable")):
            if p[index] * (len(p) - step) >= 0.05:
                break
            rejected.add(int(index))
        assert {i for i, value in enumerate(holm(p)) if value < 0.05} == rejected


class TestLabels:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_sides(self, sign: float) -> None:
        def label(x: float) -> str:
            return verdict(sign * x, sign * WIDE, original=sign * 10.0).label

        assert label(10.0) == NOT_FORGOTTEN
        assert label(12.0) == NOT_FORGOTTEN
        assert label(4.0) == NOT_FORGOTTEN
        assert label(0.3) == AS_RETRAINED
        assert label(-0.3) == AS_RETRAINED
        assert label(-4.0) == OVER_FORGOTTEN

    def test_monotone_in_distance(self) -> None:
        order = {AS_RETRAINED: 0, UNDECIDED: 1, NOT_FORGOTTEN: 2, OVER_FORGOTTEN: 2}
        for sign in (1, -1):
            found = [verdict(sign * d, WIDE, original=3.0) for d in np.linspace(0, 4, 81)]
            ranks = [order[v.label] for v in found]
            assert ranks == sorted(ranks)
            assert set(ranks) == {0, 1, 2}
            p = [v.p_value for v in found]
            assert p == sorted(p, reverse=True)
            assert p[0] == pytest.approx(1.0)

    def test_does_not_depend_on_unit_and_origin(self) -> None:
        for x in (0.3, 1.8, 4.0):
            ours, theirs = (
                verdict(x, WIDE, original=10.0),
                verdict(5 - 100 * x, 5 - 100 * WIDE, original=5 - 1000.0),
            )
            assert ours.label == theirs.label
            assert ours.p_value == pytest.approx(theirs.p_value)
            assert ours.distance == pytest.approx(-theirs.distance)

    def test_an_original_like_the_retrained(self) -> None:
        inside = verdict(0.2, WIDE, original=0.5)
        assert inside.label == UNDECIDED
        assert "Nothing to forget is visible" in inside.reason
        for x in (4.0, -4.0):
            moved = verdict(x, WIDE, original=0.5)
            assert moved.label == OVER_FORGOTTEN
            assert "Nothing to forget is visible" in moved.reason
        assert "Nothing" not in verdict(0.2, WIDE, original=10.0).reason
        # just outside, where the original is just inside: it has not moved
        limit = Yardstick(0.0, 1.0, 20).limit(1)
        near = verdict(1.001 * limit, WIDE, original=0.999 * limit)
        assert (near.label, near.p_value < 0.05) == (NOT_FORGOTTEN, True)
        assert verdict(0.2, WIDE, original=0.5, margin=1.5).label == AS_RETRAINED

    def test_a_stricter_level_rejects_less(self) -> None:
        assert verdict(2.3, WIDE, original=4.0).label == NOT_FORGOTTEN
        assert verdict(2.3, WIDE, original=4.0, level=0.99).label == UNDECIDED

    def test_undecided_says_what_it_takes(self) -> None:
        found = verdict(1.6, WIDE, original=3.0)
        assert found.label == UNDECIDED
        more = Yardstick(0.0, 1.0, 20).detectable(1, 40)
        reach = f"{found.detectable:.3g} would be told apart with 80 % power, {more:.3g} with 40"
        assert reach in found.reason
        assert verdict(-0.5, WIDE, original=-2.5).detectable == pytest.approx(-found.detectable)

    def test_readable(self) -> None:
        text = str(verdict(1.0, RETRAINED, original=1.0))
        assert text.startswith("not forgotten: 1, retrained 0.63 [0.562, 0.698], p = 0.00011. ")


def distance(x: float, original: float = 10.0, **options: Any) -> str:
    """The label of a distance, which must be that of its negative, a likeness."""
    low = verdict(-x, -WIDE, original=-original, far="low", **options)
    high = verdict(x, WIDE, original=original, far="high", **options)
    assert low.label == high.label
    assert low.p_value == pytest.approx(high.p_value)
    return high.label


class TestDistance:
    def test_towards_the_original_and_beyond_it(self) -> None:
        assert distance(0.3) == AS_RETRAINED
        assert distance(4.0) == NOT_FORGOTTEN
        assert distance(10.0) == NOT_FORGOTTEN  # untouched
        assert distance(10.09) == NOT_FORGOTTEN  # as far as the original, but for 1 %
        for wrecked in (10.2, 12.0, 1e6):
            assert distance(wrecked) == FARTHER

    def test_closer_than_retrained_models_is_no_failure(self) -> None:
        for x in (-0.3, -4.0, -1e3):
            assert distance(x) == AS_RETRAINED
            assert distance(x, original=0.5) == UNDECIDED

    @given(st.floats(-20, 20), st.floats(-20, 20))
    @settings(deadline=None)
    def test_never_over_forgotten_nor_forgotten_beyond_the_original(
        self, x: float, original: float
    ) -> None:
        label = distance(x, original)
        assert label != OVER_FORGOTTEN
        if x > original + 0.011 * abs(original) and x > 0:
            assert label != NOT_FORGOTTEN
        if x <= original:
            assert label != FARTHER or original <= 3

    def test_an_original_like_the_retrained(self) -> None:
        assert distance(4.0, original=0.5) == FARTHER

    def test_farther_than_the_originals_by_chance_is_not_farther(self) -> None:
        originals, moved = np.array([9.0, 10.0, 11.0]), np.array([-0.5, 0.3, 0.9])
        assert stats.ttest_1samp(moved, 0, alternative="greater").pvalue > 0.05
        for shift, label in ((0.0, NOT_FORGOTTEN), (1.5, FARTHER)):
            x = originals + moved + shift
            assert x.mean() > 1.01 * originals.mean()
            assert verdict(x, WIDE, original=originals, far="high").label == label
            far = stats.ttest_rel(x, originals, alternative="greater").pvalue < 0.05
            assert far == (label == FARTHER)

    def test_without_a_spread(self) -> None:
        same, options = [1.0, 1.0, 1.0], {"far": "high", "margin": 0.02}
        labels = [verdict(x, same, original=2.0, **options).label for x in (0.5, 1.01, 1.5, 2.5)]
        assert labels == [AS_RETRAINED, AS_RETRAINED, NOT_FORGOTTEN, FARTHER]


class TestWithoutSpread:
    def test_equal_scores(self) -> None:
        tenths = [0.1 + 0.2, 0.3, 0.3]  # equal but for rounding
        found = verdict(0.3, tenths, original=1.0)
        assert found.label == AS_RETRAINED
        assert found.p_value == 1
        assert "All retrained models score the same" in found.reason

    def test_whatever_is_off_is_different(self) -> None:
        # as for a spread that vanishes
        for x, original, far in ((0.99, 2.0, None), (1.5, 2.0, None), (1.5, 1.2, "high")):
            nearly = verdict(x, [1.0, 1.0, 1 + 1e-9], original=original, far=far)
            found = verdict(x, [1.0, 1.0, 1.0], original=original, far=far)
            assert found.label == nearly.label
            assert found.p_value == 0
            assert abs(found.distance) > 1

    def test_a_margin_judges(self) -> None:
        same = [1.0, 1.0, 1.0]
        assert verdict(0.99, same, original=2.0, margin=0.02).label == AS_RETRAINED
        assert verdict(0.9, same, original=2.0, margin=0.02).label == OVER_FORGOTTEN
        # an original within the margin has nothing to lose
        for x in (1.0, 1.01):
            blind = verdict(x, same, original=1.01, margin=0.02)
            assert blind.label == UNDECIDED
            assert "beyond 0.02. Nothing to forget is visible" in blind.reason
        far = verdict(1.5, same, original=2.0, margin=0.02)
        assert (far.label, far.p_value) == (NOT_FORGOTTEN, 0)
        assert far.distance == pytest.approx(25)
        hidden = verdict(1.5, same, original=1.01, margin=0.02)
        assert hidden.label == OVER_FORGOTTEN
        assert "Nothing to forget is visible" in hidden.reason


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least 2"):
        verdict(0.5, [0.5], original=1.0)
    with pytest.raises(DataError, match="values"):
        verdict([], RETRAINED, original=1.0)
    with pytest.raises(NumericalError, match="retrained with NaN"):
        verdict(0.5, [0.5, math.nan], original=1.0)
    with pytest.raises(ConfigError, match="margin=0"):
        verdict(0.5, RETRAINED, original=1.0, margin=0.0)
    with pytest.raises(ConfigError, match="margin=nan"):
        verdict(0.5, RETRAINED, original=1.0, margin=math.nan)
    with pytest.raises(NumericalError, match="infinite margin"):
        verdict(0.5, RETRAINED, original=1.0, margin=math.inf)
    with pytest.raises(ConfigError, match="level=95"):
        verdict(0.5, RETRAINED, original=1.0, level=95)
