"""Who owns a folder: one owner at a time, in this process or another, and the workers of that one.

`ledger.lock` is held by the owner, and free when its process has ended, however it did.
`ledger.owner` names it, and its term. Its workers save while they hold `ledger.saving`, and in
its term only; the next owner begins its term while it holds that.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fisher_forget._util import files
from fisher_forget.errors import StorageError

LOCK, OWNER, SAVING = "ledger.lock", "ledger.owner", "ledger.saving"


class Ownership:
    """Of a folder, by this process: one thread at a time has it, for all that it calls.

    Attributes:
        folder: Resolved.
        term: Of the present or last ownership: see `saving`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.term = folder, ""
        self.reset()

    def reset(self) -> None:
        """Nobody has it."""
        self._thread, self._depth = threading.RLock(), 0

    @contextmanager
    def held(self, wait: float) -> Iterator[None]:
        """Own the folder within this context; within another one of the same thread at once.

        Args:
            wait: Seconds to wait for another owner.

        Raises:
            StorageError: If another owner does not end in time, which is named; or the folder
                cannot be written.
        """
        if not self._thread.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            raise _taken(self.folder, wait)
        try:
            with ExitStack() as stack:
                if not self._depth:
                    self.term = stack.enter_context(_only(self.folder, wait))
                self._depth += 1
                stack.callback(self._less)
                yield
        finally:
            self._thread.release()

    def _less(self) -> None:
        self._depth -= 1


_KNOWN: weakref.WeakValueDictionary[Path, Ownership] = weakref.WeakValueDictionary()
_GUARD = threading.Lock()


def ownership(folder: Path) -> Ownership:
    """The one of a folder in this process, whoever asks."""
    with _GUARD:
        return _KNOWN.setdefault(folder, Ownership(folder))


def _forked() -> None:
    """A child process owns nothing of its parent's."""
    for own in list(_KNOWN.values()):
        own.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def _only(folder: Path, wait: float) -> Iterator[str]:
    """Own the folder within this context; its value is the term.

    Args:
        folder: Exists.
        wait: Seconds to wait for another owner.

    Raises:
        StorageError: If another owner does not end in time, which is named; or the folder cannot be
            written.
    """
    if not folder.is_dir():
        fix = "Restore the folder; this object goes on only with it."
        raise StorageError(f"no folder {folder}", "the folder of the ledger", fix)
    lock = FileLock(folder / LOCK, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise _taken(folder, wait) from error
    except OSError as error:
        got, expected = f"{folder}, which cannot be written: {error}", "a folder that can"
        fix = "A copy can be read, verified and exported; record what happens in the original."
        raise StorageError(got, expected, fix) from error
    try:
        term = secrets.token_hex(8)
        who = {"host": socket.gethostname(), "process": os.getpid(), "term": term}
        who |= {"since": datetime.now(UTC).isoformat(timespec="seconds")}
        with FileLock(folder / SAVING):
            files.write_text(folder / OWNER, json.dumps(who))
        yield term
    finally:
        lock.release()


@contextmanager
def saving(folder: Path, term: str) -> Iterator[None]:
    """Write to a folder within this context, as a worker of its owner in that term.

    Raises:
        StorageError: If the folder has another owner by now: the worker was left behind.
    """
    with FileLock(folder / SAVING):
        if _who(folder).get("term") != term:
            got, fix = f"{folder}, which has another owner by now", "Start the program again."
            raise StorageError(got, "the owner that started this worker", fix)
        yield


def remove_orphans(folders: Iterable[Path]) -> None:
    """Remove those of these folders whose last owner was a process of this machine, and is gone."""
    for folder in folders:
        who = _who(folder)
        if who.get("host") == socket.gethostname() and not _alive(who.get("process")):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: object) -> bool:
    if os.name != "posix" or not isinstance(process, int):  # elsewhere this call would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _taken(folder: Path, wait: float) -> StorageError:
    got, fix = f"{folder}, which is owned by {_named(folder)}", "Wait for its end, or stop it."
    return StorageError(got, f"a free folder within {wait:g} s", fix)


def _named(folder: Path) -> str:
    who = _who(folder)
    if not who:
        return "another process"
    return f"process {who.get('process')} on {who.get('host')} since {who.get('since')}"


def _who(folder: Path) -> dict[str, object]:
    """What the present or last owner wrote of itself; empty where that cannot be read."""
    with suppress(OSError, ValueError):
        who = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return who if isinstance(who, dict) else {}
    return {}
