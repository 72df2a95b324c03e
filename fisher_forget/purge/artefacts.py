"""What in a folder tree still holds forgotten samples: found by what files say of themselves."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fisher_forget._util import files
from fisher_forget.baselines.sisa.store import NAME as SISA_NAME
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger import Ledger, RequestLog
from fisher_forget.ledger.ledger import LEDGER, SALT
from fisher_forget.ledger.requests import OLD
from fisher_forget.purge.lists import holds_lists
from fisher_forget.purge.runs import CONFIG, Run, Runs, read_sets
from fisher_forget.rewind.checkpoints import FORMAT as CHECKPOINT

Action = Literal["remove", "rewrite", "salt", "left", "look"]
OUTPUTS = "outputs.safetensors"
ORIGINALS = {"original": "an original model", "subsets": "a model trained on a subset"}
TEXTS = {".html", ".json", ".md", ".txt", ".yaml"}
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# what a run or a ledger writes beside these, which holds no sample and no index
# What else a run or a ledger writes, which holds no sample and, where it is not listed, no index.
PLAIN = re.compile(
    r"(kl|scores|noise|tradeoff|(evaluation|tradeoff|cost)-\d+)\.(svg|png)|sweep\.(parquet|csv)"
    r"|result\.txt|outcome\.json|(report|evaluation|comparison|ledger)\.html"
    r"|(metrics|evaluation|comparison|ledger)\.json|(evaluation|comparison)\.md|ledger\.csv"
    r"|config\.yaml|ledger\.(jsonl|head|lock|owner|saving)"
)
OPEN_IT = "Open the folder with this version: its requests go into a ledger, as salted hashes."
REBASE = "Call rebase() of the prepared model."


@dataclass(frozen=True)
class Artefact:
    """A file that holds something of forgotten samples.

    Attributes:
        path: Of the file.
        what: It is.
        holds: What of the forgotten samples is in it.
        action: What `purge` does: "remove" it, "rewrite" it without them, remove it with the
            "salt", or nothing: it is "left" for somebody to do what `fix` says, or to "look" at,
            where the file does not tell what it holds.
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
    behind. Of others it says that they are to be looked at.

    Args:
        folder: Of a run, of a prepared model, or one above several.
        sets: Names of the forget sets that are to be gone from runs; by default all. A model that
            was retrained without one set holds the samples of the others, so with all of a run's
            several sets all of its models are listed.

    Returns:
        In the order of their paths; empty where nothing is left.

    Raises:
        ConfigError: If no run has a forget set of such a name.
        StorageError: If there is no such folder, or a ledger in it is damaged.
    """
    if isinstance(sets, str) or not all(isinstance(name, str) for name in sets):
        raise ConfigError(f"sets={sets!r}", "a list of names", "Put the name in a list.")
    root, runs = Path(folder), Runs(sets)
    if not root.is_dir():
        fix = "Check the path; give the folder, not a file in it."
        raise StorageError(f"{root}, which is no folder", "a folder", fix)
    found = [told for path in walk(root.resolve()) if (told := _told(path, runs)) is not None]
    runs.check()
    return found


def walk(root: Path) -> Iterator[Path]:
    """All files of a tree, sorted; links to folders are not followed."""
    for place, folders, names in os.walk(root):
        folders.sort()
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in sorted([*names, *links]))


def _told(path: Path, runs: Runs) -> Artefact | None:
    """What a file holds of forgotten samples; `None` if nothing."""
    run = runs.of(path)
    if path.is_symlink():
        fix = f"Look at {os.readlink(path)} itself."
        return Artefact(path, "a link", "where it leads is not looked into", "look", fix)
    if files.TEMPORARY.fullmatch(path.name):
        return Artefact(path, "what a killed write left behind", "any of it", "remove")
    if path.suffix == ".safetensors":
        return _weights(path, run)
    if path.name == SALT and (path.parent / LEDGER).exists():
        holds = "with it, the ledger's hashes tell who was forgotten"
        return Artefact(path, "the salt of a ledger", holds, "salt")
    if path.name == OLD:
        return Artefact(path, "requests of an earlier version", "their indices", "left", OPEN_IT)
    if run is not None and path.suffix in TEXTS and holds_lists(path, run):
        return Artefact(path, "a list of indices", "who was forgotten", "rewrite")
    own = run is not None and path == run.folder / CONFIG
    if not own and path.suffix in (".yaml", ".yml") and any(read_sets(path).values()):
        what, fix = "a recipe with a list of indices", "Take the list out of it, or remove it."
        return Artefact(path, what, "who is forgotten", "left", fix)
    if path.suffix in PICKLES and _is_result(path):
        fix = "Keep its model alone, or remove it."
        holds = "who was forgotten, by index; of early versions the samples themselves"
        return Artefact(path, "a stored ForgetResult", holds, "left", fix)
    if PLAIN.fullmatch(path.name) and (run is not None or (path.parent / LEDGER).exists()):
        return None
    fix = "Look into it yourself."
    return Artefact(path, "a file of something else", "not known", "look", fix)


def _weights(path: Path, run: Run | None) -> Artefact | None:
    """What tensors hold, by the notes that every writer of the package leaves."""
    try:
        notes = files.read_metadata(path)
    except StorageError:
        fix = "Remove it if it is one of this package."
        return Artefact(path, "a damaged file", "what can be read of it", "left", fix)
    place = path.parent.name
    if notes.get("format") == CHECKPOINT:
        return Artefact(path, "a checkpoint of a training", "trained on all samples", "remove")
    if (path.parent / LEDGER).exists() and (run is None or run.folder != path.parent):
        return _beside_ledger(path, SISA_NAME.fullmatch(path.name) is not None)
    if (path.parent / OLD).exists():
        holds = "requests of an earlier version"
        return Artefact(path, "sums or checkpoints", holds, "left", OPEN_IT)
    if run is not None and not run.gone:
        fix = "Name a forget set of its run, if its samples are to be gone."
        what = "a model of a run without such a forget set"
        return Artefact(path, what, "not known", "look", fix)
    if path.name == OUTPUTS and "fingerprint" in notes:
        return Artefact(path, "outputs of models, with labels", "a row each", "remove")
    if place in ORIGINALS and "seed" in notes:
        return Artefact(path, ORIGINALS[place], "trained on them", "remove")
    if place == "retrained" and "seed" in notes and run is None:
        return None
    if run is not None and {"seed", "fingerprint"} & notes.keys():
        if run.clean(path):
            return None
        holds = "trained on other forget sets' samples"
        return Artefact(path, "a model of one forget set", holds, "remove")
    fix = "Remove it if it was trained on them."
    return Artefact(path, "weights or sums", "not known", "look", fix)


def _beside_ledger(path: Path, sisa: bool) -> Artefact | None:
    """What the files of a prepared model or of SISA hold: who was asked to be forgotten and is in
    them still."""
    ledger = Ledger(path.parent)
    if sisa:
        if not ledger.pending():
            return None
        fix = "Call fit() of the SISA model: it trains these anew."
        return Artefact(path, "a checkpoint", "requests that are not done", "left", fix)
    if not RequestLog(ledger, samples=0).asked()[1]:
        return None
    return Artefact(path, "sums of a prepared model", "their part of the sums", "left", REBASE)


def _is_result(path: Path) -> bool:
    """Whether a pickle, or a file of `torch.save`, names the class of a result; nothing in it is
    run."""
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as inside:
                (name,) = (n for n in inside.namelist() if n.endswith("/data.pkl"))
                content = inside.read(name)
        words = (value for _, value, _ in pickletools.genops(content))
        return any("ForgetResult" in word for word in words if isinstance(word, str))
    return False
