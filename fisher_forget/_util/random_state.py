"""The global random states belong to the user: they are the same after a call as before it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global states of Python, NumPy and torch, whatever user code draws within."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what we protect
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Within, the global states of Python, NumPy and torch start from a seed, for code that draws
    from them (dropout, a user's function); after it they are as before.

    Args:
        seed: At least 0.
    """
    with preserved_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - which takes no more bits
        torch.manual_seed(seed)
        yield
