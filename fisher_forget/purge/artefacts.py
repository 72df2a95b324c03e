"""What in a folder tree still holds forgotten samples: found by what files say of themselves, and
by where a run writes them."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fisher_forget._util import files
from fisher_forget.baselines.sisa.store import NAME as SISA_NAME
from fisher_forget.errors import ConfigError, FisherForgetError, StorageError
from fisher_forget.ledger import Ledger, RequestLog
from fisher_forget.ledger.ledger import LEDGER, SALT
from fisher_forget.ledger.requests import OLD
from fisher_forget.purge.runs import LARGEST, PURGED, Run, Runs, read_recipe, sets_of
from fisher_forget.rewind.checkpoints import FORMAT as CHECKPOINT
from fisher_forget.unlearn import snapshot

Action = Literal["remove", "rewrite", "salt", "left", "look"]
OUTPUTS, MEMBER = "outputs.safetensors", {"seed", "seconds", "fingerprint"}
MEMBERS = {
    "original": "an original model",
    "subsets": "a model trained on a subset",
    "retrained": "a model retrained without some samples, not told which",
}
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ""}
LEDGERS = re.compile(r"ledger\.(jsonl|head|lock|owner|saving)")
GENERATION = re.compile(r"(generation-[1-9]\d*-)?(snapshot|curvature|model)\.safetensors")
ROLES = {
    "original": ("an original model", "trained on them"),
    "subset": ("a model trained on a subset", "trained on them"),
    "method": ("a model of a compared method", "some methods leave much of the original"),
    "outputs": ("outputs of models, with labels", "a row each"),
    "retrained": ("a retrained model", "its run does not tell that it is without all of them"),
    "scrubbed": ("a scrubbed model", "its run does not tell that it is without all of them"),
}
OPEN_IT = "Open the folder with this version: its requests go into a ledger, as salted hashes."
NAME_NONE = "Name no forget set to have it purged."


@dataclass(frozen=True)
class Artefact:
    """A file that holds something of forgotten samples.

    Attributes:
        path: Of the file.
        what: It is.
        holds: What of the forgotten samples is in it.
        action: What `purge` does: "remove" it; "rewrite" it without them; a "salt" it removes if
            asked to, unless that is needed; or nothing: it is "left" for somebody to do what `fix`
            says, or to "look" at, where the file does not tell what it holds.
        fix: What to do where `purge` does nothing.
    """

    path: Path
    what: str
    holds: str
    action: Action
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.action:8} {self.path}: {self.what}; {self.holds}. {self.fix}".rstrip()


def artefacts(folder: str | Path, sets: Collection[str] = ()) -> list[Artefact]:
    """What in a folder, at any depth, still holds forgotten samples. Nothing is changed.

    Known are the files that this package writes: runs, sweeps and comparisons, prepared models,
    SISA, ensembles of retrained models, checkpoints, results, ledgers, and what killed writes left
    behind. Of every other file it says that it is to be looked at.

    Args:
        folder: Of a run, of a prepared model, or one above several.
        sets: Names of the forget sets that are to be gone from runs; by default those that somebody
            asked for (`who`), or all where nobody did. A model that was retrained without one set
            holds the samples of the others, so with several sets of a run all of its models are
            listed.

    Returns:
        In the order of their paths; empty where nothing is left.

    Raises:
        ConfigError: If the folder is no path, or no run has a forget set of such a name.
        StorageError: If there is no such folder.
    """
    several = isinstance(sets, Collection) and not isinstance(sets, (str, bytes))
    if not several or not all(isinstance(name, str) for name in sets):
        raise ConfigError(f"sets={sets!r}", "a list of names", "Put the name in a list.")
    root, runs = checked(folder), Runs(sets)
    found = [told for path in walk(root) if (told := _meant(path, runs)) is not None]
    runs.check()
    return found


def listed(found: Iterable[object]) -> str:
    """A line each, or that there is none."""
    return "\n".join(map(str, found)) or "Nothing known here holds forgotten samples."


def checked(folder: str | Path) -> Path:
    """The folder with all links followed.

    Raises:
        ConfigError: If it is no path, or one that holds everything.
        StorageError: If there is no such folder.
    """
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise ConfigError(f"the folder {folder!r}", "a path", "Name a folder.")
    try:
        root = Path(folder).resolve()
        known = root.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"{folder}: {error}", "a folder", "Check the path.") from error
    if not known:
        fix = "Check the path; give the folder, not a file in it."
        raise StorageError(f"{root}, which is no folder", "a folder", fix)
    if root in (Path(root.anchor), Path.home()):
        got, fix = f"{root}, which holds everything", "Name the folder in question."
        raise ConfigError(got, "a folder of runs or of prepared models", fix)
    return root


def is_signed(folder: Path) -> bool:
    """Whether the ledger of a folder was begun with a key."""
    entries = Ledger(folder).entries if (folder / LEDGER).is_file() else ()
    return bool(entries and entries[0].signature)


def walk(root: Path) -> Iterator[Path]:
    """All files of a tree, sorted, links, and folders that cannot be read; links to folders are not
    followed."""
    closed: list[OSError] = []
    for place, folders, names in os.walk(root, onerror=closed.append):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in sorted([*names, *links]))
    yield from (Path(str(error.filename)) for error in closed)


def _meant(path: Path, runs: Runs) -> Artefact | None:
    """What a file holds, and what is to be done with it: nothing is removed of a run whose request
    is pending, nor of other folders where forget sets are named."""
    told = _told(path, runs)
    if told is None or told.action not in ("remove", "rewrite", "salt"):
        return told
    run = runs.of(path)
    temporary = files.TEMPORARY.fullmatch(path.name) is not None
    own = run is not None and (temporary or run.role(path) is not None or path.parent == run.folder)
    if runs.named and not (own and run is not None and run.gone):
        return replace(told, action="look", fix=NAME_NONE)
    if own and run is not None and run.pending:
        fix = f"{', '.join(run.pending)} is pending: start the run again, or withdraw it."
        return replace(told, action="left", fix=fix)
    return told


def _told(path: Path, runs: Runs) -> Artefact | None:
    """What a file holds of forgotten samples; `None` if nothing."""
    if path.is_symlink():
        fix = f"Look at {os.readlink(path)} itself."
        return Artefact(path, "a link", "where it leads is not looked into", "look", fix)
    if not path.is_file():
        what = "a folder that cannot be read" if path.is_dir() else "no file with content"
        return Artefact(path, what, "not known", "left", "Look into it yourself.")
    if not os.access(path, os.R_OK):
        fix = "Give yourself the right to read it."
        return Artefact(path, "a file that cannot be read", "not known", "left", fix)
    run = runs.of(path)
    if files.TEMPORARY.fullmatch(path.name) and _ours(path.parent, run):
        return Artefact(path, "what a killed write left behind", "any of it", "remove")
    if path.suffix == ".safetensors":
        return _weights(path, run, runs)
    salt = path.name == SALT and ((path.parent / LEDGER).is_file() or _root(run) == path.parent)
    if LEDGERS.fullmatch(path.name) or salt:
        return _ledger(path, run)
    role = None if run is None else run.role(path)
    if run is not None and role in ("text", "plain"):
        if role == "text" and run.gone and run.rewritten(path) != path.read_bytes():
            return Artefact(path, "a text with indices", "who was forgotten", "rewrite")
        return None
    return _foreign(path)


def _ours(folder: Path, run: Run | None) -> bool:
    """Whether this package writes files there."""
    if (folder / LEDGER).is_file():
        return True
    names = ("seed-0.safetensors", "scrubbed.safetensors", OUTPUTS)
    if run is not None and any(run.role(folder / name) for name in names):
        return True
    if run is not None and folder == run.folder:
        return True
    return any(files.own_metadata(path) is not None for path in folder.glob("*.safetensors"))


def _weights(path: Path, run: Run | None, runs: Runs) -> Artefact | None:
    """What tensors hold, by the notes that every writer of the package leaves."""
    notes, role = files.own_metadata(path), None if run is None else run.role(path)
    if notes is None:
        if role is not None or (path.parent / LEDGER).is_file():
            fix = "Remove it."
            return Artefact(path, "a damaged file", "what can be read of it", "left", fix)
        return Artefact(path, "weights of something else", "not known", "look", "Look into it.")
    if (path.parent / LEDGER).is_file() and role is None:
        beside = _beside_ledger(path)
        if beside != "strange":
            return beside
    if (path.parent / OLD).is_file() and _old(path.parent / OLD):
        return Artefact(path, "sums or checkpoints", "old requests", "left", OPEN_IT)
    if run is not None and role is not None:
        return _of_run(path, run, notes)
    told = _of_ensemble(path, notes)
    if told is None:
        fix = "Remove it if it was made from them."
        return Artefact(path, "weights or sums", "not known of whom", "look", fix)
    return told


def _of_run(path: Path, run: Run, notes: Mapping[str, str]) -> Artefact | None:
    role = run.role(path)
    assert role is not None
    what, holds = ROLES[role]
    if not run.gone:
        return Artefact(path, f"{what} of a run without such a set", "not known", "look", NAME_NONE)
    if role in ("retrained", "scrubbed") and run.vouches(path, notes):
        if PURGED in notes:
            return None
        holds = "with the data, its notes tell who was forgotten; it stays without these"
        return Artefact(path, what, holds, "rewrite")
    return Artefact(path, what, holds, "remove")


def _of_ensemble(path: Path, notes: Mapping[str, str]) -> Artefact | None:
    """Of checkpoints and ensembles, which do not tell what each member was trained on."""
    place = path.parent.name
    if notes.get("format") == CHECKPOINT:
        return Artefact(path, "a checkpoint of a training", "trained on all samples", "remove")
    if notes.keys() >= MEMBER and place in MEMBERS:
        return Artefact(path, MEMBERS[place], "trained on them, or on others", "remove")
    beside = any((path.parent / name).is_dir() for name in ("original", "retrained"))
    if path.name == OUTPUTS and notes.keys() == {"fingerprint"} and beside:
        return Artefact(path, "outputs of models, with labels", "a row each", "remove")
    return None


def _beside_ledger(path: Path) -> Artefact | Literal["strange"] | None:
    """What the files of a prepared model or of SISA hold: who was asked to be forgotten and is in
    them still."""
    try:
        ledger = Ledger(path.parent)
        log = RequestLog(ledger, samples=0)
        asked, pending = log.asked()[1], ledger.pending()
    except FisherForgetError as error:
        fix = "Restore it from a copy."
        return Artefact(path, f"a file beside a damaged ledger ({error.got})", "?", "left", fix)
    if SISA_NAME.fullmatch(path.name):
        if "key" not in (files.own_metadata(path) or {}):
            return "strange"
        if not pending:
            return None
        fix = "Call fit() of the SISA model: it trains these anew."
        return Artefact(path, "a checkpoint", "requests that are not done", "left", fix)
    if not GENERATION.fullmatch(path.name):
        return "strange"
    own = [log.path(name) for name in (*snapshot.NAMES, snapshot.MODEL)]
    if path not in own:
        return Artefact(path, "sums of before a rebase", "their part of the sums", "remove")
    if not asked:
        return None
    fix = "Call rebase() of the prepared model."
    return Artefact(path, "sums of a prepared model", "their part of the sums", "left", fix)


def _root(run: Run | None) -> Path | None:
    return None if run is None else run.folder


def _ledger(path: Path, run: Run | None) -> Artefact | None:
    """The files of a ledger, which names nobody without its salt."""
    if path.name == LEDGER:
        try:
            Ledger(path.parent)
        except FisherForgetError as error:
            fix = "Restore it from a copy, or remove it if it is none of this package."
            return Artefact(path, f"a damaged ledger ({error.got})", "not known", "left", fix)
    if path.name != SALT:
        return None
    holds = "with it, the ledger's hashes tell who was forgotten"
    if _root(run) == path.parent or any((path.parent / place).is_dir() for place in MEMBERS):
        return Artefact(path, "the salt of a ledger", holds, "salt")
    fix = "Remove it yourself when the folder takes no more requests."
    return Artefact(path, "the salt of a ledger", holds, "salt", fix)


def _foreign(path: Path) -> Artefact:
    """A file at a place where the package writes none."""
    if path.name == OLD and _old(path):
        return Artefact(path, "requests of an earlier version", "their indices", "left", OPEN_IT)
    if path.suffix in (".yaml", ".yml") and any(
        s["indices"] for s in sets_of(read_recipe(path)).values()
    ):
        what, fix = "a recipe with a list of indices", "Take the list out of it, or remove it."
        return Artefact(path, what, "who is forgotten", "left", fix)
    if path.suffix in PICKLES and _is_result(path):
        fix = "Keep its model alone, or remove it."
        holds = "who was forgotten, by index; of early versions the samples themselves"
        return Artefact(path, "a stored ForgetResult", holds, "left", fix)
    return Artefact(path, "a file of something else", "not known", "look", "Look into it.")


def _old(path: Path) -> bool:
    """Whether it is the list of requests of an earlier version."""
    try:
        return bool({"format", "mark", "requests"} <= files.read_json(path).keys())
    except (StorageError, AttributeError, RecursionError):
        return False


def _is_result(path: Path) -> bool:
    """Whether a pickle, or a file of `torch.save`, names the class of a result; nothing in it is
    run."""
    content: bytes
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as inside:
                (part,) = (i for i in inside.infolist() if i.filename.endswith("/data.pkl"))
                content = inside.read(part) if part.file_size <= LARGEST else b""
        else:
            with path.open("rb") as file:
                content = file.read(LARGEST)
        return b"ForgetResult" in content and _names_result(content)
    except Exception:  # a stranger's file, damaged in any way
        return False


def _names_result(content: bytes) -> bool:
    try:
        for _, value, _ in pickletools.genops(content):
            if isinstance(value, str) and "ForgetResult" in value:
                return True
    except ValueError:  # several pickles in a row, or cut off
        return True
    return False
