"""Per-sample gradients of models that per-sample code finds hard, against one backward() a sample
and output, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pieces import LENGTH, PIECES, WIDTH, Net, jacobians
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import Categorical, estimate_curvature
from fisher_forget.curvature.passes import squared_gradient_norms
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.split import resolve_split
from fisher_forget.params import flatten

SAMPLES = 20
LIKELIHOOD = Categorical()


def case(*names: str, seed: int = 0) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(seed)
    model = Net(*names).double().eval()
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    return model, TensorDataset(x, torch.randint(0, 3, (SAMPLES,)))


def truth(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """The GGN [d, d] of the mean loss, and the squared gradient norms [N]."""
    x, y = data.tensors
    jacobian, p = jacobians(model, x), model(x).detach().softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nki,nkl,nlj->ij", jacobian, middle, jacobian) / len(x)
    residual = p - nn.functional.one_hot(y, 3)
    return ggn, torch.einsum("nki,nk->ni", jacobian, residual).square().sum(1)


def agrees(model: nn.Module, data: TensorDataset, batch_size: int, memory: int | None) -> None:
    ggn, norms = truth(model, data)
    loader = DataLoader(data, batch_size=batch_size)
    options: dict[str, Any] = {"kind": "exact", "memory": memory}
    diagonal = estimate_curvature(model, loader, structure="diagonal", **options).diagonal()
    torch.testing.assert_close(flatten(diagonal), ggn.diag(), rtol=1e-7, atol=1e-12)
    ekfac = estimate_curvature(model, loader, structure="ekfac", **options)
    assert ekfac.trace() == pytest.approx(float(ggn.trace()), rel=1e-7)
    dense = estimate_curvature(model, loader, structure="dense", **options)
    assert isinstance(dense, Dense)
    values = torch.linalg.eigvalsh(ggn)
    scale = float(values.max())
    assert dense.trace() == pytest.approx(float(ggn.trace()), rel=1e-7)
    shift = 0.1 * scale
    expected = float(torch.logdet(ggn + shift * torch.eye(len(ggn), dtype=torch.float64)))
    assert dense.damped(shift).logdet() == pytest.approx(expected, rel=1e-7, abs=1e-7)
    split = resolve_split(loader, [], allow_empty=True)
    found = squared_gradient_norms(Tape(model), split, split.retain, LIKELIHOOD, memory=memory)
    torch.testing.assert_close(found, norms, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 20])
@pytest.mark.parametrize("name", PIECES)
def test_each_piece(name: str, batch_size: int) -> None:
    model, data = case(name)
    agrees(model, data, batch_size, None)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    names=st.lists(st.sampled_from(list(PIECES)), min_size=2, max_size=3),
    seed=st.integers(0, 2**16),
    batch_size=st.sampled_from([2, 9, 20]),
    memory=st.sampled_from([1, 20_000, None]),
)
def test_random_models(names: list[str], seed: int, batch_size: int, memory: int | None) -> None:
    model, data = case(*names, seed=seed)
    agrees(model, data, batch_size, memory)
