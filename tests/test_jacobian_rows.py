"""Rows of Jacobians against torch.func, whole and in blocks, of layers that stay factors and of
others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget.baselines.jacobian_rows import Rows
from fisher_forget.data.split import resolve_split
from fisher_forget.likelihood import Categorical
from fisher_forget.params import detached, flatten, unflatten

N, CLASSES = 9, 3


class Scaled(nn.Module):
    """A parameter of its own, which no layer rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def mixed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 5, bias=False),
        nn.Tanh(),
        nn.Linear(5, 3),
        Scaled(),
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3))


@pytest.mark.parametrize("memory", [1 << 30, 24 * (N * CLASSES) ** 2])
@pytest.mark.parametrize("make", [mixed, plain])
def test_products_equal_those_of_the_jacobian(make: object, memory: int) -> None:
    model = seeded(make).double().eval()
    x = torch.randn(N, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(N) % CLASSES
    split = resolve_split(DataLoader(TensorDataset(x, y), batch_size=4), [2, 5])
    parts = (split.retain, split.forget)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    rows = Rows(
        model,
        split,
        parts,
        Categorical(),
        lambda f, _: [e.expand_as(f).contiguous() for e in eye],
        memory,
    )
    start = detached(dict(model.named_parameters()))
    found = torch.func.jacrev(lambda theta: torch.func.functional_call(model, theta, (x,)))(start)
    j = torch.cat([found[name].flatten(2) for name in start], 2)[np.concatenate(parts)].flatten(
        0, 1
    )

    blocks = list(rows)
    assert len(blocks) > 2 if memory < 1 << 30 else len(blocks) == 2
    torch.testing.assert_close(torch.cat(blocks), j)
    torch.testing.assert_close(rows.gram(), j @ j.T)
    v = torch.randn(j.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rows.times(unflatten(v, start)), j @ v)
    c = torch.randn(len(j), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for k, total in enumerate(rows.transposed(c)):
        torch.testing.assert_close(flatten({name: total[name] for name in start}), j.T @ c[:, k])
