"""Noise laws: covariance through every structure, calibration, Prop. 4 of Golatkar et al. 2020."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from test_curvature import prepared
from torch import Tensor

from fisher_forget import Categorical, ConfigError, calibrate_noise, draw_noise, estimate_curvature, forget
from fisher_forget.data.split import resolve
from fisher_forget.objective import Objective
from fisher_forget.params import add, flatten, norm, unflatten

DRAWS = 6000


def dense(operator: object, like: dict[str, Tensor], p: float) -> Tensor:
    d = sum(v.numel() for v in like.values())
    unit = torch.eye(d, dtype=torch.float64)
    return torch.stack([flatten(operator.power(unflatten(e, like), p)) for e in unit], 1)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "ekfac"])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_covariance(structure: str, exponent: float) -> None:
    """Sample covariance of R draws against s^2 (B + tau I)^-2p.

    For a Gaussian the entry C_ij has standard error sqrt((C_ii C_jj + C_ij^2) / R); 44 * 45 / 2 = 990 entries in each
    of 6 cells at z = 5 (two-sided 5.7e-7) give an expected 0.004 false alarms; the seed is fixed.
    """
    model, data = prepared("mlp")
    operator = estimate_curvature(model, data, structure=structure).damped(0.05)
    like = oracle.start(model)
    scale = 0.3
    expected = scale**2 * dense(operator, like, -2 * exponent)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([flatten(draw_noise(operator, like, scale, generator, exponent)) for _ in range(DRAWS)])
    found = draws.T @ draws / DRAWS
    spread = ((expected.diag()[:, None] * expected.diag() + expected.square()) / DRAWS).sqrt()
    assert float(((found - expected) / spread).abs().max()) < 5.0
    assert float((draws.mean(0) / (expected.diag() / DRAWS).sqrt()).abs().max()) < 5.0


def test_the_exponent_is_the_minimiser_of_the_forgetting_lagrangian() -> None:
    """Prop. 4: Sigma* = (lambda s_h^2)^(1/2) B^(-1/2) minimises tr(B Sigma)/2 + lambda s_h^2 tr(Sigma^-1)/2,

    with Sigma B Sigma = lambda s_h^2 I and value sqrt(lambda s_h^2) tr(B^(1/2)).
    """
    model, data = prepared("mlp")
    operator = estimate_curvature(model, data, structure="ekfac").damped(0.05)
    like = oracle.start(model)
    b, strength = dense(operator, like, 1.0), 0.02
    noise_root = dense(operator, like, -0.25) * strength**0.25  # what draw_noise multiplies xi by
    sigma = noise_root @ noise_root.T

    def lagrangian(s: Tensor) -> float:
        return float((b @ s).trace() / 2 + strength / 2 * torch.linalg.inv(s).trace())

    assert torch.allclose(sigma @ b @ sigma, strength * torch.eye(len(b), dtype=torch.float64), atol=1e-10)
    assert lagrangian(sigma) == pytest.approx(strength**0.5 * float(oracle.power(b, 0.5).trace()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.randn(b.shape, generator=generator, dtype=torch.float64)
        assert lagrangian(sigma + 0.02 * float(sigma.trace()) / len(b) * (a @ a.T) / len(b)) > lagrangian(sigma)


class TestCalibration:
    def pieces(self) -> tuple[Objective, object, object]:
        model, data = prepared("mlp")
        split = resolve(data, [], allow_empty=True)
        return Objective(model, Categorical()), split, estimate_curvature(model, split).damped(0.05)

    @pytest.mark.parametrize("budget", [1e-4, 1e-2, 0.3])
    def test_the_rise_meets_the_budget_from_below(self, budget: float) -> None:
        objective, split, operator = self.pieces()
        scale, rise, allowed = calibrate_noise(objective, split, operator, objective.start, budget=budget, seed=3)
        assert allowed == budget
        assert 0.85 * budget < rise <= budget
        generator = torch.Generator().manual_seed(3)  # measured again, independently of the search
        before = objective.mean_loss(split.batches("retain"), objective.start)
        rises = [
            objective.mean_loss(
                split.batches("retain"), add(objective.start, draw_noise(operator, objective.start, scale, generator))
            )
            - before
            for _ in range(4)
        ]
        assert np.mean(rises) == pytest.approx(rise)

    def test_a_larger_budget_gives_a_larger_scale(self) -> None:
        objective, split, operator = self.pieces()
        scales = [calibrate_noise(objective, split, operator, objective.start, budget=b)[0] for b in (1e-4, 1e-3, 1e-2)]
        assert scales == sorted(scales)
        assert scales[0] > 0

    def test_a_budget_of_nothing_is_refused(self) -> None:
        objective, split, operator = self.pieces()
        with pytest.raises(ConfigError, match="noise=None"):
            calibrate_noise(objective, split, operator, objective.start, budget=0.0)


def test_draws_depend_on_the_generator_alone() -> None:
    model, data = prepared("residual")
    operator = estimate_curvature(model, data).damped(0.1)
    like = oracle.start(model)
    one, two = (flatten(draw_noise(operator, like, 1.0, torch.Generator().manual_seed(7))) for _ in range(2))
    other = flatten(draw_noise(operator, like, 1.0, torch.Generator().manual_seed(8)))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_forget_adds_exactly_the_noise_it_reports() -> None:
    model, data = prepared("mlp")
    result = forget(model, data, [0, 1], steps=1, damping=1.0, drift=True, noise=0.05, progress=False)
    assert result.noise is not None
    moved = add(oracle.start(result.model), result.newton.params, -1)
    assert norm(add(moved, result.noise.params, -1)) < 1e-12
    assert result.noise.norm == pytest.approx(norm(result.noise.params))
    assert result.noise.scale == 0.05
