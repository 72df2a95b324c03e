"""Whether a ledger is as it was written, told with the public key alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_forget.errors import StorageError
from fisher_forget.ledger import keys
from fisher_forget.ledger.entries import FIRST, Entry, Head, parse, read_bytes, read_head
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
        requests: Those that the entries tell of, by name.
        wrong: What is not as it was written, in sentences.
    """

    folder: Path
    entries: tuple[Entry, ...]
    requests: dict[str, Request]
    wrong: list[str]

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
    return examine(folder, public_key, known=known).wrong


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
    entries: list[Entry | None] = []
    requests: dict[str, Request] = {}
    unsigned: list[Entry] = []
    for at, line in enumerate(lines):
        try:
            entry = parse(line)
        except StorageError as error:
            wrong.append(f"Line {at + 1}: altered ({error.got}).")
            entries.append(None)
            continue
        if entry.number != at:
            wrong.append(f"Line {at + 1}: here is entry {entry.number}: dropped or swapped.")
        last = entries[-1] if entries else None
        if entry.before != (last.seal if last else "" if entries else FIRST):
            wrong.append(f"Entry {entry.number}: it does not follow the entry before it.")
        if key is not None and not keys.signed(key, entry.hash, entry.signature):
            unsigned.append(entry)
        try:
            requests = told([entry], requests)
        except StorageError as error:
            wrong.append(f"Line {at + 1}: {error.got}.")
        entries.append(entry)
    whole = tuple(e for e in entries if e is not None)
    none = bool(unsigned) and len(unsigned) == len(whole)
    wrong += _of_signatures(unsigned, len(whole))
    seals = [e.seal if e else "" for e in entries]
    if known is not None and known not in seals:
        wrong.append(
            f"No entry has the seal {known}: the end is missing, or another ledger is here."
        )
    if path.name == LEDGER:
        wrong += _of_head(head, seals, None if none else key)
    return Reading(place, whole, requests, wrong)


def _of_signatures(unsigned: list[Entry], count: int) -> list[str]:
    """One sentence where no signature fits: the key is another one."""
    if len(unsigned) < count or count < 2:
        return [f"Entry {e.number}: not signed with the private key." for e in unsigned]
    if not any(e.signature for e in unsigned):
        return [f"None of the {count} entries is signed."]
    return [f"None of the {count} signatures is of this key: is it the key of another ledger?"]


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
