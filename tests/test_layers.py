"""Second moments of layers, and EKFAC's bases, against plain products."""

from __future__ import annotations

import oracle
import pytest
import torch
from laws import blocks, claim, obeys
from small_models import MODELS, prepared
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import Categorical, estimate_curvature
from fisher_forget.curvature.rules.base import add_gram, add_squared_products
from fisher_forget.curvature.rules.convolution import ConvRule
from fisher_forget.curvature.rules.linear import LinearRule
from fisher_forget.curvature.structures.kronecker import Kronecker
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.split import resolve_split


def symmetric(upper: torch.Tensor) -> torch.Tensor:
    return upper.triu() + upper.triu(1).T


def test_gram_of_blocks() -> None:
    rows = torch.randn(11, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.cat([rows, torch.ones(11, 1, dtype=torch.float64)], 1)
    for vectors in (rows, ones):
        total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
        add_gram(total, rows)
        add_gram(total, rows)
        assert torch.allclose(symmetric(total), 2 * vectors.T @ vectors)


def test_squared_products_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    y, x = (torch.randn(7, *shape, generator=g, dtype=torch.float64) for shape in ((5, 3), (3, 4)))
    expected = (y @ x).square().sum(0)
    for budget in (1, 40, 1 << 20):
        monkeypatch.setattr("fisher_forget.curvature.rules.base.PIECE_BYTES", budget)
        total = torch.zeros(5, 4, dtype=torch.float64)
        add_squared_products(total, y, x)
        assert torch.allclose(total, expected)


CONVOLUTIONS = [
    {"padding": 1},
    {"padding": 0},
    {"padding": 2},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "dilation": 2},
    {"padding": (0, 1), "kernel_size": (2, 3)},
    {"padding": "same", "padding_mode": "circular", "kernel_size": (3, 2)},
    {"padding": 1, "kernel_size": 5},
    {"padding": 1, "stride": 2},
    {"padding": 1, "groups": 3},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_moments_equal_those_of_unfolded_patches(
    options: dict[str, object], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autocorrelation of stride-1 convolutions, borders included, is exact."""
    monkeypatch.setattr("fisher_forget.curvature.rules.convolution.SHIFTS_FROM", 0)
    torch.manual_seed(0)
    module = nn.Conv2d(3, 6, **{"kernel_size": 3, **options}, bias=bias).double()
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64)
    out = module(x)
    rule = ConvRule(module)
    size = module.weight[0].numel() + bias
    total = torch.zeros(size, size, dtype=torch.float64)
    rule.add_column_moment(total, x, torch.randn_like(out))
    # one output channel's pre-activation is linear in the patch: recover each patch by unit kernels
    channels, kernel = module.weight.shape[1], module.weight.shape[2:]
    rows = []
    for group in range(module.groups):
        unit = (
            torch.eye(size - bias, dtype=torch.float64).view(-1, *kernel, channels).movedim(-1, 1)
        )
        seen = nn.Conv2d(
            channels, len(unit), **{"kernel_size": 3, **options, "groups": 1}, bias=False
        ).double()
        seen.weight.data = unit
        part = x[:, group * channels : (group + 1) * channels]
        rows.append(seen(part).flatten(2).transpose(1, 2).flatten(0, 1).detach())
    patches = torch.cat(rows)
    if bias:
        patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    assert torch.allclose(symmetric(total), patches.T @ patches)


class Volume(nn.Module):
    """Conv3d, and RMSNorm over the channels of every position."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, **{"kernel_size": 2, **options})
        self.norm = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.norm(positions)).mean(1))


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2, 1), "padding": (0, 1, 1), "kernel_size": (2, 1, 3)},
        {"groups": 2, "padding": 1, "bias": False},
        {"groups": 2, "stride": (2, 1, 2)},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
    ],
)
def test_volumes_and_rms_norm(options: dict[str, object], kind: str, structure: str) -> None:
    """All methods of the curvature, by the layers' rules alone, against the dense oracle."""
    torch.manual_seed(0)
    model = Volume(**options).double().eval()
    data = TensorDataset(torch.randn(6, 2, 3, 4, 3, dtype=torch.float64), torch.randint(0, 3, (6,)))
    tape = Tape(model)
    tape.verify(next(resolve_split(data, [], allow_empty=True).batches("all")))
    assert tape.stray == ()
    like = oracle.start(model)
    truth = oracle.ggn(model, *data.tensors, Categorical(), empirical=kind == "empirical")
    found = estimate_curvature(model, data, structure=structure, kind=kind)
    expected = claim(found, truth, like)
    obeys(found.damped(0.03), expected + 0.03 * torch.eye(len(expected)), like)


def test_rms_norm_over_several_dimensions() -> None:
    torch.manual_seed(0)
    layers = (
        nn.RMSNorm((3, 4)),
        nn.Tanh(),
        nn.RMSNorm(4, elementwise_affine=False),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model = nn.Sequential(*layers).double().eval()
    data = TensorDataset(torch.randn(6, 3, 4, dtype=torch.float64), torch.randint(0, 3, (6,)))
    truth = oracle.ggn(model, *data.tensors, Categorical())
    for structure in ("diagonal", "ekfac"):
        found = estimate_curvature(model, data, structure=structure)
        expected = claim(found, truth, oracle.start(model))
        obeys(found.damped(0.03), expected + 0.03 * torch.eye(len(expected)), oracle.start(model))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "residual", "merged"])
def test_ekfac_bases_diagonalise_the_second_moments(name: str, kind: str) -> None:
    """Hooks gather inputs and output gradients sample by sample; Q^T (sum of their products) Q must
    be diagonal."""
    model, data = prepared(name)
    found = estimate_curvature(model, data, kind=kind)
    seen: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(
                lambda m, a, _: seen.setdefault(id(m.weight), []).append(a[0].detach())
            )
    for x in data.tensors[0]:
        model(x[None])
    by_weight = {id(p): n for n, p in model.named_parameters()}
    checked = 0
    for names, part in blocks(found):
        for key, inputs in seen.items():
            if not isinstance(part, Kronecker) or by_weight[key] not in names:
                continue
            rows = torch.cat([a.reshape(-1, a.shape[-1]) for a in inputs])
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            turned = part.col.T @ (rows.T @ rows) @ part.col
            assert float((turned - turned.diag().diag()).abs().max()) < 1e-9 * float(
                turned.abs().max()
            )
            checked += 1
    assert checked
    assert set(MODELS) >= {name}


def test_replaying_the_first_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlp", "residual", "sequence"):
        model, data = prepared(name)
        replayed = estimate_curvature(model, data, kind="sketch", draws=2)
        monkeypatch.setattr("fisher_forget.curvature.structures.ekfac.REPLAY_BYTES", 0)
        again = estimate_curvature(model, data, kind="sketch", draws=2)
        monkeypatch.undo()
        for key, value in replayed.diagonal().items():
            assert torch.allclose(value, again.diagonal()[key], rtol=1e-9, atol=1e-14)


def test_position_count() -> None:
    linear = LinearRule(nn.Linear(3, 4))
    assert linear.position_count(torch.zeros(2, 5, 4)) == 5
    assert ConvRule(nn.Conv2d(3, 6, 3)).position_count(torch.zeros(2, 6, 4, 5)) == 20
