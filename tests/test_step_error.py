"""sigma_h: what a Newton step says is still to go, where the retrained weights are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import ForgetOptions, NewtonStep, Problem, newton_step
from fisher_forget.params import flatten, size
from fisher_forget.unlearn.newton.horizon import SETTLED, Horizon

GONE = np.arange(20)
LEFT = np.arange(20, 200)


def ridge(wd: float) -> tuple[nn.Module, TensorDataset, Tensor, Tensor]:
    """Model at the minimum, data, retrained weights, and the retained objective's matrix."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g).double() * torch.logspace(0.5, -1.5, 8).double()
    y = x @ torch.randn(8, 1, generator=g).double()
    y = y + 0.3 * torch.randn(200, 1, generator=g).double()

    def fitted(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        matrix = x[rows].T @ x[rows] / len(rows) + wd * torch.eye(8).double()
        return torch.linalg.solve(matrix, x[rows].T @ y[rows] / len(rows)), matrix

    model = nn.Linear(8, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(fitted(np.arange(200))[0].T)
    return model, TensorDataset(x, y), *fitted(LEFT)


def stepped(model: nn.Module, data: TensorDataset, wd: float, **options: Any) -> NewtonStep:
    return with_time(model, data, wd, **options)[0]


def with_time(
    model: nn.Module, data: TensorDataset, wd: float, **options: Any
) -> tuple[NewtonStep, float]:
    """The step, and the time that the model tells."""
    found = ForgetOptions(weight_decay=wd, **options)
    problem = Problem.of(model, data, GONE, found)
    return newton_step(problem, found), Horizon.of(problem).time


STEPS: list[dict[str, Any]] = [
    {"budget": 0.0},
    {"budget": 1e-7},
    {"budget": 1e-5},
    {},
    {"steps": 1, "damping": 0.1},
    {"steps": 3, "damping": 0.1},
    {"steps": 1, "damping": 0.0},
]


@pytest.mark.parametrize("wd", [1e-2, 5e-4])
class TestRidge:
    """Where all is quadratic the distance is known, and sigma_h is it but for the horizon."""

    def found(self, wd: float) -> list[tuple[float, float]]:
        """(sigma_h sqrt(d), distance to the retrained weights) of every way to step."""
        model, data, retrained, matrix = ridge(wd)
        pairs = []
        for options in STEPS:
            options = {"likelihood": "gaussian", "structure": "dense"} | options
            step, time = with_time(model, data, wd, **options)
            ahead = flatten(step.params) - retrained.flatten()
            horizon = torch.eye(8).double() / time
            shorter = torch.linalg.solve(matrix + horizon, matrix @ ahead)
            claimed = step.error * math.sqrt(size(step.params))
            assert claimed == pytest.approx(float(shorter.norm()), rel=1e-6, abs=1e-12)
            pairs.append((claimed, float(ahead.norm())))
        return pairs

    def test_within_the_factor_of_the_horizon(self, wd: float) -> None:
        for claimed, true in self.found(wd):
            assert claimed <= true * (1 + 1e-9) + 1e-12
            assert true <= claimed * (1 + 1 / SETTLED) + 1e-12

    def test_it_never_falls_where_less_is_corrected(self, wd: float) -> None:
        pairs = sorted(self.found(wd), key=lambda pair: pair[1])
        claims = [claimed for claimed, _ in pairs]
        assert claims == sorted(claims)
        assert claims[-1] > 1.2 * claims[0]

    def test_shortened_and_rejected_steps(self, wd: float) -> None:
        model, data, _, _ = ridge(wd)
        options: dict[str, Any] = {"likelihood": "gaussian", "structure": "dense"}
        budgets = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, math.inf)
        steps = [stepped(model, data, wd, budget=budget, **options) for budget in budgets]
        assert any(step.accepted and step.accepted[-1].share < 1 for step in steps)
        errors = [step.error for step in steps]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1.2 * errors[-1]


@pytest.mark.parametrize("options", [{"steps": 1, "damping": tau} for tau in (0.1, 0.01, 0.001)])
def test_logistic_regression(options: dict[str, Any]) -> None:
    """Retrained to the minimum by SciPy: within a factor of three."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g).double()
    y = (x[:, 0] + 0.5 * torch.randn(200, generator=g).double() > 0).long()
    wd, eye = 5e-3, torch.eye(2).double()

    def fitted(rows: np.ndarray) -> Tensor:
        def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.tensor(v).reshape(2, 6)
            logits = x[rows] @ w.T
            loss = nn.functional.cross_entropy(logits, y[rows])
            residual = (logits.softmax(1) - eye[y[rows]]) / len(rows)
            slope = (residual.T @ x[rows] + wd * w).flatten().numpy()
            return float(loss) + wd / 2 * float(w.square().sum()), slope

        found = minimize(objective, np.zeros(12), jac=True, tol=1e-12)
        return torch.tensor(found.x).reshape(2, 6)

    model = nn.Linear(6, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(fitted(np.arange(200)))
    step = stepped(model, TensorDataset(x, y), wd, **options)
    true = float((step.params["weight"] - fitted(LEFT)).norm())
    assert 1 / 3 < step.error * math.sqrt(12) / true < 3


def test_without_weight_decay_it_is_finite() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 40, generator=g)  # fewer samples than weights: flat directions
    model = nn.Linear(40, 1).eval()
    step = stepped(
        model, TensorDataset(x, torch.zeros(30, 1)), 0.0, likelihood="gaussian", drift=False
    )
    assert 0 < step.error < math.inf
