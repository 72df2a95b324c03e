"""The deletion requests of one model and its data, by the samples' indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_forget._util import files
from fisher_forget.errors import StorageError
from fisher_forget.ledger.ledger import RESTORE, Ledger, Request

OLD, OLD_FORMAT = "requests.json", 1  # of version 0.2, with plain indices


@dataclass
class RequestLog:
    """The ledger of a folder that belongs to one model, its data and its options; see `claim`.

    Attributes:
        ledger: Of the folder.
        samples: Number of samples in the data set, whose indices are their ids.
    """

    ledger: Ledger
    samples: int
    _index: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def generation(self) -> int:
        """How often the folder's content was made anew without those who were forgotten."""
        return sum(entry.event == "rebased" for entry in self.ledger.entries)

    def path(self, name: str, generation: int | None = None) -> Path:
        """A file of the folder's present content, or of that of another generation."""
        number = self.generation if generation is None else generation
        return self.ledger.folder / (f"{number}-{name}" if number else name)

    def claim(self, mark: str, artefacts: Iterable[str]) -> None:
        """Make an empty folder ours, or see that it is.

        Args:
            mark: Fingerprint of all that its content depends on, apart from the requests.
            artefacts: Patterns of files that are worthless without the ledger.

        Raises:
            StorageError: If the folder belongs to something else, or its ledger is gone or damaged.
        """
        place = self.ledger.folder
        with self.ledger.owned():
            files.sweep_temporary(place)
            if not self.ledger.exists:
                old = place / OLD
                found = sorted(p.name for pattern in artefacts for p in place.glob(pattern))
                if found and not old.exists():
                    got = f"{place}, which holds {found[0]}, and no ledger of who was forgotten"
                    fix = RESTORE + " Or name an empty folder, and ask for every deletion again."
                    raise StorageError(got, "both, or neither", fix)
                requests = _old(old, mark) if old.exists() else []
                self.ledger.record("opened", mark=mark, samples=self.samples)
                for request in requests:
                    self.ask(request)
                    self.done(recorded_by=OLD)
                if old.exists():
                    old.unlink()
                    files.sync_folder(place)
            marks = [e.details["mark"] for e in self.ledger.entries if "mark" in e.details]
            if not marks or marks[-1] != mark:
                raise _foreign(place, self.generation)

    def rebase(self, mark: str, names: Iterable[str]) -> None:
        """From now on the content is that of the next generation, which is there; files of earlier
        ones, by these names, are removed."""
        with self.ledger.owned():
            self.ledger.record("rebased", mark=mark)
            self.remove_earlier(names)

    def remove_earlier(self, names: Iterable[str]) -> None:
        """Remove files of other generations: of those before, and of one that a kill kept from
        coming about."""
        names = tuple(names)
        now = {self.path(name) for name in names}
        for path in self.ledger.folder.iterdir():
            number, _, name = path.name.rpartition("-")
            if name in names and (number.isdecimal() or not number) and path not in now:
                path.unlink(missing_ok=True)

    def requests(self) -> list[list[int]]:
        """Samples by request since the last rebase, in order; those that are under way count,
        withdrawn ones do not.

        Raises:
            StorageError: If the salt is gone, or a hash is of no sample.
        """
        return self._samples(self._asked()[1])

    def erased(self) -> list[int]:
        """Samples that the content is made without, as far as the salt tells who they are."""
        before = self._asked()[0]
        try:
            return sorted({i for request in self._samples(before) for i in request})
        except StorageError:
            return []  # they are in nothing any more

    def count_erased(self) -> int:
        """How many samples these are, whoever they are."""
        return len({h for request in self._asked()[0] for h in request.samples})

    def _asked(self) -> tuple[list[Request], list[Request]]:
        """Requests before and since the last rebase that were not withdrawn."""
        since = 0
        for entry in self.ledger.entries:
            if entry.event == "rebased":
                since = entry.number
        names = {e.request for e in self.ledger.entries if e.event == "asked" and e.number < since}
        kept = [r for r in self.ledger.requests.values() if r.state != "withdrawn"]
        return [r for r in kept if r.name in names], [r for r in kept if r.name not in names]

    def _samples(self, kept: Sequence[Request]) -> list[list[int]]:
        wanted = {h for r in kept for h in r.samples} - set(self._index)
        if wanted:
            ids = range(self.samples)
            found = zip(self.ledger.hashed(ids), ids, strict=True)
            self._index |= {h: i for h, i in found if h in wanted}
        if missing := wanted - set(self._index):
            got = f"{self.ledger.folder}, whose ledger names {len(missing)} samples not among these"
            raise StorageError(got, f"samples 0 to {self.samples - 1}", "Give the same data set.")
        return [sorted(self._index[h] for h in r.samples) for r in kept]

    def ask(self, samples: Sequence[int], who: str = "") -> str:
        """Record a request, and that it is under way; its name."""
        name = self.ledger.ask(samples, who=who).name
        self._index |= zip(self.ledger.hashed(samples), samples, strict=True)
        self.ledger.begin(name)
        return name

    def done(self, **evidence: Any) -> None:
        """All requests are done that were asked for and are not, since each result is without all
        of their samples."""
        for request in self.ledger.pending():
            self.ledger.done(request.name, **evidence)


def _old(path: Path, mark: str) -> list[list[int]]:
    """Requests of a folder of an earlier version."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != OLD_FORMAT:
        raise StorageError(f"{path}, which is damaged", "the requests so far", RESTORE)
    if content.get("mark") != mark:
        raise _foreign(path.parent, 0)
    requests: list[list[int]] = content["requests"]
    return requests


def _foreign(folder: Path, generation: int) -> StorageError:
    got = f"{folder}, made for another model, other data or other options"
    fix = "Name another folder, or delete this one if its requests are no longer needed."
    if generation:
        fix = f"It was rebased: its model is {folder}/{generation}-model.safetensors. " + fix
    return StorageError(got, "the folder of this one, or an empty one", fix)
