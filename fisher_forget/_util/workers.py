"""Worker processes that end with the process that started them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PAUSE = 0.2  # seconds between two looks
_watching = threading.Event()


@dataclass(frozen=True)
class Tied:
    """A function that a worker process calls, and no longer than its parent lives.

    Where a parent is killed its workers live on, and would write what they have made. A thread of
    the worker sees that its parent is gone, and ends it at once. A function that is called in the
    same process, or on another machine, is called as it is.
    """

    function: Callable[..., Any]
    parent: int = field(default_factory=os.getpid)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        if os.getppid() == self.parent and not _watching.is_set():
            _watching.set()
            threading.Thread(target=_watch, args=(self.parent,), daemon=True).start()
        return self.function(*args, **options)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PAUSE)
    os._exit(1)  # now: no handler may write
