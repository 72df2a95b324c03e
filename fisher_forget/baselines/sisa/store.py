"""The folder of a SISA run: its requests, and a file a checkpoint that says what it has seen.

A checkpoint's key is a hash chain over the slices that it has seen, with the samples that are
retained in them:

    key_0 = hash(run, shard),    key_d = hash(key_{d-1}, retained samples of slice d).

A file with another key than the requests so far imply was trained on something else, a forgotten
sample for instance, and is removed before anything is trained. So the folder needs no log of what
was under way when a run was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fisher_forget._util import files
from fisher_forget.baselines.sisa.partition import Shard
from fisher_forget.errors import StorageError

PATTERN = "shard-*.safetensors"


@dataclass(frozen=True)
class Store(files.RequestLog):
    """A folder that belongs to one run: its requests, and its checkpoints."""

    def keys(self, shard: int, parts: Shard) -> tuple[str, ...]:
        """key_0 ... key_R of a shard whose slices retain `parts`."""
        # a hash chain: a sample less in slice d changes all keys from d on, and none before
        chain = [files.fingerprint(self.mark, shard)]
        for part in parts:
            chain.append(files.fingerprint(chain[-1], part))
        return tuple(chain)

    def path(self, shard: int, done: int) -> Path:
        """Where a shard's checkpoint after `done` slices lies."""
        return self.folder / f"shard-{shard}-after-{done}.safetensors"

    def save(self, shard: int, done: int, model: nn.Module, key: str) -> None:
        """Write a checkpoint."""
        files.save_model(self.path(shard, done), model, {"key": key})

    def load(self, shard: int, done: int, template: nn.Module, key: str) -> nn.Module:
        """Read a checkpoint into a copy of `template`, in eval mode.

        Raises:
            StorageError: If it is missing or damaged, or has another key.
        """
        return files.load_model(self.path(shard, done), template, {"key": key})

    def holds(self, shard: int, done: int, key: str) -> bool:
        """Whether a checkpoint is there and has this key."""
        return _key(self.path(shard, done)) == key

    def keep_only(self, wanted: Mapping[Path, str]) -> None:
        """Remove checkpoints not wanted or of another key, and what killed writes left behind."""
        for path in self.folder.glob(PATTERN):
            # what cannot be read has no key, and goes as well
            if path not in wanted or _key(path) != wanted[path]:
                _remove(path)
        for path in self.folder.glob(f".{PATTERN}.*.tmp"):
            _remove(path)

    def size(self, model: nn.Module) -> int:
        """Bytes of one checkpoint; the same for all, because every key has the same length."""
        probe = self.path(0, 0)
        self.save(0, 0, model, files.fingerprint(self.mark))
        size = probe.stat().st_size
        _remove(probe)
        return size


def _key(path: Path) -> str | None:
    with suppress(StorageError):
        return files.read_metadata(path).get("key")
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path}: {error}", "a file that can be removed", "Remove it by hand: it is stale."
        ) from error
