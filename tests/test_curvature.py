"""Every cell of the support table against a float64 dense oracle, and the laws every curvature
obeys."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from laws import blocks
from small_models import MODELS, prepared
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fisher_forget import (
    Bernoulli,
    Categorical,
    CurvatureError,
    Gaussian,
    ModelError,
    estimate_curvature,
)
from fisher_forget.curvature.operator import Spectral
from fisher_forget.curvature.passes import squared_gradient_norms
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.params import channels_last, flatten, randn_like, unflatten

TIGHT = 1e-6  # relative, for every supported cell


def split_of(data: TensorDataset) -> Split:
    return resolve_split(data, [], allow_empty=True)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
class TestAgainstOracle:
    def test_dense(self, name: str, kind: str) -> None:
        model, data = prepared(name)
        truth = oracle.ggn(model, *data.tensors, Categorical(), empirical=kind == "empirical")
        found = estimate_curvature(model, data, structure="dense", kind=kind)
        assert isinstance(found, Dense)
        assert float((found.matrix() - truth).abs().max() / truth.abs().max()) < TIGHT

    def test_diagonal(self, name: str, kind: str) -> None:
        model, data = prepared(name)
        truth = oracle.ggn(
            model, *data.tensors, Categorical(), empirical=kind == "empirical"
        ).diag()
        found = flatten(estimate_curvature(model, data, structure="diagonal", kind=kind).diagonal())
        assert float((found - truth).abs().max() / truth.max()) < TIGHT

    def test_ekfac_eigenvalues_are_the_exact_diagonal_in_an_orthonormal_basis(
        self, name: str, kind: str
    ) -> None:
        model, data = prepared(name)
        truth = oracle.ggn(model, *data.tensors, Categorical(), empirical=kind == "empirical")
        found = estimate_curvature(model, data, structure="ekfac", kind=kind)
        like, start, where = oracle.start(model), 0, {}
        for key, p in like.items():
            where[key] = torch.arange(start, start + p.numel())
            start += p.numel()
        for names, part in blocks(found):
            rows = torch.cat([where[n] for n in names])
            shapes = {n: like[n] for n in names}
            unit = torch.eye(len(rows), dtype=torch.float64)
            basis = torch.stack(
                [flatten(part.rotate(unflatten(e, shapes))) for e in unit], 1
            )  # Q^T
            assert float((basis @ basis.T - unit).abs().max()) < 1e-10
            expected = (basis @ truth[rows][:, rows] @ basis.T).diag()
            error = (flatten(part.eigenvalues) - expected).abs().max() / expected.max().clamp(
                min=1e-12
            )
            assert float(error) < TIGHT

    def test_every_structure_has_the_exact_trace(self, name: str, kind: str) -> None:
        model, data = prepared(name)
        truth = float(
            oracle.ggn(model, *data.tensors, Categorical(), empirical=kind == "empirical").trace()
        )
        for structure in ("dense", "diagonal", "ekfac"):
            assert estimate_curvature(
                model, data, structure=structure, kind=kind
            ).trace() == pytest.approx(truth)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "ekfac"])
class TestPowers:
    def operator(self, structure: str) -> tuple[Spectral, nn.Module]:
        model, data = prepared("residual")
        return estimate_curvature(model, data, structure=structure).damped(0.03), model

    def dense(self, operator: Spectral, like: dict[str, Tensor]) -> Tensor:
        d = sum(p.numel() for p in like.values())
        unit = torch.eye(d, dtype=torch.float64)
        return torch.stack([flatten(operator.power(unflatten(e, like), 1.0)) for e in unit], 1)

    @pytest.mark.parametrize("p", [1.0, 0.5, -0.25, -0.5, -1.0])
    def test_equal_the_powers_of_the_dense_matrix(self, structure: str, p: float) -> None:
        operator, model = self.operator(structure)
        like = oracle.start(model)
        v = randn_like(like, torch.Generator().manual_seed(0))
        expected = oracle.power(self.dense(operator, like), p) @ flatten(v)
        found = flatten(operator.power(v, p))
        assert float((found - expected).norm() / expected.norm()) < 1e-8

    def test_compose(self, structure: str) -> None:
        operator, model = self.operator(structure)
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(1))
        once = flatten(operator.power(operator.power(v, -0.25), 0.75))
        expected = flatten(operator.power(v, 0.5))
        assert torch.allclose(once, expected, rtol=1e-9, atol=1e-12)

    def test_diagonal_trace_and_logdet_are_those_of_the_dense_matrix(self, structure: str) -> None:
        operator, model = self.operator(structure)
        matrix = self.dense(operator, oracle.start(model))
        assert torch.allclose(flatten(operator.diagonal()), matrix.diag(), rtol=1e-8)
        assert operator.trace() == pytest.approx(float(matrix.trace()))
        assert operator.logdet() == pytest.approx(float(torch.linalg.slogdet(matrix)[1]))

    def test_damping_adds_a_multiple_of_the_identity(self, structure: str) -> None:
        operator, model = self.operator(structure)
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(2))
        more = flatten(operator.damped(0.5).power(v, 1.0))
        assert torch.allclose(
            more, flatten(operator.power(v, 1.0)) + 0.5 * flatten(v), rtol=1e-9, atol=1e-12
        )

    def test_negative_power_of_a_singular_curvature_is_refused(self, structure: str) -> None:
        model, data = prepared("residual")
        undamped = estimate_curvature(
            model, TensorDataset(*(t[:1] for t in data.tensors)), structure=structure
        )
        if structure == "dense":  # rounding leaves tiny positive eigenvalues: cut them
            undamped = Dense(
                eigenvalues={k: v.where(v > 1e-12, 0.0) for k, v in undamped.eigenvalues.items()},
                basis=undamped.basis,
                like=undamped.like,
            )
        with pytest.raises(CurvatureError, match="Damp it first"):
            undamped.power(randn_like(oracle.start(model), torch.Generator()), -1.0)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "ekfac"])
@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["residual", "sequence"])
def test_the_batch_size_does_not_matter(name: str, kind: str, structure: str) -> None:
    model, data = prepared(name)
    found = []
    for size in (1, 3, 64):
        loader = torch.utils.data.DataLoader(data, batch_size=size)
        curvature = estimate_curvature(
            model, loader, structure=structure, kind=kind, draws=2, seed=5
        )
        found.append(torch.cat([flatten(curvature.diagonal()), torch.tensor([curvature.trace()])]))
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=1e-9, atol=1e-12)


def test_a_small_memory_gives_the_same() -> None:
    model, data = prepared("residual")
    whole = flatten(estimate_curvature(model, data, structure="diagonal").diagonal())
    pieces = flatten(estimate_curvature(model, data, structure="diagonal", memory=1).diagonal())
    assert torch.allclose(whole, pieces, rtol=1e-10)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5)])
def test_other_likelihoods(likelihood: Bernoulli | Gaussian) -> None:
    model, data = prepared("mlp")
    y = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = oracle.ggn(model, data.tensors[0], y, likelihood)
    found = estimate_curvature(
        model, TensorDataset(data.tensors[0], y), likelihood, structure="dense"
    )
    assert float((found.matrix() - truth).abs().max() / truth.abs().max()) < TIGHT


@pytest.mark.parametrize("kind", ["sketch", "sampled"])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)])
def test_random_kinds_are_unbiased(
    kind: str, likelihood: Categorical | Bernoulli | Gaussian
) -> None:
    """Mean of R independent one-draw diagonals within z = 4.5 standard errors of the exact one,
    entry by entry.

    44 entries x 6 cells, two-sided: expected false alarms 264 * 6.8e-6 = 0.002, and the seeds are
    fixed.
    """
    model, data = prepared("mlp")
    x, y = data.tensors
    if not isinstance(likelihood, Categorical):
        y = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = flatten(
        estimate_curvature(model, TensorDataset(x, y), likelihood, structure="diagonal").diagonal()
    )
    draws = torch.stack(
        [
            flatten(
                estimate_curvature(
                    model, TensorDataset(x, y), likelihood, structure="diagonal", kind=kind, seed=s
                ).diagonal()
            )
            for s in range(400)
        ]
    )
    spread = (
        draws.std(0) / len(draws) ** 0.5 + 1e-9 * exact.max()
    )  # a sketch of diagonal H has none for a bias
    error = (draws.mean(0) - exact) / spread
    assert float(error.abs().max()) < 4.5


def test_random_kinds_depend_on_the_seed_alone() -> None:
    model, data = prepared("residual")
    first, again, other = (
        flatten(estimate_curvature(model, data, kind="sketch", seed=seed).diagonal())
        for seed in (1, 1, 2)
    )
    torch.manual_seed(99)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class TestTape:
    def test_rules_cover_what_they_can(self) -> None:
        """The fast path is in use: only the bare parameter of the convolutional net falls back."""
        model, data = prepared("residual")
        tape = Tape(model)
        tape.verify(next(resolve_split(data, [], allow_empty=True).batches("all")))
        assert tape.stray == ("temperature",)

    def test_verification_moves_what_rules_cannot_see(self) -> None:
        model, data = prepared("patched")
        tape = Tape(model)
        tape.verify(next(resolve_split(data, [], allow_empty=True).batches("all")))
        assert "inner.weight" in tape.stray
        assert "attention.in_proj_weight" in tape.stray
        assert "attention.out_proj.weight" in tape.stray
        assert "out.weight" not in tape.stray

    def test_a_wrong_rule_is_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mutation that verification exists for: a rule that is off by a factor."""
        from fisher_forget.curvature.rules.linear import LinearRule

        right = LinearRule.per_sample
        monkeypatch.setattr(
            LinearRule,
            "per_sample",
            lambda self, a, g: {k: 2 * v for k, v in right(self, a, g).items()},
        )
        model, data = prepared("mlp")
        tape = Tape(model)
        tape.verify(next(resolve_split(data, [], allow_empty=True).batches("all")))
        assert set(tape.stray) == set(tape.params)
        truth = oracle.ggn(model, *data.tensors, Categorical()).diag()
        found = flatten(estimate_curvature(model, data, structure="diagonal").diagonal())
        assert torch.allclose(found, truth, rtol=1e-6, atol=1e-12)

    def test_models_that_mix_samples_are_refused(self) -> None:
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f = nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.f(x - x.mean(0))

        data = TensorDataset(torch.randn(6, 3), torch.zeros(6, dtype=torch.long))
        with pytest.raises(ModelError, match="depends on the other samples"):
            estimate_curvature(Centred().eval(), data)


class TestGivenTape:
    """A caller's own private copy serves the estimate, and plain forward passes beside it."""

    @pytest.mark.parametrize(
        "structure",
        ["ekfac", "matrix_free", {"*bias": "dense", "*": "ekfac"}],
    )
    @pytest.mark.parametrize("name", MODELS)
    def test_it_gives_what_the_model_gives(self, name: str, structure: Any) -> None:
        model, data = prepared(name)
        tape = Tape(model)
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
        expected = flatten(estimate_curvature(model, data, structure=structure).power(v, 1.0))
        for _ in range(2):
            found = flatten(estimate_curvature(tape, data, structure=structure).power(v, 1.0))
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)

    def test_it_is_not_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data = prepared("residual")
        copied = []
        deepcopy = copy.deepcopy
        tape = Tape(model)
        monkeypatch.setattr(copy, "deepcopy", lambda x, *a: copied.append(x) or deepcopy(x, *a))
        estimate_curvature(tape, data)
        estimate_curvature(tape, data, structure={"*bias": "dense", "*": "ekfac"})
        squared_gradient_norms(tape, split_of(data), np.arange(7), Categorical())
        assert not any(isinstance(x, nn.Module) for x in copied)

    def test_a_subset_of_its_parameters(self) -> None:
        model, data = prepared("residual")
        tape = Tape(model, ("head.*", "shared.*", "temperature"))
        whole = estimate_curvature(tape, data, structure="diagonal").diagonal()
        part = estimate_curvature(tape, data, structure="diagonal", subset="head.*").diagonal()
        assert set(whole) == set(tape.params)
        assert set(part) == {"head.weight", "head.bias"}
        assert all(torch.allclose(part[name], whole[name], rtol=1e-10) for name in part)
        with pytest.raises(ModelError, match="no parameter that matches"):
            estimate_curvature(tape, data, subset="first.*")

    def test_plain_passes_stay_plain(self) -> None:
        """Outside `run` the hooks do nothing: position ids fed once a batch are not widened, and
        derivatives of all kinds pass."""
        model, data = prepared("sequence")
        tape = Tape(model)
        estimate_curvature(tape, data)
        seen: list[int] = []
        place = next(m for n, m in tape.model.named_modules() if n == "place")
        place.register_forward_hook(lambda _, args, output: seen.append(len(output)))
        x, w = data.tensors[0], oracle.start(model)

        def outputs(at: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(tape.model, at, (x,))

        assert torch.equal(outputs(w), model(x))
        assert seen == [1]
        assert torch.func.jvp(outputs, (w,), (w,))[1].isfinite().all()

    @pytest.mark.parametrize("kind", ["exact", "empirical"])
    @pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense", "matrix_free"])
    def test_in_any_memory_layout(self, structure: Any, kind: Any) -> None:
        model, data = prepared("residual")
        tape = Tape(model)
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
        expected = estimate_curvature(tape, data, structure=structure, kind=kind).damped(0.1)
        channels_last(tape.model)
        found = estimate_curvature(tape, data, structure=structure, kind=kind).damped(0.1)
        for p in (1.0, -1.0):
            assert torch.allclose(flatten(found.power(v, p)), flatten(expected.power(v, p)))
        assert torch.allclose(flatten(found.diagonal()), flatten(expected.diagonal()))


class TestSquaredGradientNorms:
    def expected(self, model: nn.Module, data: TensorDataset, likelihood: Any) -> Tensor:
        """Sample by sample, by autograd."""
        norms = []
        for x, y in data:
            loss = likelihood.losses(model(x[None]), y[None]).sum()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            norms.append(sum(float(g.square().sum()) for g in grads if g is not None))
        return torch.tensor(norms, dtype=torch.float64)

    @pytest.mark.parametrize("name", MODELS)
    def test_equal_those_of_autograd(self, name: str) -> None:
        model, data = prepared(name)
        truth = self.expected(model, data, Categorical())
        order = np.random.default_rng(0).permutation(len(data))[:-1]
        for batch_size, memory in ((64, None), (2, None), (64, 1)):
            split = replace(split_of(data), batch_size=batch_size)
            found = squared_gradient_norms(Tape(model), split, order, Categorical(), memory=memory)
            assert found.dtype == torch.float64
            assert torch.allclose(found, truth[order], rtol=1e-9)

    @pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5)])
    def test_of_other_likelihoods(self, likelihood: Bernoulli | Gaussian) -> None:
        model, data = prepared("mlp")
        y = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(data.tensors[0], y)
        found = squared_gradient_norms(Tape(model), split_of(data), np.arange(9), likelihood)
        assert torch.allclose(found, self.expected(model, data, likelihood), rtol=1e-9)

    def test_of_some_parameters_and_of_no_sample(self) -> None:
        model, data = prepared("residual")
        tape = Tape(model, ("head.bias", "shared.weight"))
        for name, p in model.named_parameters():
            p.requires_grad_(name in tape.params)
        found = squared_gradient_norms(tape, split_of(data), np.arange(7), Categorical())
        model_params = [p for p in model.parameters() if p.requires_grad]
        for n, (x, y) in enumerate(data):
            loss = F.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, model_params)
            assert float(found[n]) == pytest.approx(sum(float(g.square().sum()) for g in grads))
        assert squared_gradient_norms(tape, split_of(data), np.arange(0), Categorical()).shape == (
            0,
        )


def test_subset_and_frozen_parameters() -> None:
    model, data = prepared("residual")
    full = estimate_curvature(model, data, structure="diagonal").diagonal()
    part = estimate_curvature(
        model, data, structure="diagonal", subset=("head.*", "norm.weight")
    ).diagonal()
    assert set(part) == {"head.weight", "head.bias", "norm.weight"}
    for name, value in part.items():
        assert torch.allclose(value, full[name], rtol=1e-10)
    model.first.weight.requires_grad_(False)
    frozen = estimate_curvature(model, data, structure="diagonal").diagonal()
    assert set(full) - set(frozen) == {"first.weight"}


def test_dense_refuses_a_large_model() -> None:
    model = nn.Linear(300, 100).eval()
    data = TensorDataset(torch.randn(4, 300), torch.randint(0, 100, (4,)))
    with pytest.raises(CurvatureError, match=r"30,100 parameters"):
        estimate_curvature(model, data, structure="dense")


def test_the_model_is_untouched() -> None:
    model, data = prepared("residual")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for structure, kind in itertools.product(("dense", "diagonal", "ekfac"), ("exact", "sketch")):
        estimate_curvature(model, data, structure=structure, kind=kind)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
