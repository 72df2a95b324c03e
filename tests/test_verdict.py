"""Verdicts: error rates at the stated level, SciPy's tests, and the order of the labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fisher_forget import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.verdict import (
    FARTHER,
    INDISTINGUISHABLE,
    NOT_FORGOTTEN,
    OVER_FORGOTTEN,
    UNDECIDED,
    Design,
    verdict,
)

RETRAINED = [0.60, 0.64, 0.62, 0.66, 0.63]  # mean 0.63, s = 0.02236
WIDE = np.linspace(-1.6, 1.6, 20) / np.std(
    np.linspace(-1.6, 1.6, 20), ddof=1
)  # 20 models, mean 0, s = 1


def rate(
    models: int, margin: float | None, distance: float | None, seed: int, runs: int = 1
) -> dict[str, float]:
    """Shares of labels over 1000 worlds of retrained models N(0, 1); no distance: the scrubbed are
    such models."""
    rng = np.random.default_rng(seed)
    labels = []
    for _ in range(1000):
        r = rng.normal(size=models)
        x = rng.normal(size=runs) if distance is None else np.full(1, distance)
        labels.append(verdict(x, r, original=1e3, margin=margin).label)
    return {
        label: labels.count(label) / 1000
        for label in (NOT_FORGOTTEN, INDISTINGUISHABLE, OVER_FORGOTTEN)
    }


def likely(share: float, probability: float) -> bool:
    """Binomial over 1000 worlds, false-alarm rate 1e-5."""
    low, high = stats.binom.ppf([5e-6, 1 - 5e-6], 1000, probability)
    return bool(low <= round(1000 * share) <= high)


class TestErrorRates:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # most of the time, and nothing to the labels
        monkeypatch.setattr(Design, "models_needed", lambda *_: None)

    @pytest.mark.parametrize("models", [2, 5, 20])
    def test_a_retrained_model_is_rejected_in_five_percent(self, models: int) -> None:
        found = rate(models, None, None, seed=models)
        assert likely(found[NOT_FORGOTTEN] + found[OVER_FORGOTTEN], 0.05)
        assert likely(found[NOT_FORGOTTEN], 0.025)
        assert likely(found[INDISTINGUISHABLE], Design(models).power())

    @pytest.mark.parametrize("models", [2, 5, 20])
    def test_a_model_at_the_margin_is_called_the_same_in_five_percent(self, models: int) -> None:
        assert likely(rate(models, None, 2.0, seed=30 + models)[INDISTINGUISHABLE], 0.05)

    @pytest.mark.parametrize("models", [5, 20])
    def test_so_is_one_at_a_given_margin(self, models: int) -> None:
        # The two one-sided tests are exact at one side of the margin; the other side only takes
        # probability away.
        found = rate(models, 1.5, 1.5, seed=40 + models)[INDISTINGUISHABLE]
        assert round(1000 * found) <= stats.binom.ppf(1 - 1e-5, 1000, 0.05)
        assert found > 0.02

    @pytest.mark.parametrize("distance", [0.0, 0.5, 1.2])
    def test_power_is_what_it_says(self, distance: float) -> None:
        assert likely(
            rate(10, None, distance, seed=50)[INDISTINGUISHABLE],
            Design(10).power(distance),
        )

    def test_several_runs_are_judged_by_welch(self) -> None:
        found = rate(8, None, None, seed=60, runs=6)
        assert likely(found[NOT_FORGOTTEN] + found[OVER_FORGOTTEN], 0.05)


class TestAgainstScipy:
    def test_prediction_interval(self) -> None:
        found = verdict(0.65, RETRAINED, original=1.0)
        half = stats.t.ppf(0.975, 4) * np.std(RETRAINED, ddof=1) * math.sqrt(1.2)
        assert (found.low, found.high) == pytest.approx((0.63 - half, 0.63 + half))
        assert found.target == pytest.approx(0.63)
        assert found.margin == pytest.approx(2 * 0.0223607, rel=1e-5)
        # The same as a t-test with equal variances of one value against five.
        assert found.p_value == pytest.approx(
            stats.ttest_ind([0.65], RETRAINED, equal_var=True).pvalue
        )

    def test_welch(self) -> None:
        x = torch.tensor([0.60, 0.66, 0.69], dtype=torch.float64)
        found = verdict(x, RETRAINED, original=1.0)
        theirs = stats.ttest_ind(x.numpy(), RETRAINED, equal_var=False)
        assert found.p_value == pytest.approx(theirs.pvalue)
        interval = theirs.confidence_interval(0.95)
        assert found.high - found.target == pytest.approx((interval.high - interval.low) / 2)
        assert found.value == pytest.approx(0.65)

    @pytest.mark.parametrize("x", [0.61, 0.65, 0.66, 0.67])
    @pytest.mark.parametrize("margin", [0.03, 0.045, 0.06])
    def test_two_one_sided_tests(self, x: float, margin: float) -> None:
        below = stats.ttest_1samp(RETRAINED, x + margin, alternative="less").pvalue < 0.05
        above = stats.ttest_1samp(RETRAINED, x - margin, alternative="greater").pvalue < 0.05
        found = verdict(x, RETRAINED, original=1.0, margin=margin)
        assert found.label == (INDISTINGUISHABLE if below and above else UNDECIDED)
        assert found.margin == pytest.approx(margin)

    def test_two_one_sided_welch_tests(self) -> None:
        x = np.array([0.62, 0.65, 0.66])
        for margin in (0.03, 0.04, 0.05, 0.06):
            below = (
                stats.ttest_ind(x - margin, RETRAINED, equal_var=False, alternative="less").pvalue
                < 0.05
            )
            above = (
                stats.ttest_ind(
                    x + margin, RETRAINED, equal_var=False, alternative="greater"
                ).pvalue
                < 0.05
            )
            found = verdict(x, RETRAINED, original=1.0, margin=margin).label
            assert found == (INDISTINGUISHABLE if below and above else UNDECIDED)

    def test_power_by_hand(self) -> None:
        # Known margin c, M = 16, t_{15, 0.95} = 1.75305: |x - rbar| / s < c - 1.75305 / 4, and for
        # a retrained model (x - rbar) / (s sqrt(17/16)) is Student's t with 15 degrees of freedom.
        bound = (3 - 1.75305 / 4) / math.sqrt(17 / 16)
        assert Design(16, 3.0, estimated=False).power() == pytest.approx(
            2 * stats.t.cdf(bound, 15) - 1, abs=1e-5
        )
        assert verdict(0.0, WIDE, original=9.0).power == pytest.approx(Design(20).power())


class TestLabels:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_sides(self, sign: float) -> None:
        def label(x: float) -> str:
            return verdict(sign * x, sign * WIDE, original=sign * 10.0).label

        assert label(10.0) == NOT_FORGOTTEN
        assert label(12.0) == NOT_FORGOTTEN
        assert label(4.0) == NOT_FORGOTTEN
        assert label(0.3) == INDISTINGUISHABLE
        assert label(-0.3) == INDISTINGUISHABLE
        assert label(-4.0) == OVER_FORGOTTEN

    def test_monotone_in_distance(self) -> None:
        order = {INDISTINGUISHABLE: 0, UNDECIDED: 1, NOT_FORGOTTEN: 2, OVER_FORGOTTEN: 2}
        for sign in (1, -1):
            found = [verdict(sign * d, WIDE, original=10.0) for d in np.linspace(0, 4, 81)]
            ranks = [order[v.label] for v in found]
            assert ranks == sorted(ranks)
            assert set(ranks) == {0, 1, 2}
            p = [v.p_value for v in found]
            assert p == sorted(p, reverse=True)
            assert p[0] == pytest.approx(1.0)

    def test_the_edges_are_where_the_formulas_say(self) -> None:
        edge = stats.t.ppf(0.975, 19) * math.sqrt(1.05)
        same = stats.nct.ppf(0.05, 19, 2 * math.sqrt(20)) / math.sqrt(20)
        assert verdict(edge - 1e-6, WIDE, original=10.0).label == UNDECIDED
        assert verdict(edge + 1e-6, WIDE, original=10.0).label == NOT_FORGOTTEN
        assert verdict(same - 1e-6, WIDE, original=10.0).label == INDISTINGUISHABLE
        assert verdict(same + 1e-6, WIDE, original=10.0).label == UNDECIDED

    def test_does_not_depend_on_unit_and_origin(self) -> None:
        for x in (0.3, 1.8, 4.0):
            ours, theirs = (
                verdict(x, WIDE, original=10.0),
                verdict(5 - 100 * x, 5 - 100 * WIDE, original=5 - 1000.0),
            )
            assert (ours.label, ours.models_needed) == (theirs.label, theirs.models_needed)
            assert ours.p_value == pytest.approx(theirs.p_value)

    def test_an_original_like_the_retrained(self) -> None:
        inside = verdict(0.2, WIDE, original=0.5)
        assert inside.label == INDISTINGUISHABLE
        assert "Nothing to forget is visible" in inside.reason
        for x in (4.0, -4.0):
            moved = verdict(x, WIDE, original=0.5)
            assert moved.label == OVER_FORGOTTEN
            assert "Nothing to forget is visible" in moved.reason
        assert "Nothing" not in verdict(0.2, WIDE, original=10.0).reason

    def test_a_difference_within_a_generous_margin_is_still_a_difference(self) -> None:
        found = verdict(4.0, WIDE, original=10.0, margin=8.0)
        assert found.label == NOT_FORGOTTEN
        assert "within the given margin" in found.reason
        assert "within" not in verdict(4.0, WIDE, original=10.0, margin=4.0).reason

    def test_a_stricter_level_rejects_less(self) -> None:
        assert verdict(2.3, WIDE, original=10.0).label == NOT_FORGOTTEN
        assert verdict(2.3, WIDE, original=10.0, level=0.99).label == UNDECIDED

    def test_undecided_says_what_it_takes(self) -> None:
        near, far = verdict(1.6, WIDE, original=10.0), verdict(2.05, WIDE, original=10.0)
        assert near.label == far.label == UNDECIDED
        assert near.models_needed == Design(20).models_needed(1.6)
        assert f"about {near.models_needed} retrained models" in near.reason
        assert far.models_needed is None
        assert "show a difference" in far.reason
        assert "over 1000" in verdict(1.99, WIDE, original=10.0).reason

    def test_readable(self) -> None:
        text = str(verdict(1.0, RETRAINED, original=1.0))
        assert text.startswith("not forgotten: 1, retrained 0.63 [0.562, 0.698], p = 0.00011. ")


def distance(x: float, original: float = 10.0, **options: Any) -> str:
    """The label of a distance, which must be that of its negative, a likeness."""
    low = verdict(-x, -WIDE, original=-original, far="low", **options)
    high = verdict(x, WIDE, original=original, far="high", **options)
    assert low.label == high.label
    assert low.reason == high.reason
    return high.label


class TestDistance:
    def test_towards_the_original_and_beyond_it(self) -> None:
        assert distance(0.3) == INDISTINGUISHABLE
        assert distance(4.0) == NOT_FORGOTTEN
        assert distance(10.0) == NOT_FORGOTTEN  # untouched
        assert distance(10.0 * (1 + 1e-9)) == NOT_FORGOTTEN
        for wrecked in (10.1, 12.0, 1e6):
            assert distance(wrecked) == FARTHER

    def test_closer_than_retrained_models_is_no_failure(self) -> None:
        for x in (-0.3, -4.0, -1e3):
            assert distance(x) == INDISTINGUISHABLE

    @given(st.floats(-20, 20), st.floats(-20, 20))
    @settings(deadline=None)
    def test_never_over_forgotten_nor_forgotten_beyond_the_original(
        self, x: float, original: float
    ) -> None:
        label = distance(x, original)
        assert label != OVER_FORGOTTEN
        if x > original + 1e-3 and x > 0:
            assert label != NOT_FORGOTTEN
        if x <= original:
            assert label != FARTHER or original <= 3

    def test_an_original_like_the_retrained(self) -> None:
        assert distance(4.0, original=0.5) == FARTHER

    def test_without_a_spread(self) -> None:
        same, options = [1.0, 1.0, 1.0], {"far": "high", "margin": 0.02}
        labels = [verdict(x, same, original=2.0, **options).label for x in (0.5, 1.01, 1.5, 2.5)]
        assert labels == [INDISTINGUISHABLE, INDISTINGUISHABLE, NOT_FORGOTTEN, FARTHER]


class TestWithoutSpread:
    def test_equal_scores(self) -> None:
        tenths = [0.1 + 0.2, 0.3, 0.3]  # equal but for rounding
        found = verdict(0.3, tenths, original=1.0)
        assert found.label == INDISTINGUISHABLE
        assert math.isnan(found.p_value)
        assert "All retrained models score the same" in found.reason

    def test_only_a_margin_can_judge(self) -> None:
        same = [1.0, 1.0, 1.0]
        assert verdict(0.99, same, original=2.0).label == UNDECIDED
        assert verdict(0.99, same, original=2.0, margin=0.02).label == INDISTINGUISHABLE
        assert verdict(0.9, same, original=2.0, margin=0.02).label == OVER_FORGOTTEN
        assert verdict(1.5, same, original=2.0, margin=0.02).label == NOT_FORGOTTEN
        hidden = verdict(1.5, same, original=1.01, margin=0.02)
        assert hidden.label == OVER_FORGOTTEN
        assert "Nothing to forget is visible" in hidden.reason


class TestModelsNeeded:
    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("distance", [None, 0.0, 1.0, 1.5])
    def test_is_the_least_number(self, distance: float | None, known: bool) -> None:
        found = Design(2, estimated=not known).models_needed(distance)
        assert found is not None
        assert Design(found, estimated=not known).power(distance) >= 0.8
        assert Design(found - 1, estimated=not known).power(distance) < 0.8

    def test_approaches_the_normal_formula(self) -> None:
        # A known margin c at distance d: n = ((z_0.8 + z_0.95) / (c - d))^2 = 618 for c - d = 0.1,
        # d small.
        expected = ((stats.norm.ppf(0.8) + stats.norm.ppf(0.95)) / 0.1) ** 2
        assert Design(2, 0.2, estimated=False).models_needed(0.1) == pytest.approx(
            expected, rel=0.02
        )

    def test_grows_with_distance_and_has_an_end(self) -> None:
        numbers = [Design(2).models_needed(d) for d in (0.0, 0.5, 1.0, 1.5, 1.8)]
        assert numbers == sorted(numbers)  # type: ignore[type-var]
        assert Design(2).models_needed(2.1) is None
        # A retrained model is itself within 1 s with probability 0.68 only, however many there are.
        assert Design(2, 1.0).models_needed() is None


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
    with pytest.raises(ConfigError, match="models=1"):
        Design(1)
    with pytest.raises(ConfigError, match="margin=-1"):
        Design(2, -1.0)
