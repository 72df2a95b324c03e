"""Entries of a ledger: lines of JSON, each with the hash of the one before.

The hash of an entry is

    h_n = SHA-256(canonical JSON of number, time, event, request, details and s_(n-1)),

its signature, where there is a key, is Ed25519 over h_n, and its seal s_n is the SHA-256 of its
whole line, signature included; s_(-1) is 64 zeros. Canonical is
the one way in which this JSON may be written: sorted keys, no spaces, ASCII. A line that says the
same in other bytes is no entry.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fisher_forget._util.files import plain
from fisher_forget.errors import StorageError

Notice = Literal["opened", "purged", "rebased", "delivered", "audited"]  # of the ledger as a whole
Event = Notice | Literal["asked", "under way", "failed", "done", "served", "withdrawn"]
EVENTS = {
    *("opened", "purged", "rebased", "delivered", "audited"),
    *("asked", "under way", "failed", "done", "served", "withdrawn"),
}
FIRST = "0" * 64
RESTORE = "Restore the ledger from a copy: without it nobody knows who was forgotten."
KINDS = (
    *(("number", int), ("details", dict)),
    *((name, str) for name in ("time", "event", "request", "before", "signature")),
)
KEYS = ("before", "details", "event", "hash", "number", "request", "signature", "time")


@dataclass(frozen=True)
class Entry:
    """One thing that happened.

    Attributes:
        number: Its place in the ledger, from 0.
        time: When, UTC, in the form of ISO 8601.
        event: What.
        request: To which request; empty where it is of the ledger as a whole.
        details: What else is to be known, as JSON can hold it.
        before: Seal of the entry before.
        signature: Of `hash`, in hexadecimal digits; empty without a key.
    """

    number: int
    time: str
    event: Event
    request: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    before: str = FIRST
    signature: str = ""

    @property
    def hash(self) -> str:
        """h_n: 64 hexadecimal digits."""
        return hashlib.sha256(canonical(self._content())).hexdigest()

    @property
    def seal(self) -> str:
        """s_n: 64 hexadecimal digits."""
        return hashlib.sha256(self.line()[:-1]).hexdigest()

    def line(self) -> bytes:
        """As it stands in the file, with its end of line."""
        whole = self._content() | {"hash": self.hash, "signature": self.signature}
        return canonical(whole) + b"\n"

    def _content(self) -> dict[str, Any]:
        names = ("number", "time", "event", "request", "details", "before")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Head:
    """How many entries there are, which shows that the end was cut off.

    Attributes:
        count: Number of entries.
        seal: Of the last.
        signature: Of `hash`; empty without a key.
    """

    count: int
    seal: str
    signature: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of count and seal: 64 hexadecimal digits."""
        return hashlib.sha256(canonical({"count": self.count, "seal": self.seal})).hexdigest()

    def line(self) -> bytes:
        """As it stands in its file."""
        return canonical({"count": self.count, "seal": self.seal, "signature": self.signature})


def canonical(content: object) -> bytes:
    """The one way in which this is written as JSON."""
    text = json.dumps(
        plain(content), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def parse(line: bytes) -> Entry:
    """The entry of a line without its end.

    Raises:
        StorageError: If the line is none, or not in its canonical form, or has another hash.
    """
    entry, hash_ = read_line(line)
    fix = "Restore the ledger from a copy."
    if hash_ != entry.hash:
        got = f"entry {entry.number} with another hash than that of its content"
        raise StorageError(got, "an entry as it was written", fix)
    if entry.line() != line + b"\n":
        got = f"entry {entry.number} in another form than it was written in"
        raise StorageError(got, "an entry as it was written", fix)
    return entry


def read_line(line: bytes) -> tuple[Entry, object]:
    """What a line says, altered or not, and the hash that stands in it.

    Raises:
        StorageError: If it is no entry.
    """
    try:
        content = json.loads(line)
        entry = Entry(**{key: content[key] for key in KEYS if key != "hash"})
        whole = set(content) == set(KEYS) and entry.event in EVENTS
        whole = whole and all(isinstance(getattr(entry, name), kind) for name, kind in KINDS)
        whole = whole and bool(entry.line())
    except (ValueError, TypeError, KeyError, StorageError, RecursionError):
        whole = False
    if not whole:
        got, fix = "a line that is no entry of a ledger", "Restore the ledger from a copy."
        raise StorageError(got, "JSON written by this package", fix)
    return entry, content["hash"]


def chained(content: bytes) -> tuple[Entry, ...]:
    """The entries of a file's lines, each of which names the one before.

    Raises:
        StorageError: If one was altered, dropped or swapped.
    """
    entries: list[Entry] = []
    for line in content.split(b"\n")[:-1]:
        entry = parse(line)
        last = entries[-1].seal if entries else FIRST
        if entry.number != len(entries) or entry.before != last:
            got = f"entry {entry.number} after entry {len(entries) - 1}"
            raise StorageError(got, "each after the one that it names", RESTORE)
        entries.append(entry)
    return tuple(entries)


def read_head(path: Path) -> Head | None:
    """What the head of a ledger says; `None` where there is none.

    Raises:
        StorageError: If it is damaged.
    """
    if not path.exists():
        return None
    content = read_bytes(path)
    try:
        head = Head(**json.loads(content))
        same = head.line() == content and isinstance(head.count, int)
    except (ValueError, TypeError, StorageError):
        same = False
    if not same:
        raise StorageError(f"{path}, which is damaged", "the file as it was written", RESTORE)
    return head


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        StorageError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "Check the file, and who may read it."
        raise StorageError(f"{path}: {error}", "a file that can be read", fix) from error
