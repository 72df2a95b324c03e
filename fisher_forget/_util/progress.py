"""Progress bars on all long work, in a terminal and in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], total: int, description: str, show: bool) -> Iterator[T]:
    """Iterate with a bar that vanishes when it is done; `show=False` iterates only."""
    if not show:
        yield from items
        return
    yield from tqdm(items, total=total, desc=description, leave=False, dynamic_ncols=True)
