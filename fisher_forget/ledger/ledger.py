"""A folder's record of deletion requests: append-only, chained by hashes, under one lock.

Four files lie in the folder: `ledger.jsonl`, the entries; `ledger.head`, how many there are and the
seal of the last, which shows that the end was cut off; `ledger.salt`, without which nobody can tell
which samples the hashes in it stand for; and the lock. An entry is on the disk (fsync) when the
call that makes it returns. What a kill leaves half-written was never returned, and is taken away by
the next owner.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger import keys, owner
from fisher_forget.ledger.entries import FIRST, Entry, Event, canonical, parse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LEDGER, HEAD, SALT = "ledger.jsonl", "ledger.head", "ledger.salt"
FORMAT = 1
RESTORE = "Restore the ledger from a copy: without it nobody knows who was forgotten."
State = Literal["asked", "under way", "done", "served", "withdrawn"]
OPEN = ("asked", "under way")


@dataclass(frozen=True)
class Request:
    """A deletion request, as its entries tell it.

    Attributes:
        name: By which the ledger knows it.
        who: Opaque reference of who asked, as given.
        samples: Salted hashes of the samples' ids.
        asked: When, UTC.
        due: Until when it must be served, UTC.
        state: "asked", "under way", "done" (the new model is there), "served" (it is in use, and
            who asked was told), or "withdrawn".
        evidence: What the entries say of how it was done.
    """

    name: str
    who: str
    samples: tuple[str, ...]
    asked: datetime
    due: datetime
    state: State
    evidence: dict[str, Any]

    def overdue(self, now: datetime | None = None) -> bool:
        """Whether it should have been served by now."""
        over = self.state in ("served", "withdrawn")
        return not over and (now or datetime.now(UTC)) > self.due


class Ledger:
    """The ledger of a folder, made at its first use.

    Args:
        folder: Of the ledger, and of what it is about.
        salt: Another place of the salt: who removes it makes the hashes useless.
        key: Signs the entries: a file of `new_keys`, or such a key.
        wait: Seconds to wait for another owner.

    Attributes:
        folder: As given.
        entries: All so far, as this object has read them last.
        term: Of the present or last ownership: see `owner.saving`.

    Raises:
        StorageError: If an entry was altered, dropped, swapped or cut off.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        salt: str | Path | None = None,
        key: str | Path | Ed25519PrivateKey | None = None,
        wait: float = 3600.0,
    ) -> None:
        self.folder = files.ensure_folder(folder)
        self.wait = wait
        self._salt = Path(salt) if salt is not None else self.folder / SALT
        self._key = keys.read_private(key) if isinstance(key, (str, Path)) else key
        self._thread, self._depth = threading.RLock(), 0
        self.entries: tuple[Entry, ...] = ()
        self.term = ""
        self.read()

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, {len(self.entries)} entries)"

    @property
    def exists(self) -> bool:
        """Whether anything has been recorded."""
        return bool(self.entries)

    @property
    def requests(self) -> dict[str, Request]:
        """All requests by name, in the order in which they came."""
        found: dict[str, Request] = {}
        for entry in self.entries:
            if entry.event == "asked":
                found[entry.request] = _asked(entry)
            elif entry.request:
                request = found[entry.request]
                evidence = request.evidence | entry.details
                state: Any = entry.event
                found[entry.request] = replace(request, state=state, evidence=evidence)
        return found

    def pending(self) -> list[Request]:
        """Requests that were asked for, and are not done: after a kill, those to be done again."""
        return [r for r in self.requests.values() if r.state in OPEN]

    def overdue(self, now: datetime | None = None) -> list[Request]:
        """Requests that should have been served by now."""
        return [r for r in self.requests.values() if r.overdue(now)]

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Nobody else, in this process or another, writes to the folder within this context; what
        others have written before is read first.

        Raises:
            StorageError: If another owner does not end in time; it is named.
        """
        with self._thread:
            if self._depth:  # ours already
                yield
                return
            with owner.only(self.folder, self.wait) as self.term:
                self._depth += 1
                try:
                    self.read(repair=True)
                    yield
                finally:
                    self._depth -= 1

    def read(self, *, repair: bool = False) -> None:
        """Read the entries again, and check them.

        Raises:
            StorageError: If an entry was altered, dropped, swapped or cut off.
        """
        path = self.folder / LEDGER
        # in this order, since another owner writes an entry first and the head then
        head = read_head(self.folder)
        content = path.read_bytes() if path.exists() else b""
        whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        entries = chained(whole)
        at = entries[-1].seal if entries else FIRST
        count, last = head if head is not None else (0, FIRST)
        if len(entries) < count or (self._depth and head is None and len(entries) > 1):
            got = f"{path} with {len(entries)} entries, where {HEAD} tells of {count or 'none'}"
            raise StorageError(got, "all that were written", RESTORE)
        before = entries[count - 1].seal if count else FIRST
        if before != last or (self._depth and len(entries) > count + 1):
            got = f"{path}, whose entries are not those that {HEAD} tells of"
            raise StorageError(got, "the entries that were written", RESTORE)
        if repair and rest:  # of a write that never returned
            with path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        if repair and len(entries) == count + 1:
            self._write_head(len(entries), at)
        self.entries = entries

    def record(self, event: Event, request: str = "", **details: Any) -> Entry:
        """Append an entry; it is on the disk when this returns.

        Raises:
            StorageError: If it cannot be written; then nothing was.
        """
        with self.owned():
            if not self.entries:
                self._open()
            return self._append(event, request, details)

    def ask(
        self, samples: Iterable[object], *, who: str = "", due: datetime | None = None
    ) -> Request:
        """Record that somebody asks for samples to be forgotten.

        Args:
            samples: Their ids, numbers or words; only salted hashes are kept.
            who: Opaque reference of who asked, such as the number of a ticket: no name.
            due: Until when; by default within one month of now (GDPR, Art. 12(3)).
        """
        now = datetime.now(UTC)
        with self.owned():
            hashes = sorted(self.hashed(samples))
            name = f"r-{1 + sum(e.event == 'asked' for e in self.entries)}"
            limit = (due or a_month_after(now)).astimezone(UTC)
            self.record("asked", name, who=str(who), samples=hashes, due=limit.isoformat())
            return self.requests[name]

    def begin(self, name: str) -> None:
        """It is under way."""
        self._next(name, "under way", OPEN)

    def done(self, name: str, **evidence: Any) -> None:
        """The model without its samples is there; what shows it is kept."""
        self._next(name, "done", OPEN, **evidence)

    def serve(self, name: str, **evidence: Any) -> None:
        """That model is in use, and who asked has been told."""
        self._next(name, "served", ("done",), **evidence)

    def withdraw(self, name: str, reason: str) -> None:
        """It was not carried out, and who asked has been told why."""
        self._next(name, "withdrawn", OPEN, reason=reason)

    @contextmanager
    def request(self, samples: Iterable[object], *, who: str = "") -> Iterator[dict[str, Any]]:
        """A request that is carried out within this context: asked, under way, and done at its end
        with what was put into the dict. An exception withdraws it; a kill leaves it pending."""
        with self.owned():
            name = self.ask(samples, who=who).name
            self.begin(name)
            evidence: dict[str, Any] = {}
            try:
                yield evidence
            except Exception as error:
                self.withdraw(name, f"{type(error).__name__}: {error}"[:500])
                raise
            self.done(name, **evidence)

    def hashed(self, samples: Iterable[object]) -> list[str]:
        """HMAC-SHA-256 of every id under the salt: 64 hexadecimal digits each.

        Raises:
            StorageError: If the salt is gone, or not the one that the ledger was opened with.
        """
        with self.owned():
            if not self.entries:
                self._open()
        salt = self._read_salt()
        return [hmac.digest(salt, _id(s), "sha256").hex() for s in samples]

    def _next(self, name: str, event: Event, after: Sequence[str], **details: Any) -> None:
        with self.owned():
            request = self.requests.get(name)
            if request is None or request.state not in after:
                state = (
                    "no such request" if request is None else f"a request that is {request.state}"
                )
                got = f"{name!r}, {state}, to be {event}"
                raise ConfigError(got, f"one that is {' or '.join(after)}", "See Ledger.requests.")
            self.record(event, name, **details)

    def _open(self) -> None:
        if not self._salt.exists():
            files.ensure_folder(self._salt.parent)
            files.write_file(self._salt, _new_salt)
        tells = hashlib.sha256(self._read_salt(check=False)).hexdigest()
        self._append("opened", "", {"format": FORMAT, "salt": tells})

    def _append(self, event: Event, request: str, details: dict[str, Any]) -> Entry:
        path = self.folder / LEDGER
        last = self.entries[-1].seal if self.entries else FIRST
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        entry = Entry(len(self.entries), now, event, request, details, last)
        entry = parse(entry.line()[:-1])  # as it will be read
        if self._key is not None:
            entry = replace(entry, signature=keys.sign(self._key, entry.hash))
        size = path.stat().st_size if path.exists() else None
        try:
            with path.open("ab") as file:
                file.write(entry.line())
                file.flush()
                os.fsync(file.fileno())
            if size is None:
                files.sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size or 0)
            fix = "Check the folder and its space. Nothing was recorded."
            raise StorageError(f"{path}: {error}", "a file that can be written", fix) from error
        self.entries = (*self.entries, entry)
        self._write_head(len(self.entries), entry.seal)
        return entry

    def _write_head(self, count: int, last: str) -> None:
        content = canonical({"count": count, "seal": last})
        files.write_file(self.folder / HEAD, lambda file: file.write_bytes(content))

    def _read_salt(self, *, check: bool = True) -> bytes:
        try:
            salt = self._salt.read_bytes()
        except OSError as error:
            fix = "Restore it, if the hashes are to be understood; what was forgotten stays so."
            raise StorageError(f"{self._salt}: {error}", "the salt of the ledger", fix) from error
        tells = self.entries[0].details.get("salt") if self.entries else None
        if check and hashlib.sha256(salt).hexdigest() != tells:
            got = f"{self._salt}, another salt than the ledger was opened with"
            raise StorageError(got, "that salt", "Restore it from a copy.")
        return salt


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


def read_head(folder: Path) -> tuple[int, str] | None:
    """Number of entries, and the seal of the last; `None` where there is no such file.

    Raises:
        StorageError: If it is damaged.
    """
    path = folder / HEAD
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        head = json.loads(content)
        count, last = head["count"], head["seal"]
        same = canonical({"count": count, "seal": last}) == content and isinstance(count, int)
    except (ValueError, KeyError, TypeError, StorageError):
        same = False
    if not same:
        raise StorageError(f"{path}, which is damaged", "the file as it was written", RESTORE)
    return count, last


def a_month_after(time: datetime) -> datetime:
    """The same day of the next month, or its last one."""
    year, month = time.year + time.month // 12, time.month % 12 + 1
    day = min(time.day, calendar.monthrange(year, month)[1])
    return time.replace(year=year, month=month, day=day)


def _asked(entry: Entry) -> Request:
    details = dict(entry.details)
    who, samples = details.pop("who"), tuple(details.pop("samples"))
    due = datetime.fromisoformat(details.pop("due"))
    return Request(
        entry.request, who, samples, datetime.fromisoformat(entry.time), due, "asked", details
    )


def _id(sample: object) -> bytes:
    """42 and "42" are two ids; 42 of NumPy or torch is 42."""
    if type(sample) is int:
        return b"%d" % sample
    if hasattr(sample, "item"):
        sample = sample.item()
    if isinstance(sample, bool) or not isinstance(sample, (int, str)):
        got = f"an id of type {type(sample).__name__}"
        raise ConfigError(got, "a whole number or a text", "Pass what names the sample.")
    return canonical(sample)


def _new_salt(file: Path) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secrets.token_bytes(32))
