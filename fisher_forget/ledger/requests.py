"""The deletion requests of one model and its data, by the samples' indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_forget._util import files
from fisher_forget.errors import StorageError
from fisher_forget.ledger.ledger import RESTORE, Ledger

OLD, OLD_FORMAT = "requests.json", 1  # of version 0.2, with plain indices


@dataclass
class RequestLog:
    """The ledger of a folder that belongs to one model, its data and its options.

    Attributes:
        ledger: Of the folder.
        mark: Fingerprint of all that the folder's content depends on, apart from the requests.
        samples: Number of samples in the data set, whose indices are their ids.
    """

    ledger: Ledger
    mark: str
    samples: int
    _index: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(
        cls, folder: str | Path, mark: str, samples: int, artefacts: Iterable[str], **options: Any
    ) -> RequestLog:
        """An empty folder becomes ours.

        Args:
            folder: Made if need be.
            mark: See above.
            samples: See above.
            artefacts: Patterns of files that are worthless without the ledger.
            **options: Of `Ledger`.

        Raises:
            StorageError: If the folder belongs to something else, or its ledger is gone or damaged.
        """
        log = cls(Ledger(folder, **options), mark, samples)
        place = log.ledger.folder
        with log.ledger.owned():
            files.sweep_temporary(place)
            if not log.ledger.exists:
                old = place / OLD
                found = sorted(p.name for pattern in artefacts for p in place.glob(pattern))
                if found and not old.exists():
                    got = f"{place}, which holds {found[0]}, and no ledger of who was forgotten"
                    fix = RESTORE + " Or name an empty folder, and ask for every deletion again."
                    raise StorageError(got, "both, or neither", fix)
                requests = _old(old, mark) if old.exists() else []
                log.ledger.record("opened", mark=mark, samples=samples)
                for request in requests:
                    log.ask(request)
                    log.done(recorded_by=OLD)
                if old.exists():
                    old.unlink()
                    files.sync_folder(place)
            log._check()
        return log

    def requests(self) -> list[list[int]]:
        """Samples by request, in order; those that are under way count, withdrawn ones do not.

        Raises:
            StorageError: If the salt is gone, or a hash is of no sample.
        """
        kept = [r for r in self.ledger.requests.values() if r.state != "withdrawn"]
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

    def _check(self) -> None:
        marks = [e.details["mark"] for e in self.ledger.entries if "mark" in e.details]
        if not marks or marks[-1] != self.mark:
            raise _foreign(self.ledger.folder)


def _old(path: Path, mark: str) -> list[list[int]]:
    """Requests of a folder of an earlier version."""
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != OLD_FORMAT:
        raise StorageError(f"{path}, which is damaged", "the requests so far", RESTORE)
    if content.get("mark") != mark:
        raise _foreign(path.parent)
    requests: list[list[int]] = content["requests"]
    return requests


def _foreign(folder: Path) -> StorageError:
    got = f"{folder}, made for another model, other data or other options"
    fix = "Name another folder, or delete this one if its requests are no longer needed."
    return StorageError(got, "the folder of this one, or an empty one", fix)
