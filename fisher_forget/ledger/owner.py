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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fisher_forget._util import files
from fisher_forget.errors import StorageError

LOCK, OWNER, SAVING = "ledger.lock", "ledger.owner", "ledger.saving"


@contextmanager
def only(folder: Path, wait: float) -> Iterator[str]:
    """Own the folder within this context; its value is the term.

    Args:
        folder: Exists.
        wait: Seconds to wait for another owner.

    Raises:
        StorageError: If another owner does not end in time; it is named.
    """
    if not folder.is_dir():
        fix = "Restore the folder; this object goes on only with it."
        raise StorageError(f"no folder {folder}", "the folder of the ledger", fix)
    lock = FileLock(folder / LOCK, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        got, fix = f"{folder}, which is owned by {_named(folder)}", "Wait for its end, or stop it."
        raise StorageError(got, f"a free folder within {wait:g} s", fix) from error
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
