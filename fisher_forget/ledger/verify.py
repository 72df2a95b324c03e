"""Whether a ledger is as it was written, told with the public key alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_forget.errors import StorageError
from fisher_forget.ledger import keys
from fisher_forget.ledger.entries import (
    FIRST,
    Entry,
    Head,
    parse,
    read_bytes,
    read_head,
    read_line,
)
from fisher_forget.ledger.ledger import HEAD, LEDGER
from fisher_forget.ledger.states import OPEN, Request, told

RETRIES = 20

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class Reading:
    """What can be read of a ledger, altered or not.

    Attributes:
        folder: As given.
        entries: Those that are whole, in their order.
        requests: Those that the entries tell of, by name, altered entries included.
        wrong: What is not as it was written, in sentences.
        unproven: Why no signature fits the key given: it is another key, or somebody has made the
            whole record anew. Empty where they fit, or no key was given.
        altered: Names of the requests that an altered entry is of: they are shown as it now says.
        broken: Names of those whose beginning cannot be read, so that they are not among
            `requests`.
    """

    folder: Path
    entries: tuple[Entry, ...]
    requests: dict[str, Request]
    wrong: list[str]
    unproven: str = ""
    altered: frozenset[str] = frozenset()
    broken: tuple[str, ...] = ()

    @property
    def findings(self) -> list[str]:
        """All that speaks against relying on it, in sentences; none where it is intact."""
        return [*self.wrong, *filter(None, [self.unproven])]

    @property
    def seal(self) -> str:
        """Of the last entry; empty without entries."""
        return self.entries[-1].seal if self.entries else ""

    def pending(self) -> list[Request]:
        """Requests that were asked for, and are not done."""
        return [r for r in self.requests.values() if r.state in OPEN]

    def overdue(self, now: datetime | None = None) -> list[Request]:
        """Requests that should have been served by now."""
        return [r for r in self.requests.values() if r.overdue(now)]


def verify(
    folder: str | Path,
    public_key: str | Path | Ed25519PublicKey | None = None,
    *,
    known: str | None = None,
) -> list[str]:
    """What is wrong with a ledger, entry by entry; nothing is written.

    Without a key, the chain shows what was altered by accident, or by somebody who did not make
    them anew. With it, nobody without the private key can alter, drop, swap or append an entry.
    Neither shows that folder and head were both put back to an earlier state: keep the seal of the
    last entry elsewhere (`Ledger.seal`), and pass it.

    Args:
        folder: Of the ledger; or the ledger's lines alone, as a file.
        public_key: File of `new_keys`, or such a key.
        known: Seal of an entry that must be there.

    Returns:
        Sentences; none where all is as it was written.

    Raises:
        StorageError: If it, or the key, cannot be read.
    """
    return examine(folder, public_key, known=known).findings


def examine(
    folder: str | Path,
    public_key: str | Path | Ed25519PublicKey | None = None,
    *,
    known: str | None = None,
) -> Reading:
    """What can be read of a ledger, and what is wrong with it: see `verify`."""
    place = Path(folder)
    path = place / LEDGER if place.is_dir() else place
    key = keys.read_public(public_key) if isinstance(public_key, (str, Path)) else public_key
    if not path.is_file():
        return Reading(place, (), {}, [f"{path}: there is no ledger."])
    head, content = _read(path)
    *lines, rest = content.split(b"\n")
    wrong = ["The last line has no end: it was cut off, or never written whole."] if rest else []
    lost: dict[str, list[int]] = {}  # entries of a request whose beginning cannot be read
    altered: set[str] = set()
    entries: list[Entry | None] = []  # as they were written
    requests: dict[str, Request] = {}
    for at, line in enumerate(lines):
        entry, whole = _entry(line)
        last = entries[-1] if entries else None
        entries.append(entry if whole else None)
        if entry is None or not whole:
            wrong.append(f"Line {at + 1}: {_what(entry)}.")
        else:
            wrong += _out_of_place(entry, at, last)
        if entry is None:
            continue
        if not whole and entry.request:
            altered.add(entry.request)
        if entry.request and entry.event != "asked" and entry.request not in requests:
            lost.setdefault(entry.request, []).append(at + 1)
            continue
        try:
            requests = told([entry], requests)
        except StorageError as error:
            wrong.append(f"Line {at + 1}: {error.got}.")
    wrong += [_lost(name, lines) for name, lines in lost.items()]
    kept = tuple(e for e in entries if e is not None)
    said, unproven = _of_signatures(kept, key)
    wrong += said
    seals = [e.seal if e else "" for e in entries]
    if known is not None and known not in seals:
        wrong.append(
            f"No entry has the seal {known}: the end is missing, or another ledger is here."
        )
    if path.name == LEDGER:
        wrong += _of_head(head, seals, None if unproven else key)
    broken = tuple(name for name in lost if name not in requests)
    return Reading(place, kept, requests, wrong, unproven, frozenset(altered), broken)


def _entry(line: bytes) -> tuple[Entry | None, bool]:
    """What a line says, if anything, and whether it is as it was written."""
    try:
        return parse(line), True
    except StorageError:
        try:
            return read_line(line)[0], False
        except StorageError:
            return None, False


def _what(entry: Entry | None) -> str:
    """What a line is that is not as it was written."""
    if entry is None:
        return "no entry of a ledger"
    return f"altered, of {entry.request!r}" if entry.request else "altered"


def _out_of_place(entry: Entry, at: int, last: Entry | None) -> Iterator[str]:
    """That it does not stand where it was written; after an altered entry that cannot be told."""
    if entry.number != at:
        yield f"Line {at + 1}: here is entry {entry.number}: dropped or swapped."
    if (last is not None or at == 0) and entry.before != (last.seal if last else FIRST):
        yield f"Entry {entry.number}: it does not follow the entry before it."


def _lost(name: str, lines: list[int]) -> str:
    several = "s" if len(lines) > 1 else ""
    return f"Line{several} {', '.join(map(str, lines))}: of {name!r}, whose beginning is not there."


def _of_signatures(entries: Sequence[Entry], key: Ed25519PublicKey | None) -> tuple[list[str], str]:
    """Entries that are not signed with a key, or why none is."""
    unsigned = [e for e in entries if key and not keys.signed(key, e.hash, e.signature)]
    if len(unsigned) < len(entries) or not unsigned:
        return [f"Entry {e.number}: not signed with the private key." for e in unsigned], ""
    if any(e.signature for e in unsigned):
        why = "None of its signatures is of the key given: it is the key of another ledger"
    else:
        why = "None of its entries is signed: it was begun without a key"
    return [], f"{why}, or somebody has made the whole record anew."


def _read(path: Path) -> tuple[Head | str | None, bytes]:
    """Head (or what is wrong with it) and entries, as they are while nobody appends."""
    for _ in range(RETRIES):
        head, content = _head(path), read_bytes(path)
        if _head(path) == head:
            break
    return head, content


def _head(path: Path) -> Head | str | None:
    try:
        return read_head(path.parent / HEAD)
    except StorageError as error:
        return f"{error.got}."


def _of_head(head: Head | str | None, seals: list[str], key: Ed25519PublicKey | None) -> list[str]:
    """What the head says against these entries."""
    if isinstance(head, str):
        return [head]
    if head is None:
        return [f"There is no {HEAD}, which tells how many entries there are."] if seals else []
    if key is not None and not keys.signed(key, head.hash, head.signature):
        return [f"{HEAD} is not signed with the private key."]
    if len(seals) < head.count:
        return [f"{head.count} entries were written, {len(seals)} are here: the end was cut off."]
    if (seals[head.count - 1] if head.count else FIRST) != head.seal:
        return [f"Entry {head.count - 1} is not the one that {HEAD} tells of."]
    if len(seals) > head.count + 1:
        return [f"{head.count} entries were written, {len(seals)} are here: some were appended."]
    return []
