"""Cross-checks with other libraries, in float64: BackPACK's diagonal, curvlinops' GGN products and
EKFAC.

They are installed by `make bench` and not needed for anything else.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import estimate_curvature
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.params import Params, flatten, randn_like, unflatten

TIGHT = 1e-8  # relative, float64
BATCH = 5  # does not divide the number of samples: batch means must be weighted
HOW = "not installed: run `make bench` once"

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)
    )
    return model, torch.randn(17, 2, 3)


def cnn() -> tuple[nn.Module, Tensor]:
    convolutions = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, stride=2, bias=False),
        nn.ReLU(),
    ]
    # no pooling: BackPACK's derivative of AvgPool2d is in float32 only
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 3)), torch.randn(17, 2, 4, 4)


@pytest.fixture(params=[mlp, cnn], ids=["mlp", "cnn"])
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, TensorDataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = request.param()
        return model.double().eval(), TensorDataset(x.double(), torch.randint(0, 3, (len(x),)))


def ours(model: nn.Module, data: TensorDataset, structure: Any, kind: Any = "exact") -> Any:
    return estimate_curvature(
        model, DataLoader(data, batch_size=BATCH), structure=structure, kind=kind
    )


def batches(data: TensorDataset) -> list[tuple[Tensor, Tensor]]:
    x, y = data.tensors
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def close(found: Tensor, truth: Tensor) -> bool:
    return float((found - truth).abs().max()) < TIGHT * float(truth.abs().max())


class TestBackpack:
    def total(
        self, model: nn.Module, data: TensorDataset, extension: str, field: str, power: int
    ) -> Params:
        """Sum over batches of (batch size)^power / N times what BackPACK finds for a batch's mean
        loss."""
        backpack = pytest.importorskip("backpack", reason=HOW)
        extensions = pytest.importorskip("backpack.extensions", reason=HOW)
        twin, lossfunc = (
            backpack.extend(copy.deepcopy(model)),
            backpack.extend(nn.CrossEntropyLoss()),
        )
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for x, y in batches(data):
            with backpack.backpack(getattr(extensions, extension)()):
                lossfunc(twin(x), y).backward()
            for name, p in twin.named_parameters():
                total[name] += getattr(p, field).detach() * len(x) ** power / len(data)
        return total

    def test_exact_diagonal(self, problem: tuple[nn.Module, TensorDataset]) -> None:
        truth = self.total(*problem, "DiagGGNExact", "diag_ggn_exact", 1)
        found = ours(*problem, "diagonal").diagonal()
        assert all(close(found[name], truth[name]) for name in truth)

    def test_empirical_diagonal(self, problem: tuple[nn.Module, TensorDataset]) -> None:
        # the squares of gradients of l_n / (batch size)
        truth = self.total(*problem, "SumGradSquared", "sum_grad_squared", 2)
        found = ours(*problem, "diagonal", "empirical").diagonal()
        assert all(close(found[name], truth[name]) for name in truth)


class TestCurvlinops:
    def operator(self, name: str, model: nn.Module, data: TensorDataset, **options: Any) -> Any:
        library = pytest.importorskip("curvlinops", reason=HOW)
        twin = copy.deepcopy(model)
        params = list(twin.parameters())
        return getattr(library, name)(twin, nn.CrossEntropyLoss(), params, batches(data), **options)

    def vectors(self, model: nn.Module, count: int = 3) -> list[Params]:
        generator = torch.Generator().manual_seed(5)
        return [randn_like(dict(model.named_parameters()), generator) for _ in range(count)]

    def product(self, operator: Any, v: Params) -> Params:
        return unflatten(operator @ flatten(v), v)

    def test_dense_is_the_ggn(self, problem: tuple[nn.Module, TensorDataset]) -> None:
        model, data = problem
        ggn = self.operator("GGNLinearOperator", model, data)
        found = ours(model, data, "dense")
        assert isinstance(found, Dense)
        for v in self.vectors(model):
            assert close(flatten(found.power(v, 1)), flatten(self.product(ggn, v)))

    def test_empirical_dense_is_the_uncentred_gradient_covariance(
        self, problem: tuple[nn.Module, TensorDataset]
    ) -> None:
        model, data = problem
        fisher = self.operator("EFLinearOperator", model, data)
        found = ours(model, data, "dense", "empirical")
        for v in self.vectors(model):
            assert close(flatten(found.power(v, 1)), flatten(self.product(fisher, v)))

    @pytest.mark.parametrize("kind", ["exact", "empirical"])
    def test_ekfac(self, problem: tuple[nn.Module, TensorDataset], kind: str) -> None:
        model, data = problem
        options = {
            "fisher_type": "type-2" if kind == "exact" else "empirical",
            "separate_weight_and_bias": False,
        }
        peer = self.operator("EKFACLinearOperator", model, data, **options)
        found = ours(model, data, "ekfac", kind)
        for v in self.vectors(model):
            assert close(flatten(found.power(v, 1)), flatten(self.product(peer, v)))
        assert found.trace() == pytest.approx(float(peer.trace), rel=TIGHT)
