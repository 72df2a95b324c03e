"""Every supported (kind, structure) cell against float64 oracles; estimates against their variance;
options."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import oracle
import pytest
import torch
from laws import DRAWS, POWERS, RANK, SEED, claim, exactly, obeys, relative, truth
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget import (
    Categorical,
    CurvatureError,
    Gaussian,
    NumericalError,
    SplitError,
    estimate_curvature,
)
from fisher_forget.curvature import passes as walk
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.estimate import (
    CurvatureKeywords,
    Structure,
    support,
    support_table,
)
from fisher_forget.curvature.kinds import RANDOM
from fisher_forget.curvature.operator import BlockDiagonal, Info
from fisher_forget.curvature.options import CurvatureOptions
from fisher_forget.curvature.solvers import eigh
from fisher_forget.curvature.structures import STRUCTURES, ekfac, low_rank, matrix_free
from fisher_forget.curvature.structures.dense import Dense, from_matrix
from fisher_forget.curvature.structures.diagonal import Diagonal, DiagonalSum
from fisher_forget.curvature.structures.kronecker import Kronecker
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.curvature.structures.matrix_free import MatrixFree
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import some
from fisher_forget.params import Params, flatten, randn_like

SUPPORT = support()
SUPPORTED = [cell for cell, reason in SUPPORT.items() if reason is None]
UNSUPPORTED = [cell for cell, reason in SUPPORT.items() if reason is not None]


@pytest.mark.parametrize("name", ["mlp", "sequence"])
@pytest.mark.parametrize(("kind", "structure"), SUPPORTED)
def test_a_supported_cell_is_what_the_oracle_says(kind: str, structure: str, name: str) -> None:
    model, data = prepared(name)
    like = oracle.start(model)
    found = estimate_curvature(
        model, data, structure=structure, kind=kind, draws=DRAWS, seed=SEED, rank=RANK
    )
    matrix = truth(model, data, kind)
    count = float(Categorical().counts(data.tensors[1]).sum())
    drawn = (DRAWS, SEED) if kind in RANDOM else (0, 0)
    assert found.info == Info(count, kind, structure, *drawn)
    if (kind, structure) == (
        "hessian",
        "diagonal",
    ):  # an estimate: its values are tested by their variance below
        matrix = flatten(found.diagonal()).diag()
    else:
        matrix = claim(found, matrix, like)
    tau = max(0.03, -1.5 * float(torch.linalg.eigvalsh(matrix)[0]))
    damped = exactly(found.damped(tau))
    assert damped.info == found.info
    obeys(damped, matrix + tau * torch.eye(len(matrix)), like)


@pytest.mark.parametrize(("kind", "structure"), UNSUPPORTED)
def test_an_unsupported_cell_says_why(kind: str, structure: str) -> None:
    model, data = prepared("mlp")
    reason = SUPPORT[kind, structure]
    assert reason
    with pytest.raises(CurvatureError, match=re.escape(reason)):
        estimate_curvature(model, data, structure=structure, kind=kind)
    with pytest.raises(CurvatureError, match=re.escape(reason)):
        estimate_curvature(model, data, structure={"0.*": "diagonal", "*": structure}, kind=kind)


def test_type_checkers_know_every_structure_and_option() -> None:
    assert set(get_args(Structure)) == set(STRUCTURES)
    options = {field.name for field in fields(CurvatureOptions)}
    assert set(CurvatureKeywords.__annotations__) == options


def test_the_support_table_shows_every_cell() -> None:
    rows = [line.split("|")[1:-1] for line in support_table().splitlines() if line.startswith("|")]
    structures = [cell.strip() for cell in rows[0][1:]]
    shown = {
        (row[0].strip(), s): cell.strip()
        for row in rows[2:]
        for s, cell in zip(structures, row[1:], strict=True)
    }
    assert shown.keys() == SUPPORT.keys()
    assert all((cell == "yes") == (SUPPORT[at] is None) for at, cell in shown.items())
    assert all(reason in support_table() for reason in SUPPORT.values() if reason)


@pytest.mark.parametrize(
    ("kind", "structure"), [cell for cell in SUPPORTED if cell[0] in ("sketch", "hessian")]
)
def test_neither_memory_nor_batch_size_matters(kind: str, structure: str) -> None:
    model, data = prepared("sequence")
    v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
    found = [
        flatten(
            estimate_curvature(
                model,
                DataLoader(data, batch_size=size),
                structure=structure,
                kind=kind,
                memory=memory,
            ).power(v, 1.0)
        )
        for size, memory in ((64, None), (64, 1), (2, None), (3, 1))
    ]
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-8, atol=1e-12)


def test_a_second_pass_over_the_data_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = prepared("sequence")
    replayed = estimate_curvature(model, data, structure="ekfac")
    monkeypatch.setattr(ekfac, "REPLAY_BYTES", 0)
    walked = estimate_curvature(model, data, structure="ekfac")
    assert walked.info == replayed.info
    assert torch.allclose(flatten(walked.diagonal()), flatten(replayed.diagonal()), rtol=1e-9)


def test_products_work_on_a_convolutional_net() -> None:
    """BatchNorm, grouped and circular convolutions, a shared layer, an in-place ReLU and a bare
    parameter."""
    model, data = prepared("residual")
    like = oracle.start(model)
    v = randn_like(like, torch.Generator().manual_seed(0))
    for kind in ("exact", "empirical"):
        found = estimate_curvature(model, data, structure="matrix_free", kind=kind)
        assert relative(flatten(found.power(v, 1.0)), truth(model, data, kind) @ flatten(v)) < 1e-9
    x, y = data.tensors
    w = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, w, (x,)), y)
    grads = torch.autograd.grad(loss, list(w.values()), create_graph=True)
    expected = torch.autograd.grad(grads, list(w.values()), list(v.values()))
    found = estimate_curvature(model, data, structure="matrix_free", kind="hessian")
    assert (
        relative(flatten(found.power(v, 1.0)), torch.cat([e.reshape(-1) for e in expected])) < 1e-9
    )


@pytest.mark.parametrize("structure", get_args(Structure))
def test_no_result_drags_a_graph_along(structure: str) -> None:
    """A convolution with a large output has a kernel of its own, which sees the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 576, 2)).eval()
    data = TensorDataset(torch.randn(3, 1, 24, 24), torch.tensor([0, 1, 1]))
    found = estimate_curvature(model, data, structure=structure, rank=4)
    v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
    for params in (found.diagonal(), found.power(v, 1.0)):
        assert not any(x.requires_grad for x in params.values())


def test_auto_is_exact_where_products_need_no_columns() -> None:
    model, data = prepared("sequence")
    wide = nn.Linear(3, 40).eval()
    pairs = TensorDataset(torch.randn(4, 3), torch.arange(4))
    assert estimate_curvature(wide, pairs, structure="low_rank").info.kind == "exact"
    assert estimate_curvature(wide, pairs, structure="diagonal").info.kind == "sketch"
    assert estimate_curvature(model, data).info.kind == "exact"


class TestLowRank:
    def test_keeps_the_trace_and_the_largest_eigenvalues(self) -> None:
        model, data = prepared("residual")
        matrix = truth(model, data, "exact")
        found = estimate_curvature(model, data, structure="low_rank", rank=6)
        assert isinstance(found, LowRank)
        assert found.basis.shape == (len(matrix), 6)
        assert found.products < 60 < len(matrix)
        assert torch.allclose(
            found.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[:6], rtol=1e-8
        )
        assert found.trace() == pytest.approx(float(matrix.trace()))
        assert found.residual < 2e-8
        assert not found.trace_estimated

    def test_full_rank_is_the_matrix_itself(self) -> None:
        model, data = prepared("mlp")
        like = oracle.start(model)
        found = estimate_curvature(model, data, structure="low_rank", rank=1000)
        obeys(found.damped(0.03), truth(model, data, "exact") + 0.03 * torch.eye(44), like)
        assert found.basis.shape == (44, 44)
        assert found.delta == 0.0

    def test_repeated_eigenvalues_are_all_found(self) -> None:
        """A Gaussian linear model has every eigenvalue as often as it has outputs."""
        torch.manual_seed(0)
        model = nn.Linear(3, 4, bias=False).double().eval()
        data = TensorDataset(torch.randn(20, 3).double(), torch.randn(20, 4).double())
        found = estimate_curvature(model, data, "gaussian", structure="low_rank", rank=8)
        matrix = oracle.ggn(model, *data.tensors, Gaussian())
        assert torch.allclose(
            found.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[:8], rtol=1e-8
        )

    def test_a_singular_one_is_refused(self) -> None:
        model, data = prepared("mlp")
        few = TensorDataset(*(t[:1] for t in data.tensors))
        found = estimate_curvature(model, few, structure="low_rank", rank=8)
        assert found.delta == 0.0
        assert found.logdet() == -math.inf
        v = randn_like(oracle.start(model), torch.Generator())
        root = oracle.power(truth(model, few, "exact"), 0.5) @ flatten(v)
        assert relative(flatten(found.power(v, 0.5)), root) < 1e-6
        with pytest.raises(CurvatureError, match="Damp it first"):
            found.power(v, -1.0)

    def test_the_trace_of_many_columns_is_an_unbiased_estimate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mean of 200 seeds within 4.5 standard errors: one comparison, false alarms 7e-6, and the
        seeds are fixed."""
        monkeypatch.setattr(low_rank, "EXACT_UP_TO", 1)
        model, data = prepared("mlp")
        found = [
            estimate_curvature(model, data, structure="low_rank", kind="exact", rank=1, seed=s)
            for s in range(200)
        ]
        assert all(f.trace_estimated for f in found)
        traces = torch.tensor([f.trace() for f in found], dtype=torch.float64)
        error = traces.mean() - truth(model, data, "exact").trace()
        assert traces.std() > 0
        assert abs(float(error)) < 4.5 * float(traces.std()) / math.sqrt(200)


class TestMatrixFree:
    def operator(self, **options: Any) -> tuple[MatrixFree, Tensor, Params]:
        model, data = prepared("mlp")
        found = estimate_curvature(model, data, structure="matrix_free", **options)
        assert isinstance(found, MatrixFree)
        return found, truth(model, data, options.get("kind", "exact")), oracle.start(model)

    def counted(self, found: MatrixFree) -> tuple[MatrixFree, list[int]]:
        calls: list[int] = []

        def product(v: Params) -> Params:
            calls.append(1)
            return found.product(v)

        return replace(found, product=product), calls

    @pytest.mark.parametrize("p", POWERS)
    def test_the_default_tolerance_is_kept(self, p: float) -> None:
        found, matrix, like = self.operator()
        v = randn_like(like, torch.Generator().manual_seed(0))
        expected = oracle.power(matrix + 0.01 * torch.eye(44), p) @ flatten(v)
        assert relative(flatten(found.damped(0.01).power(v, p)), expected) < 1e-5

    def test_a_preconditioner_saves_products(self) -> None:
        model, x, y = many(600)
        x = x * torch.logspace(-1.5, 1, 12)  # features of different scales
        model, data = model.double(), TensorDataset(x.double(), y)
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
        plain, without = self.counted(estimate_curvature(model, data, structure="matrix_free"))
        ekfac = estimate_curvature(model, data, structure="ekfac")
        helped, calls = self.counted(
            estimate_curvature(model, data, structure="matrix_free", preconditioner=ekfac)
        )
        expected = flatten(plain.damped(1e-4).power(v, -1.0))
        assert relative(flatten(helped.damped(1e-4).power(v, -1.0)), expected) < 1e-4
        assert len(calls) < 0.6 * len(without)

    @pytest.mark.parametrize("p", [-1.0, -0.25, 0.5])
    def test_what_has_not_converged_is_an_error(self, p: float) -> None:
        found, _, like = self.operator()
        hasty = replace(found.damped(1e-4), iterations=3)
        with pytest.raises(NumericalError, match="after 3 products"):
            hasty.power(randn_like(like, torch.Generator().manual_seed(0)), p)

    @pytest.mark.parametrize("p", [-1.0, -0.25])
    def test_a_singular_one_is_refused(self, p: float) -> None:
        model, data = prepared("mlp")
        few = TensorDataset(*(t[:1] for t in data.tensors))
        found = estimate_curvature(model, few, structure="matrix_free")
        assert found.logdet() == -math.inf
        with pytest.raises((CurvatureError, NumericalError), match=r"Damp it first|more damping"):
            found.power(randn_like(oracle.start(model), torch.Generator().manual_seed(0)), p)

    def test_zero_and_integer_powers(self) -> None:
        found, matrix, like = self.operator()
        v = randn_like(like, torch.Generator().manual_seed(0))
        assert torch.equal(flatten(found.power(v, 0)), flatten(v))
        assert relative(flatten(exactly(found).power(v, 2)), matrix @ matrix @ flatten(v)) < 1e-8
        nothing = found.damped(1.0).power({n: torch.zeros_like(p) for n, p in like.items()}, -0.5)
        assert float(flatten(nothing).abs().max()) == 0.0

    def test_diagonal_of_a_large_one_by_random_signs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Entry i is a Rademacher sum of variance s_i^2: P(error > 6 s_i) <= 2 exp(-18)
        (Hoeffding), 44 entries: 1e-6.

        For the trace 6 standard errors, 2e-9 if it is near normal; the seed is fixed.
        """
        monkeypatch.setattr(matrix_free, "SMALL", 0)
        found, matrix, _ = self.operator()
        off = matrix - matrix.diag().diag()
        bound = 6 * (off.square().sum(1) / found.probes).sqrt()
        error = flatten(found.damped(0.2).diagonal()) - 0.2 - matrix.diag()
        assert bool((error.abs() <= bound).all())
        assert float(error.abs().max()) > 0  # it was an estimate
        spread = math.sqrt(2 * float(off.square().sum()) / found.probes)
        assert abs(found.trace() - float(matrix.trace())) < 6 * spread

    def test_logdet_of_a_large_one_by_quadrature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Within 6 standard errors of z^T log(B + tau I) z over random signs: 2e-9 if near normal;
        fixed seed."""
        monkeypatch.setattr(matrix_free, "SMALL", 0)
        found, matrix, _ = self.operator()
        for tau in (0.01, 0.3):  # the second comes from the first one's quadrature
            values, vectors = torch.linalg.eigh(matrix + tau * torch.eye(44))
            logarithm = (vectors * values.log()) @ vectors.T
            off = logarithm - logarithm.diag().diag()
            spread = math.sqrt(2 * float(off.square().sum()) / found.probes)
            error = found.damped(tau).logdet() - float(values.log().sum())
            assert 0 < abs(error) < 6 * spread

    def test_float32(self) -> None:
        model, data = prepared("mlp")
        like = oracle.start(model)
        v = randn_like(like, torch.Generator().manual_seed(0))
        matrix = truth(model, data, "exact") + 0.01 * torch.eye(44)
        single = estimate_curvature(model.float(), data, structure="matrix_free").damped(0.01)
        short = {n: x.float() for n, x in v.items()}
        for p in POWERS:
            found = flatten(single.power(short, p))
            assert found.dtype == torch.float32
            assert (
                relative(found.double(), oracle.power(matrix, p) @ flatten(v)) < 1e-3
            )  # eps |B| / tau = 6e-5
        low = estimate_curvature(model, data, structure="low_rank", rank=44).damped(0.01)
        assert (
            relative(
                flatten(low.power(short, -0.5)).double(), oracle.power(matrix, -0.5) @ flatten(v)
            )
            < 1e-3
        )


class TestHessian:
    def test_diagonal_is_an_estimate_within_its_variance(self) -> None:
        """Rademacher sums: P(error > 6 standard deviations) <= 2 exp(-18) (Hoeffding); 44 entries:
        1e-6."""
        model, data = prepared("mlp")
        matrix = truth(model, data, "hessian")
        off = matrix - matrix.diag().diag()
        for draws in (1, 400):
            found = estimate_curvature(
                model, data, structure="diagonal", kind="hessian", draws=draws
            )
            error = (flatten(found.diagonal()) - matrix.diag()).abs()
            assert bool((error <= 6 * (off.square().sum(1) / draws).sqrt() + 1e-12).all())

    @pytest.mark.parametrize("small", [512, 0])
    @pytest.mark.parametrize("structure", ["dense", "matrix_free"])
    def test_an_indefinite_one_says_how_much_damping_is_enough(
        self, structure: str, small: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(matrix_free, "SMALL", small)
        model, data = prepared("mlp")
        like = oracle.start(model)
        v = randn_like(like, torch.Generator().manual_seed(0))
        matrix = truth(model, data, "hessian")
        lowest = float(torch.linalg.eigvalsh(matrix)[0])
        assert lowest < -1e-3
        found = estimate_curvature(model, data, structure=structure, kind="hessian")
        assert relative(flatten(found.power(v, 1.0)), matrix @ flatten(v)) < 1e-8
        for p in (-1.0, -0.25, 0.5):
            with pytest.raises(CurvatureError, match="indefinite") as caught:
                found.power(v, p)
            enough = re.search(r"tau >= ([0-9.e-]+);", str(caught.value))
            assert enough
            tau = float(enough[1])
            assert -lowest < tau < -1.1 * lowest
            damped = exactly(found.damped(tau))
            expected = oracle.power(matrix + tau * torch.eye(44), p) @ flatten(v)
            assert relative(flatten(damped.power(v, p)), expected) < 1e-5
        with pytest.raises(CurvatureError, match="indefinite"):
            found.logdet()
        with pytest.raises(CurvatureError, match="indefinite"):
            found.damped(-0.5 * lowest).power(v, -1.0)

    def test_an_indefinite_diagonal_is_refused(self) -> None:
        found = Diagonal({"w": torch.tensor([1.0, -0.5])}, signed=True)
        with pytest.raises(CurvatureError, match=r"indefinite.*tau >= 0.505"):
            found.power({"w": torch.ones(2)}, -0.5)
        assert found.power({"w": torch.ones(2)}, 1.0)["w"].tolist() == [1.0, -0.5]
        assert found.diagonal()["w"].tolist() == [1.0, -0.5]

    def test_at_a_linear_model_it_is_the_ggn(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 4).double().eval()
        data = TensorDataset(torch.randn(9, 3).double(), torch.randint(0, 4, (9,)))
        found = [
            estimate_curvature(model, data, structure="dense", kind=k).matrix()
            for k in ("hessian", "exact")
        ]
        assert torch.allclose(found[0], found[1], atol=1e-12)

    def test_only_rounding_is_clamped_in_a_ggn(self) -> None:
        like = {"w": torch.zeros(2, dtype=torch.float64)}
        assert (
            from_matrix(torch.tensor([[1.0, 0.0], [0.0, -1e-12]]).double(), like).logdet()
            == -math.inf
        )
        with pytest.raises(CurvatureError, match=r"eigenvalue -0\.1"):
            from_matrix(torch.tensor([[1.0, 0.0], [0.0, -0.1]]).double(), like)

    def test_parameters_with_a_constant_or_no_gradient(self) -> None:
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.shift = nn.Parameter(torch.zeros(2))
                self.unused = nn.Parameter(torch.zeros(3))

            def forward(self, x: Tensor) -> Tensor:
                return x + self.shift

        data = TensorDataset(torch.randn(5, 2), torch.randn(5, 2))
        found = estimate_curvature(
            Shifted().eval(), data, "gaussian", structure="dense", kind="hessian"
        )
        assert torch.allclose(found.matrix().diag(), torch.tensor([1.0, 1.0, 0, 0, 0]))


class TestMixed:
    MIX: Mapping[str, Any] = {
        "first.*": "diagonal",
        "*.bias": "low_rank",
        "shared.*": "dense",
        "*": "ekfac",
    }

    def test_each_group_has_its_structure(self) -> None:
        model, data = prepared("residual")
        like = oracle.start(model)
        found = estimate_curvature(model, data, structure=self.MIX, rank=RANK)
        assert isinstance(found, BlockDiagonal)
        assert found.order == tuple(like)
        assert sorted(n for names, _ in found.parts for n in names) == sorted(like)
        kinds = {n: type(part) for names, part in found.parts for n in names}
        assert kinds["first.bias"] is Diagonal  # the first match wins
        assert kinds["head.bias"] is LowRank
        assert kinds["head.weight"] is Kronecker
        assert kinds["shared.weight"] is Dense
        assert found.info == Info(
            7.0, "exact", "first.*: diagonal, *.bias: low_rank, shared.*: dense, *: ekfac"
        )
        matrix = claim(found, truth(model, data, "exact"), like) + 0.02 * torch.eye(
            flatten(like).numel()
        )
        obeys(found.damped(0.02), matrix, like)

    def test_random_columns_are_the_same_in_all_groups(self) -> None:
        model, data = prepared("sequence")
        whole = estimate_curvature(
            model, data, structure="diagonal", kind="sketch", seed=3
        ).diagonal()
        split = estimate_curvature(
            model,
            data,
            structure={"mlp.*": "diagonal", "*": "dense"},
            kind="sketch",
            seed=3,
            max_samples=5,
        ).diagonal()
        assert list(split) == list(whole)
        assert torch.allclose(flatten(split), flatten(whole), rtol=1e-9)

    def test_with_a_subset(self) -> None:
        model, data = prepared("mlp")
        found = estimate_curvature(
            model, data, structure={"0.*": "dense", "*": "diagonal"}, subset=("0.*", "2.bias")
        )
        assert list(found.diagonal()) == ["0.weight", "0.bias", "2.bias"]

    @pytest.mark.parametrize(
        ("structure", "message"),
        [
            ({"conv*": "diagonal", "*": "ekfac"}, r"'conv\*' in structure=, of nothing"),
            ({"*": "diagonal", "0.*": "ekfac"}, "all taken by earlier ones.*no name is left"),
            ({"0.*": "diagonal"}, r"no pattern in structure= for \['2.weight', '2.bias'\]"),
            ({"*": "cubic"}, "structure='cubic'"),
            ({}, "an empty structure="),
        ],
    )
    def test_patterns_that_do_not_fit_are_refused(self, structure: Any, message: str) -> None:
        model, data = prepared("mlp")
        with pytest.raises(CurvatureError, match=message):
            estimate_curvature(model, data, structure=structure)


class Watched(Dataset[Any]):
    """Remembers which samples were read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        return self.x[i], self.y[i]


def many(count: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    return model, torch.randn(count, 12, generator=g), torch.randint(0, 5, (count,), generator=g)


class TestSamples:
    def test_the_mean_is_over_those_that_were_drawn(self) -> None:
        model, x, y = many(40)
        model, x = model.double(), x.double()
        data = Watched(x, y)
        found = estimate_curvature(model, data, structure="diagonal", max_samples=9, seed=1)
        # the first reads look for random augmentation, and at the loss
        drawn = sorted(set(data.read[-9:]))
        assert found.info.count == len(drawn) == 9
        assert drawn != list(range(9))
        expected = oracle.ggn(model, x[drawn], y[drawn], Categorical()).diag()
        assert torch.allclose(flatten(found.diagonal()), expected, rtol=1e-8)

    def test_each_is_drawn_equally_often(self) -> None:
        """400 draws of 3 of 12: counts within z = 5 of binomial, 12 comparisons, false alarms 7e-6;
        fixed seeds."""
        drawn = [some(np.arange(12), 3, seed) for seed in range(400)]
        assert all(len(set(d)) == 3 for d in drawn)
        counts = np.bincount(np.concatenate(drawn), minlength=12)
        assert (abs(counts - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)).all()
        assert (drawn[0] == some(np.arange(12), 3, 0)).all()

    def test_more_than_there_are_is_all(self) -> None:
        model, data = prepared("mlp")
        assert estimate_curvature(model, data, max_samples=100).info.count == 9

    @pytest.mark.parametrize("option", ["max_samples", "memory", "rank", "draws"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_numbers_out_of_range_are_refused(self, option: str, value: Any) -> None:
        model, data = prepared("mlp")
        with pytest.raises(CurvatureError, match=option):
            estimate_curvature(model, data, **{option: value})

    def test_an_empty_part_is_refused(self) -> None:
        model, data = prepared("mlp")
        with pytest.raises(SplitError, match="part='forget'"):
            estimate_curvature(model, data, part="forget")


class TestMemory:
    def test_recorded_chunks_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x, y = many(64)
        sizes: list[int] = []
        run = Tape.run

        def spy(self: Tape, batch: Batch) -> Any:
            sizes.append(len(batch))
            return run(self, batch)

        monkeypatch.setattr(Tape, "run", spy)
        estimate_curvature(model, TensorDataset(x, y), structure="diagonal")
        assert max(sizes) == 64
        sizes.clear()
        estimate_curvature(model, TensorDataset(x, y), structure="diagonal", memory=5000)
        # inputs of both layers and what is as large, and the outputs' copies
        assert max(sizes) == 5000 // ((12 + 16) * 4 * 4 + 12 * 4 * 4)

    def test_graphs_are_kept_where_they_fit(self) -> None:
        model, x, y = many(64)
        kept = estimate_curvature(model, TensorDataset(x, y), structure="matrix_free").product
        rebuilt = estimate_curvature(
            model, TensorDataset(x, y), structure="matrix_free", memory=5_000
        ).product
        assert kept.kept
        assert not rebuilt.kept
        v = randn_like(oracle.start(model), torch.Generator().manual_seed(0))
        assert torch.allclose(flatten(kept(v)), flatten(rebuilt(v)), rtol=1e-4, atol=1e-7)

    def test_the_default_is_a_quarter_of_what_is_free(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__)
        assert walk.default_memory(torch.device("cpu")) == 1_024_000
        pages["SC_AVPHYS_PAGES"] = 10**9
        assert walk.default_memory(torch.device("cpu")) == 256 << 20

        def unknown(name: str) -> int:
            raise ValueError(name)

        monkeypatch.setattr(os, "sysconf", unknown)
        assert walk.default_memory(torch.device("cpu")) == 256 << 20


EVERY_STRUCTURE: list[Any] = [*STRUCTURES, {"0.*": "dense", "*": "ekfac"}]


class TestDryRun:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("structure", EVERY_STRUCTURE, ids=str)
    def test_the_result_is_as_large_as_predicted(self, structure: Any, dtype: torch.dtype) -> None:
        model, x, y = many(30)
        model, data = model.to(dtype), TensorDataset(x.to(dtype), y)
        predicted = estimate_curvature(model, data, structure=structure, dry_run=True)
        assert isinstance(predicted, CostEstimate)
        found = estimate_curvature(model, data, structure=structure)
        assert predicted.bytes_result == found.nbytes()
        assert predicted.bytes_peak > predicted.bytes_result
        assert predicted.samples == 30

    def test_hessians_too(self) -> None:
        model, x, y = many(30)
        for structure in ("dense", "diagonal", "matrix_free"):
            options: Any = {"structure": structure, "kind": "hessian", "draws": 2}
            predicted = estimate_curvature(model, TensorDataset(x, y), dry_run=True, **options)
            assert (
                predicted.bytes_result
                == estimate_curvature(model, TensorDataset(x, y), **options).nbytes()
            )

    def test_larger_structures_are_predicted_larger(self) -> None:
        model, x, y = many(30)
        nbytes, peaks = zip(
            *(
                (predicted.bytes_result, predicted.bytes_peak)
                for structure in ("diagonal", "ekfac", "low_rank", "dense")
                for predicted in [
                    estimate_curvature(
                        model, TensorDataset(x, y), structure=structure, rank=100, dry_run=True
                    )
                ]
            ),
            strict=True,
        )
        assert list(nbytes) == sorted(set(nbytes))
        assert max(peaks) == peaks[-1]

    @pytest.mark.parametrize(
        ("structure", "kind", "passes", "columns"),
        [
            ("diagonal", "exact", 1, 4),
            ("diagonal", "sketch", 1, 2),
            ("diagonal", "empirical", 1, 1),
            ("diagonal", "hessian", 2, 0),  # a product a probe
            ("dense", "exact", 1, 4),
            ("dense", "hessian", 293, 0),  # a product a parameter
            ("matrix_free", "exact", 1, 0),
            ("low_rank", "exact", 1 + 32, 4),  # the trace, and at most 3 rank + 20 products
        ],
    )
    def test_passes_and_columns(self, structure: Any, kind: Any, passes: int, columns: int) -> None:
        model, x, y = many(30)
        predicted = estimate_curvature(
            model,
            TensorDataset(x, y),
            structure=structure,
            kind=kind,
            draws=2,
            rank=4,
            dry_run=True,
        )
        assert (predicted.passes, predicted.columns) == (passes, columns)
        assert 0 < predicted.seconds < math.inf

    def test_blocks_add_up(self) -> None:
        model, x, y = many(30)
        data = TensorDataset(x, y)
        whole = estimate_curvature(
            model, data, structure={"0.*": "dense", "*": "diagonal"}, dry_run=True
        )
        parts = [
            estimate_curvature(model, data, structure=structure, subset=subset, dry_run=True)
            for structure, subset in (("dense", "0.*"), ("diagonal", "2.*"))
        ]
        assert whole.bytes_result == sum(part.bytes_result for part in parts)
        assert whole.passes == sum(part.passes for part in parts)

    def test_it_reads_a_few_samples_only(self) -> None:
        model, x, y = many(400)
        data = Watched(x, y)
        predicted = estimate_curvature(
            model, DataLoader(data, batch_size=10), structure="ekfac", kind="exact", dry_run=True
        )
        assert len(set(data.read)) <= 50
        assert (predicted.samples, predicted.passes, predicted.columns) == (400, 1, 4)

    def test_ekfac_without_replay_is_two_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x, y = many(400)
        loader = DataLoader(TensorDataset(x, y), batch_size=10)
        monkeypatch.setattr(ekfac, "REPLAY_BYTES", 100_000)
        assert estimate_curvature(model, loader, dry_run=True).passes == 2


def test_where_single_precision_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for some matrices of low rank: then in float64."""
    model, x, y = many(40)
    expected = oracle.ggn(model.double(), x.double(), y, Categorical())
    eigh = torch.linalg.eigh

    def narrow(matrix: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", narrow)
    found = estimate_curvature(model.float(), TensorDataset(x, y), structure="dense", kind="exact")
    torch.testing.assert_close(flatten(found.diagonal()), expected.diag().float())


def test_float32_sums_do_not_drift() -> None:
    """A million samples in chunks of 50: 200 times the same 100 chunks, against one exact float64
    sum of these."""
    model, x, y = many(5000)

    def pieces(net: nn.Module) -> Iterator[tuple[Tape, Any]]:
        tape = Tape(net)
        for start in range(0, 5000, 50):
            batch = Batch((x[start : start + 50],), {}, y[start : start + 50]).on(tape.model)
            record = tape.run(batch)
            columns = list(Categorical().columns(record.outputs.detach(), batch.targets))
            yield (
                tape,
                (
                    record,
                    [(c, record.pull(c), c is columns[-1]) for c in columns[:2] + columns[-1:]],
                ),
            )

    single = list(pieces(model))
    total = DiagonalSum(single[0][0])
    for _ in range(200):
        for _, (record, steps) in single:
            for column, grads, last in steps:
                total.add(record, column, grads, last)
    total.end_pass()
    found = flatten(total.result(1e6).diagonal()).double()
    double = list(pieces(model.double()))
    reference = DiagonalSum(double[0][0])
    for _, (record, steps) in double:
        for column, grads, last in steps:
            reference.add(record, column, grads, last)
    expected = flatten(reference.result(5000).diagonal())
    assert float(((found - expected).abs() / expected).max()) < 1e-4


def test_the_documentation_shows_the_table_that_the_code_has() -> None:
    page = Path(__file__).parent.parent / "docs" / "curvature.md"
    assert support_table() in page.read_text()


class TestEigenvectors:
    """In single precision LAPACK may fail, or return NaN without a word, where the rank is low."""

    @pytest.mark.parametrize("how", ["nothing", "NaN", "error"])
    @pytest.mark.parametrize("upper", [False, True])
    def test_against_numpy(self, monkeypatch, how, upper):
        real = torch.linalg.eigh

        def single_fails(x, *args, **kwargs):
            if how == "nothing" or x.dtype == torch.float64:
                return real(x, *args, **kwargs)
            if how == "error":
                raise RuntimeError("the algorithm failed to converge")
            return torch.full(x.shape[:1], math.nan), torch.full(x.shape, math.nan)

        a = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
        a[30:40] = 0  # dead pixels
        b = a @ a.T
        monkeypatch.setattr(torch.linalg, "eigh", single_fails)
        half = b.triu() if upper else b.tril()
        values, vectors = eigh(half, upper=upper)
        assert values.dtype == vectors.dtype == torch.float32
        expected = np.linalg.eigvalsh(b.double().numpy())
        assert np.allclose(values.numpy(), expected, atol=1e-3)
        assert torch.allclose(vectors.T @ vectors, torch.eye(60), atol=1e-4)
        assert torch.allclose(vectors * values @ vectors.T, b, atol=1e-3)

    def test_a_matrix_that_has_none(self):
        with pytest.raises(NumericalError, match="without eigenvectors"):
            eigh(torch.full((3, 3), math.nan))

    def test_forgetting_with_nan_from_lapack(self, monkeypatch):
        """A wide layer: its basis is asked for in single precision first."""
        real = torch.linalg.eigh

        def single_fails(x, *args, **kwargs):
            if x.dtype == torch.float64:
                return real(x, *args, **kwargs)
            return torch.full(x.shape[:1], math.nan), torch.full(x.shape, math.nan)

        g = torch.Generator().manual_seed(0)
        x = torch.randn(50, 600, generator=g)
        data = TensorDataset(x, (x[:, 0] > 0).long())
        model = nn.Linear(600, 2).eval()
        monkeypatch.setattr(torch.linalg, "eigh", single_fails)
        curvature = estimate_curvature(model, data, structure="ekfac", progress=False)
        assert math.isfinite(curvature.trace())
