"""What became of a deletion request, as its entries tell it."""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.ledger.entries import Entry
from fisher_forget.ledger.evidence import Verdict, verdict

State = Literal["asked", "under way", "failed", "done", "served", "withdrawn"]
OPEN, CLOSED = ("asked", "under way", "failed"), ("served", "withdrawn")


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
        evidence: What the entries say of how it was done, since it was done last.
        times: When it came into each of its states, UTC; and "received", where that was before it
            was recorded.
    """

    name: str
    who: str
    samples: tuple[str, ...]
    asked: datetime
    due: datetime
    state: State
    evidence: dict[str, Any]
    times: dict[str, datetime]

    @property
    def verdict(self) -> Verdict | Literal[""]:
        """What its evidence says of whether its samples are forgotten; empty before it is done."""
        return verdict(self.evidence) if self.state in ("done", "served") else ""

    def overdue(self, now: datetime | None = None) -> bool:
        """Whether it should have been served by now."""
        return not any(state in self.times for state in CLOSED) and bool(self.late(now))

    def late(self, now: datetime | None = None) -> timedelta:
        """How long after the day it was due it was served or withdrawn, or is not by now; 0 of one
        that is in time."""
        ends = [self.times[state] for state in CLOSED if state in self.times]
        end = ends[0] if ends else in_utc(now or datetime.now(UTC))
        return max(end - self.due, timedelta(0))


def told(entries: Iterable[Entry], before: Mapping[str, Request]) -> dict[str, Request]:
    """Requests by name after these entries, where those before told of `before`.

    Raises:
        StorageError: If an entry is of a request that nobody asked for, or says nothing of it.
    """
    found = dict(before)
    for entry in entries:
        if entry.event == "asked":
            found[entry.request] = _asked(entry)
        elif entry.request:
            if entry.request not in found:
                raise _senseless(entry, f"of {entry.request!r}, which nobody asked for")
            request, state = found[entry.request], entry.event
            before = {} if state == "done" else request.evidence  # of the model that is there now
            found[entry.request] = replace(
                request,
                state=state,  # type: ignore[arg-type]
                evidence=before | entry.details,
                times=request.times | {state: _time(entry, entry.time)},
            )
    return found


def a_month_after(time: datetime) -> datetime:
    """The same day of the next month, or its last one."""
    year, month = time.year + time.month // 12, time.month % 12 + 1
    day = min(time.day, calendar.monthrange(year, month)[1])
    return time.replace(year=year, month=month, day=day)


def _asked(entry: Entry) -> Request:
    details = dict(entry.details)
    who, samples = details.pop("who", None), details.pop("samples", None)
    if not isinstance(who, str) or not isinstance(samples, list):
        raise _senseless(entry, "of a request, without who asked or for what")
    due, asked = _time(entry, details.pop("due", None)), _time(entry, entry.time)
    received = details.pop("received", None)
    times = {} if received is None else {"received": _time(entry, received)}
    times["asked"] = asked
    return Request(
        entry.request, who, tuple(map(str, samples)), asked, due, "asked", details, times
    )


def in_utc(time: datetime) -> datetime:
    """A time in UTC; without a time zone it is this machine's local time.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return time.astimezone(UTC)
    except (AttributeError, TypeError, ValueError, OverflowError, OSError) as error:
        fix = "Pass a datetime, best with its zone: datetime(2027, 1, 31, tzinfo=UTC)."
        raise ConfigError(
            f"the time {time!r}", "a time between the years 1 and 9999", fix
        ) from error


def _time(entry: Entry, text: object) -> datetime:
    try:
        return in_utc(datetime.fromisoformat(str(text)))
    except (ValueError, ConfigError) as error:
        raise _senseless(entry, f"with the time {text!r}") from error


def _senseless(entry: Entry, what: str) -> StorageError:
    fix = "Restore the ledger from a copy."
    return StorageError(f"entry {entry.number} {what}", "what this package writes", fix)
