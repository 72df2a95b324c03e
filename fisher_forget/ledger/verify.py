"""Whether a ledger is as it was written, told with the public key alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fisher_forget.errors import StorageError
from fisher_forget.ledger import keys
from fisher_forget.ledger.entries import FIRST, Head, parse
from fisher_forget.ledger.ledger import HEAD, LEDGER, read_head

RETRIES = 20

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


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
    last entry elsewhere, and pass it.

    Args:
        folder: Of the ledger; or the ledger's lines alone, as a file.
        public_key: File of `new_keys`, or such a key.
        known: Seal of an entry that must be there.

    Returns:
        Sentences; none where all is as it was written.
    """
    place = Path(folder)
    path = place / LEDGER if place.is_dir() else place
    key = keys.read_public(public_key) if isinstance(public_key, (str, Path)) else public_key
    if not path.is_file():
        return [f"{path}: there is no ledger."]
    head, content = _read(path)
    *lines, rest = content.split(b"\n")
    wrong = ["The last line has no end: it was cut off, or never written whole."] if rest else []
    seals: list[str] = []
    for place_, line in enumerate(lines):
        try:
            entry = parse(line)
        except StorageError as error:
            wrong.append(f"Line {place_ + 1}: altered ({error.got}).")
            seals.append("")
            continue
        if entry.number != place_:
            wrong.append(f"Line {place_ + 1}: here is entry {entry.number}: dropped or swapped.")
        if entry.before != (seals[-1] if seals else FIRST):
            wrong.append(f"Entry {entry.number}: it does not follow the entry before it.")
        if key is not None and not keys.signed(key, entry.hash, entry.signature):
            wrong.append(f"Entry {entry.number}: not signed with the private key.")
        seals.append(entry.seal)
    if known is not None and known not in seals:
        wrong.append(
            f"No entry has the seal {known}: the end is missing, or another ledger is here."
        )
    return wrong + (_of_head(head, seals, key) if path.name == LEDGER else [])


def _read(path: Path) -> tuple[Head | str | None, bytes]:
    """Head (or what is wrong with it) and entries, as they are while nobody appends."""
    for _ in range(RETRIES):
        head, content = _head(path), path.read_bytes()
        if _head(path) == head:
            break
    return head, content


def _head(path: Path) -> Head | str | None:
    try:
        return read_head(path.parent)
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
