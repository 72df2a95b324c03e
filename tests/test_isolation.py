"""A call gives the same numbers in whatever context it is made, and leaves the context alone."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import nn
from tqdm import TMonitor, tqdm

from fisher_forget import (
    METHODS,
    Problem,
    estimate_curvature,
    evaluate,
    forget,
    newton_step,
    prepare,
)
from fisher_forget._util.isolation import isolated, seeded_rng
from fisher_forget._util.torch_errors import explained
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import CurvatureError, ModelError
from fisher_forget.evaluate.ensemble import Members, RetrainedEnsemble
from fisher_forget.evaluate.predictions import predict
from fisher_forget.experiments.training import TrainSettings, train

DATA = blobs_data()
PLAIN: dict[str, Any] = {"drift": True, "weight_decay": 0.01}


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad disabled": lambda: torch.set_grad_enabled(False),
    "meta": lambda: torch.device("meta"),
    "cpu": lambda: torch.device("cpu"),
    "float64": float64,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def curved(structure: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    def call(model: nn.Module) -> dict[str, torch.Tensor]:
        curvature = estimate_curvature(model, DATA, structure=structure)  # type: ignore[arg-type]
        ones = {
            name: torch.full(p.shape, 1.0, dtype=p.dtype, device=p.device)
            for name, p in model.named_parameters()
        }
        return curvature.damped(0.1).power(ones, -1) | curvature.diagonal()

    return call


def stepped(model: nn.Module) -> dict[str, torch.Tensor]:
    problem = Problem.of(model, DATA, [0, 5], **PLAIN)
    return newton_step(problem, **PLAIN).params


def requested(model: nn.Module) -> dict[str, torch.Tensor]:
    prepared = prepare(model, DATA, progress=False, **PLAIN)
    return numbers(prepared.forget([0, 5], generator=torch.Generator().manual_seed(0)).model)


def noisy(model: nn.Module) -> dict[str, torch.Tensor]:
    result = forget(model, DATA, [0, 5], progress=False, **PLAIN)
    return numbers(result.with_noise(0.1, generator=torch.Generator().manual_seed(0)))


def predicted(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"outputs": predict(model, resolve_split(DATA, [0, 5]))[0]}


PARTS = {name: blobs_data(20, seed=i) for i, name in enumerate(("forget", "retain", "test"))}
RETRAINED = tuple(seeded(small_net, seed) for seed in range(1, 5))
ENSEMBLE = RetrainedEnsemble(
    Members((seeded(small_net),), (0,), (0.0,)),
    Members(RETRAINED, (1, 2, 3, 4), (0.0,) * 4),
    resolve_split(PARTS["forget"], [0]).forget,
)


def evaluated(model: nn.Module) -> dict[str, torch.Tensor]:
    table = evaluate(
        model, ENSEMBLE, PARTS, metrics=["kl", "loss", "membership_features", "klom_mean"]
    )
    values = [row.value for row in table.scores if row.value == row.value]
    return {"scores": torch.tensor(values, dtype=torch.float64, device="cpu")}


def method(name: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: numbers(METHODS[name]().unlearn(model, resolve_split(DATA, [0, 5])).model)


CALLS: dict[str, Callable[[nn.Module], dict[str, torch.Tensor]]] = {
    **{
        structure: curved(structure)
        for structure in ("ekfac", "diagonal", "dense", "low_rank", "matrix_free")
    },
    "newton": stepped,
    "prepare": requested,
    "noise": noisy,
    "predict": predicted,
    "evaluate": evaluated,
    **{name: method(name) for name in ("golatkar-paper", "ssd", "influence", "ntk", "finetune")},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_the_same_numbers_in_every_context(call: str, untouched: Any) -> None:
    expected = CALLS[call](seeded(small_net))
    for name, context in CONTEXTS.items():
        model = seeded(small_net)
        with untouched(model), context():
            found = CALLS[call](model)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)
            assert found[key].dtype == value.dtype, (name, key)


@pytest.mark.parametrize(
    "build", [small_net, lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))]
)
def test_models_and_data_made_in_inference_mode(build: Any) -> None:
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    plain = forget(seeded(build), DATA, [0, 5], progress=False, generator=one, **PLAIN)
    with torch.inference_mode():
        model, data = seeded(build), blobs_data()
    result = forget(model, data, [0, 5], progress=False, generator=two, **PLAIN)
    assert result.losses == plain.losses
    assert not any(x.is_inference() for x in result.model.state_dict().values())


def test_the_context_is_as_before() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        with isolated():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
            assert torch.zeros(1).device.type == "cpu"
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.zeros(1).device.type == "meta"
    with torch.no_grad(), seeded_rng(0):
        assert torch.is_grad_enabled()


class TestErrorsOfTorch:
    def test_known_ones_say_what_they_mean(self) -> None:
        with pytest.raises(ModelError, match="different types"), explained():
            torch.zeros(2, 2) @ torch.zeros(2, 2, dtype=torch.float64)
        with pytest.raises(ModelError, match="out of memory"), explained():
            torch.empty(1 << 60)
        with pytest.raises(ModelError, match="out of memory"), explained():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        x = torch.rand(2, 3, requires_grad=True)
        (once,) = torch.autograd.grad(torch.cdist(x, x, p=3.0).sum(), x, create_graph=True)
        with pytest.raises(CurvatureError, match="no derivative of its own"), explained():
            once.sum().backward()

    @pytest.mark.parametrize(
        "error", [RuntimeError("mine"), KeyError("x"), ValueError("same dtype")]
    )
    def test_others_go_through(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, explained():
            raise error
        assert caught.value is error


@contextmanager
def drawing() -> Iterator[list[tuple[float, ...]]]:
    """Another thread draws from the global streams, seeded with 3, all the time."""
    draws: list[tuple[float, ...]] = []
    over, begun = threading.Event(), threading.Event()

    def draw() -> None:
        while not over.is_set():
            draws.append(drawn())
            begun.set()

    before = states()
    reseed(3)
    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        begun.wait()
        yield draws
    finally:
        over.set()
        thread.join()
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - the global stream is meant
        torch.set_rng_state(before[2])


def drawn() -> tuple[float, ...]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def reseed(seed: int) -> None:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002


def states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def forgotten(model: nn.Module) -> dict[str, torch.Tensor]:
    one = torch.Generator().manual_seed(0)
    return numbers(forget(model, DATA, [0, 5], progress=False, generator=one).model)


class Restless(torch.utils.data.Dataset[Any]):
    """Draws at every read, as augmentation does, the same for all."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        drawn()
        return DATA[index]


class TestThreads:
    @pytest.mark.parametrize("name", ["forget", "prepare", "ekfac", "low_rank", "evaluate"])
    def test_neither_thread_sees_the_other(self, name: str) -> None:
        call = forgotten if name == "forget" else CALLS[name]
        model = seeded(small_net)
        alone = call(model)
        with drawing() as draws:
            found = call(model)
        assert all(torch.equal(found[key], value) for key, value in alone.items())
        with isolated():
            reseed(3)
            assert draws == [drawn() for _ in draws]

    def test_trainings_are_those_of_one_after_the_other(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))

        def trained(seed: int) -> dict[str, torch.Tensor]:
            settings = TrainSettings(epochs=20, batch_size=8)
            return numbers(train(model, DATA, settings, seed=seed, progress=False))

        alone = [trained(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(trained, range(4)))
        for one, other in zip(alone, together, strict=True):
            assert all(torch.equal(other[name], value) for name, value in one.items())
        assert not torch.equal(alone[0]["0.weight"], alone[1]["0.weight"])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_process_forked_meanwhile_does_not_wait(self) -> None:
        inside, over = threading.Event(), threading.Event()

        def train_on() -> None:
            with seeded_rng(0):
                inside.set()
                over.wait()

        thread = threading.Thread(target=train_on)
        thread.start()
        inside.wait()
        if not (child := os.fork()):
            signal.alarm(5)  # ends it where it hangs
            with seeded_rng(1):
                os._exit(0)
        try:
            assert os.waitpid(child, 0)[1] == 0
        finally:
            over.set()
            thread.join()

    def test_what_user_code_draws_is_put_back_where_no_one_else_draws(self, untouched: Any) -> None:
        model = seeded(small_net)
        with untouched(model):
            forget(model, Restless(), [0, 5], progress=False)
        # a bar starts a thread that stays
        monitor = TMonitor(tqdm, 1000)
        try:
            with untouched(model):
                estimate_curvature(model, Restless())
        finally:
            monitor.exit()

    def test_a_thread_that_user_code_starts_keeps_its_stream(self) -> None:
        with ExitStack() as stack:
            with isolated():
                draws = stack.enter_context(drawing())
            count = len(draws)
            while len(draws) < count + 10:
                pass
            taken = draws[: count + 10]
        with isolated():
            reseed(3)
            assert taken == [drawn() for _ in taken]
