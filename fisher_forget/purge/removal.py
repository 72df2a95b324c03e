"""Purge: what still holds forgotten samples is removed, or rewritten without them, on record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_forget._util import files
from fisher_forget.errors import StorageError
from fisher_forget.ledger import Ledger
from fisher_forget.ledger.ledger import LEDGER, SALT
from fisher_forget.purge.artefacts import Artefact, artefacts
from fisher_forget.purge.lists import without_lists
from fisher_forget.purge.runs import CONFIG, Runs

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MEMBERS = ("original", "subsets", "retrained")


@dataclass(frozen=True)
class Purged:
    """What `purge` did.

    Attributes:
        removed: Files that are gone.
        rewritten: Files that hold the rest of what they held.
        left: What holds forgotten samples still, and what is to be done with it.
        unknown: Files that do not tell what they hold.
    """

    removed: tuple[Path, ...]
    rewritten: tuple[Path, ...]
    left: tuple[Artefact, ...]
    unknown: tuple[Artefact, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing known is left but salts."""
        return all(artefact.action == "salt" for artefact in self.left)

    def __str__(self) -> str:
        lines = [f"removed  {path}" for path in self.removed]
        lines += [f"rewrote  {path}" for path in self.rewritten]
        lines += [str(artefact) for artefact in (*self.left, *self.unknown)]
        return "\n".join(lines or ["Nothing known here holds forgotten samples."])


def purge(
    folder: str | Path,
    sets: Collection[str] = (),
    *,
    salt: bool = False,
    key: str | Path | Ed25519PrivateKey | None = None,
    ledger: Ledger | None = None,
) -> Purged:
    """Remove what `artefacts` lists, or rewrite it without the forgotten samples.

    Nothing may run in the folder meanwhile. What is removed is recorded before and after in the
    ledger of the run or of the folder that it was in, with salted hashes in the place of indices:
    a run whose ledger says so is not trained again, which would bring the samples back. A purge
    that was killed goes on when it is called again. Copies elsewhere, backups and what a disk keeps
    of removed files are beyond it.

    Args:
        folder: As for `artefacts`.
        sets: As for `artefacts`.
        salt: Remove the ledgers' salts, too, which lie in the folder: nobody can tell then who was
            forgotten, and a prepared model or SISA takes no more requests there.
        key: Signs the entries, where such a ledger was begun with a key.
        ledger: Records all of it as well: the one that has the request.

    Raises:
        ConfigError: As for `artefacts`; or without the key of a ledger that is signed.
        StorageError: As for `artefacts`; or if a file cannot be removed.
    """
    root, runs = Path(folder).resolve(), Runs(sets)
    found = artefacts(root, sets)
    work: dict[Path | None, list[Artefact]] = defaultdict(list)
    for artefact in found:
        if artefact.action in ("remove", "rewrite"):
            work[_home(artefact.path, runs)].append(artefact)
    every = [artefact for own in work.values() for artefact in own]
    salted = {a.path.parent for a in found if a.action == "salt"}
    homes = {home for home in work if home is not None} | (salted if salt else set())
    records = [_Record.of(Ledger(home, key=key), work[home], salt) for home in sorted(homes)]
    if ledger is not None:
        records.append(_Record(ledger, _named(root, every)))
    for record in records:  # who refuses, refuses before anything is removed
        record.begin(runs)
    # a run's configuration comes last: it says what the lists are, should a kill come between
    for artefact in sorted(every, key=lambda a: a.path.name == CONFIG):
        _carry_out(artefact, runs)
    for record in records:
        record.end()
    salts = tuple(home / SALT for home in sorted(homes) if salt)
    for path in salts:
        _unlink(path)
    return Purged(
        removed=tuple(a.path for a in every if a.action == "remove") + salts,
        rewritten=tuple(a.path for a in every if a.action == "rewrite"),
        left=tuple(a for a in found if a.action == "left" or (a.action == "salt" and not salt)),
        unknown=tuple(a for a in found if a.action == "look"),
    )


@dataclass(frozen=True)
class _Record:
    """Of a purge in a ledger: what is to become of files, before and after."""

    ledger: Ledger
    files: dict[str, str]

    @classmethod
    def of(cls, ledger: Ledger, own: list[Artefact], salt: bool) -> _Record:
        named = _named(ledger.folder, own)
        return cls(ledger, named | ({SALT: "removed"} if salt else {}))

    def begin(self, runs: Runs) -> None:
        run = runs.of(self.ledger.folder / CONFIG)
        lists = {} if run is None else run.lists
        hashed = {name: self.ledger.hashed(indices) for name, indices in lists.items()}
        self.ledger.record("purged", step="begun", files=self.files, samples=hashed)

    def end(self) -> None:
        self.ledger.record("purged", step="done", files=self.files)


def _home(path: Path, runs: Runs) -> Path | None:
    """The folder whose ledger tells what became of a file: of its run, of its prepared model, or of
    the ensemble that it is of; `None` where there is none."""
    if (run := runs.of(path)) is not None:
        return run.folder
    if (path.parent / LEDGER).exists():
        return path.parent
    return path.parent.parent if path.parent.name in MEMBERS else None


def _carry_out(artefact: Artefact, runs: Runs) -> None:
    path, run = artefact.path, runs.of(artefact.path)
    if artefact.action == "rewrite" and run is not None:
        files.write_text(path, without_lists(path.read_text(encoding="utf-8"), run))
    else:
        _unlink(path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        files.sync_folder(path.parent)
    except OSError as error:
        fix = "Remove it yourself, and call purge again."
        raise StorageError(f"{path}: {error}", "a file that can be removed", fix) from error


def _named(folder: Path, of: list[Artefact]) -> dict[str, str]:
    """What became of files, by their paths within a folder."""
    done = {"remove": "removed", "rewrite": "rewritten"}
    return {a.path.relative_to(folder).as_posix(): done[a.action] for a in of}
