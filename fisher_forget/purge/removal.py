"""Purge: what still holds forgotten samples is removed, or rewritten without them, on record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger import Ledger
from fisher_forget.ledger.ledger import LEDGER, SALT
from fisher_forget.ledger.owner import LOCK
from fisher_forget.purge.artefacts import (
    MEMBERS,
    OUTPUTS,
    Artefact,
    artefacts,
    checked,
    is_signed,
    listed,
    walk,
)
from fisher_forget.purge.runs import CONFIG, PURGED, Run, Runs

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

WAIT = 10.0  # seconds for another owner, who is at work in the folder


@dataclass(frozen=True)
class Purged:
    """What `purge` did.

    Attributes:
        removed: Files that are gone.
        rewritten: Files that hold the rest of what they held.
        left: What holds forgotten samples still, and what is to be done with it; salts that were
            not to be removed among them.
        unknown: Files that do not tell what they hold.
    """

    removed: tuple[Path, ...]
    rewritten: tuple[Path, ...]
    left: tuple[Artefact, ...]
    unknown: tuple[Artefact, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is left but salts, and every file told what it holds."""
        return not self.unknown and all(artefact.action == "salt" for artefact in self.left)

    def __str__(self) -> str:
        lines = [f"removed  {path}" for path in self.removed]
        lines += [f"rewrote  {path}" for path in self.rewritten]
        lines += [str(artefact) for artefact in (*self.left, *self.unknown)]
        return listed(lines)


def purge(
    folder: str | Path,
    sets: Collection[str] = (),
    *,
    salt: bool = False,
    key: str | Path | Ed25519PrivateKey | None = None,
    ledger: Ledger | None = None,
) -> Purged:
    """Remove what `artefacts` lists, or rewrite it without the forgotten samples.

    What is removed is recorded before and after in the ledger of the run, of the prepared model or
    of the ensemble that it was of, with salted hashes in the place of indices. A run or an ensemble
    whose ledger says so is not trained again, which would bring the samples back. A purge that was
    killed goes on when it is called again. Copies elsewhere, backups and what a disk keeps of
    removed files are beyond it.

    Args:
        folder: As for `artefacts`.
        sets: As for `artefacts`.
        salt: Remove the salts of runs and ensembles, too: nobody can tell then from their ledgers
            who was forgotten. Prepared models and SISA need theirs; remove those yourself, when
            they take no more requests.
        key: Signs the entries of the ledgers that were begun with a key.
        ledger: Records all of it as well: the one that has the request.

    Raises:
        ConfigError: As for `artefacts`; or without the key of a ledger that is signed.
        StorageError: As for `artefacts`; if a ledger is damaged, or somebody is at work in its
            folder; or if a file cannot be removed.
    """
    if not (ledger is None or isinstance(ledger, Ledger)):
        raise ConfigError(f"ledger={ledger!r}", "a Ledger, or none", "Pass Ledger(folder).")
    root = checked(folder)
    with ExitStack() as stack:
        for home in _homes(root):
            stack.enter_context(Ledger(home, wait=WAIT).owned())
        return _purge(root, Runs(sets), salt=salt, key=key, ledger=ledger)


def _homes(root: Path) -> list[Path]:
    """Folders of runs, and those with a ledger, in a tree; and the run that the tree is within."""
    runs, homes = Runs(()), set[Path]()
    if (run := runs.of(root / CONFIG)) is not None:
        homes.add(run.folder)
    for path in walk(root):
        if path.name == CONFIG and (run := runs.of(path)) is not None:
            homes.add(run.folder)
        elif path.name in (LEDGER, LOCK):
            homes.add(path.parent)
    return sorted(home for home in homes if _readable(home))


def _readable(home: Path) -> bool:
    """Whether its ledger can be read; `artefacts` names it if not."""
    try:
        _check_own(home)
        Ledger(home)
    except StorageError:
        return False
    return True


def _check_own(home: Path) -> None:
    """Refuse a ledger that leads out of its folder."""
    for path in home.glob("ledger.*"):
        if path.is_symlink() or not path.is_file():
            got, fix = f"{path}, which is a link or no file", "Put the file itself there."
            raise StorageError(got, "a ledger's own file", fix)


def _purge(
    root: Path,
    runs: Runs,
    *,
    salt: bool,
    key: str | Path | Ed25519PrivateKey | None,
    ledger: Ledger | None,
) -> Purged:
    """What `purge` does, in folders that nobody else works in."""
    found = artefacts(root, runs.named)
    every = [a for a in found if a.action in ("remove", "rewrite") or (salt and _free(a))]
    work: dict[Path | None, list[Artefact]] = defaultdict(list)
    for artefact in every:
        work[_home(artefact.path, runs)].append(artefact)
    records = [_Record.of(home, own, key) for home, own in work.items() if home is not None]
    if ledger is not None and every:
        records.append(_Record(ledger, _named(root, every)))
    for record in records:  # each was opened before: who refuses, refuses before anything is done
        record.begin(runs)
    linked = [_linked(artefact) for artefact in every]
    for artefact in sorted(every, key=_turn):
        _carry_out(artefact, runs)
    salts = []
    for record in records:
        record.end()
        if salt and record.made_salt:
            salts.append(record.ledger.folder / SALT)
            _unlink(salts[-1])
    left = [a for a in found if a.action in ("left", "salt") and a not in every]
    return Purged(
        removed=tuple(a.path for a in every if a.action != "rewrite") + tuple(salts),
        rewritten=tuple(a.path for a in every if a.action == "rewrite"),
        left=(*left, *(artefact for artefact in linked if artefact is not None)),
        unknown=tuple(a for a in found if a.action == "look"),
    )


class _Record:
    """Of a purge in a ledger: what is to become of files, before and after."""

    def __init__(self, ledger: Ledger, named: dict[str, str]) -> None:
        self.ledger, self.named = ledger, named
        self.made_salt = False

    @classmethod
    def of(
        cls, home: Path, own: list[Artefact], key: str | Path | Ed25519PrivateKey | None
    ) -> _Record:
        """In the folder's own ledger.

        Raises:
            ConfigError: If it was begun with a key, and none is given.
            StorageError: If it is damaged, or leads out of the folder.
        """
        _check_own(home)
        signed = is_signed(home)
        if signed and key is None:
            fix = "Pass key=, or --key, with the private key that it was begun with."
            raise ConfigError(f"{home}, whose ledger is signed", "its key", fix)
        return cls(Ledger(home, key=key if signed else None, wait=WAIT), _named(home, own))

    def begin(self, runs: Runs) -> None:
        run = runs.of(self.ledger.folder / CONFIG)
        known = sorted(run.indices) if run is not None else []
        before = (self.ledger.folder / SALT).exists()
        samples = self.ledger.hashed(known) if known else []
        self.ledger.record("purged", step="begun", files=self.named, samples=samples)
        self.made_salt = not before and (self.ledger.folder / SALT).exists()

    def end(self) -> None:
        self.ledger.record("purged", step="done", files=self.named)


def _home(path: Path, runs: Runs) -> Path | None:
    """The folder whose ledger tells what became of a file: of its run, of its prepared model, or of
    the ensemble that it is of; `None` where there is none."""
    if (path.parent / LEDGER).is_file():
        return path.parent
    run = runs.of(path)
    if run is not None and (run.role(path) is not None or files.TEMPORARY.fullmatch(path.name)):
        return run.folder
    if path.name == OUTPUTS:
        return path.parent
    return path.parent.parent if path.parent.name in MEMBERS else None


def _free(artefact: Artefact) -> bool:
    """Whether it is a salt that nothing needs any more."""
    return artefact.action == "salt" and not artefact.fix


def _turn(artefact: Artefact) -> int:
    """A run's metrics and configuration come late: they say what the lists are, and which models
    stay, should a kill come between. Salts come last: with them the lists are hashed."""
    late = {"metrics.json": 1, CONFIG: 2}.get(artefact.path.name, 0)
    return 3 if artefact.action == "salt" else late


def _carry_out(artefact: Artefact, runs: Runs) -> None:
    path, run = artefact.path, runs.of(artefact.path)
    if artefact.action == "rewrite" and run is not None:
        _rewrite(path, run)
    else:
        _unlink(path)


def _rewrite(path: Path, run: Run) -> None:
    if path.suffix == ".safetensors":
        tensors, notes = files.load_tensors(path)
        notes.pop("fingerprint", None)
        files.save_tensors(path, tensors, notes | {PURGED: "True"})
        return
    mode, content = path.stat().st_mode, run.rewritten(path)

    def write(file: Path) -> None:
        file.write_bytes(content)
        file.chmod(mode)

    files.write_file(path, write)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
        files.sync_folder(path.parent)
    except OSError as error:
        fix = "Remove it yourself, and call purge again."
        raise StorageError(f"{path}: {error}", "a file that can be removed", fix) from error


def _linked(artefact: Artefact) -> Artefact | None:
    """What is left of a file that has other names."""
    try:
        about = artefact.path.stat()
    except OSError:  # somebody was quicker
        return None
    others = about.st_nlink - 1
    if artefact.action != "remove" or others < 1:
        return None
    fix = f"Find them: find / -xdev -inum {about.st_ino}"
    what = f"a file with {others} other names (hard links)"
    return Artefact(artefact.path, what, artefact.holds, "left", fix)


def _named(folder: Path, of: list[Artefact]) -> dict[str, str]:
    """What becomes of files, by their paths within a folder."""
    done = {"remove": "removed", "rewrite": "rewritten", "salt": "removed"}
    return {a.path.relative_to(folder).as_posix(): done[a.action] for a in of}
