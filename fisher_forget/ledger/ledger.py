"""A folder's record of deletion requests: append-only, chained by hashes, under one lock.

Four files lie in the folder: `ledger.jsonl`, the entries; `ledger.head`, how many there are and the
seal of the last, which shows that the end was cut off; `ledger.salt`, without which nobody can tell
which samples the hashes in it stand for; and the lock. An entry is on the disk (fsync) when the
call that makes it returns. What a kill leaves half-written was never returned, and is taken away by
the next owner.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.ledger import keys, owner
from fisher_forget.ledger.entries import (
    FIRST,
    RESTORE,
    Entry,
    Event,
    Head,
    Notice,
    chained,
    parse,
    read_bytes,
    read_head,
)
from fisher_forget.ledger.evidence import WRONG
from fisher_forget.ledger.ids import id_of, text_of
from fisher_forget.ledger.states import OPEN, Request, a_month_after, in_utc, told

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

LEDGER, HEAD, SALT = "ledger.jsonl", "ledger.head", "ledger.salt"
COPIED = (LEDGER, HEAD, SALT)  # make a copy of a ledger
FORMAT = 1


class Ledger:
    """The ledger of a folder, made at its first use. A copy that cannot be written can be read.

    Several objects of one folder may be used within each other: what one thread owns, it owns
    through all of them. It is no object to be copied or pickled: open it again by its folder.

    Args:
        folder: Of the ledger, and of what it is about.
        salt: Another place of the salt: who removes it makes the hashes useless.
        key: Signs the entries: a file of `new_keys`, or such a key.
        wait: Seconds to wait for another owner.
        data: Names the data of a prepared model or of SISA, in place of a look at every sample
            whenever the folder is opened; the entry "opened" says so.

    Attributes:
        folder: As given.
        entries: All so far, as this object has read them last.

    Raises:
        StorageError: If an entry was altered, dropped, swapped or cut off.
        ConfigError: If `wait` is no time, or the key is not the one that signs this ledger.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        salt: str | Path | None = None,
        key: str | Path | Ed25519PrivateKey | None = None,
        wait: float = 3600.0,
        data: str = "",
    ) -> None:
        if not isinstance(wait, (int, float)) or not wait >= 0:
            got, fix = f"wait={wait!r}", "Pass math.inf to wait as long as it takes."
            raise ConfigError(got, "seconds, 0 or more", fix)
        there = os.path.exists(Path(folder) / LEDGER)  # a copy to be read, perhaps
        self.folder = (Path(folder) if there else files.ensure_folder(folder)).resolve()
        self.wait, self.data = wait, text_of(data)
        self._salt = Path(salt) if salt is not None else self.folder / SALT
        self._key = keys.read_private(key) if isinstance(key, (str, Path)) else key
        self._owner = owner.ownership(self.folder)
        self.entries: tuple[Entry, ...] = ()
        self._requests: tuple[int, dict[str, Request]] = (0, {})
        self._size = 0
        self.read()
        if self._key is not None:
            self._check_key()

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, {len(self.entries)} entries)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        got, fix = f"a copy or pickle of {self!r}", "Open it again: Ledger(folder)."
        raise StorageError(got, "the ledger itself, which knows who writes to it", fix)

    @property
    def term(self) -> str:
        """Of the present or last ownership: see `owner.saving`."""
        return self._owner.term

    @property
    def seal(self) -> str:
        """Of the last entry: kept elsewhere, and passed to `verify` as `known=`, it shows that
        nothing up to here was taken back. Empty without entries."""
        return self.entries[-1].seal if self.entries else ""

    @property
    def exists(self) -> bool:
        """Whether anything has been recorded."""
        return bool(self.entries)

    @property
    def requests(self) -> dict[str, Request]:
        """All requests by name, in the order in which they came."""
        done, found = self._requests
        self._requests = len(self.entries), told(self.entries[done:], found)
        return dict(self._requests[1])

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
            StorageError: If another owner does not end in time, which is named; or the folder
                cannot be written.
        """
        with self._owner.held(self.wait):
            self._read(owned=True)
            yield

    def read(self) -> None:
        """Read the entries again, and check them.

        Raises:
            StorageError: If an entry was altered, dropped, swapped or cut off, or none can be read.
        """
        self._read(owned=False)

    def _read(self, *, owned: bool) -> None:
        """An owner takes away what a kill left half-written, too."""
        path = self.folder / LEDGER
        # in this order, since another owner writes an entry first and the head then
        head = read_head(self.folder / HEAD)
        size = path.stat().st_size if path.exists() else 0
        read = Head(len(self.entries), self.entries[-1].seal) if self.entries else None
        if head is not None and size == self._size and replace(head, signature="") == read:
            return  # nobody has written since
        content = read_bytes(path) if size else b""
        whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        entries = chained(whole)
        at = entries[-1].seal if entries else FIRST
        count, last = (head.count, head.seal) if head is not None else (0, FIRST)
        if entries[: len(self.entries)] != self.entries:
            got = f"{path} without entries that were there before"
            raise StorageError(got, "a ledger that only grows", RESTORE)
        if len(entries) < count or (owned and head is None and len(entries) > 1):
            got = f"{path} with {len(entries)} entries, where {HEAD} tells of {count or 'none'}"
            raise StorageError(got, "all that were written", RESTORE)
        before = entries[count - 1].seal if count else FIRST
        if before != last or (owned and len(entries) > count + 1):
            got = f"{path}, whose entries are not those that {HEAD} tells of"
            raise StorageError(got, "the entries that were written", RESTORE)
        if owned and rest:  # of a write that never returned
            with path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        if owned and len(entries) == count + 1 and self._signs(head):
            self._write_head(len(entries), at)
        self.entries, self._size = entries, len(whole)

    def record(self, event: Notice, **details: Any) -> Entry:
        """Append an entry that is of no request; it is on the disk when this returns.

        Raises:
            StorageError: If it cannot be written; then nothing was.
        """
        with self.owned():
            return self._record(event, "", details)

    def _record(self, event: Event, request: str, details: Mapping[str, Any]) -> Entry:
        own = {str(key): value for key, value in details.items()}
        if self.entries:
            return self._append(event, request, own)
        tells = {"format": FORMAT, "salt": hashlib.sha256(self._new_salt()).hexdigest()}
        if event == "opened":
            return self._append(event, request, tells | own)
        self._append("opened", "", tells)
        return self._append(event, request, own)

    def ask(
        self,
        samples: Iterable[object],
        *,
        who: str = "",
        received: datetime | None = None,
        due: datetime | None = None,
    ) -> Request:
        """Record that somebody asks for samples to be forgotten.

        Args:
            samples: Their ids, numbers or words; only salted hashes are kept.
            who: Opaque reference of who asked, such as the number of a ticket: no name.
            received: When the request came in; by default now. Without a time zone this and `due`
                are this machine's local time.
            due: Until when it must be served; by default one month after it came in (GDPR, Art.
                12(3)). A day that has passed is recorded with a warning: a request must not be
                lost for being late.

        Raises:
            ConfigError: If there is no sample, or a time is none, or yet to come.
            StorageError: If it cannot be recorded.
        """
        now = datetime.now(UTC)
        came = now if received is None else in_utc(received)
        if came > now:
            got = f"received={received!r}, which is yet to come"
            raise ConfigError(got, "the time at which the request came in", "Correct it.")
        limit = a_month_after(came) if due is None else in_utc(due)
        if isinstance(samples, (str, bytes)) or not isinstance(samples, Iterable):
            got, fix = f"samples of type {type(samples).__name__}", "Put it in a list."
            raise ConfigError(got, "a list of ids", fix)
        with self.owned():
            hashes = sorted(self.hashed(samples))
            if not hashes:
                got, fix = "a request for no sample", "Name at least one."
                raise ConfigError(got, "the ids of those to be forgotten", fix)
            name = f"r-{1 + sum(e.event == 'asked' for e in self.entries)}"
            details = {"who": text_of(who), "samples": hashes, "due": limit.isoformat()}
            if received is not None:
                details["received"] = came.isoformat()
            self._record("asked", name, details)
            request = self.requests[name]
        if limit < now:
            warnings.warn(
                f"{name} is overdue: it was due on {limit:%Y-%m-%d %H:%M} UTC.",
                FisherForgetWarning,
                stacklevel=2,
            )
        return request

    def begin(self, name: str, /, **evidence: Any) -> None:
        """It is under way."""
        self._next(name, "under way", OPEN, evidence)

    def fail(self, name: str, reason: str) -> None:
        """An error came: it is to be done again, and stays due."""
        self._next(name, "failed", OPEN, {"reason": reason})

    def done(self, name: str, /, **evidence: Any) -> None:
        """The model without its samples is there; what shows it is kept (`evidence`). Until it is
        served it may be done again, by a better model."""
        self._next(name, "done", (*OPEN, "done"), evidence)

    def serve(self, name: str, /, *, although: str = "", **evidence: Any) -> None:
        """That model is in use, and who asked has been told.

        Args:
            name: Of a request that is done.
            although: Why it is served although its self-check says that the samples are not
                forgotten, or that others were harmed; it is recorded.
            **evidence: What else is to be known.

        Raises:
            ConfigError: If it is not done, or its check says so and no reason is given.
        """
        although = text_of(although or "")
        with self.owned():
            request = self.requests.get(name)
            if request is not None and request.verdict in WRONG and not although.strip():
                got = f"{name!r}, whose self-check says: {request.verdict}"
                fix = (
                    "Forget again by other options, or retrain; or say why: although=, --although."
                )
                raise ConfigError(got, "one whose check does not say so", fix)
            reason = {"although": although} if although else {}
            self._next(name, "served", ("done",), reason | evidence)

    def withdraw(self, name: str, reason: str) -> None:
        """It was not carried out, and who asked has been told why."""
        self._next(name, "withdrawn", OPEN, {"reason": reason})

    @contextmanager
    def request(
        self,
        samples: Iterable[object],
        *,
        who: str = "",
        received: datetime | None = None,
        due: datetime | None = None,
    ) -> Iterator[dict[str, Any]]:
        """A request that is carried out within this context: asked, under way, and done at its end
        with what was put into the dict. After an exception or a kill it is pending, and due. See
        `ask`."""
        with self.owned():
            name = self.ask(samples, who=who, received=received, due=due).name
            self.begin(name)
            evidence: dict[str, Any] = {}
            try:
                yield evidence
            except Exception as error:
                self.fail(name, f"{type(error).__name__}: {error}"[:500])
                raise
            self._next(name, "done", OPEN, evidence)

    def hashed(self, samples: Iterable[object]) -> list[str]:
        """HMAC-SHA-256 of every id under the salt: 64 hexadecimal digits each.

        Raises:
            StorageError: If the salt is gone, or not the one that the ledger was opened with.
        """
        if not self.entries:
            with self.owned():
                if not self.entries:  # nobody else has made it meanwhile
                    self._record("opened", "", {})
        salt = self._read_salt()
        return [hmac.digest(salt, id_of(s), "sha256").hex() for s in samples]

    def _next(
        self, name: str, event: Event, after: Sequence[str], details: Mapping[str, Any]
    ) -> None:
        with self.owned():
            request = self.requests.get(name)
            if request is None or request.state not in after:
                state = (
                    "no such request" if request is None else f"a request that is {request.state}"
                )
                got = f"{name!r}, {state}, to be {event}"
                raise ConfigError(
                    got,
                    f"one that is {' or '.join(after)}",
                    "See which requests there are, and their states.",
                )
            self._record(event, name, details)

    def _new_salt(self) -> bytes:
        if not self._salt.exists():
            files.ensure_folder(self._salt.parent)
            files.write_file(self._salt, _new_salt)
        return self._salt.read_bytes()

    def _append(self, event: Event, request: str, details: dict[str, Any]) -> Entry:
        path = self.folder / LEDGER
        self._check_key()
        last = self.entries[-1].seal if self.entries else FIRST
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        entry = Entry(len(self.entries), now, event, request, details, last)
        entry = parse(entry.line()[:-1])  # as it will be read
        if self._key is not None:
            entry = replace(entry, signature=keys.sign(self._key, entry.hash))
        try:
            with path.open("ab") as file:
                file.write(entry.line())
                file.flush()
                os.fsync(file.fileno())
            if not self._size:
                files.sync_folder(self.folder)
            self._write_head(entry.number + 1, entry.seal)
        except (OSError, StorageError) as error:
            with suppress(OSError):
                os.truncate(path, self._size)
            fix = "Check the folder and its space. Nothing was recorded."
            raise StorageError(f"{path}: {error}", "a file that can be written", fix) from error
        self.entries, self._size = (*self.entries, entry), self._size + len(entry.line())
        return entry

    def _check_key(self) -> None:
        head = read_head(self.folder / HEAD)
        if head is None or self._signs(head):
            return
        if not head.signature:
            got, fix = f"a key for {self.folder}, whose ledger is not signed", "Give no key."
            raise ConfigError(got, "no key, as at its beginning", fix)
        other = "no key" if self._key is None else "another key"
        fix = "Give the private key that it was begun with: key=, on the command line --key."
        raise ConfigError(f"{other} for {self.folder}, whose ledger is signed", "its key", fix)

    def _signs(self, head: Head | None) -> bool:
        """Whether what this object writes is signed as the head is: a signature has one form."""
        return head is None or head.signature == self._signed(head.count, head.seal)

    def _signed(self, count: int, seal: str) -> str:
        return "" if self._key is None else keys.sign(self._key, Head(count, seal).hash)

    def _write_head(self, count: int, seal: str) -> None:
        content = Head(count, seal, self._signed(count, seal)).line()
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


def _new_salt(file: Path) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secrets.token_bytes(32))
