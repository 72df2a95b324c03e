"""A ledger for people: a page in plain words, a table, and all of it as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_forget._util.files import ensure_folder, write_file, write_json
from fisher_forget.errors import StorageError
from fisher_forget.ledger import Ledger, Request, verify
from fisher_forget.ledger.ledger import LEDGER
from fisher_forget.report.pages.html import render_template, write_html

STATES = {
    "asked": "asked for, not begun",
    "under way": "begun, not finished: start the program again, which goes on",
    "failed": "an error came: it is still to be done",
    "done": "the model without these samples is there; who asked has not been told",
    "served": "done, and who asked has been told",
    "withdrawn": "not carried out",
}


def check_ledger(folder: str | Path) -> None:
    """Refuse a folder that has no ledger.

    Raises:
        StorageError: If it has none.
    """
    if not (Path(folder) / LEDGER).is_file():
        fix = (
            "There is no ledger here: name the folder of a prepared model, of SISA, or one that a "
            "Ledger was made for."
        )
        raise StorageError(f"{folder} without a ledger", f"a folder with {LEDGER}", fix)


def read_ledger(folder: str | Path) -> Ledger:
    """The ledger of a folder that has one.

    Raises:
        StorageError: If it has none, or it was altered.
    """
    check_ledger(folder)
    return Ledger(folder)


def ledger_table(ledger: Ledger, now: datetime | None = None) -> pd.DataFrame:
    """One row a request: name, who asked, samples, asked, due, done, served, state, overdue."""
    columns = ["request", "who", "samples", "asked", "due", "done", "served", "state", "overdue"]
    rows = [
        (
            *(r.name, r.who, len(r.samples), _day(r.asked), _day(r.due)),
            *(_day(r.times[state]) if state in r.times else "" for state in ("done", "served")),
            *(r.state, r.overdue(now)),
        )
        for r in ledger.requests.values()
    ]
    return pd.DataFrame(rows, columns=columns)


def write_ledger(
    folder: str | Path, out: str | Path, public_key: str | Path | None = None
) -> list[Path]:
    """Write a ledger for an auditor: ledger.html, ledger.csv and ledger.json, and what is wrong
    with it, if anything is.

    Args:
        folder: Of the ledger.
        out: Folder of the three files, made if need be.
        public_key: File of `new_keys`, with which signatures are checked.

    Raises:
        StorageError: If there is no ledger, it was altered, or nothing can be written.
    """
    ledger, place = read_ledger(folder), ensure_folder(out)
    wrong, table = verify(folder, public_key), ledger_table(ledger)
    content = {
        "ledger": str(folder),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "verified": {"signatures": public_key is not None, "wrong": wrong},
        "requests": [_told(r) for r in ledger.requests.values()],
        "entries": ledger.entries,
    }
    write_json(place / "ledger.json", content)
    write_file(place / "ledger.csv", lambda file: table.to_csv(file, index=False))
    page = render_template(
        "ledger.html.j2",
        ledger=ledger,
        table=table.assign(overdue=table.overdue.map({True: "yes", False: "no"})),
        states=STATES,
        wrong=wrong,
        signed=public_key is not None,
        overdue=ledger.overdue(),
        pending=ledger.pending(),
        requests=[_told(r) for r in ledger.requests.values()],
    )
    return [write_html(place / "ledger.html", page), place / "ledger.csv", place / "ledger.json"]


def _told(request: Request) -> dict[str, Any]:
    """What a request's entries say, in words and numbers that JSON holds."""
    return {
        "request": request.name,
        "who": request.who,
        "samples": len(request.samples),
        "asked": request.asked.isoformat(timespec="seconds"),
        "due": request.due.isoformat(timespec="seconds"),
        "state": request.state,
        "overdue": request.overdue(),
        "times": {k: t.isoformat(timespec="seconds") for k, t in request.times.items()},
        "evidence": request.evidence,
    }


def _day(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")
