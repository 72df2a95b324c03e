"""Scales: there and back, bounds, and the empirical logit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_forget import ConfigError
from fisher_forget.evaluate.scale import COUNT, LINEAR, LOG, logit

POSITIVE = st.floats(1e-9, 1e9)
ANY = st.floats(-700, 700)


@given(POSITIVE)
def test_there_and_back(x: float) -> None:
    for scale in (LINEAR, LOG, COUNT):
        assert scale.score(float(scale.forward(np.array(x)))) == pytest.approx(
            x, rel=1e-9, abs=1e-9
        )


@given(st.integers(0, 100), st.integers(1, 10**6))
def test_shares_of_any_number_of_samples(share: int, samples: int) -> None:
    scale = logit(samples)
    assert scale.score(float(scale.forward(np.array(share)))) == pytest.approx(share, abs=1e-8)


@given(ANY)
def test_whatever_is_taken_back_is_possible(z: float) -> None:
    assert LOG.score(z) >= 0
    assert COUNT.score(z) >= 0
    assert 0 <= logit(60).score(z) <= 100


def test_nothing_comes_back_as_nothing_and_too_much_as_infinite() -> None:
    assert LOG.score(float(LOG.forward(np.array(0.0)))) == 0
    assert LOG.score(1e4) == np.inf


def test_the_empirical_logit() -> None:
    # 3 of 10: ln(3.5 / 7.5); none and all have a place, the same distance from the middle
    forward = logit(10).forward
    assert forward(np.array([30.0, 0.0, 100.0, 50.0])) == pytest.approx(
        [np.log(3.5 / 7.5), np.log(0.5 / 10.5), np.log(10.5 / 0.5), 0.0]
    )


def test_what_is_rounding_is_the_least_positive_number() -> None:
    assert LOG.forward(np.array([0.0, -1e-17, 1e-12])).tolist() == [np.log(1e-12)] * 3
    assert COUNT.forward(np.array(0.0)) == np.log(0.5)


def test_no_samples() -> None:
    with pytest.raises(ConfigError, match="0 samples"):
        logit(0)
