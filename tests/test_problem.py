"""What is known of a problem before any step: its decay, its classes without a retained sample,
sums of some samples for those of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import Bernoulli, Categorical, Gaussian, Problem, newton_step, prepare
from fisher_forget.params import flatten

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(30, 4, generator=G), torch.arange(30) % 3
SOME = "fisher_forget.unlearn.problem.GRADIENT_SAMPLES"
TENFOLD = "fisher_forget.unlearn.problem.TENFOLD"


def gone(targets: Tensor, idx: Any, likelihood: Any = None, outputs: int = 3) -> tuple[int, ...]:
    """Classes without a retained sample when these samples are forgotten."""
    model = seeded(lambda: nn.Linear(4, outputs))
    data = TensorDataset(X[: len(targets)], targets)
    return Problem.of(model, data, list(idx), likelihood=likelihood or Categorical()).absent


@pytest.mark.parametrize("most", [5000, 6])
class TestAbsent:
    """Whether the sums are of all samples or of six of thirty: what they miss is looked up."""

    @pytest.fixture(autouse=True)
    def _some(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SOME, most)

    @pytest.mark.parametrize(
        ("idx", "expected"),
        [
            (np.flatnonzero(Y == 1), (1,)),
            (np.flatnonzero(Y == 1)[:-1], ()),  # a single sample of it is left
            (np.flatnonzero(Y == 1)[1:], ()),
            (np.flatnonzero(Y != 0), (1, 2)),
            ([0], ()),
        ],
    )
    def test_labels(self, idx: Any, expected: tuple[int, ...]) -> None:
        assert gone(Y, idx) == expected

    def test_a_class_that_never_was_is_not_gone(self) -> None:
        assert gone(Y, np.flatnonzero(Y == 1), outputs=5) == (1,)

    def test_soft_labels(self) -> None:
        """What subtracting sums of inexact numbers leaves is not a sample."""
        soft, idx = torch.rand(30, 3, generator=G), list(range(0, 30, 2))
        soft[1::2, 2] = 0
        soft /= soft.sum(1, keepdim=True)
        assert gone(soft, idx) == (2,)
        assert gone(soft, idx[1:]) == ()

    def test_ignored_positions_do_not_count(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x)[:, None].expand(-1, 2, -1)

        targets = torch.tensor([[0, 1], [2, 0], [1, -100], [-100, 0]])
        data = TensorDataset(X[:4], targets)
        assert Problem.of(seeded(Tokens), data, [1]).absent == (2,)

    @pytest.mark.parametrize(
        ("likelihood", "targets", "outputs"),
        [(Gaussian(), Y[:, None].float(), 1), (Bernoulli(), (Y == 0).float()[:, None], 1)],
    )
    def test_other_likelihoods_have_none(
        self, likelihood: Any, targets: Tensor, outputs: int
    ) -> None:
        assert gone(targets, range(20), likelihood, outputs) == ()


def test_prepared_requests_find_it_when_the_last_sample_goes() -> None:
    data = blobs_data()
    last = torch.nonzero(data.tensors[1] == 1).flatten().tolist()
    net = seeded(small_net)
    prepared = prepare(net, data, weight_decay=WEIGHT_DECAY, progress=False)
    one_left = prepared.split.forgetting(last[:-1])
    none_left = one_left.forgetting(last[-1:])
    for split, expected in ((one_left, ()), (none_left, (1,))):
        problem = Problem(prepared.objective, split, prepared.made.curvature, prepared.made.sums)
        assert problem.absent == expected


class TestSomeSamples:
    def test_stand_for_all(self, trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read-off and forces by 40 of 60 samples are near those by all; the forgotten samples
        themselves always count in full."""
        data, idx = blobs_data(), list(range(0, 60, 6))
        whole = Problem.of(trained, data, idx)
        monkeypatch.setattr(SOME, 40)
        monkeypatch.setattr(TENFOLD, 1)
        some = Problem.of(trained, data, idx)
        assert len(some.sums.samples) == 40
        assert np.isin(some.known, some.sums.samples).all()
        assert not np.isin(some.known, idx).any()
        assert some.positions == whole.positions == 60
        # all 60 gradients differ by 1 / sqrt(n); a draw of 40 without replacement, seeded
        assert some.found.value == pytest.approx(whole.found.value, rel=0.5)
        a, b = (newton_step(problem).gradient_norm for problem in (some, whole))
        assert a == pytest.approx(b, rel=0.2)

    def test_are_all_where_the_gradient_is_a_force(
        self, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SOME, 40)
        monkeypatch.setattr(TENFOLD, 1)
        for options in ({"drift": False}, {"steps": 1, "damping": 0.1}):
            problem = Problem.of(trained, blobs_data(), [0], **options)
            assert len(problem.sums.samples) == 60

    def test_nothing_is_owed_to_nobody(
        self, net: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SOME, 40)
        monkeypatch.setattr(TENFOLD, 1)
        problem = Problem.of(net, blobs_data(), [0])
        split = problem.split
        nobody = type(split)(split.base, np.arange(60), np.arange(0), split.batch_size)
        sums, curvature = problem.sums, problem.curvature
        step = newton_step(Problem(problem.objective, nobody, curvature, sums))
        assert not flatten(step.params).ne(flatten(problem.objective.start)).any()
