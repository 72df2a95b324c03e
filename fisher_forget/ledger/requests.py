"""The deletion requests of one model and its data, by the samples' indices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fisher_forget._util import files
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger.entries import RESTORE
from fisher_forget.ledger.evidence import WRONG
from fisher_forget.ledger.ledger import Ledger
from fisher_forget.ledger.states import OPEN, Request

NO_PARTS: Mapping[str, str] = MappingProxyType({})
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

    @property
    def mark(self) -> str:
        """Fingerprint of all that the present content depends on, apart from the requests; empty
        before `claim`."""
        marks = [e.details["mark"] for e in self.ledger.entries if "mark" in e.details]
        return str(marks[-1]) if marks else ""

    def path(self, name: str, generation: int | None = None) -> Path:
        """A file of the folder's present content, or of that of another generation."""
        number = self.generation if generation is None else generation
        return self.ledger.folder / (f"generation-{number}-{name}" if number else name)

    def claim(
        self,
        mark: str,
        artefacts: Iterable[Path],
        *,
        parts: Mapping[str, str] = NO_PARTS,
        data: str = "",
        looked_at: int = 0,
    ) -> None:
        """Make an empty folder ours, or see that it is.

        Args:
            mark: Fingerprint of all that its content depends on, apart from the requests.
            artefacts: Files that are worthless without the ledger, if they are there.
            parts: What the mark is of, by name, so that an error can say which differs.
            data: Name of the data, where not every sample was looked at.
            looked_at: Then, how many were.

        Raises:
            StorageError: If the folder belongs to something else, or its ledger is gone or damaged.
        """
        place, ledger = self.ledger.folder, self.ledger
        with ledger.owned():
            files.sweep_temporary(place)
            old = place / OLD
            asked = _old(old, mark, self.samples) if old.exists() else []
            if not ledger.exists and not old.exists():
                found = sorted(p.name for p in artefacts if p.exists())
                if found:
                    got = f"{place}, which holds {found[0]}, and no ledger of who was forgotten"
                    fix = RESTORE + " Or name an empty folder, and ask for every deletion again."
                    raise StorageError(got, "both, or neither", fix)
            if not self.mark and not ledger.requests:
                named = {"data": data, "samples_looked_at": looked_at} if data else {}
                named |= {"of": dict(parts)} if parts else {}
                ledger.record("opened", mark=mark, samples=self.samples, **named)
            if self.mark != mark:
                raise self._foreign(data, parts)
            if old.exists():  # goes on where a kill came between
                for request in asked[len(ledger.requests) :]:
                    self.ask(request)
                self.done(recorded_by=OLD)
                old.unlink()
                files.sync_folder(place)

    def rebase(self, mark: str, parts: Mapping[str, str]) -> None:
        """From now on the content is that of the next generation, which is there; see `claim`."""
        self.ledger.record("rebased", mark=mark, of=dict(parts))

    def remove_earlier(self, names: Iterable[str], later: str) -> None:
        """Remove files of other generations: of those before, and of one that a kill kept from
        coming about.

        Args:
            names: Of the files that every generation has.
            later: Of one that all but the first have.
        """
        for name in (*names, later):
            for path in self.all_paths(name):
                if path not in (self.path(name), self.ledger.folder / later):
                    path.unlink(missing_ok=True)

    def all_paths(self, name: str) -> list[Path]:
        """The files of this name, of every generation."""
        first = [p for p in [self.path(name, 0)] if p.exists()]
        pattern = re.compile(rf"generation-[1-9]\d*-{re.escape(name)}")
        return first + [p for p in self.ledger.folder.iterdir() if pattern.fullmatch(p.name)]

    def requests(self) -> list[list[int]]:
        """Samples by request since the last rebase, in order; those that are under way count,
        withdrawn ones do not.

        Raises:
            StorageError: If the salt is gone, or a hash is of no sample.
        """
        return self._samples(self.asked()[1])

    def erased(self, members: int | None = None) -> list[int]:
        """Samples that the content is made without, as far as the salt tells who they are.

        Args:
            members: How many samples the data are said to be, erased ones or not.

        Raises:
            StorageError: If erased ones must be among these, and the salt does not tell which.
        """
        try:
            return self._erased()
        except StorageError as error:  # they are in nothing any more
            if members is not None and members + self.count_erased() > self.samples:
                raise self._nameless(error) from error
            return []

    def _erased(self) -> list[int]:
        return sorted({i for request in self._samples(self.asked()[0]) for i in request})

    def count_erased(self) -> int:
        """How many samples these are, whoever they are."""
        return len({h for request in self.asked()[0] for h in request.samples})

    def asked(self) -> tuple[list[Request], list[Request]]:
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

    def ask(
        self,
        samples: Sequence[int],
        who: str = "",
        received: datetime | None = None,
        look: Callable[[], Mapping[str, Any]] = dict,
    ) -> str:
        """Record a request, then that it is under way; its name.

        Args:
            samples: Their indices.
            who: As for `Ledger.ask`.
            received: As for `Ledger.ask`.
            look: Tells what is to be kept of the model before: it is asked when nothing can be lost
                any more.
        """
        name = self.ledger.ask(samples, who=who, received=received).name
        self._index |= zip(self.ledger.hashed(samples), samples, strict=True)
        self.ledger.begin(name, **look())
        return name

    def check_each(self, samples: Sequence[int], who: str, share: float) -> None:
        """Refuse samples of a requester beyond a share of all, before anything is recorded.

        Args:
            samples: Their indices.
            who: As for `Ledger.ask`.
            share: Of all samples, that one requester may ask for in all; 1 refuses nothing.

        Raises:
            ConfigError: If it would be more, or nobody is named.
        """
        if share >= 1:
            return
        if not who:
            got = "a request without `who`, where each requester has a limit"
            raise ConfigError(got, "who asks", "Pass who=: a reference, no name.")
        kept = [r for r in self.ledger.requests.values() if r.state != "withdrawn"]
        known = {h for r in kept if r.who == who for h in r.samples}
        total, most = (
            len(known | set(self.ledger.hashed(samples))),
            math.floor(share * self.samples),
        )
        if total > most:
            got = f"{total:,} samples asked for by {who!r}, those of before included"
            fix = "Nothing was recorded. Look at what is asked for, and what it does to others; to "
            fix += "go on, raise the limit for `each`."
            raise ConfigError(got, f"at most {most:,} of one requester", fix)

    def done(self, *, again: bool = False, **evidence: Any) -> None:
        """All requests are done that were asked for and are not, since each result is without all
        of their samples; those with a check that said no are done again.

        Args:
            again: So are all that are not served yet: this model takes the place of theirs. Where
                all are served, the model is recorded by itself.
            **evidence: What shows it.
        """
        names = [
            request.name
            for request in self.asked()[1]
            if request.state in OPEN
            or (request.state == "done" and (again or request.verdict in WRONG))
        ]
        for name in names:
            self.ledger.done(name, **evidence)
        if again and not names:
            self.ledger.record("delivered", **evidence)

    @property
    def model(self) -> str:
        """Fingerprint of the model that was made last, without all who were asked for; empty before
        the first."""
        made = [e.details for e in self.ledger.entries if e.event in ("done", "delivered")]
        return str(made[-1].get("model_after", "")) if made else ""

    def _foreign(self, data: str, parts: Mapping[str, str]) -> StorageError:
        folder = self.ledger.folder
        opened = [e.details for e in self.ledger.entries if e.event == "opened"]
        named = str(opened[-1].get("data", ""))
        if named != data:
            known = [f"the name {name!r}" if name else "every sample" for name in (named, data)]
            same = f"open it as Ledger(folder, data={named!r})" if named else "give no name"
            fix = f"Name another folder; or {same}."
            got = f"{folder}, whose data are known by {known[0]}, to be opened by {known[1]}"
            return StorageError(got, f"to be opened by {known[0]}", fix)
        try:
            self._erased()
        except StorageError as error:
            return self._nameless(error)
        kept = [e.details["of"] for e in self.ledger.entries if "of" in e.details]
        others = {"model": "another model", "data": "other data", "options": "other options"}
        differ = [others[name] for name in parts if kept and kept[-1].get(name) != parts[name]]
        got = f"{folder}, made for {' and '.join(differ) or ', or '.join(others.values())}"
        fix = "Name another folder, or pass those: this one has the requests so far."
        if self.generation and others["model"] in (differ or others.values()):
            fix = f"It was rebased: its model is {self.path('model.safetensors')}. {fix}"
        return StorageError(got, "the folder of this one, or an empty one", fix)

    def _nameless(self, error: StorageError) -> StorageError:
        """Some were erased, and nobody knows who."""
        erased = f"{self.count_erased():,} of whose {self.samples:,} samples were erased"
        got = f"{self.ledger.folder}, {erased}: nobody can tell which without its salt, {error.got}"
        fix = "Pass a loader over a Subset of the others, with the model and the options of the "
        fix += "last rebase; or bring the salt back."
        return StorageError(got, "the samples that are left", fix)


def _old(path: Path, mark: str, samples: int) -> list[list[int]]:
    """Requests of a folder of an earlier version.

    Raises:
        StorageError: If they are damaged, or of something else.
    """
    content = files.read_json(path)
    requests = content.get("requests") if isinstance(content, dict) else None
    if (
        not isinstance(requests, list)
        or content.get("format") != OLD_FORMAT
        or not all(isinstance(r, list) and all(_is_index(i, samples) for i in r) for r in requests)
    ):
        raise StorageError(f"{path}, which is damaged", "the requests so far", RESTORE)
    if content.get("mark") != mark:
        got = f"{path} of an earlier version, or of something else, with {len(requests)} requests"
        fix = (
            "Name an empty folder, and ask for the samples in that file again; keep it until then."
        )
        raise StorageError(got, "a folder of this version", fix)
    return [request for request in requests if request]


def _is_index(value: object, samples: int) -> bool:
    return type(value) is int and 0 <= value < samples
