"""Parameters of any shape, scalars and single entries among them, in everything that holds a
curvature: against the float64 oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import claim, obeys
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import estimate_curvature, forget
from fisher_forget.baselines import METHODS
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.data.split import resolve_split
from fisher_forget.likelihood import Categorical

SHAPES = st.lists(st.lists(st.integers(1, 2), max_size=3).map(tuple), min_size=1, max_size=2)
N, CLASSES = 12, 3


class Shaped(nn.Module):
    """Parameters of the given shapes, which no rule knows, beside a layer, which one does."""

    def __init__(self, shapes: list[tuple[int, ...]], layer: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.own = nn.ParameterList(torch.randn(shape, generator=draw) for shape in shapes)
        self.layer = nn.Linear(4, CLASSES) if layer else None

    def forward(self, x: Tensor) -> Tensor:
        out = x[:, :CLASSES] if self.layer is None else torch.tanh(self.layer(x))
        for p in self.own:
            features = torch.outer(x.sum(1), torch.arange(1.0, p.numel() + 1).to(x)).cos()
            out = out * (1 + 0.1 * (features * p.reshape(-1)).sum(1, keepdim=True)) + p.mean()
            out = out + x[:, :CLASSES] * p.reshape(-1)[0]
        return out


def made(shapes: list[tuple[int, ...]], layer: bool) -> tuple[nn.Module, TensorDataset]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (N,), generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Shaped(shapes, layer).double().eval(), TensorDataset(x, y)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", list(STRUCTURES))
@settings(max_examples=5, deadline=None)
@given(SHAPES, st.booleans(), st.sampled_from([1, None]))
def test_every_structure_is_what_the_oracle_says(
    structure: str, kind: str, shapes: list[tuple[int, ...]], layer: bool, memory: int | None
) -> None:
    model, data = made(shapes, layer)
    like, (x, y) = oracle.start(model), data.tensors
    options = {"structure": structure, "kind": kind, "memory": memory, "rank": 100}
    found = estimate_curvature(model, data, **options)
    matrix = oracle.ggn(model, x, y, Categorical(), empirical=kind == "empirical")
    if structure != "low_rank":  # of full rank
        matrix = claim(found, matrix, like)
    obeys(found.damped(0.5), matrix + 0.5 * torch.eye(len(matrix)).to(matrix), like)


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_forget(structure: str, solver: str) -> None:
    model, data = made([(), (1,), (2, 1)], True)
    options = {"structure": structure, "solver": solver, "progress": False}
    result = forget(model, data, [0, 3], weight_decay=0.01, drift=True, noise=1e-3, **options)
    for p, q in zip(result.model.parameters(), model.parameters(), strict=True):
        assert p.shape == q.shape
        assert bool(p.isfinite().all())
        assert not torch.equal(p, q)


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("name", ["influence", "ntk", "ntk-fisher", "ssd"])
def test_methods(name: str, layer: bool) -> None:
    model, data = made([(), (1,)], layer)
    found = METHODS[name]().unlearn(model, resolve_split(data, [0, 3])).model
    assert math.isfinite(sum(float(p.detach().sum()) for p in found.parameters()))
