"""A ledger for people: a page in plain words, a table, and all of it as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_forget._util.files import ensure_folder, write_file, write_json
from fisher_forget._util.numbers import number
from fisher_forget.errors import StorageError
from fisher_forget.ledger import Entry, Ledger, Reading, Request, examine, key_fingerprint
from fisher_forget.ledger.evidence import WRONG
from fisher_forget.ledger.ledger import LEDGER
from fisher_forget.ledger.states import OPEN
from fisher_forget.report.pages.html import flat, render_template, write_html

STATES = {
    "asked": "asked for, not begun",
    "under way": "begun, not finished: start the program again, which goes on",
    "failed": "an error came: it is still to be done",
    "done": "the model without these samples is there; who asked has not been told",
    "served": "done, and who asked has been told",
    "withdrawn": "not carried out",
}
CHECKS = {
    "forgotten": "the method is exact: the model never saw the samples",
    "no trace found": "the model answers to the samples as to ones it never saw, which the model "
    "before did not: an estimate, no proof",
    "not shown": "nobody looked, or there was nothing to compare with: it may be forgotten or not",
    "NOT forgotten": "the model still tells the samples from ones it never saw, or is the one of "
    "before",
    "others harmed": "the samples that stay are answered worse than before",
}
NOTICES = {
    "opened": "the record was begun",
    "rebased": "the model without those forgotten so far became the start of all later requests, "
    "and what was kept of the data was made anew without them",
    "delivered": "the model without all who were asked for was made again",
    "audited": "attacks were made on the models with and without the samples",
}
PURGES = {"begun": "a purge was begun, of", "done": "a purge was done, of"}
TONES = {
    **dict.fromkeys(["served", "forgotten", "no trace found"], "good"),
    **dict.fromkeys(["asked", "under way", "done", "not shown"], "fair"),
    **dict.fromkeys(["failed", *WRONG], "poor"),
    "withdrawn": "none",
}
"""How the words of states and checks look on the page."""
WORDS = {
    "nats": "how wrong answers are (a loss), or how far two models' answers are apart (a KL): 0 is "
    "none, and 0.7 is about as much as that between knowing and tossing a coin",
    "p": "how often chance alone makes a difference as large as the one seen; below 0.01 it is not "
    "taken for chance",
    "fingerprint, seal, hash": "digits that are the same where the model, the record or the sample "
    "is the same, and that tell nothing else",
}
LABELS = {
    "model_before": "model before, by its fingerprint",
    "model_after": "model after, by its fingerprint",
    "retained": "samples left",
    "forgotten": "samples that the model is without, those of earlier requests included",
    "noise": "scale of the noise added to the weights",
    "model": "model, by its fingerprint",
    "salt": "salt, by its hash",
    "data": "data, known by this name",
    "samples_looked_at": "of whose samples were looked at",
    "mark": "model, data and options, by their fingerprint",
    "although": "served although the check says so, because",
    "reason": "because",
}
TIMES = ["received", "due", "done", "served"]
HASH = re.compile(r"[0-9a-f]{64}")
MARKS = {"fine": "fine", "wrong": "NO", "unknown": "not known"}


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


def ledger_table(ledger: Ledger | Reading, now: datetime | None = None) -> pd.DataFrame:
    """One row a request: name, state, what its check says, how late it is or was, who asked, number
    of samples, and times."""
    columns = ["request", "state", "check", "late", "who", "samples", *TIMES]
    rows = [
        (
            *(_shown(r.name), r.state, r.verdict, _late(r, now), _shown(r.who), len(r.samples)),
            *(_minute(r.times.get("received", r.asked)), _minute(r.due)),
            *(_minute(r.times[state]) if state in r.times else "" for state in TIMES[2:]),
        )
        for r in ledger.requests.values()
    ]
    return pd.DataFrame(rows, columns=columns)


def summary(ledger: Reading, now: datetime | None = None) -> str:
    """How many requests there are, and which of them need somebody, in a sentence or two."""
    requests = ledger.requests.values()
    if not requests and ledger.findings:
        return "No request can be read."
    if not requests:
        return "Nobody has asked for anything to be deleted."
    counts = {
        "Requests": len(requests),
        "Not carried out yet": len(ledger.pending()) or "none",
        "Overdue": len(ledger.overdue(now)) or "none",
    }
    if unclear := sum(r.verdict == "not shown" for r in requests):
        counts["Done, but not shown to be forgotten"] = unclear
    text = "".join(f"{name}: {count}. " for name, count in counts.items())
    for verdict in WRONG:
        names = [r.name for r in requests if r.verdict == verdict]
        if names:
            text += f'Whose own check says "{verdict}": {", ".join(names)}. '
    if ledger.broken:
        text += f"Whose beginning cannot be read: {_shown(', '.join(ledger.broken))}."
    return text.rstrip()


def models_on_record(ledger: Ledger | Reading, fingerprint: str) -> tuple[list[str], bool]:
    """Which model of a ledger it is that has this fingerprint, in sentences, none where it is not
    on record; and whether it holds nobody who asked, as far as the record tells."""
    requests = [r for r in ledger.requests.values() if r.state != "withdrawn"]
    done = [r for r in requests if "done" in r.times]
    after = [r for r in done if fingerprint in _listed(r.evidence.get("model_after"))]
    before = [r for r in requests if fingerprint in _listed(r.evidence.get("model_before"))]
    again = [
        datetime.fromisoformat(e.time)
        for e in ledger.entries
        if e.event in ("delivered", "rebased")
        and fingerprint in (e.details.get("model_after"), e.details.get("model"))
    ]
    said = []
    if after:
        said.append(f"It is the model after {_names(after)}.")
    if again:
        said.append(f"It is without all samples asked for until {_minute(max(again))}.")
    clean = bool(after or again) and not before
    if after or again:
        last = max([*(r.times["done"] for r in after), *again])
        later = [r for r in done if r.times["done"] > last]
        undone = [r for r in requests if r.state in OPEN]
        clean = clean and not later and not undone
        if later:
            said.append(
                f"A later one was made for {_names(later)}: this one may hold their samples."
            )
        if undone:
            said.append(f"None was made yet for {_names(undone)}: it may hold their samples.")
    if before:
        said.append(f"It is the model before {_names(before)}, and may hold their samples.")
    return said, clean


def _names(requests: list[Request]) -> str:
    return ", ".join(r.name for r in requests)


def _listed(value: object) -> list[object]:
    """A run of several originals has a fingerprint of each."""
    return value if isinstance(value, list) else [value]


def write_ledger(
    folder: str | Path,
    out: str | Path,
    public_key: str | Path | None = None,
    *,
    known: str | None = None,
) -> list[Path]:
    """Write a ledger for an auditor: ledger.html, ledger.csv and ledger.json. One that was altered
    is written as far as it can be read, and the page says first that it was, and what is wrong.

    Args:
        folder: Of the ledger; nothing is written there.
        out: Folder of the three files, made if need be.
        public_key: File of `new_keys`, with which signatures are checked.
        known: Seal of an entry that must be there.

    Raises:
        StorageError: If there is no ledger, it cannot be read, or nothing can be written.
    """
    check_ledger(folder)
    ledger, place = examine(folder, public_key, known=known), ensure_folder(out)
    table, now = ledger_table(ledger), datetime.now(UTC)
    key = None if public_key is None else key_fingerprint(public_key)
    content = {
        "ledger": str(folder),
        "written": now.isoformat(timespec="seconds"),
        "verified": {
            "signatures": public_key is not None,
            "key": key,
            "wrong": ledger.wrong,
            "unproven": ledger.unproven,
        },
        "seal": ledger.seal,
        "requests": [_told(r, ledger) for r in ledger.requests.values()],
        "entries": ledger.entries,
    }
    write_json(place / "ledger.json", content)
    write_file(place / "ledger.csv", lambda file: table.to_csv(file, index=False))
    page = render_template(
        "ledger.html.j2",
        ledger=ledger,
        findings=[_shown(sentence) for sentence in ledger.findings],
        summary=summary(ledger, now),
        written=_minute(now),
        rows=_rows(table, ledger, now),
        times=TIMES,
        states=STATES,
        checks=CHECKS,
        words=WORDS,
        tones=TONES,
        key=key,
        public_key=None if public_key is None else Path(public_key).name,
        details=[[*_times(r), *_plainly(r.evidence)] for r in ledger.requests.values()],
        notices=[
            (_minute(datetime.fromisoformat(e.time)), notice, list(_plainly(e.details)))
            for e in ledger.entries
            if (notice := _notice(e))
        ],
    )
    return [write_html(place / "ledger.html", page), place / "ledger.csv", place / "ledger.json"]


def _rows(table: pd.DataFrame, ledger: Reading, now: datetime) -> list[dict[str, Any]]:
    """Of the table on the page: days, and what is to be seen at once."""
    days = table.assign(**{name: table[name].str[:10] for name in TIMES}).to_dict("records")
    return [
        {str(name): value for name, value in row.items()}
        | {"altered": request.name in ledger.altered, "overdue": request.overdue(now)}
        for row, request in zip(days, ledger.requests.values(), strict=True)
    ]


def _notice(entry: Entry) -> str:
    """What an entry of no request tells; empty of others."""
    if entry.event != "purged":
        return NOTICES.get(entry.event, "")
    files = entry.details.get("files")
    count = len(files) if isinstance(files, (Mapping, list)) else 0
    step = PURGES.get(str(entry.details.get("step")), "a purge, of")
    return f"{step} {count:,} {'file' if count == 1 else 'files'} that held forgotten samples"


def _told(request: Request, ledger: Reading) -> dict[str, Any]:
    """What a request's entries say, in words and numbers that JSON holds."""
    return {
        "request": request.name,
        "altered": request.name in ledger.altered,
        "who": request.who,
        "samples": len(request.samples),
        "asked": request.asked.isoformat(timespec="seconds"),
        "due": request.due.isoformat(timespec="seconds"),
        "state": request.state,
        "check": request.verdict,
        "overdue": request.overdue(),
        "late": _late(request),
        "times": {k: t.isoformat(timespec="seconds") for k, t in request.times.items()},
        "evidence": request.evidence,
    }


def _times(request: Request) -> Iterator[tuple[str, str]]:
    """When it came into each of its states, and when it was due."""
    yield from ((state, _minute(time)) for state, time in request.times.items())
    yield "due", _minute(request.due)


def _plainly(details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Evidence for people: names and values, findings of a self-check in their own sentences."""
    for name, value in details.items():
        if name == "self_check" and isinstance(value, list):
            for found in (f for f in value if isinstance(f, Mapping)):
                mark = MARKS.get(str(found.get("verdict")), "")
                yield f"check: {found.get('name', '')}", _shown(f"{mark}. {found.get('says', '')}")
        else:
            label, value = LABELS.get(name, name.replace("_", " ")), _counted(value)
            told = flat({"name": value})
            yield from ((_shown(label + key[4:]), _shown(text)) for key, text in told)


def _shown(text: str) -> str:
    """Without characters that a terminal or a file takes for something else."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _counted(value: Any) -> Any:
    """Lists of hashes by their length, and numbers by their first digits: nobody reads them all."""
    if isinstance(value, Mapping):
        return {key: _counted(part) for key, part in value.items()}
    if isinstance(value, float):
        return number(value)
    hashes = isinstance(value, list) and value and all(HASH.fullmatch(str(x)) for x in value)
    return f"{len(value):,}, by their hashes" if hashes else value


def _late(request: Request, now: datetime | None = None) -> str:
    late = request.late(now)
    if not late:
        return ""
    days = {0: "less than a day", 1: "1 day"}.get(late.days, f"{late.days:,} days")
    over = request.overdue(now)
    return f"overdue by {days}" if over else f"{request.state} {days} late"


def _minute(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
