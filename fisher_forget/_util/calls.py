"""One call of the package: what is opened within it may stay open until its end, and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

_CURRENT: ContextVar[ExitStack | None] = ContextVar("call", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Within, `current_call` is the same; a call within a call is part of the outer one."""
    if _CURRENT.get() is not None:
        yield
        return
    with ExitStack() as call:
        _CURRENT.set(call)
        try:
            yield
        finally:
            _CURRENT.set(None)


def current_call() -> ExitStack | None:
    """The call under way in this thread: what is pushed on it is closed at its end, also where it
    raises. `None` outside of any."""
    return _CURRENT.get()
