"""SISA as a method to compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fisher_forget import ConfigError
from fisher_forget.baselines import METHODS
from fisher_forget.baselines.sisa.method import Sharded
from fisher_forget.data.split import resolve_split
from fisher_forget.experiments.training import TrainSettings, train

CALLS: list[set[int]] = []


def fit(model: nn.Module, data: Any, rows: Any, seed: int) -> nn.Module:
    CALLS.append(set(np.asarray(rows).tolist()))
    return train(
        model, data, TrainSettings(epochs=3, batch_size=8), seed=seed, indices=rows, progress=False
    )


@pytest.fixture
def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    return TensorDataset(x, (x[:, 0] > 0).long())


def test_only_the_shards_that_are_hit_are_trained_again_and_without_the_forgotten(
    data: TensorDataset,
) -> None:
    net, split = nn.Linear(4, 2), resolve_split(data, [5])
    CALLS.clear()
    found = Sharded(train=fit, shards=4).unlearn(net, split)
    first, again = CALLS[:4], CALLS[4:]
    assert set.union(*first) == set(range(60))
    assert len(again) == 1
    assert again[0] == next(rows for rows in first if 5 in rows) - {5}
    assert found.seconds > 0
    assert len(found.model.members) == 4
    template = Sharded(shards=4).template(net).state_dict()
    assert {k: v.shape for k, v in template.items()} == {
        k: v.shape for k, v in found.model.state_dict().items()
    }


def test_rows_are_those_of_the_data_set_below_a_subset(data: TensorDataset) -> None:
    CALLS.clear()
    split = resolve_split(Subset(data, range(20, 60)), [3])
    Sharded(train=fit, shards=2).unlearn(nn.Linear(4, 2), split)
    assert set.union(*CALLS[:2]) == set(split.indices("all").tolist())
    assert not set(split.forget.tolist()) & set.union(*CALLS[2:])


def test_seeds_and_shards_start_from_different_weights(data: TensorDataset) -> None:
    one, same, other = (
        Sharded(train=fit, shards=2, seed=seed)
        .unlearn(nn.Linear(4, 2), resolve_split(data, [5]))
        .model.state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["members.0.weight"], other["members.0.weight"])
    assert not torch.equal(one["members.0.weight"], one["members.1.weight"])


def test_shards_are_trained_once_for_several_requests(data: TensorDataset) -> None:
    net, split = nn.Linear(4, 2), resolve_split(data, [5])
    ready, model = Sharded(train=fit, shards=3).prepare(net, split)
    alone = Sharded(train=fit, shards=3).unlearn(net, resolve_split(data, [8])).model.state_dict()
    CALLS.clear()
    first = ready.unlearn(model, split).model.state_dict()
    again = ready.unlearn(model, split).model.state_dict()
    other = ready.unlearn(model, resolve_split(data, [8])).model.state_dict()
    assert len(CALLS) == 3  # the shard that is hit, three times
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(other[key], alone[key]) for key in other)  # 5 was not forgotten in it
    assert ready.ensemble is not None
    assert ready.ensemble.forgotten.tolist() == []


def test_it_needs_the_training_function(data: TensorDataset) -> None:
    with pytest.raises(ConfigError, match="no train"):
        METHODS["sisa"]().unlearn(nn.Linear(4, 2), resolve_split(data, [5]))
