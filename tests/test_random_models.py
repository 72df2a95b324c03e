"""Random small architectures: the exact diagonal and the dense matrix are those of the float64
oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fisher_forget import Bernoulli, Categorical, Gaussian, estimate_curvature
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import flatten

TIGHT = 1e-8  # relative, float64
SAMPLES, OUTPUTS = 3, 3
MEMORY = [1, 1 << 28]  # bytes: sample by sample, and all at once
CONV = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Positions(nn.Module):
    """A Linear layer over the positions: [N, C, ...] -> [N, D, ...]; `merge` hides the samples from
    it."""

    def __init__(self, before: int, after: int, merge: bool) -> None:
        super().__init__()
        self.linear, self.merge = nn.Linear(before, after), merge

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        if self.merge:
            out = self.linear(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
        else:
            out = self.linear(rows)
        # contiguous: torch 2.13 crashes in GroupNorm on channels-last inputs that need no gradient
        # themselves
        return out.movedim(-1, 1).contiguous()


@dataclass
class Problem:
    """A model, its data, and what was drawn (hypothesis prints it)."""

    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: Likelihood
    memory: int
    frozen: list[str] = field(default_factory=list)


def activation(draw: st.DrawFn) -> nn.Module:
    return draw(st.sampled_from([nn.Tanh, nn.Sigmoid, nn.SiLU, lambda: nn.ReLU(inplace=True)]))()


def divisor(draw: st.DrawFn, *numbers: int) -> int:
    return draw(st.sampled_from([k for k in range(1, 5) if all(n % k == 0 for n in numbers)]))


def norm(draw: st.DrawFn, channels: int, dims: int, sizes: tuple[int, ...]) -> nn.Module:
    kind = draw(st.sampled_from(["none", "batch", "group", "layer"]))
    if kind == "batch":
        return BATCH_NORM[max(dims, 1)](channels)
    if kind == "group" and dims:
        return nn.GroupNorm(divisor(draw, channels), channels)
    if kind == "layer":
        return nn.LayerNorm([channels, *sizes], bias=draw(st.booleans()))
    return nn.Identity()


def conv(
    draw: st.DrawFn, channels: int, dims: int, sizes: tuple[int, ...], keep: bool
) -> nn.Module:
    """A convolution that fits; `keep` keeps the shape."""
    after = channels if keep else draw(st.sampled_from([2, 4]))
    dilation = draw(st.integers(1, 2))
    largest = 2 if dilation == 2 else 3  # reflection must be narrower than the input
    kernel = tuple(draw(st.integers(1, largest)) for _ in range(dims))
    options: dict[str, Any] = {"stride": 1, "padding": "same"}
    if not keep and draw(st.booleans()):
        stride = tuple(draw(st.integers(1, 2)) for _ in range(dims))
        options = {"stride": stride, "padding": draw(st.integers(0, 1))}
        if options["padding"] == 0 and any(
            dilation * (k - 1) >= size for k, size in zip(kernel, sizes, strict=True)
        ):
            options["padding"] = 1
    modes = ["zeros", "circular", "replicate", "reflect"]
    return CONV[dims](
        channels,
        after,
        kernel,
        dilation=dilation,
        groups=divisor(draw, channels, after),
        padding_mode=draw(st.sampled_from(modes)) if min(sizes) > 2 else "zeros",
        bias=draw(st.booleans()),
        **options,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dims = draw(st.integers(0, 2))
    channels = draw(st.sampled_from([2, 4]))
    shape = (channels, *(4 + draw(st.integers(0, 1)) for _ in range(dims)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 1000)))
        x = torch.randn(SAMPLES, *shape, dtype=torch.float64)
        layers: list[nn.Module] = []
        current = x
        for _ in range(draw(st.integers(1, 2))):
            added = stage(draw, current.shape[1], tuple(current.shape[2:]))
            layers += added
            current = nn.Sequential(*added).double().eval()(current.clone()).detach()
        model = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(current[0].numel(), OUTPUTS)
        ).double()
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if (
                value.is_floating_point()
            ):  # running statistics, too; a scale or variance must stay positive
                value.data = 0.3 * torch.randn_like(value) + (1 if value.min() > 0.99 else 0)
            if name.endswith("running_var"):
                value.data = value.data.abs() + 0.5
        likelihood = draw(st.sampled_from([Categorical(), Bernoulli(), Gaussian(0.7)]))
        y = targets(likelihood)
    names = [name for name, _ in model.named_parameters()]
    frozen = draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return Problem(model.eval(), x, y, likelihood, draw(st.sampled_from(MEMORY)), frozen)


def stage(draw: st.DrawFn, channels: int, sizes: tuple[int, ...]) -> list[nn.Module]:
    """A layer, possibly residual or used twice, and a norm and an activation after it."""
    dims = len(sizes)
    use = draw(st.sampled_from(["plain", "residual", "twice"]))
    keep = use != "plain"
    if dims and draw(st.integers(0, 3)):
        layer = conv(draw, channels, dims, sizes, keep)
    else:
        after = channels if keep else draw(st.sampled_from([2, 4]))
        over_positions = Positions(channels, after, draw(st.booleans())) if dims else None
        layer = over_positions or nn.Linear(channels, after, bias=draw(st.booleans()))
    used = {"plain": [layer], "residual": [Residual(layer)], "twice": [layer, nn.Tanh(), layer]}[
        use
    ]
    out = nn.Sequential(*used).eval()(torch.zeros(1, channels, *sizes))
    return [*used, norm(draw, out.shape[1], dims, tuple(out.shape[2:])), activation(draw)]


def targets(likelihood: Likelihood) -> Tensor:
    if isinstance(likelihood, Categorical):
        return torch.randint(0, OUTPUTS, (SAMPLES,))
    if isinstance(likelihood, Bernoulli):
        return torch.randint(0, 2, (SAMPLES, OUTPUTS)).double()
    return torch.randn(SAMPLES, OUTPUTS, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # vmap over layers without a batching rule
@settings(
    deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(problem=problems())
def test_exact_curvature_is_the_oracle(problem: Problem) -> None:
    model, data = problem.model, torch.utils.data.TensorDataset(problem.x, problem.y)
    # torch.func.functional_call leaves its values in a module that is registered under two names
    truth = oracle.ggn(copy.deepcopy(model), problem.x, problem.y, problem.likelihood)
    scale = max(float(truth.abs().max()), 1e-12)
    options: dict[str, Any] = {"kind": "exact", "memory": problem.memory}
    dense = estimate_curvature(model, data, problem.likelihood, structure="dense", **options)
    assert isinstance(dense, Dense)
    assert float((dense.matrix() - truth).abs().max()) < TIGHT * scale
    diagonal = flatten(
        estimate_curvature(
            model, data, problem.likelihood, structure="diagonal", **options
        ).diagonal()
    )
    assert float((diagonal - truth.diag()).abs().max()) < TIGHT * scale
    ekfac = estimate_curvature(model, data, problem.likelihood, structure="ekfac", **options)
    assert ekfac.trace() == pytest.approx(float(truth.trace()), rel=TIGHT, abs=TIGHT)
