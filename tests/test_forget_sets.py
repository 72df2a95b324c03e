"""Which samples a recipe forgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import ConfigError
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle, load_dataset
from fisher_forget.experiments.forget_sets import (
    SHARE,
    Scores,
    choose,
    corrupted,
    memorisation,
    other_labels,
    subset,
)


def never() -> Scores:
    raise AssertionError("this kind trains nothing")


@pytest.fixture(scope="module")
def data() -> DataBundle:
    return load_dataset("digits", max_train=200)


class TestChoose:
    def test_kinds(self, data: DataBundle) -> None:
        y = data.train.tensors[1].numpy()
        assert set(y[choose(ForgetSet("a", "class", label=3), data, never)]) == {3}
        some = choose(ForgetSet("b", "samples", label=5, count=7), data, never)
        assert len(some) == 7
        assert set(y[some]) == {5}
        assert len(choose(ForgetSet("c", "random", count=9, seed=1), data, never)) == 9
        assert choose(ForgetSet("d", "indices", indices=[5, 2, 5]), data, never).tolist() == [2, 5]
        one, other = (
            choose(ForgetSet("e", "random", count=9, seed=seed), data, never) for seed in (0, 1)
        )
        assert not np.array_equal(one, other)

    def test_the_most_memorised(self, data: DataBundle) -> None:
        scores = np.zeros(len(data.train))
        scores[[7, 150, 31]] = 0.9, 0.4, 0.6
        assert choose(ForgetSet("m", "memorised", count=2), data, lambda: scores).tolist() == [
            7,
            31,
        ]

    @pytest.mark.parametrize(
        "wrong",
        [
            ForgetSet("a", "class"),
            ForgetSet("a", "class", label=77),
            ForgetSet("a", "samples", label=3),
            ForgetSet("a", "samples", label=3, count=9999),
            ForgetSet("a", "mislabelled"),
            ForgetSet("a", "memorised", count=200),
            ForgetSet("a", "indices", indices=[-1]),
        ],
    )
    def test_refusals(self, data: DataBundle, wrong: ForgetSet) -> None:
        with pytest.raises(ConfigError, match="forget set 'a'"):
            choose(wrong, data, never)

    def test_regression_has_no_labels_to_get_wrong(self) -> None:
        with pytest.raises(ConfigError, match="regression"):
            choose(ForgetSet("a", "mislabelled", count=3), load_dataset("diabetes"), never)


class TestMislabelled:
    def test_only_the_chosen_labels_change_and_all_of_them(self, data: DataBundle) -> None:
        settings = ForgetSet("a", "mislabelled", count=40)
        chosen = choose(settings, data, never)
        wrong = corrupted(data, settings, chosen).train.tensors[1]
        changed = (wrong != data.train.tensors[1]).nonzero()[:, 0].numpy()
        np.testing.assert_array_equal(changed, chosen)
        assert set(wrong.tolist()) <= set(range(10))

    def test_other_kinds_leave_the_data_alone(self, data: DataBundle) -> None:
        assert corrupted(data, ForgetSet("a", "random", count=3), np.arange(3)) is data

    def test_other_labels_are_uniform_over_the_others(self) -> None:
        drawn = other_labels(torch.full((90_000,), 4), 10, seed=0)
        counts = np.bincount(drawn.numpy(), minlength=10)
        assert counts[4] == 0
        # nine counts, standard deviation 94: five of them are exceeded once in 200,000 seeds
        assert np.abs(np.delete(counts, 4) - 10_000).max() < 5 * 94.3


class Table(nn.Module):
    """p(label 1) of a sample whose input is its index, from a table."""

    def __init__(self, p: torch.Tensor) -> None:
        super().__init__()
        self.p = nn.Parameter(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.p[x[:, 0].long()]
        return torch.stack([1 - p, p], 1).log()


class TestMemorisation:
    def test_by_hand(self) -> None:
        total, seeds = 10, [0, 1, 2, 3]
        targets = torch.arange(total) % 2
        data = DataBundle(
            "x", TensorDataset(torch.arange(total).float()[:, None], targets), None, ("a", "b")
        )  # type: ignore[arg-type]
        p = torch.rand(4, total, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
        found = memorisation([Table(row) for row in p], seeds, data)
        right = torch.where(targets == 1, p, 1 - p).double().numpy()
        inside = np.array([[i in set(subset(total, s)) for i in range(total)] for s in seeds])
        for i in range(total):
            within, without = right[inside[:, i], i], right[~inside[:, i], i]
            expected = within.mean() - without.mean() if len(within) and len(without) else 0.0
            assert found[i] == pytest.approx(expected, abs=1e-6)

    def test_subsets_have_their_size_and_differ(self) -> None:
        assert len(subset(100, 0)) == round(100 * SHARE) == len(set(subset(100, 0)))
        assert not np.array_equal(subset(100, 0), subset(100, 1))
