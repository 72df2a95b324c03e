"""The checkpoints of a SISA run: files that say what they have seen.

A checkpoint's key is a hash chain over the slices that it has seen, with the samples that are
retained in them:

    key_0 = hash(run, shard),    key_d = hash(key_{d-1}, retained samples of slice d).

A file with another key than the requests so far imply was trained on something else, a forgotten
sample for instance, and is removed before anything is trained. So the folder needs no log of what
was under way when a run was killed. A second chain, over the content of the same samples, tells
that the data are the ones it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from fisher_forget._util import files
from fisher_forget._util.isolation import isolated
from fisher_forget.baselines.sisa.partition import Shard
from fisher_forget.data.fingerprint import BYTES, Hashes, SampleHasher
from fisher_forget.data.split import Split
from fisher_forget.errors import StorageError
from fisher_forget.ledger.owner import saving

PATTERN = "shard-*-after-*.safetensors"
UNSEEN = "0" * 16  # content that nobody looked at
NAME = re.compile(r"shard-\d+-after-\d+\.safetensors")


@dataclass(frozen=True)
class Store:
    """The checkpoints in the folder of one run.

    Attributes:
        folder: Exists and is writable.
        mark: Fingerprint of all that a checkpoint depends on, apart from who is retained.
        hashes: Of every retained sample [N, 16]; `None` where the data are known by a name.
        term: Of the ownership in which checkpoints may be saved; see `saving`.
    """

    folder: Path
    mark: str
    hashes: Hashes | None = None
    term: str = ""

    def keys(self, shard: int, parts: Shard) -> tuple[str, ...]:
        """key_0 ... key_R of a shard whose slices retain `parts`."""
        # a hash chain: a sample less in slice d changes all keys from d on, and none before
        chain = [files.fingerprint(self.mark, shard)]
        for part in parts:
            chain.append(files.fingerprint(chain[-1], part))
        return tuple(chain)

    def contents(self, parts: Shard) -> tuple[str, ...]:
        """The same chain over the content of these samples, where that is looked at."""
        chain = [UNSEEN]
        if self.hashes is None:
            return tuple(chain * (len(parts) + 1))
        for part in parts:
            chain.append(files.fingerprint(chain[-1], self.hashes[part]))
        return tuple(chain)

    def check_content(self, shard: int, done: int, key: str, content: str) -> None:
        """Refuse other data than a checkpoint with this key was trained on. One that does not tell,
        since it was written where nobody looked, is taken at its word, and tells from now on.

        Raises:
            StorageError: If they are others.
        """
        path = self.path(shard, done)
        if content == UNSEEN or not self.holds(shard, done, key):
            return
        written = files.read_metadata(path).get("content", UNSEEN)
        if written == UNSEEN:
            tensors, notes = files.load_tensors(path)
            files.save_tensors(path, tensors, notes | {"content": content})
        elif written != content:
            got = f"{path}, which was trained on other samples than those of shard {shard}"
            fix = "Pass the data set that it was made with, or name another folder. Of a data set "
            fix += "that changes its samples at random say by fingerprint= which it is."
            raise StorageError(got, "the data set of this folder", fix)

    def path(self, shard: int, done: int) -> Path:
        """Where a shard's checkpoint after `done` slices lies."""
        return self.folder / f"shard-{shard}-after-{done}.safetensors"

    def save(self, shard: int, done: int, model: nn.Module, key: str, content: str) -> None:
        """Write a checkpoint.

        Raises:
            StorageError: If a file of that name is there that is no checkpoint, or the folder has
                another owner by now.
        """
        path = self.path(shard, done)
        if path.exists() and _foreign(path):
            got, fix = f"{path}, which is no checkpoint of SISA", "Name another folder."
            raise StorageError(got, "a folder without other files of that name", fix)
        with saving(self.folder, self.term):
            files.save_model(path, model, {"key": key, "content": content})

    def load(self, shard: int, done: int, template: nn.Module, key: str) -> nn.Module:
        """Read a checkpoint into a copy of `template`, in eval mode.

        Raises:
            StorageError: If it is missing or damaged, or has another key.
        """
        return files.load_model(self.path(shard, done), template, {"key": key})

    def holds(self, shard: int, done: int, key: str) -> bool:
        """Whether a checkpoint is there and has this key."""
        return _key(self.path(shard, done)) == key

    def own_files(self) -> list[Path]:
        """The checkpoints that are there, whatever they have seen."""
        found = (p for p in self.folder.glob(PATTERN) if NAME.fullmatch(p.name))
        return sorted(path for path in found if not _foreign(path))

    def keep_only(self, wanted: Mapping[Path, str]) -> None:
        """Remove checkpoints not wanted or of another key, and what killed writes left behind."""
        for path in self.own_files():
            # what is damaged has no key, and goes as well
            if path not in wanted or _key(path) != wanted[path]:
                _remove(path)
        files.sweep_temporary(self.folder)

    def size(self, model: nn.Module) -> int:
        """Bytes of one checkpoint; the same for all, because every key has the same length."""
        probe = self.path(0, 0)
        files.save_model(probe, model, {"key": files.fingerprint(self.mark), "content": UNSEEN})
        size = probe.stat().st_size
        _remove(probe)
        return size


@isolated()
def content_hashes(split: Split, known: Hashes | None) -> Hashes:
    """Of the retained samples [N, 16], those not known yet; the others are not read."""
    hashes = np.zeros((len(cast("Sized", split.base)), BYTES), dtype=np.uint8)
    hashes = hashes if known is None else known.copy()
    new = split.retain[~hashes[split.retain].any(axis=1)]
    if len(new):
        hashes[new] = SampleHasher(split.reader, split.retain)(new)
    return hashes


def _foreign(path: Path) -> bool:
    """Whether it is an undamaged file of another kind, such as a part of a model of another
    library."""
    try:
        return "key" not in files.read_metadata(path)
    except StorageError:
        return False


def _key(path: Path) -> str | None:
    with suppress(StorageError):
        notes = files.read_metadata(path, checked=True)
        return notes.get("key")
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path}: {error}", "a file that can be removed", "Remove it by hand: it is stale."
        ) from error
