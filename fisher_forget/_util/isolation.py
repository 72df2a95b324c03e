"""A call computes the same wherever it is made, and leaves its surroundings as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from fisher_forget._util.calls import one_call
from fisher_forget._util.checks import is_whole
from fisher_forget._util.torch_errors import explained
from fisher_forget.errors import ConfigError

SEEDS = 2**64  # so many a generator of torch takes
AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")  # devices that autocast knows


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast, on any device; the cheap part of `isolated`, for single products."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, AUTOCAST):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def isolated() -> Iterator[None]:
    """Within, torch computes as at the start of a program, whatever contexts the caller is in:
    with gradients, without autocast, inference mode, compiled code or the default device "meta".

    After it the global random states of Python, NumPy and torch are as before, whatever user code
    draws within. Errors of torch whose reason is known become the package's own.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what we protect
    devices = list(range(torch.cuda.device_count()))
    try:
        with ExitStack() as stack:
            stack.enter_context(explained())
            stack.enter_context(one_call())
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(full_precision())
            if torch.get_default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            if "torch._dynamo" in sys.modules:  # only then can anything have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, on the CPU.

    Raises:
        ConfigError: The seed is no whole number of at least 0.
    """
    if not is_whole(seed, 0):
        fix = "Pass seed=0, say."
        raise ConfigError(f"seed={seed!r}", "a whole number of at least 0", fix)
    return torch.Generator().manual_seed(int(seed) % SEEDS)  # which takes no integers of NumPy


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Isolated, and the global states of Python, NumPy and torch start from a seed, for code that
    draws from them (dropout, a user's function).

    Args:
        seed: At least 0.
    """
    with isolated():
        random.seed(int(seed))
        np.random.seed(seed % 2**32)  # noqa: NPY002 - which takes no more bits
        torch.manual_seed(int(seed) % SEEDS)
        yield
