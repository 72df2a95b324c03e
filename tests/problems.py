"""Problems put together from their parts, and linear models whose minima are known."""

from __future__ import annotations

from typing import Literal

import numpy as np
import oracle
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from fisher_forget import Categorical, Curvature, Likelihood, Problem
from fisher_forget.data.split import Split
from fisher_forget.params import flatten, unflatten
from fisher_forget.unlearn.data_sums import take_data_sums
from fisher_forget.unlearn.objective import Objective


def problem_of(
    model: nn.Module,
    split: Split,
    curvature: Curvature,
    likelihood: Likelihood | None = None,
    weight_decay: float | Literal["auto"] = 0.0,
) -> Problem:
    """A problem with a curvature of the test's own."""
    objective = Objective(model, likelihood or Categorical())
    return Problem(objective, split, curvature, take_data_sums(objective, split), weight_decay)


def regression() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g, dtype=torch.float64)
    return x, x @ torch.randn(5, 2, generator=g, dtype=torch.float64) + 0.3 * torch.randn(
        60, 2, generator=g
    ).double()


def ridge(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    """Closed-form minimiser of (1/n) sum |y - Wx - b|^2 / 2 + (decay/2) |(W, b)|^2."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    w = torch.linalg.solve(
        ones.T @ ones / len(x) + decay * torch.eye(ones.shape[1], dtype=x.dtype),
        ones.T @ y / len(x),
    )
    model = nn.Linear(x.shape[1], y.shape[1]).double()
    with torch.no_grad():
        model.weight.copy_(w[:-1].T)
        model.bias.copy_(w[-1])
    return model.eval()


def softmax_minimiser(model: nn.Module, x: Tensor, y: Tensor, decay: float) -> nn.Module:
    """SciPy's minimiser of the mean cross-entropy + (decay/2)|w|^2, to a gradient of 1e-10."""
    like = oracle.start(model)

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(w).requires_grad_()
        out = torch.func.functional_call(model, unflatten(flat, like), (x,))
        loss = Categorical().losses(out, y).mean() + decay / 2 * flat.square().sum()
        return float(loss), torch.autograd.grad(loss, flat)[0].numpy()

    found = minimize(
        value,
        flatten(like).numpy(),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-10, "maxiter": 2000},
    )
    with torch.no_grad():
        for p, v in zip(
            model.parameters(), unflatten(torch.from_numpy(found.x), like).values(), strict=True
        ):
            p.copy_(v)
    return model
