"""What became of a deletion request, as its entries tell it."""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from fisher_forget.ledger.entries import Entry

State = Literal["asked", "under way", "failed", "done", "served", "withdrawn"]
OPEN = ("asked", "under way", "failed")


@dataclass(frozen=True)
class Request:
    """A deletion request, as its entries tell it.

    Attributes:
        name: By which the ledger knows it.
        who: Opaque reference of who asked, as given.
        samples: Salted hashes of the samples' ids.
        asked: When, UTC.
        due: Until when it must be served, UTC.
        state: "asked", "under way", "failed" (an error came, and it is to be done again), "done"
            (the new model is there), "served" (it is in use, and who asked was told), or
            "withdrawn".
        evidence: What the entries say of how it was done.
        times: When it came into each of its states, UTC.
    """

    name: str
    who: str
    samples: tuple[str, ...]
    asked: datetime
    due: datetime
    state: State
    evidence: dict[str, Any]
    times: dict[str, datetime]

    def overdue(self, now: datetime | None = None) -> bool:
        """Whether it should have been served by now."""
        over = self.state in ("served", "withdrawn")
        return not over and (now or datetime.now(UTC)) > self.due


def told(entries: Iterable[Entry], before: Mapping[str, Request]) -> dict[str, Request]:
    """Requests by name after these entries, where those before told of `before`."""
    found = dict(before)
    for entry in entries:
        if entry.event == "asked":
            found[entry.request] = _asked(entry)
        elif entry.request:
            request, state = found[entry.request], entry.event
            found[entry.request] = replace(
                request,
                state=state,  # type: ignore[arg-type]
                evidence=request.evidence | entry.details,
                times=request.times | {state: datetime.fromisoformat(entry.time)},
            )
    return found


def a_month_after(time: datetime) -> datetime:
    """The same day of the next month, or its last one."""
    year, month = time.year + time.month // 12, time.month % 12 + 1
    day = min(time.day, calendar.monthrange(year, month)[1])
    return time.replace(year=year, month=month, day=day)


def _asked(entry: Entry) -> Request:
    details = dict(entry.details)
    who, samples = details.pop("who"), tuple(details.pop("samples"))
    due = datetime.fromisoformat(details.pop("due"))
    asked = datetime.fromisoformat(entry.time)
    times = {"asked": asked}
    return Request(entry.request, who, samples, asked, due, "asked", details, times)
