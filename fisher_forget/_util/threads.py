"""How many threads torch uses, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads within, and as many as before after it.

    With another number of threads sums are added in another order, which changes their last digits:
    workers use one thread, so that the number of workers changes nothing.

    Args:
        count: Threads; `None` leaves them alone.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # worker processes are reused, perhaps by someone else
