"""Rewind-to-delete against gradient descent written out by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget import ConfigError, NumericalError
from fisher_forget.baselines.rewind_to_delete import RewindToDelete
from fisher_forget.data.split import resolve_split

DATA = blobs_data()
X, Y = DATA.tensors[0].double(), DATA.tensors[1]
GONE = [0, 5, 17, 30, 31]
KEPT = [n for n in range(len(Y)) if n not in GONE]
LR, WD = 0.05, 0.01


def small() -> nn.Module:
    """The same untrained net every time."""
    return seeded(small_net, 0)


def descended(model: nn.Module, rows: list[int], steps: int) -> nn.Module:
    """The model after full gradient descent, in place."""
    weights = list(model.parameters())
    for _ in range(steps):
        grads = torch.autograd.grad(F.cross_entropy(model(X[rows]), Y[rows]), weights)
        with torch.no_grad():
            for p, g in zip(weights, grads, strict=True):
                p.sub_(LR * (g + WD * p))
    return model.eval()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def split(gone: list[int] = GONE):
    data = torch.utils.data.TensorDataset(X, Y)
    return resolve_split(data, gone, allow_empty=True)


@pytest.mark.parametrize("steps", [1, 6])
def test_back_to_the_start_is_retraining(steps):
    """All steps of a short training are taken back: what is left is gradient descent on D_r."""
    model = descended(small().double(), list(range(len(Y))), steps)
    retrained = vector(descended(small().double(), KEPT, steps))
    method = RewindToDelete(steps=steps, lr=LR, weight_decay=WD)
    found = method.unlearn(model, split())
    far = (vector(model) - retrained).norm()
    assert (vector(found.model) - retrained).norm() < 0.02 * far
    assert found.passes > steps


def test_nothing_to_forget_leads_back():
    model = descended(small().double(), list(range(len(Y))), 6)
    found = RewindToDelete(steps=6, lr=LR, weight_decay=WD).unlearn(model, split([]))
    moved = (vector(model) - vector(small().double())).norm()
    assert (vector(found.model) - vector(model)).norm() < 0.01 * moved


def test_no_steps_change_nothing():
    model = small().double().eval()
    found = RewindToDelete(steps=0).unlearn(model, split())
    assert torch.equal(vector(found.model), vector(model))
    assert found.passes == 0


def test_a_rate_that_cannot_be_taken_back():
    with pytest.raises(NumericalError, match=r"does not settle|not finite"):
        RewindToDelete(steps=1, lr=50.0).unlearn(small().double().eval(), split())


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("steps", -1), ("weight_decay", -1.0)])
def test_settings(field, value):
    with pytest.raises(ConfigError, match=field):
        RewindToDelete(**{field: value})
