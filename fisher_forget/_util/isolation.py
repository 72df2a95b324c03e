"""A call computes the same wherever it is made, and leaves its surroundings as they were."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from fisher_forget._util.calls import one_call
from fisher_forget._util.checks import is_whole
from fisher_forget._util.torch_errors import explained
from fisher_forget.errors import ConfigError

SEEDS = 2**64  # so many a generator of torch takes
AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")  # devices that autocast knows
# Threads of these wait or pass things on for as long as the process lives, and draw nothing.
SERVANTS = (
    "IPython.core.history",
    "fisher_forget._util.workers",
    "ipykernel",
    "joblib.externals.loky",
    "multiprocessing.queues",
    "torch.utils.data",
    "tqdm",
    "zmq",
)
_SEEDING = [threading.RLock()]  # the process has one set of global streams
if hasattr(os, "register_at_fork"):  # a forked process has its own, and no thread that would let go
    os.register_at_fork(after_in_child=lambda: _SEEDING.__setitem__(0, threading.RLock()))


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

    The package draws from generators of its own, so the global random states of Python, NumPy and
    torch stay as they are. User code within may draw from them; where this thread is the only one
    of the process, they are put back after it. Beside other threads they are never written to, or
    another thread would draw the same numbers again: what user code has drawn is gone then, as in
    any loop of its own.

    Errors of torch whose reason is known become the package's own.
    """
    put_back = _global_streams() if _alone() else None
    try:
        with ExitStack() as stack:
            stack.enter_context(explained())
            stack.enter_context(one_call())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(full_precision())
            if torch.get_default_device().type == "meta":
                stack.enter_context(torch.device("cpu"))
            if "torch._dynamo" in sys.modules:  # only then can anything have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        if put_back is not None and _alone():  # user code may have started a thread
            put_back()


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
    """Isolated, and the global states of Python, NumPy and torch start from a seed and are put back
    at the end, for code that draws from them: initialisation, dropout, a user's function.

    One such section at a time runs in a process; those of other threads wait. So trainings in
    several threads give the numbers that they give one after the other. Threads that draw from the
    global streams themselves meanwhile are no part of this: they draw from the seeded streams, and
    move them. Dropout takes no generator, so nothing better can be had from torch; train in a
    process of its own, as `jobs` does, beside such threads.

    Args:
        seed: At least 0.
    """
    with _SEEDING[0], isolated():
        put_back = _global_streams()
        try:
            random.seed(int(seed))
            np.random.seed(seed % 2**32)  # noqa: NPY002 - which takes no more bits
            torch.manual_seed(int(seed) % SEEDS)
            yield
        finally:
            put_back()


def _global_streams() -> Callable[[], None]:
    """Puts the global random states back to what they are now."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what we protect
    cpu = torch.get_rng_state()
    cuda = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)

    return put_back


def _alone() -> bool:
    """Whether no other thread could draw."""
    me = threading.current_thread()
    return all(thread is me or _serves(thread) for thread in threading.enumerate())


def _serves(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)  # of a thread that is no class of its own
    place = getattr(target, "__module__", None) or type(thread).__module__
    return f"{place}.".startswith(tuple(f"{name}." for name in SERVANTS))
