"""Sums over the data: all of them, or some that stand for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fisher_forget import Categorical
from fisher_forget.data.split import resolve_split
from fisher_forget.unlearn.data_sums import take_data_sums
from fisher_forget.unlearn.objective import Objective

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 4, 5, generator=G).double(), torch.randint(0, 3, (50, 4), generator=G)
Y[::3, -1] = -100  # padding is not scored


@pytest.mark.parametrize("padded", [False, True])
def test_of_all_and_of_some_samples(padded: bool) -> None:
    """Gradient, loss, count and targets of each class, by autograd over the same samples; all of
    them where some have fewer scored positions."""
    targets = Y if padded else Y.clamp(min=0)
    model = seeded(lambda: nn.Linear(5, 3).double())
    objective = Objective(model, Categorical())
    split = resolve_split(TensorDataset(X, targets), [0, 7])
    for most in (None, 60, 20):
        sums = take_data_sums(objective, split, most, seed=3)
        rows = sums.samples
        assert len(rows) == (50 if padded else min(most or 50, 50))
        assert np.array_equal(rows, np.unique(rows))
        y = targets[rows].flatten()
        loss = F.cross_entropy(model(X[rows]).flatten(0, 1), y, reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for found, truth in zip(sums.total.sums.values(), grads, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
        assert sums.total.count == float((y != -100).sum())
        assert sums.total.classes.tolist() == [int((y == c).sum()) for c in range(3)]
        p = model(X).softmax(-1).detach()
        spread = ((1 - p.square().sum(-1)) * (targets != -100)).sum(
            -1
        )  # tr(diag p - p p^T), summed
        torch.testing.assert_close(sums.spread_of(rows).double(), spread[rows], rtol=1e-5, atol=0)
    others = take_data_sums(objective, split, 20, seed=4)
    assert np.array_equal(others.samples, sums.samples) == padded
