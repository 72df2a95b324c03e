"""Settings are chosen on validation data, by two numbers that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import DataError, NumericalError
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.forget_sets import other_labels
from fisher_forget.experiments.tuning import Judge

CLASSES = ("a", "b", "c")


class Echo(nn.Module):
    """The input is the logits."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


def bundle(size: int, seed: int) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 3, generator=g), torch.arange(size) % 3)


@pytest.fixture
def data() -> DataBundle:
    return DataBundle("made up", bundle(30, 0), bundle(6, 9), CLASSES)


def judge(
    data: DataBundle, forget: Any, kind: Any, original: nn.Module | None = None
) -> tuple[Judge, TensorDataset]:
    validation = bundle(24, 1)
    settings = ForgetSet("x", kind, count=3)
    return Judge.of(original or Echo(), data, np.asarray(forget), settings, validation), validation


class TestJudge:
    def test_a_whole_class_is_remembered_as_far_as_it_is_recognised(self, data: DataBundle) -> None:
        found, validation = judge(data, range(0, 30, 3), "class")
        x, y = validation.tensors
        right = (x.argmax(1) == y).double()
        assert found.whole
        assert found(Echo()).memory == pytest.approx(100 * float(right[y == 0].mean()))
        assert found(Echo()).damage == 0
        # the opposite prediction: what is lost on the retained classes counts, a gain never does
        lost = 100 * float(right[y != 0].mean() - ((-x).argmax(1) == y)[y != 0].double().mean())
        assert found(Echo(-1.0)).damage == pytest.approx(max(lost, 0.0))

    def test_other_samples_by_the_auc_of_their_loss(self, data: DataBundle) -> None:
        forget = [0, 3, 4]
        found, validation = judge(data, forget, "samples")
        loss = nn.CrossEntropyLoss(reduction="none")
        x, y = data.train.tensors
        like = validation.tensors[1] <= 1
        members, others = (
            loss(x[forget], y[forget]),
            loss(validation.tensors[0][like], validation.tensors[1][like]),
        )
        u = mannwhitneyu(members.numpy(), others.numpy()).statistic / (len(members) * len(others))
        assert not found.whole
        assert found(Echo()).memory == pytest.approx(100 * abs(2 * u - 1))

    def test_mislabelled_samples_against_unseen_ones_with_wrong_labels(
        self, data: DataBundle
    ) -> None:
        found, validation = judge(data, [1, 2, 5], "mislabelled")
        labels = validation.tensors[1]
        assert torch.equal(found.unseen.tensors[1], other_labels(labels, 3, 0))
        assert not (found.unseen.tensors[1] == labels).any()
        assert torch.equal(found.kept.tensors[1], labels)

    @pytest.mark.parametrize(
        ("forget", "kind"), [([0, 3, 4], "samples"), (range(0, 30, 3), "class")]
    )
    @pytest.mark.parametrize("scale", [float("inf"), float("nan")])
    def test_outputs_that_are_not_finite_fail(
        self, data: DataBundle, forget: Any, kind: Any, scale: float
    ) -> None:
        with pytest.raises(NumericalError, match="outputs that are NaN or infinite"):
            judge(data, forget, kind)[0](Echo(scale))

    def test_a_ruined_model_is_judged(self, data: DataBundle) -> None:
        assert judge(data, [0, 3, 4], "samples")[0](Echo(1e30)).memory >= 0

    def test_two_points_are_two_points(self, data: DataBundle) -> None:
        """0.95 - 0.93 is a little more than 0.02 in floating point."""
        found = replace(judge(data, [0, 3, 4], "samples")[0], accuracy=0.95)
        labels = torch.tensor([0] * 93 + [1] * 7)
        kept = TensorDataset(torch.tensor([[1.0, 0.0, 0.0]]).repeat(100, 1), labels)
        assert replace(found, kept=kept)(Echo()).damage == 2.0

    def test_validation_data_must_have_the_forgotten_class(self, data: DataBundle) -> None:
        only = TensorDataset(torch.randn(4, 3), torch.ones(4, dtype=torch.long))
        with pytest.raises(DataError, match="what is forgotten"):
            Judge.of(Echo(), data, np.array([0, 3]), ForgetSet("x", "samples"), only)
