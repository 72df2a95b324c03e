"""Sums over the data: the sampling variance of the mean gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fisher_forget import Problem
from fisher_forget.unlearn.newton.policy import stationarity

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(200, 5, generator=G).double(), torch.randint(0, 3, (200,), generator=G)


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(5, 3).double().eval()


@pytest.mark.parametrize("positions", [1, 4, 10])
def test_variance_of_the_mean_gradient_with_several_positions_a_sample(positions: int) -> None:
    """Sum_n |g_n|^2 / P^2 over the samples, g_n the gradient of a sample's summed loss."""
    model, n = linear(), 200 // positions
    x, y = X.view(n, positions, 5), Y.view(n, positions).clone()
    if positions > 1:
        y[::3, -1] = -100  # padding is not scored
    else:
        x, y = x[:, 0], y[:, 0]
    squares = []
    for i in range(n):
        loss = F.cross_entropy(model(x[i]).view(-1, 3), y[i].view(-1), reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        squares.append(sum(float(g.square().sum()) for g in grads))
    problem = Problem.of(model, TensorDataset(x, y), [0])
    expected = n * sum(squares[1:]) / (n - 1) / float((y != -100).sum()) ** 2
    assert problem.sums.variance_of_mean(problem.split.retain) == pytest.approx(expected)


def test_rows_cut_into_sequences_are_as_far_from_a_minimum_as_before() -> None:
    """The rows are independent, so that cutting them otherwise changes no variance but by chance:
    a ratio of two estimates from 20 and 200 terms, within a factor of 2 (seeded)."""
    flat = stationarity(Problem.of(linear(), TensorDataset(X, Y), [0]))
    cut = TensorDataset(X.view(20, 10, 5), Y.view(20, 10))
    assert 0.5 < stationarity(Problem.of(linear(), cut, [0])) / flat < 2
