"""The gap and its interval: closed forms, a jackknife done by leaving models out, and coverage in a
world whose truth is known.

In that world a model is a point, and the KL of two models is half of their squared distance, as of
Gaussians with these means: retrained models are N(0, I_d), so the floor is d, and an original at o
has KL (|o|^2 + d) / 2.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from fisher_forget.evaluate.gap import Gap, gap_closed, p_value
from fisher_forget.evaluate.intervals import Array

D = 10


def kl(a: Array, b: Array) -> Array:
    return np.square(a[:, None] - b[None]).sum(-1) / 2


def measured(retrained: Array, originals: Array, scrubbed: Array) -> tuple[Array, ...]:
    """The arguments of `gap_closed`."""
    mutual, count = kl(retrained, retrained), len(retrained) - 1
    to_models = (kl(retrained, models).T for models in (originals, scrubbed))
    return *to_models, mutual.sum(0) / count, mutual.sum(1) / count


def world(seed: int, members: int, runs: int, far: float = 15.0, left: float = 2.0):
    rng = np.random.default_rng(seed)
    shift = np.zeros(D)
    shift[0] = 1.0
    points = (rng.normal(size=(n, D)) for n in (members, runs, runs))
    retrained, originals, scrubbed = points
    return retrained, originals + far * shift, scrubbed + left * shift


def share_of(retrained: Array, originals: Array, scrubbed: Array) -> tuple[float, float]:
    """Numerator and denominator, from the models."""
    mutual = kl(retrained, retrained)
    floor = mutual[~np.eye(len(retrained), dtype=bool)].mean()
    before, after = kl(retrained, originals), kl(retrained, scrubbed)
    return float(before.mean() - after.mean()), float(before.mean() - floor)


class TestInterval:
    @pytest.mark.parametrize("runs", [1, 4])
    def test_its_ends_are_where_fiellers_test_just_rejects(self, runs: int) -> None:
        """(above - rho below)^2 = t^2 var(above - rho below), found by leaving models out."""
        models = retrained, originals, scrubbed = world(0, 6, runs)
        above, below = share_of(*models)
        rest = np.array(
            [share_of(np.delete(retrained, i, 0), originals, scrubbed) for i in range(6)]
        )

        def excess(rho: float) -> float:
            direction = np.array([1, -rho])
            spread = 5 / 6 * np.square((rest - rest.mean(0)) @ direction).sum()
            limit = stats.t.ppf(0.975, 5) ** 2 * spread
            return float((above - rho * below) ** 2 - limit)

        found = gap_closed(*measured(*models))
        assert found is not None
        assert found.value == pytest.approx(above / below)
        assert found.low == pytest.approx(optimize.brentq(excess, -5.0, found.value))
        assert found.high == pytest.approx(optimize.brentq(excess, found.value, 9.0))

    def test_neither_unit_nor_order_matters(self) -> None:
        models = world(1, 5, 3)
        first = gap_closed(*measured(*models))
        again = gap_closed(*measured(*(m[::-1] for m in models)))
        scaled = gap_closed(*(7 * x for x in measured(*models)))
        assert first is not None
        for other in (again, scaled):
            assert other is not None
            assert (other.value, other.low, other.high) == pytest.approx(
                (first.value, first.low, first.high)
            )

    @pytest.mark.parametrize(("members", "runs"), [(4, 1), (12, 1), (5, 3), (12, 5)])
    def test_it_covers_the_truth(self, members: int, runs: int) -> None:
        """Of 300 intervals at 95 % fewer than 269 cover it with a chance below 1e-4 (binomial)."""
        covered = 0
        for seed in range(300):
            models = _, originals, scrubbed = world(seed, members, runs, far=60.0)
            found = gap_closed(*measured(*models))
            assert found is not None
            # of these originals
            before, after = (np.square(x).sum(1).mean() / 2 + D / 2 for x in (originals, scrubbed))
            covered += found.low <= (before - after) / (before - D) <= found.high
        assert covered >= 269


class TestNoGap:
    @pytest.mark.parametrize(("members", "runs"), [(3, 1), (5, 1), (12, 1), (5, 3)])
    def test_a_retrained_model_in_the_originals_place_has_none(
        self, members: int, runs: int
    ) -> None:
        """Told apart in 5 % of 600 cases at most: over 52 with a chance below 1e-4 (binomial)."""
        apart = defined = 0
        for seed in range(600):
            arguments = measured(*world(seed, members, runs, far=0.0, left=0.0))
            gap = Gap.of(*arguments)
            apart += gap.p_original <= 0.05
            defined += gap.closed is not None
        assert 0 < apart <= 52
        assert defined <= apart

    def test_two_retrained_models_cannot_tell(self) -> None:
        gap = Gap.of(*measured(*world(0, 2, 1, far=50.0)))
        assert gap.closed is None
        assert math.isnan(gap.p_original)
        assert not gap.scrubbed_told_apart

    def test_what_is_not_finite_has_none(self) -> None:
        original, scrubbed, *beside = measured(*world(0, 5, 1))
        for bad in (math.nan, math.inf):
            assert gap_closed(original * bad, scrubbed, *beside) is None
            assert gap_closed(original, scrubbed * bad, *beside) is None
            assert math.isnan(p_value(original * bad, *beside))

    def test_retrained_models_that_are_all_alike(self) -> None:
        """Without a spread whatever is farther is apart."""
        same = np.zeros((5, D))
        at = np.eye(D)[:1]
        gap = Gap.of(*measured(same, 3 * at, at))
        assert (gap.p_original, gap.p_scrubbed) == (0.0, 0.0)
        assert gap.closed is not None
        assert gap.closed.value == gap.closed.low == gap.closed.high == pytest.approx(8 / 9)
        assert Gap.of(*measured(same, same[:1], same[:1])).p_original == 1.0


def test_a_scrubbed_model_is_told_apart_where_it_is_far() -> None:
    near, far = (Gap.of(*measured(*world(3, 8, 2, left=left))) for left in (0.0, 7.0))
    assert far.scrubbed_told_apart
    assert not near.scrubbed_told_apart
