"""A GPU computes what the CPU does, in float64; skipped where there is none."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from small_models import MODELS
from small_models import prepared as model_and_data
from test_structures import SUPPORTED
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import (
    CheckpointKeeper,
    ForgetOptions,
    ModelError,
    RetrainedEnsemble,
    TrainSettings,
    estimate_curvature,
    evaluate,
    forget,
    prepare,
    resolve_split,
    rewind,
    train,
)
from fisher_forget.baselines import METHODS
from fisher_forget.curvature.passes import default_memory
from fisher_forget.params import flatten, randn_like

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
IDX = list(range(0, 60, 7))


def weights(model: nn.Module) -> torch.Tensor:
    return flatten({name: p.detach() for name, p in model.named_parameters()})


def on_gpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


@pytest.fixture
def double(trained: nn.Module, blobs: TensorDataset) -> tuple[nn.Module, TensorDataset]:
    x, y = blobs.tensors
    return copy.deepcopy(trained).double(), TensorDataset(x.double(), y)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kind", "structure"), SUPPORTED)
def test_curvature(kind: str, structure: str, name: str) -> None:
    model, data = model_and_data(name)
    options = {"structure": structure, "kind": kind, "draws": 2, "rank": 4}
    try:
        here = estimate_curvature(model, data, **options)
    except Exception as error:
        with pytest.raises(type(error)):
            estimate_curvature(on_gpu(model), data, **options)
        return
    there = estimate_curvature(on_gpu(model), data, **options)
    generator = torch.Generator().manual_seed(1)
    vector = randn_like({n: p.detach() for n, p in model.named_parameters()}, generator)
    given = {n: v.to(DEVICE) for n, v in vector.items()}
    tau = 10.0 if kind == "hessian" else 0.1
    for power in (1.0, -1.0):
        one, other = here.damped(tau).power(vector, power), there.damped(tau).power(given, power)
        assert flatten(other).device.type == DEVICE.type
        torch.testing.assert_close(flatten(other).cpu(), flatten(one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", ["auto", 1])
@pytest.mark.parametrize("structure", ["ekfac", "matrix_free", "low_rank", "diagonal"])
def test_forget(double, structure: str, steps: object) -> None:
    model, data = double
    options = {"structure": structure, "kind": "exact", "steps": steps, "noise": None}
    here = forget(model, data, IDX, progress=False, **options)
    loader = DataLoader(data, batch_size=16)
    there = forget(on_gpu(model), loader, IDX, progress=False, **options)
    assert weights(there.model).device.type == DEVICE.type
    torch.testing.assert_close(
        weights(there.model).cpu(), weights(here.model), rtol=1e-4, atol=1e-6
    )
    brought = forget(model, data, IDX, progress=False, device=str(DEVICE), **options)
    assert weights(brought.model).device.type == "cpu"
    torch.testing.assert_close(weights(brought.model), weights(here.model), rtol=1e-4, atol=1e-6)


def test_the_call_without_options(trained: nn.Module, blobs: TensorDataset, untouched) -> None:
    """float32, noise included, and nothing given is changed."""
    model = on_gpu(trained)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    result = forget(model, DataLoader(blobs, batch_size=16), IDX, progress=False)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.cuda.get_rng_state())
    assert weights(result.model).device.type == DEVICE.type
    assert bool(weights(result.model).isfinite().all())
    here = forget(trained, blobs, IDX, progress=False, noise=None)
    moved = weights(here.model) - weights(trained)
    quiet = forget(model, blobs, IDX, progress=False, noise=None)
    assert float((weights(quiet.model).cpu() - weights(here.model)).norm()) < 0.02 * float(
        moved.norm()
    )


def test_prepare(double, tmp_path) -> None:
    model, data = double
    options = ForgetOptions(kind="exact", noise=None)
    here = prepare(model, data, options, progress=False).forget(IDX, progress=False)
    folder = tmp_path / "prepared"
    there = prepare(on_gpu(model), data, options, folder=folder, progress=False)
    first = there.forget(IDX[:4], progress=False)
    assert weights(first.model).device.type == DEVICE.type
    again = prepare(on_gpu(model), data, options, folder=folder, progress=False)
    second = again.forget(IDX[4:], progress=False)
    expected = weights(here.model)
    assert float((weights(second.model).cpu() - expected).norm()) < 0.1 * float(
        (expected - weights(model)).norm()
    )


def test_rewind(tmp_path) -> None:
    data = blobs_data(240)
    settings = TrainSettings(epochs=8, batch_size=32, lr=0.1)
    keeper = CheckpointKeeper(tmp_path, settings.total_steps(len(data)))
    start = seeded(small_net)
    model = train(start, data, settings, seed=0, progress=False, after_step=keeper.step)
    found = rewind(
        on_gpu(model), data, IDX, checkpoints=tmp_path, rest=settings, share=0.5, progress=False
    )
    assert weights(found.model).device.type == DEVICE.type


SETTINGS = TrainSettings(epochs=20, batch_size=60, lr=0.3, weight_decay=WEIGHT_DECAY)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("deltagrad", "retrain", "sisa")])
def test_methods(name: str, trained: nn.Module, blobs: TensorDataset) -> None:
    model = on_gpu(trained)
    method = METHODS[name]()
    found = method.unlearn(model, resolve_split(blobs, IDX))
    assert weights(found.model).device.type == DEVICE.type
    assert bool(weights(found.model).isfinite().all())


def test_evaluation() -> None:
    data, test = blobs_data(120, seed=1), blobs_data(90, seed=2)
    forgotten = np.flatnonzero(data.tensors[1].numpy() == 2)

    def fit(indices, seed) -> nn.Module:
        net = seeded(small_net, int(seed))
        return train(net, data, SETTINGS, seed=int(seed), indices=indices, progress=False).to(
            DEVICE
        )

    ensemble = RetrainedEnsemble.fit(
        fit,
        data,
        forgotten,
        template=seeded(small_net).to(DEVICE),
        seeds=range(100, 105),
        original_seeds=(0,),
        progress=False,
    )
    scrubbed = [forget(m, data, forgotten, progress=False) for m in ensemble.originals.models]
    parts = {
        "forget": torch.utils.data.Subset(data, forgotten.tolist()),
        "retain": torch.utils.data.Subset(data, sorted(set(range(120)) - set(forgotten.tolist()))),
        "test": test,
    }
    table = evaluate(scrubbed, ensemble, parts)

    def found(method: str) -> float:
        return table.get("kl", "forget", method).value

    assert found("scrubbed") < found("original")


def test_memory_is_the_devices() -> None:
    assert 0 < default_memory(DEVICE) <= torch.cuda.mem_get_info()[0]


def test_parts_of_a_model_on_two_devices_are_refused(trained: nn.Module, blobs) -> None:
    model = copy.deepcopy(trained)
    model[2] = model[2].to(DEVICE)
    with pytest.raises(ModelError, match="device"):
        forget(model, blobs, IDX, progress=False)
    assert next(model.parameters()).device.type == "cpu"
