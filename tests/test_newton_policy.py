"""The Newton policy by itself: signs and options in, times and budget out."""

from __future__ import annotations

import math

import pytest

from fisher_forget import ForgetOptions
from fisher_forget.unlearn.newton.policy import (
    DRIFTING,
    STATIONARY,
    STRICT,
    TIMES,
    Policy,
    Signs,
    decide,
)

SETTLED = Signs(stationarity=0.2, gain=0.01, allowed=0.01, drift_prevails=False)
TRAINING = Signs(stationarity=0.088, gain=0.02, allowed=0.0067, drift_prevails=False)
DRIFTS = Signs(stationarity=3.0, gain=0.0, allowed=0.01, drift_prevails=True)


class TestMinimum:
    @pytest.mark.parametrize(
        ("signs", "at_minimum"), [(SETTLED, True), (TRAINING, False), (DRIFTS, False)]
    )
    def test_needs_a_small_gradient_and_a_loss_that_stays(
        self, signs: Signs, at_minimum: bool
    ) -> None:
        assert decide(signs, ForgetOptions()).at_minimum == at_minimum

    def test_the_bound_itself_is_too_much(self) -> None:
        signs = Signs(STATIONARY, gain=0.0, allowed=0.01, drift_prevails=False)
        assert not decide(signs, ForgetOptions()).at_minimum

    def test_the_reason_is_the_one_that_holds(self) -> None:
        lower = "training on would lower the retained loss by 0.02 nats, 0.0067 expected at most"
        assert TRAINING.unsettled == f"{lower}; stationarity 0.088 is fine"
        assert DRIFTS.unsettled == "stationarity 3, 0.5 expected at most"
        blind = Signs(stationarity=0.2, gain=math.inf, allowed=0.01, drift_prevails=False)
        assert "cannot be computed" in blind.unsettled
        assert SETTLED.unsettled == ""


class TestDrift:
    def test_is_removed_only_away_from_a_minimum_and_where_it_prevails(self) -> None:
        here = Signs(stationarity=0.2, gain=0.0, allowed=0.01, drift_prevails=True)
        assert not decide(here, ForgetOptions()).remove_drift
        assert not decide(TRAINING, ForgetOptions()).remove_drift
        assert decide(DRIFTS, ForgetOptions()).remove_drift

    @pytest.mark.parametrize("drift", [True, False])
    @pytest.mark.parametrize("signs", [SETTLED, TRAINING, DRIFTS])
    def test_an_option_decides_itself(self, signs: Signs, drift: bool) -> None:
        assert decide(signs, ForgetOptions(drift=drift)).remove_drift == drift


class TestBudget:
    @pytest.mark.parametrize(
        ("signs", "drift", "budget"),
        [
            (SETTLED, "auto", None),
            (SETTLED, True, STRICT),
            (TRAINING, "auto", STRICT),
            (TRAINING, False, STRICT),
            (DRIFTS, "auto", STRICT),
        ],
    )
    def test_is_strict_where_the_loss_need_not_rise(
        self, signs: Signs, drift: bool | str, budget: float | None
    ) -> None:
        assert decide(signs, ForgetOptions(drift=drift)).budget == budget  # type: ignore[arg-type]

    @pytest.mark.parametrize("signs", [SETTLED, TRAINING, DRIFTS])
    def test_a_given_one_stays(self, signs: Signs) -> None:
        assert decide(signs, ForgetOptions(budget=0.3)).budget == 0.3
        assert decide(signs, ForgetOptions(budget=0.0)).budget == 0.0


class TestTimes:
    def test_grow_to_the_horizon(self) -> None:
        assert decide(SETTLED, ForgetOptions()).times(cleared=False) == TIMES
        assert sum(TIMES) == 3875
        assert list(TIMES) == sorted(TIMES)

    def test_are_shorter_without_the_drift(self) -> None:
        assert decide(DRIFTS, ForgetOptions()).times(cleared=False) == DRIFTING
        assert decide(TRAINING, ForgetOptions()).times(cleared=False) == TIMES

    @pytest.mark.parametrize("remove_drift", [True, False])
    @pytest.mark.parametrize(("unsettled", "times"), [("", (125.0,)), ("it moves", ())])
    def test_one_or_none_from_cleared_rows(
        self, remove_drift: bool, unsettled: str, times: tuple[float, ...]
    ) -> None:
        assert Policy(unsettled, remove_drift, None).times(cleared=True) == times
