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

from fisher_forget import ForgetResult, Problem, estimate_curvature, forget, plots, prepare
from fisher_forget.errors import CurvatureError, DataError, StorageError
from fisher_forget.evaluate.information import NoiseLaw

DATA = blobs_data()
PLAIN: dict[str, Any] = {"drift": True, "weight_decay": 0.01, "progress": False}
MIXED = {"0.*": "ekfac", "2.weight": "matrix_free", "*": "diagonal"}
STRUCTURES = ["ekfac", "diagonal", "dense", "low_rank", "matrix_free", MIXED]


def saved(result: Any, raw: bool = False) -> Any:
    stream = io.BytesIO()
    torch.save(result, stream)
    if raw:
        return stream.getvalue()
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def noisy(result: ForgetResult) -> nn.Module:
    return result.with_noise(0.1, generator=torch.Generator().manual_seed(3))


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
        drawn = [noisy(r).state_dict() for r in (result, twin)]
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def held(stored: bytes, params: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, p in params.items() if p.detach().numpy().tobytes() in stored]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
class TestNothingGivesTheNoiseAway:
    """Neither the noise nor the weights before it, nor the original ones, are in what is stored."""

    @pytest.mark.parametrize("way", ["pickle", "torch.save", "repr"])
    def test_no_weights_are_in_the_file(self, way: str, structure: Any) -> None:
        model = seeded(small_net)
        result = forget(model, DATA, [0, 5], structure=structure, noise=0.01, **PLAIN)
        stored = {
            "pickle": pickle.dumps(result),
            "torch.save": saved(result, raw=True),
            "repr": (repr(result) + repr(result.noise) + repr(result.newton)).encode(),
        }[way]
        after = dict(result.model.named_parameters())
        secrets = {
            "before": result.corrected,
            "noise": {name: after[name] - p for name, p in result.corrected.items()},
            "original": dict(model.named_parameters()),
        }
        assert {name: held(stored, params) for name, params in secrets.items()} == {
            name: [] for name in secrets
        }
        assert b"tensor(" not in stored
        if way != "repr":
            assert held(stored, after) == list(after)  # it would have been found

    def test_what_needs_the_weights_before_noise_says_so(self, structure: Any) -> None:
        model = seeded(small_net)
        result = forget(model, DATA, [0, 5], structure=structure, noise=0.01, **PLAIN)
        twin = pickle.loads(pickle.dumps(result))
        calls = (lambda r: r.with_noise(0.1), NoiseLaw.of, lambda r: plots.plot_steps(r, model))
        for call in calls:
            with pytest.raises(DataError, match="weights before noise"):
                call(twin)
            call(result)
        assert repr(twin.noise) == repr(result.noise)
        assert twin.newton.error == result.newton.error

    def test_without_noise_there_is_nothing_to_hide(self, structure: Any) -> None:
        result = forget(seeded(small_net), DATA, [0, 5], structure=structure, noise=None, **PLAIN)
        twin = pickle.loads(pickle.dumps(result))
        for name, p in twin.model.named_parameters():
            assert torch.equal(twin.corrected[name], p)


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
    drawn = [noisy(r)(DATA.tensors[0]) for r in (result, copied)]
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


def test_a_shallow_copy_shares_all_that_the_result_holds() -> None:
    result = forget(seeded(small_net), DATA, [0, 5], noise=0.01, **PLAIN)
    twin = copy.copy(result)
    assert twin is not result
    assert twin.split is result.split
    assert twin.corrected is result.corrected
