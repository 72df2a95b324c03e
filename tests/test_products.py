"""Products with J and the GGN, and gradients at other weights, against plain autograd, sample by
sample."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from fisher_forget import (
    Categorical,
    CurvatureError,
    FisherForgetWarning,
    Gaussian,
    Likelihood,
    Limits,
    estimate_curvature,
    forget,
    prepare,
)
from fisher_forget import params as P
from fisher_forget.baselines.influence import Lissa
from fisher_forget.curvature.kernels import TwiceDifferentiable
from fisher_forget.curvature.products import DataProduct
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.data.split import resolve_split
from fisher_forget.evaluate.information import NoiseLaw, information_in_outputs
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

WIDTH, SAMPLES, OUTPUTS = 4, 7, 3


class Recurrent(nn.Module):
    """[B, W] as W steps of one number."""

    def __init__(self, layer: nn.RNNBase, width: int, packed: bool) -> None:
        super().__init__()
        self.layer, self.out, self.packed = layer, nn.Linear(width, WIDTH), packed

    def forward(self, x: Tensor) -> Tensor:
        steps = x[..., None] if self.layer.batch_first else x.T[..., None]
        if self.packed:
            lengths = torch.full((len(x),), x.shape[1] - 1)
            first = self.layer.batch_first
            steps = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=first)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.layer(steps)[0], batch_first=first)
        else:
            out = self.layer(steps)[0]
        return self.out(out[:, -1] if self.layer.batch_first else out[-1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


class Attention(nn.Module):
    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True) if heads else None
        self.project = nn.Linear(4, 12)
        self.out = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[..., None])
        if self.heads is not None:
            x = self.heads(x, x, x, need_weights=False)[0]
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out[:, 0].mean(1))


class Bags(nn.Module):
    """Ids made of the inputs, in bags of equal or of unequal lengths."""

    def __init__(self, mode: str, sparse: bool, offsets: bool, padding: int | None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, WIDTH, mode=mode, sparse=sparse, padding_idx=padding)
        self.offsets = offsets

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach().abs() * 3).long().clamp(max=5)
        if not self.offsets:
            out: Tensor = self.bag(ids)
            return out
        ids, starts = ids[:, :-1], torch.arange(len(x)) * (x.shape[1] - 1)
        summed: Tensor = self.bag(ids.reshape(-1), starts)
        return summed


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class Counting(nn.Module):
    """Buffers that forward passes change, in place and not, and that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.inner(x)
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
        return torch.tanh(out)


class Borrowing(nn.Module):
    """A weight that is used through a list, which no module registers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.borrowed = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) @ self.borrowed[0]


class Cube(torch.autograd.Function):
    """In the old style, with a backward that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 / 6

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * x**2 / 2


class Own(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


@st.composite
def pieces(draw: st.DrawFn) -> nn.Module:
    """A layer or so, from [B, W] to [B, W]."""
    kind = draw(st.sampled_from(["recurrent", "attention", "bags", "distances", "own", "other"]))
    if kind == "recurrent":
        cell = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
        hidden, both = draw(st.integers(1, 3)), draw(st.booleans())
        options: dict[str, Any] = {"num_layers": draw(st.integers(1, 2)), "bidirectional": both}
        options |= {"batch_first": draw(st.booleans()), "bias": draw(st.booleans())}
        if cell is nn.LSTM and hidden > 1 and draw(st.booleans()):
            options["proj_size"] = 1
        width = options.get("proj_size", hidden) * (1 + both)
        return Recurrent(cell(1, hidden, **options), width, draw(st.booleans()))
    if kind == "attention":
        return Attention(draw(st.booleans()))
    if kind == "bags":
        mode, padding = draw(st.sampled_from(["sum", "mean"])), draw(st.sampled_from([None, 0, 2]))
        return Bags(mode, draw(st.booleans()), draw(st.booleans()), padding)
    if kind == "distances":
        return Prototypes()
    if kind == "own":
        return Own(Cube.apply)
    return draw(st.sampled_from([Checkpointed, Counting, Borrowing]))()


def network(seed: int, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A piece between two layers, with a parameter of no dimension, an empty one, and one that
    nothing uses."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.piece = nn.Linear(WIDTH, WIDTH), build()
            self.last = nn.Linear(WIDTH, OUTPUTS)
            self.scale = nn.Parameter(torch.tensor(1.2))
            self.nothing = nn.Parameter(torch.zeros(0, 2))
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.piece(torch.tanh(self.first(x)))) * self.scale
            return out

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().to(dtype).eval()


def samples(likelihood: Likelihood, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=dtype)
    if isinstance(likelihood, Gaussian):
        return TensorDataset(x, torch.randn(SAMPLES, OUTPUTS, generator=generator, dtype=dtype))
    return TensorDataset(x, torch.randint(OUTPUTS, (SAMPLES,), generator=generator))


def by_hand(model: nn.Module, data: TensorDataset, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """GGN [d, d] and gradient [d] of the mean loss, from one gradient an output and sample."""
    weights = [p for p in model.parameters() if p.requires_grad]
    width = sum(p.numel() for p in weights)
    total, pulled = torch.zeros(width, width).double(), torch.zeros(width).double()

    def row(value: Tensor) -> Tensor:
        model.zero_grad()
        value.backward(retain_graph=True)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in weights]
        model.zero_grad()
        return torch.cat([g.reshape(-1) for g in grads]).double()

    for x, y in zip(*data.tensors, strict=True):
        f = model(x[None])[0]

        def loss(v: Tensor, y: Tensor = y) -> Tensor:
            return likelihood.losses(v[None], y[None]).sum()

        jacobian = torch.stack([row(value) for value in f])
        middle = torch.autograd.functional.hessian(loss, f.detach()).double()
        total += jacobian.T @ middle @ jacobian / len(data)
        pulled += row(loss(f)) / len(data)
    return total, pulled


def moved(model: nn.Module, step: float = 0.1) -> tuple[nn.Module, Params]:
    """A copy at other weights, and these."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for p in twin.parameters():
        p.data += step * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return twin, {n: p.detach() for n, p in twin.named_parameters()}


def agree(found: Params, expected: Tensor, tolerance: float) -> None:
    flat = P.flatten(found).double()
    assert float((flat - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-12)


def check(model: nn.Module, likelihood: Likelihood, tolerance: float) -> None:
    """Products at the given weights, products and gradients at others, and back again."""
    dtype = next(model.parameters()).dtype
    data = samples(likelihood, dtype)
    split = resolve_split(torch.utils.data.DataLoader(data, batch_size=3), [], allow_empty=True)
    truth, _ = by_hand(model, data, likelihood)
    like = {n: p.detach() for n, p in model.named_parameters()}
    v = P.randn_like(like, torch.Generator().manual_seed(1))
    for memory in (1, None):  # graphs that are made again, and kept
        b = estimate_curvature(model, split, likelihood, structure="matrix_free", memory=memory)
        agree(b.power(v, 1), truth @ P.flatten(v).double(), tolerance)
    objective = Objective(model, likelihood)
    buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
    twin, at = moved(model)
    elsewhere, gradient = by_hand(twin, data, likelihood)
    product = objective.ggn(split, split.indices("all"), at, SAMPLES)
    assert isinstance(product, DataProduct)
    for _ in range(2):
        found = objective.gradient(split.batches("all"), at)
        agree(found.mean(), gradient, tolerance)
        agree(product(v), elsewhere @ P.flatten(v).double(), tolerance)
    original = by_hand(model, data, likelihood)[1]
    agree(objective.gradient(split.batches("all"), like).mean(), original, tolerance)
    twin_loss = objective.mean_loss(split.batches("all"), at)
    assert twin_loss == pytest.approx(found.loss / SAMPLES, rel=1e-6)
    assert all(torch.equal(b, buffers[n]) for n, b in objective.model.named_buffers())


@settings(
    deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_products_and_gradients_are_those_of_single_samples(data: st.DataObject) -> None:
    likelihood = data.draw(st.sampled_from([Categorical(), Gaussian(0.7)]))
    seed = data.draw(st.integers(0, 1000))
    piece = pieces()
    model = network(seed, lambda: data.draw(piece), torch.float64)
    check(model, likelihood, 1e-9)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bidirectional": True, "num_layers": 2},
        {"proj_size": 1, "bias": False},
    ],
)
def test_single_precision_lstm(options: dict[str, Any]) -> None:
    width = options.get("proj_size", 2) * (2 if "bidirectional" in options else 1)
    for packed in (False, True):
        layer = lambda: Recurrent(nn.LSTM(1, 2, **options), width, packed)  # noqa: B023, E731
        check(network(0, layer, torch.float32), Categorical(), 1e-4)


class TestKernels:
    """The same values as torch's own, with derivatives of any order."""

    @pytest.mark.parametrize("mode", ["sum", "mean", "max"])
    @pytest.mark.parametrize("padding", [None, 1, -1])
    @pytest.mark.parametrize("last", [True, False])
    def test_bags_of_any_length(self, mode: str, padding: int | None, last: bool) -> None:
        weight = torch.randn(5, 3, dtype=torch.float64)
        ids, offsets = torch.tensor([0, 1, 4, 4, 2, 1, 3]), torch.tensor([0, 0, 3, 4, 7, 7])
        options: dict[str, Any] = {"mode": mode, "padding_idx": padding}
        options |= {"include_last_offset": last}
        if mode == "sum":
            options["per_sample_weights"] = torch.randn(7, dtype=torch.float64)
        with TwiceDifferentiable():
            found = F.embedding_bag(ids, weight, offsets, **options)
        torch.testing.assert_close(found, F.embedding_bag(ids, weight, offsets, **options))

    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0, torch.inf])
    def test_distances(self, p: float) -> None:
        x, y = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
        with TwiceDifferentiable():
            found = torch.cdist(x, y, p=p)
        torch.testing.assert_close(found, torch.cdist(x, y, p=p))

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_weight_norm(self, dim: int) -> None:
        v = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        g = torch.norm_except_dim(v, 2, dim).detach() + 1
        expected = torch._weight_norm(v, g, dim)
        with TwiceDifferentiable():
            torch.testing.assert_close(torch._weight_norm(v, g, dim), expected)
            curved = lambda v: torch._weight_norm(v, g, dim).sin()  # noqa: E731
            assert torch.autograd.gradgradcheck(curved, v)

    def test_attention(self) -> None:
        q, k, v = torch.randn(3, 2, 4, 5, 6).double().requires_grad_()
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        for options in ({}, {"is_causal": True}, {"attn_mask": mask, "scale": 0.3}):
            with TwiceDifferentiable():
                found = F.scaled_dot_product_attention(q, k, v, **options)
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **options))
        heads = nn.MultiheadAttention(6, 2).double()
        for wanted in (True, False):
            with TwiceDifferentiable():
                out, weights = heads(q[0], k[0], v[0], need_weights=wanted)
            expected = heads(q[0], k[0], v[0], need_weights=wanted)
            torch.testing.assert_close(out, expected[0])
            assert (weights is None) == (expected[1] is None)

    def test_no_global_flag_changes(self) -> None:
        flags = [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("math", "flash")
        ]
        seen = []

        def watching(x: Tensor) -> Tensor:
            seen.append([torch.backends.cuda.flash_sdp_enabled(), torch.backends.mkldnn.enabled])
            return torch.tanh(x)

        model = network(0, lambda: Own(watching), torch.float64)
        estimate_curvature(model, samples(Categorical()), structure="matrix_free")
        assert all(flash == flags[1] and mkldnn for flash, mkldnn in seen)


class TestAttached:
    def test_weights_and_buffers_are_back_after_an_error(self) -> None:
        model = network(0, Counting, torch.float64)
        before = {n: x.clone() for n, x in model.state_dict().items()}
        objects = {n: id(x) for n, x in model.named_parameters()}
        _, at = moved(model)
        with pytest.raises(KeyError), P.attached(model, at):  # noqa: PT012
            model(torch.randn(2, WIDTH).double())
            assert torch.equal(model.get_parameter("first.weight"), at["first.weight"])
            raise KeyError
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
        assert objects == {n: id(x) for n, x in model.named_parameters()}

    def test_what_is_given_is_not_written_to(self) -> None:
        model = network(0, Counting, torch.float64)
        at = {n: x.detach().clone() for n, x in [*model.named_parameters(), *model.named_buffers()]}
        given = {n: x.clone() for n, x in at.items()}
        with P.attached(model, at):
            model(torch.randn(2, WIDTH).double())
        assert all(torch.equal(x, given[n]) for n, x in at.items())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Detaching(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g.detach() * (ctx.saved_tensors[0] > 0)


class Half(Once):
    """Hides a part only."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return (0.9 * g + 0.1 * g.detach()) * (ctx.saved_tensors[0] > 0)


class InNumpy(Once):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(g.detach().numpy() * (ctx.saved_tensors[0].numpy() > 0))


def largest(x: Tensor) -> Tensor:
    """torch's own, without a second derivative."""
    ids = torch.arange(x.shape[1]).expand(len(x), -1)
    table = x.T.contiguous()
    bags = [F.embedding_bag(ids[i : i + 1], table[:, i : i + 1], mode="max") for i in range(len(x))]
    return x + torch.cat(bags)


def recomputed(x: Tensor) -> Tensor:
    """By checkpoints that know nothing but backward()."""
    out: Tensor = checkpoint(torch.tanh, x, use_reentrant=True)
    return out


HIDING = {
    "once": Once.apply,
    "detach": Detaching.apply,
    "half": Half.apply,
    "numpy": InNumpy.apply,
    "bag": largest,
    "reentrant": recomputed,
}


@pytest.mark.parametrize("function", HIDING.values(), ids=HIDING)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:None of the inputs")
class TestHidden:
    """Where the backward pass can't be differentiated, products are refused."""

    def model(self, function: Callable[[Tensor], Tensor]) -> nn.Module:
        return network(0, lambda: Own(function), torch.float64)

    def test_estimates(self, function: Callable[[Tensor], Tensor]) -> None:
        model, data = self.model(function), samples(Categorical())
        for options in (
            {"structure": "matrix_free"},
            {"structure": "low_rank"},
            {"structure": "dense", "kind": "hessian"},
            {"structure": {"last*": "diagonal", "*": "low_rank"}},
        ):
            with pytest.raises(CurvatureError, match="can't be differentiated again"):
                estimate_curvature(model, data, **options)
        truth, _ = by_hand(model, data, Categorical())
        dense = estimate_curvature(model, data, structure="dense", kind="exact")
        assert float((dense.matrix() - truth).norm()) <= 1e-9 * float(truth.norm())
        # nothing that products are for lies below the hidden part
        head = estimate_curvature(model, data, structure="matrix_free", subset="last*")
        assert head.trace() == pytest.approx(float(truth.diag()[-15:].sum()), abs=math_slack(truth))

    @pytest.mark.filterwarnings("ignore:Retained samples suffered")  # nothing was trained
    def test_forget_goes_on_by_the_direct_solver(
        self, function: Callable[[Tensor], Tensor]
    ) -> None:
        model, data = self.model(function), samples(Categorical())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", FisherForgetWarning)
            found = forget(model, data, [1], drift=True, noise=None, progress=False)
        ours = [str(w.message) for w in seen if "solver='direct'" in str(w.message)]
        assert len(ours) == 1
        assert "can't be differentiated" in ours[0]
        options = {"drift": True, "noise": None, "progress": False}
        expected = forget(model, data, [1], solver="direct", **options)
        assert found.options.solver == "direct"
        for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(CurvatureError, match="solver='direct'"):
            forget(model, data, [1], solver="cg", progress=False)

    @pytest.mark.filterwarnings("ignore:Retained samples suffered")
    def test_prepared(self, function: Callable[[Tensor], Tensor]) -> None:
        model, data = self.model(function), samples(Categorical())
        with pytest.warns(FisherForgetWarning, match="solver='direct'"):
            prepared = prepare(model, data, limits=Limits(1.0, 1.0, rise=9.0), progress=False)
        assert len(prepared.made.sampled) == SAMPLES
        assert prepared.forget([1], drift=True).options.solver == "direct"
        with pytest.raises(CurvatureError, match="solver='direct'"):
            prepared.forget([2], solver="cg")

    def test_information_in_outputs(self, function: Callable[[Tensor], Tensor]) -> None:
        model, data = self.model(function), samples(Categorical())
        split = resolve_split(data, [1])
        weights = {n: p.detach() for n, p in model.named_parameters()}
        law = NoiseLaw(weights, Diagonal(P.map_params(torch.ones_like, weights)), 0.1)
        others = law.at(moved(model)[1])
        exact = information_in_outputs(model, law, others, split.batches("forget"))
        assert exact.isfinite().all()
        for options in ({"draws": 9}, {"linearised": True}):
            with pytest.raises(CurvatureError, match="draws=None"):
                information_in_outputs(model, law, others, split.batches("forget"), **options)

    def test_influence(self, function: Callable[[Tensor], Tensor]) -> None:
        split = resolve_split(samples(Categorical()), [1])
        with pytest.raises(CurvatureError, match="Use 'influence'"):
            Lissa(steps=2).unlearn(self.model(function), split)


class Kept(torch.autograd.Function):
    """tanh, which keeps its value as an attribute: the first derivative is right, and linear in g;
    that it depends on x is hidden."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.value = x.tanh()
        return ctx.value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * (1 - ctx.value**2)


class TestHessian:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_hidden_second_derivative_is_refused(self, dtype: torch.dtype) -> None:
        model, data = network(0, lambda: Own(Kept.apply), dtype), samples(Categorical(), dtype)
        for structure in ("matrix_free", "dense", "diagonal"):
            with pytest.raises(CurvatureError, match=r"first\.weight"):
                estimate_curvature(model, data, structure=structure, kind="hessian")
        with pytest.raises(CurvatureError, match="Use 'influence'"):
            Lissa(steps=2).unlearn(model, resolve_split(data, [1]))
        check(model, Categorical(), 1e-4 if dtype == torch.float32 else 1e-9)

    @settings(deadline=None, max_examples=15, derandomize=True)
    @given(data=st.data())
    @pytest.mark.filterwarnings("ignore")
    def test_what_is_right_is_not(self, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        normed = lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))  # noqa: E731
        piece = st.sampled_from([lambda: Own(torch.relu), lambda: Own(torch.sign), normed])
        build = data.draw(st.one_of(piece, pieces().map(lambda layer: lambda: layer)))
        model = network(data.draw(st.integers(0, 100)), build, dtype)
        likelihood = data.draw(st.sampled_from([Categorical(), Gaussian(0.7)]))
        given = samples(likelihood, dtype)
        found = estimate_curvature(
            model, given, likelihood, structure="matrix_free", kind="hessian"
        )
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        v = P.randn_like(weights, torch.Generator().manual_seed(1))
        with torch.enable_grad(), TwiceDifferentiable():
            loss = likelihood.losses(model(given.tensors[0]), given.tensors[1]).mean()
            grads = torch.autograd.grad(
                loss,
                list(weights.values()),
                create_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            along = sum(torch.sum(g * v[n]) for n, g in zip(weights, grads, strict=True))
            expected = torch.autograd.grad(
                along, list(weights.values()), materialize_grads=True, allow_unused=True
            )
        flat = torch.cat([x.reshape(-1) for x in expected]).double()
        agree(found.power(v, 1), flat, 1e-4 if dtype == torch.float32 else 1e-9)


def math_slack(truth: Tensor) -> float:
    return 1e-9 * float(truth.trace())


def test_what_is_seldom_used_or_small_hides_nothing() -> None:
    """A tiny gradient below the hidden part is missed as much as a large one."""
    model = network(0, lambda: Own(Once.apply), torch.float64)
    with torch.no_grad():
        model.get_parameter("piece.inner.weight").mul_(1e-3)
        model.get_parameter("last.weight").mul_(1e-3)
    with pytest.raises(CurvatureError, match=r"first\.weight"):
        estimate_curvature(model, samples(Categorical()), structure="matrix_free")


def test_a_dead_layer_is_no_fault() -> None:
    """Gradients of zero, and those of rounding alone, as of a key's bias in attention."""
    for piece in (lambda: Own(lambda x: torch.relu(x - 100)), lambda: Own(torch.sign)):
        model = network(0, piece, torch.float32)
        data = samples(Categorical(), torch.float32)
        estimate_curvature(model, data, structure="matrix_free")
    attention = network(0, lambda: Attention(True), torch.float32)
    for seed in range(3):
        np.random.default_rng(seed)
        estimate_curvature(attention, samples(Categorical(), torch.float32), structure="low_rank")
