"""Classes with no retained sample: found from labels, their output rows from what the network
does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, seeded, small_net
from problems import problem_of
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

from fisher_forget import (
    Bernoulli,
    Categorical,
    FisherForgetWarning,
    Gaussian,
    estimate_curvature,
    forget,
    prepare,
)
from fisher_forget.data.split import resolve_split
from fisher_forget.unlearn.data_sums import take_data_sums
from fisher_forget.unlearn.newton.absent_classes import absent_classes, clear_rows
from fisher_forget.unlearn.newton.flow import EXACT, Flow, LinearSolver
from fisher_forget.unlearn.objective import Objective

G = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=G)
Y = torch.arange(30) % 3
QUIET: dict[str, Any] = {"noise": None, "progress": False, "weight_decay": WEIGHT_DECAY}


def gone(targets: Tensor, idx: list[int], likelihood: Any, outputs: int = 3) -> tuple[int, ...]:
    """What is found when these samples are forgotten."""
    data = TensorDataset(torch.randn(len(targets), 4, generator=G), targets)
    objective, split = Objective(nn.Linear(4, outputs), likelihood), resolve_split(data, idx)
    total = take_data_sums(objective, split).total
    forgotten = objective.gradient(split.batches("forget"), objective.start)
    return absent_classes(total, total - forgotten)


class TestAbsentClasses:
    @pytest.mark.parametrize(
        ("idx", "expected"),
        [
            (np.flatnonzero(Y == 1), (1,)),
            (np.flatnonzero(Y == 1)[:-1], ()),  # a single sample of it is left
            (np.flatnonzero(Y != 0), (1, 2)),
            ([0], ()),
        ],
    )
    def test_labels(self, idx: Any, expected: tuple[int, ...]) -> None:
        assert gone(Y, list(idx), Categorical()) == expected

    def test_a_class_that_never_was_is_not_gone(self) -> None:
        assert gone(Y, list(np.flatnonzero(Y == 1)), Categorical(), outputs=5) == (1,)

    def test_soft_labels(self) -> None:
        """What subtracting sums of inexact numbers leaves is not a sample."""
        soft, idx = torch.rand(30, 3, generator=G), list(range(0, 30, 2))
        soft[1::2, 2] = 0
        soft /= soft.sum(1, keepdim=True)
        assert gone(soft, idx, Categorical()) == (2,)
        assert gone(soft, idx[1:], Categorical()) == ()

    def test_ignored_positions_do_not_count(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x)[:, None].expand(-1, 2, -1)

        targets = torch.tensor([[0, 1], [2, 0], [1, -100], [-100, 0]])
        objective, split = (
            Objective(Tokens(), Categorical()),
            resolve_split(TensorDataset(X[:4], targets), [1]),
        )
        total = take_data_sums(objective, split).total
        assert total.classes.tolist() == [3, 2, 1]
        assert absent_classes(
            total, objective.gradient(split.batches("retain"), objective.start)
        ) == (2,)

    @pytest.mark.parametrize(
        ("likelihood", "targets", "outputs"),
        [(Gaussian(), Y[:, None].float(), 1), (Bernoulli(), (Y == 0).float()[:, None], 1)],
    )
    def test_other_likelihoods_have_none(
        self, likelihood: Any, targets: Tensor, outputs: int
    ) -> None:
        assert gone(targets, list(range(20)), likelihood, outputs) == ()


class Pooled(nn.Module):
    """A convolutional head, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(1, 5, 2), nn.Conv1d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x[:, None]))).mean(-1)


class Normalised(nn.Module):
    """A head behind which a BatchNorm scales each class."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


class Square(nn.Module):
    """Hidden layers as wide as the output: their rows are those of no class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def unlike(name: str) -> Callable[[], nn.Module]:
    """Networks whose class outputs are not those of a row."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            if name == "frozen":
                self.head.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            z = self.head(x)
            return {"frozen": z, "skip": z + x[:, :3], "coupled": z + z.sum(1, keepdim=True)}[name]

    return Odd


HEADS = {
    "linear": (lambda: nn.Linear(4, 3), {"weight", "bias"}),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), {"weight"}),
    "hidden": (small_net, {"2.weight", "2.bias"}),
    "square": (Square, {"head.weight", "head.bias"}),
    "conv": (Pooled, {"head.weight", "head.bias"}),
    "normalised": (
        Normalised,
        {"head.weight", "norm.bias"},
    ),  # nothing is left for norm.weight to scale
    "weight norm": (
        lambda: weight_norm(nn.Linear(4, 3)),
        {"bias", "parametrizations.weight.original0"},  # a direction of length zero is none
    ),
}


class TestClearRows:
    @pytest.mark.parametrize("classes", [[1], [0, 2]])
    @pytest.mark.parametrize("head", HEADS)
    def test_outputs_of_those_classes_are_zero_and_others_as_before(
        self, head: str, classes: list[int]
    ) -> None:
        build, rows = HEADS[head]
        model = seeded(build)
        objective, split = Objective(model, Categorical()), resolve_split(TensorDataset(X, Y), [0])
        cleared = clear_rows(objective, split, np.arange(8), classes)
        assert cleared is not None
        changed = {
            name for name, value in cleared.items() if not torch.equal(value, objective.start[name])
        }
        assert changed == rows
        with torch.no_grad():
            before, after = model(X), torch.func.functional_call(model, cleared, (X,))
        kept = [c for c in range(3) if c not in classes]
        torch.testing.assert_close(after[:, kept], before[:, kept])
        assert not after[:, classes].any()

    @pytest.mark.parametrize("name", ["frozen", "skip", "coupled"])
    def test_networks_without_such_rows(self, name: str) -> None:
        objective, split = (
            Objective(seeded(unlike(name)), Categorical()),
            resolve_split(TensorDataset(X, Y), [0]),
        )
        assert clear_rows(objective, split, np.arange(8), [1]) is None

    def test_a_tied_embedding_only_where_the_token_is_not_read(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.embedding(x) @ self.embedding.weight.T

        tokens, model = torch.arange(24) % 5, seeded(Tied)
        objective, split = (
            Objective(model, Categorical()),
            resolve_split(TensorDataset(tokens, tokens), [0]),
        )
        assert clear_rows(objective, split, np.arange(12), [5]) is not None
        assert clear_rows(objective, split, np.arange(12), [3]) is None


class TestForget:
    gone = 1

    def run(self, model: nn.Module, data: TensorDataset, **options: Any) -> Any:
        idx = torch.nonzero(data.tensors[1] == self.gone).flatten().tolist()
        return forget(model, data, idx, **(QUIET | options))

    def test_at_a_minimum_one_sub_step_follows(
        self, trained: nn.Module, blobs: TensorDataset
    ) -> None:
        result = self.run(trained, blobs)
        assert result.newton.at_minimum
        assert result.newton.absent == (self.gone,)
        assert [s.damping for s in result.newton.accepted] == [1 / 125]
        assert "no retained sample of class 1" in str(result)
        assert result.summary()["newton"]["absent"] == [self.gone]

    def test_the_sub_step_is_the_newton_step_there(
        self, trained: nn.Module, blobs: TensorDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One step from the cleared rows is the Newton step there, by a dense system of all
        retained samples."""
        x, y = (t[blobs.tensors[1] != self.gone] for t in blobs.tensors)
        model = seeded(small_net)
        model.load_state_dict(trained.state_dict())
        with torch.no_grad():
            model[2].weight[self.gone] = 0
            model[2].bias[self.gone] = 0
        weights = dict(model.named_parameters())

        def flat(values: Any) -> Tensor:
            return torch.cat([v.flatten() for v in values]).double()

        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        force = flat(
            torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        ) + WEIGHT_DECAY * flat(weights.values())
        p = outputs.softmax(1).detach()
        jacobian = torch.stack(
            [
                flat(torch.autograd.grad(o, list(weights.values()), retain_graph=True)).detach()
                for o in outputs.flatten()
            ]
        ).reshape(len(x), 3, -1)
        h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).double()
        ggn = torch.einsum("nip,nij,njq->pq", jacobian, h, jacobian) / len(x)
        tau = 1 / 125
        eye = torch.eye(len(force), dtype=torch.float64)
        expected = flat(weights.values()) - torch.linalg.solve(
            ggn + (WEIGHT_DECAY + tau) * eye, force
        )
        monkeypatch.setattr("fisher_forget.unlearn.newton.flow.QUICK", EXACT)
        result = self.run(trained, blobs, budget=10.0)
        found = flat(result.newton.params.values())
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)

    def test_elsewhere_the_row_alone_changes(self, net: nn.Module, blobs: TensorDataset) -> None:
        with pytest.warns(FisherForgetWarning, match="absent class's output row"):
            result = self.run(net, blobs, budget=10.0)
        assert not result.newton.at_minimum
        assert not result.newton.path
        with torch.no_grad():
            before, after = net(blobs.tensors[0]), result.model(blobs.tensors[0])
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
        assert not after[:, self.gone].any()
        assert "no step follows" in str(result)

    def test_a_budget_that_it_leaves_undoes_it(
        self, trained: nn.Module, blobs: TensorDataset
    ) -> None:
        shifted = seeded(small_net)
        shifted.load_state_dict(trained.state_dict())
        with torch.no_grad():  # all logits shifted: a row of zero is now the likeliest class of all
            shifted[2].bias -= 10.0
        result = self.run(shifted, blobs, drift=False, budget=0.1)
        assert result.newton.absent == ()
        assert result.newton.accepted
        assert all(s.loss <= result.newton.loss_before + 0.1 for s in result.newton.accepted)

    def test_the_textbook_step_leaves_the_rows_alone(
        self, trained: nn.Module, blobs: TensorDataset
    ) -> None:
        assert self.run(trained, blobs, steps=1).newton.absent == ()

    def test_a_subset_without_the_head_keeps_its_rows(
        self, trained: nn.Module, blobs: TensorDataset
    ) -> None:
        result = self.run(trained, blobs, subset=("0.weight", "0.bias"))
        assert result.newton.absent == ()
        assert torch.equal(result.model[2].weight, trained[2].weight)

    def test_samples_of_a_class_that_stays_take_the_plain_flow(
        self, trained: nn.Module, blobs: TensorDataset
    ) -> None:
        result = forget(trained, blobs, [1, 4, 7], **QUIET)
        assert result.newton.absent == ()
        assert result.newton.budget == 0.01  # not what is left of it after clearing a row
        assert result.newton.accepted[0].damping == 1 / 125

    def test_a_prepared_folder_remembers_the_classes(
        self, trained: nn.Module, blobs: TensorDataset, tmp_path: Path
    ) -> None:
        idx = torch.nonzero(blobs.tensors[1] == self.gone).flatten().tolist()
        for request, expected in ((idx[:-1], ()), (idx[-1:], (self.gone,))):
            prepared = prepare(
                trained, blobs, folder=tmp_path / "sums", weight_decay=WEIGHT_DECAY, progress=False
            )
            assert prepared.forget(request, noise=None).newton.absent == expected

    def test_prepared_requests_find_it_when_the_last_sample_goes(
        self, trained: nn.Module, blobs: TensorDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fisher_forget.unlearn.newton.flow.QUICK", EXACT)
        idx = torch.nonzero(blobs.tensors[1] == self.gone).flatten().tolist()
        prepared = prepare(trained, blobs, weight_decay=WEIGHT_DECAY, progress=False)
        assert prepared.forget(idx[:-1], noise=None).newton.absent == ()
        result = prepared.forget(idx[-1:], noise=None)
        assert result.newton.absent == (self.gone,)
        once = self.run(trained, blobs)
        for a, b in zip(result.model.parameters(), once.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_the_flow_goes_on_from_cleared_weights_with_the_gradient_there() -> None:
    """With every sample in the pool, the force is that of a full pass; then both of its parts
    change."""
    model, split = seeded(small_net), resolve_split(TensorDataset(X, Y), [1, 4])
    problem = problem_of(model, split, estimate_curvature(model, split))
    sums = replace(problem.sums, spread=torch.ones(len(X)))
    problem = replace(problem, sums=sums)
    objective, curvature = problem.objective, problem.curvature
    there = {name: value * 0.5 for name, value in objective.start.items()}
    solver = LinearSolver(working_set=10)
    flow = Flow(problem, split.retain, problem.retained, solver, start=there)
    expected = objective.gradient(split.batches("retain"), there)
    torch.testing.assert_close(flow.linearise()[0], expected.mean(), rtol=1e-4, atol=1e-6)

    elsewhere = {name: value * 0.3 for name, value in objective.start.items()}
    flow.move(elsewhere)
    after, before = (
        objective.gradient(split.batches(flow.most_curved()), w) for w in (elsewhere, there)
    )
    others = curvature.power(
        {name: value * (0.3 - 0.5) for name, value in objective.start.items()}, 1
    )
    changed = {
        name: g + 18 / 28 * others[name] for name, g in (expected + (after - before)).mean().items()
    }
    torch.testing.assert_close(flow.linearise()[0], changed, rtol=1e-4, atol=1e-6)
