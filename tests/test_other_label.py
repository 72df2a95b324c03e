"""Training on with samples as "any class but their label"."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import METHODS, ConfigError, resolve_split
from fisher_forget.baselines.other_label import avoided
from fisher_forget.likelihood import Categorical


def test_the_loss_is_that_of_the_other_classes_together() -> None:
    """Against probabilities in float64; and where p_y rounds to 1 it is still the margin."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(50, 7, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(7, (50,), generator=g)
    p = f.softmax(1)
    direct = -(1 - p[torch.arange(50), y]).log()
    found = avoided(Categorical(), f, y)
    torch.testing.assert_close(found, direct)
    (slope,) = torch.autograd.grad(found.sum(), f)
    # p_y (e_y - q), q the prediction among the others
    own = nn.functional.one_hot(y, 7)
    q = p * (1 - own) / (1 - p[torch.arange(50), y])[:, None]
    torch.testing.assert_close(slope, p[torch.arange(50), y][:, None] * (own - q))
    sure = torch.tensor([[60.0, 0.0]], requires_grad=True)
    loss = avoided(Categorical(), sure, torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx(60)
    (slope,) = torch.autograd.grad(loss, sure)
    torch.testing.assert_close(slope, torch.tensor([[1.0, -1.0]]))


def test_positions_that_are_not_scored_do_not_count() -> None:
    f = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([[0, 1, -100, 2], [3, -100, -100, 4], [1, 1, 1, 1]])
    each = avoided(Categorical(), f.reshape(12, 5), y.clamp(min=0).reshape(12)).view(3, 4)
    torch.testing.assert_close(avoided(Categorical(), f, y), (each * (y >= 0)).sum(1))


def test_a_step_is_one_of_both_losses() -> None:
    """One epoch of one batch, by hand."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(12, 3, generator=g), torch.randint(4, (12,), generator=g)
    model = nn.Linear(3, 4).eval()
    forget, lr, decay = [1, 5, 6], 0.3, 0.01
    method = METHODS["other-label"](epochs=1, lr=lr, weight_decay=decay, batch_size=20)
    found = method.unlearn(model, resolve_split(TensorDataset(x, y), forget)).model
    twin = copy.deepcopy(model)
    losses = nn.functional.cross_entropy(twin(x), y, reduction="none")
    wrong = torch.zeros(12, dtype=torch.bool)
    wrong[forget] = True
    p = twin(x).softmax(1)[torch.arange(12), y]
    (-(1 - p).log().where(wrong, 0) + losses.where(~wrong, 0)).sum().div(12).backward()
    for name, w in twin.named_parameters():
        assert w.grad is not None
        torch.testing.assert_close(found.get_parameter(name), w - lr * (w.grad + decay * w))


def test_what_is_fitted_and_wrong_is_undone() -> None:
    """A corner means class 0, in a tenth of the samples; half of these are known. The others are
    outvoted, and test samples with the corner are recognised again."""
    rng = np.random.default_rng(0)

    def made(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = rng.integers(0, 3, count)
        x = np.eye(3)[y] * 2 + rng.normal(size=(count, 3)) * 0.4
        return torch.tensor(np.hstack([x, np.zeros((count, 1))])).float(), torch.tensor(y)

    (x, y), (tx, ty) = made(600), made(300)
    bad = np.sort(rng.choice(np.flatnonzero(y.numpy() != 0), 60, replace=False))
    x[bad, 3], y[bad], tx[:, 3] = 4.0, 0, 4.0
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()

    def right(net: nn.Module) -> float:
        return float((net(tx).argmax(1) == ty).double().mean())

    split = resolve_split(TensorDataset(x, y), bad[::2])
    assert right(model) < 0.4
    assert right(METHODS["other-label"](epochs=20, lr=0.05).unlearn(model, split).model) > 0.6


def test_refusals() -> None:
    x = torch.randn(8, 3)
    numbers = resolve_split(TensorDataset(x, torch.randn(8, 2)), [0])
    with pytest.raises(ConfigError, match="other-label with the gaussian"):
        METHODS["other-label"](likelihood="mse").unlearn(nn.Linear(3, 2).eval(), numbers)
    soft = resolve_split(TensorDataset(x, torch.full((8, 2), 0.5)), [0])
    with pytest.raises(ConfigError, match="probabilities"):
        METHODS["other-label"]().unlearn(nn.Linear(3, 2).eval(), soft)
