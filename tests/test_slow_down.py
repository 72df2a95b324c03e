"""Slow-down poisoning: its gradient against finite differences, its projections against SciPy, the
attack against a model without poison, and the defences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from fisher_forget import ConfigError, DataError, load_dataset
from fisher_forget.attack.slow_down import (
    SlowDownPoisoning,
    _ball,
    interval,
    refusals,
    step_lengths,
)
from fisher_forget.certify import CertifiedLogistic
from fisher_forget.certify.logistic import hessian_factor


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_dataset("digits").train.tensors
    mine = (y == 3) | (y == 8)
    x = x[mine].flatten(1).double()
    return (x - x.min()) / (x.max() - x.min()), y[mine]


def made(accounting: Any = "added", sigma: float = 0.3) -> CertifiedLogistic:
    generator = torch.Generator().manual_seed(0)
    return CertifiedLogistic(1e-2, sigma, accounting=accounting, generator=generator)


ATTACK = SlowDownPoisoning(radius=8.0, iterations=5)
ROWS = range(40)


class TestSteps:
    def test_the_gradient_is_that_of_the_sum(self) -> None:
        x, y = digits()
        model = made().fit(ATTACK.features(x), y)
        factor = hessian_factor(model.x, model.weights[0], 1e-2)
        own, signs = x[:5], model.signs[0][:5]
        value, gradient = ATTACK._pull(own, signs, model.weights[0], factor)
        assert value == pytest.approx(ATTACK._value(own, signs, model.weights[0], factor))
        at = own.clone().requires_grad_(True)
        (auto,) = torch.autograd.grad(self.total(at, signs, model, factor), at)
        torch.testing.assert_close(gradient, auto, rtol=1e-8, atol=1e-12)

    def total(self, x: Tensor, y: Tensor, model: CertifiedLogistic, factor: Tensor) -> Tensor:
        u = (x - 0.5) / (x - 0.5).norm(dim=1, keepdim=True)
        pull = -torch.sigmoid(-y * (u @ model.weights[0])) * y
        return torch.cholesky_solve((pull[:, None] * u).T, factor).norm(dim=0).sum()

    def test_lengths_are_those_of_the_steps(self) -> None:
        x, y = digits()
        model = made().fit(ATTACK.features(x), y)
        lengths = step_lengths(model)
        for row in (0, 7):
            factor = hessian_factor(model.x, model.weights[0], 1e-2)
            alone = self.total(x[[row]], model.signs[0][[row]], model, factor)
            assert float(lengths[row]) == pytest.approx(float(alone), rel=1e-8)

    @pytest.mark.parametrize("norm", [1, 2, math.inf])
    def test_projections_are_the_nearest_points(self, norm: float) -> None:
        rng = np.random.default_rng(0)
        attack = SlowDownPoisoning(radius=0.5, norm=norm)
        clean = torch.tensor(rng.uniform(0.1, 0.9, (1, 4)))
        wanted = torch.tensor(rng.normal(0.5, 1, (1, 4)))
        found = attack._projected(wanted, clean)[0]
        moved = (found - clean[0]).numpy()
        assert np.linalg.norm(moved, norm) <= 0.5 + 1e-6
        assert float(found.min()) >= 0.0
        assert float(found.max()) <= 1.0

        def far(z: Any) -> float:
            return float(((z - wanted[0].numpy()) ** 2).sum())

        inside = {
            "type": "ineq",
            "fun": lambda z: 0.5 - np.linalg.norm(z - clean[0].numpy(), norm),
        }
        theirs = optimize.minimize(
            far, clean[0].numpy(), bounds=[(0, 1)] * 4, constraints=[inside], tol=1e-10
        )
        assert far(found.numpy()) <= theirs.fun + 1e-4

    def test_a_ball_holds_its_own(self) -> None:
        x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for norm in (1, 2, math.inf):
            y = _ball(x, 1.5, norm)
            assert float(torch.linalg.vector_norm(y, norm, dim=1).max()) <= 1.5 + 1e-9
            inner = torch.linalg.vector_norm(x, norm, dim=1) <= 1.5
            torch.testing.assert_close(y[inner], x[inner])


class TestAttack:
    def test_it_stays_where_it_may_and_gains(self) -> None:
        x, y = digits()
        poisoned = ATTACK.poison(x, y, ROWS, made)
        moved = (poisoned - x[: len(ROWS)]).abs().sum(1)
        assert float(moved.max()) <= ATTACK.radius + 1e-6
        assert float(poisoned.min()) >= -1e-9
        assert float(poisoned.max()) <= 1 + 1e-9
        everyone = x.clone()
        everyone[: len(ROWS)] = poisoned
        before, after = (made().fit(ATTACK.features(z), y) for z in (x, everyone))
        own = slice(0, len(ROWS))
        assert float(step_lengths(after)[own].mean()) > 1.5 * float(
            step_lengths(before)[own].mean()
        )

    def test_bounds_that_add_up_fall_and_what_is_measured_stands(self) -> None:
        x, y = digits()
        makes = {"none": made, "whole gradient": lambda: made("corrected", 2.0)}
        makes["measured"] = lambda: made("measured")
        found = ATTACK.run(x, y, ROWS, makes, test=(x, y))
        assert found.attacked["none"] < found.clean["none"] / 2
        assert found.factor["none"] > 2
        for name in ("whole gradient", "measured"):
            assert found.attacked[name] == found.clean[name] == found.tried
        assert found.refused[0] > found.refused[1]
        assert min(found.accuracy) > 0.9
        assert "times as often" in str(found)
        assert found.to_dict()["factor"] == found.factor

    def test_without_poison_nothing_is_found(self) -> None:
        x, y = digits()
        nothing = SlowDownPoisoning(radius=1e-9, iterations=1)
        found = nothing.run(x, y, ROWS, made)
        assert found.factor["none"] == pytest.approx(1, abs=0.1)
        assert found.refused[0] == found.refused[1]

    def test_with_all_power_everything_is_found(self) -> None:
        """Random directions of any size within the box, and a small budget."""
        x, y = digits()
        strong = SlowDownPoisoning(radius=1e9, iterations=10)
        found = strong.run(x, y, ROWS, lambda: made(sigma=0.2))
        assert found.attacked["none"] <= 3

    def test_batches_spend_less_often(self) -> None:
        x, y = digits()
        features = ATTACK.features(x)
        one, ten = (interval(made().fit(features, y), list(ROWS), n) for n in (1, 40))
        assert one < 40
        assert ten in (0, 40)

    def test_a_screen_refuses_its_share_of_honest_ones(self) -> None:
        x, y = digits()
        model = made().fit(ATTACK.features(x), y)
        everyone = refusals(model, range(0, len(x), 2), 0.9)
        assert everyone == pytest.approx(0.1, abs=0.07)


@pytest.mark.parametrize(
    "change", [{"radius": 0.0}, {"norm": 3}, {"iterations": 0}, {"radius": math.nan}]
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SlowDownPoisoning(**change)


def test_bad_data() -> None:
    x, y = digits()
    with pytest.raises(ConfigError, match="removals"):
        ATTACK.run(x, y, range(10), made, removals=11)
    with pytest.raises(DataError, match="two"):
        ATTACK.poison(x, torch.arange(len(y)) % 3, ROWS, made)
    with pytest.raises(DataError, match="direction"):
        ATTACK.features(torch.full((2, 4), 0.5))
