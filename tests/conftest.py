"""Shared by all tests: one thread, a count of what was skipped, and small models that are really
trained."""

from __future__ import annotations

import collections
import copy
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Two test workers share two cores: programs and notebook kernels that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget.experiments.training import TrainSettings, train

torch.set_num_threads(1)
pytest.register_assert_rewrite("browser", "laws", "oracle")

# Data sets that need files lie beside this repository, for all tests and what they start.
for parent in Path(__file__).resolve().parents:
    if (parent / "shared" / "data").is_dir():
        os.environ.setdefault("FISHER_FORGET_DATA", str(parent / "shared" / "data"))

WEIGHT_DECAY = 0.01


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("allowed_skips", "how the reason of a skip may begin", type="linelist")
    parser.addoption(
        "--strict-skips", action="store_true", help="fail where a skip is not in allowed_skips"
    )


def skip_reasons(config: pytest.Config) -> collections.Counter[str]:
    """How often a test or file was skipped, by reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    return collections.Counter(r.longrepr[2].removeprefix("Skipped: ") for r in skipped)


def unexpected_skips(config: pytest.Config) -> list[str]:
    allowed = tuple(config.getini("allowed_skips"))
    return [reason for reason in skip_reasons(config) if not reason.startswith(allowed)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for reason, count in skip_reasons(config).most_common():
        verdict = "unexpected" if reason in unexpected_skips(config) else "allowed"
        terminalreporter.write_line(f"skipped {count} ({verdict}): {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("strict_skips") and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def blobs_data(count: int = 60, classes: int = 3, seed: int = 0) -> TensorDataset:
    """Overlapping Gaussian blobs in 4 dimensions; classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    centres = 1.5 * torch.randn(classes, 4, generator=generator)
    return TensorDataset(torch.randn(count, 4, generator=generator) + centres[targets], targets)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in eval mode, initialised from a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture(scope="session")
def blobs() -> TensorDataset:
    return blobs_data()


@pytest.fixture(scope="session")
def trained(blobs: TensorDataset) -> nn.Module:
    """Trained on `blobs` to a minimum of the mean loss + (WEIGHT_DECAY / 2) |w|^2."""
    settings = TrainSettings(epochs=400, batch_size=60, lr=0.3, weight_decay=WEIGHT_DECAY)
    return train(seeded(small_net), blobs, settings, seed=0, progress=False)


@pytest.fixture
def net() -> nn.Module:
    """Untrained: pass `drift` to forget()."""
    return seeded(small_net)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a user could notice."""
    return {
        "weights": {
            n: v.numpy().tobytes()
            for n, v in model.state_dict().items()
            if v.dtype != torch.bfloat16
        },
        "bits": {
            n: v.view(torch.int16).tolist()
            for n, v in model.state_dict().items()
            if v.dtype == torch.bfloat16
        },
        "grads": {
            n: None if p.grad is None else (id(p.grad), p.grad.tolist())
            for n, p in model.named_parameters()
        },
        "identity": {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: [
                list(hooks)
                for hooks in (
                    m._forward_hooks,
                    m._forward_pre_hooks,
                    m._backward_hooks,
                    m._backward_pre_hooks,
                )
            ]
            for n, m in model.named_modules()
        },
        "momentum": {n: m.momentum for n, m in model.named_modules() if hasattr(m, "momentum")},
    }


def _rng() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state must stay as it is
    return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    if isinstance(model, nn.Module):
        for p in list(model.parameters())[:1]:
            if p.dtype.is_floating_point:
                p.grad = torch.ones_like(p)  # the user's own, from before
        before = copy.deepcopy(_state(model))
    rng = _rng()
    try:
        yield
    finally:
        assert _rng() == rng, "a global random state moved"
        if isinstance(model, nn.Module):
            after = _state(model)
            for key, value in before.items():
                assert after[key] == value, f"{key} of the given model changed"


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """with untouched(model): neither the model nor a global random state may change, whatever is
    raised."""
    return _untouched
