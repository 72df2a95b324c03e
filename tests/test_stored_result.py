"""A result that is pickled, saved by torch or deep-copied: all of it but the training data."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import blobs_data, seeded, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fisher_forget import ForgetResult, Problem, estimate_curvature, forget, prepare
from fisher_forget.errors import CurvatureError, DataError, StorageError

DATA = blobs_data()
PLAIN: dict[str, Any] = {"drift": True, "weight_decay": 0.01, "progress": False}
MIXED = {"0.*": "ekfac", "2.weight": "matrix_free", "*": "diagonal"}
STRUCTURES = ["ekfac", "diagonal", "dense", "low_rank", "matrix_free", MIXED]


def saved(result: Any) -> Any:
    stream = io.BytesIO()
    torch.save(result, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
class TestEveryStructure:
    def test_says_the_same(self, way: str, structure: Any) -> None:
        result = forget(seeded(small_net), DATA, [0, 5], structure=structure, noise=0.01, **PLAIN)
        twin = WAYS[way](result)
        assert str(twin) == str(result)
        assert json.dumps(twin.summary()) == json.dumps(result.summary())
        assert twin.split.forget.tolist() == [0, 5]
        for name, value in result.model.state_dict().items():
            assert torch.equal(twin.model.state_dict()[name], value)
            assert twin.model.state_dict()[name].data_ptr() != value.data_ptr()

    def test_further_noise(self, way: str, structure: Any) -> None:
        result = forget(seeded(small_net), DATA, [0, 5], structure=structure, noise=None, **PLAIN)
        twin = WAYS[way](result)
        if "matrix_free" in str(structure) and way != "deepcopy":
            with pytest.raises(CurvatureError, match="training data"):
                twin.with_noise(0.1)
            return
        drawn = [r.with_noise(0.1, seed=3).state_dict() for r in (result, twin)]
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


class Secret(TensorDataset):
    """Samples whose numbers can be looked for in a file."""

    def __init__(self) -> None:
        x = torch.full((40, 4), 1234.5678) + torch.arange(40)[:, None]
        super().__init__(x / 1e3, torch.arange(40) % 3)


@given(st.sampled_from(STRUCTURES), st.integers(1, 40), st.booleans())
@settings(max_examples=12, deadline=None)
def test_no_sample_is_in_the_file(structure: Any, batch_size: int, lambdas: bool) -> None:
    data = Secret()
    options: dict[str, Any] = {"unpack": lambda batch: (batch[0], batch[1])} if lambdas else {}
    collate: Any = (lambda batch: default_collate(batch)) if lambdas else None
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate)
    result = forget(seeded(small_net), loader, [0, 5], structure=structure, **options, **PLAIN)
    text = pickle.dumps(result)
    for row in data.tensors[0]:
        assert row.numpy().tobytes() not in text
    assert b"TensorDataset" not in text
    assert b"Secret" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_needs_the_data_says_so(workers: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    model.train()(DATA.tensors[0])
    loader = DataLoader(DATA, batch_size=16, num_workers=workers)
    result = forget(model.eval(), loader, [0, 5], noise=None, **PLAIN)
    assert result.buffers_refreshed
    stored = pickle.loads(pickle.dumps(result))
    with pytest.raises(DataError, match="loaded from a file"):
        stored.with_noise(0.1)
    copied = copy.deepcopy(result)
    assert copied.split is result.split
    drawn = [r.with_noise(0.1, seed=3)(DATA.tensors[0]) for r in (result, copied)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(1, 3, 2, padding="same"),
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Conv1d(1, 3, 4, stride=2, padding=1)),
        lambda: nn.Sequential(nn.GroupNorm(1, 1), nn.ConvTranspose1d(1, 3, 2)),
    ],
)
def test_layers_of_every_family(layer: Any) -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), layer(), nn.Flatten(), nn.LazyLinear(3))
    )
    model(DATA.tensors[0])
    result = forget(model, DATA, [0, 5], noise=None, **PLAIN)
    text = pickle.dumps(result.curvature)
    stored = pickle.loads(text)
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, value in result.curvature.damped(0.1).power(v, -0.25).items():
        assert torch.equal(stored.damped(0.1).power(v, -0.25)[name], value)


def test_the_result_is_at_home_in_a_deep_copy_of_a_container() -> None:
    result = forget(seeded(small_net), DATA, [0, 5], **PLAIN)
    copied = copy.deepcopy({"results": [result, result]})["results"]
    assert isinstance(copied[0], ForgetResult)
    assert copied[0] is copied[1]
    copied[0].newton.params["0.weight"].zero_()
    assert result.newton.params["0.weight"].any()


@pytest.mark.parametrize("way", [pickle.dumps, copy.deepcopy, saved])
def test_what_holds_the_data_refuses(way: Callable[[Any], Any]) -> None:
    model = seeded(small_net)
    with pytest.raises(StorageError, match="folder="):
        way(prepare(model, DATA, **PLAIN))
    problem = Problem.of(model, DATA, [0, 5], weight_decay=0.01)
    with pytest.raises(StorageError, match="ForgetResult"):
        way(problem)


def test_curvatures_can_be_pickled_alone() -> None:
    B = estimate_curvature(seeded(small_net), DATA, structure="matrix_free")
    kept = B.diagonal()
    stored = pickle.loads(pickle.dumps(B))
    assert all(torch.equal(stored.diagonal()[name], x) for name, x in kept.items())
    with pytest.raises(CurvatureError, match="no file of it holds"):
        stored.power(kept, 1)
