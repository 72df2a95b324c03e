"""One self-contained page: the answer first, then figures, tables, settings and how to do it again.

The page asks for nothing over a network: figures are inlined as SVG, and its content security
policy forbids every request and every script but the few lines that sort tables.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fisher_forget._util.files import ensure_folder, write_text
from fisher_forget._util.numbers import MISSING, number, percent, plus_minus
from fisher_forget.attack.findings import findings_table
from fisher_forget.likelihood import Score
from fisher_forget.likelihood.base import ERROR_LOSS, SHARE_LOSS
from fisher_forget.report import tables
from fisher_forget.report.pages.svg import inline
from fisher_forget.report.tables import Case

CAPTIONS = {
    "trade-off": "Forgetting against usefulness. Each point is one noise scale s, its mean and 95 "
    "% interval over draws; light dots are single draws. The target is the green diamond on the "
    "floor, not the lower right corner.",
    "KL": "KL to the retrained models before (square) and after (circle) forgetting. The green bar "
    "is the floor, the KL between two retrained models: the closer the circle, the better.",
    "scores": "Quality before (square) and after (circle) forgetting. The green bar is what "
    "retrained models reach: the closer the circle, the better, on the forgotten data, too.",
    "noise": "KL against the noise scale, with 95 % bands over draws. Dotted lines are the floors.",
}
TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True)
class Figure:
    """A figure of a page and its caption."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class Number:
    """A number of the answer and what it must be read against."""

    label: str
    value: str
    unit: str
    beside: str


def write_report(
    metrics: Mapping[str, Any],
    figures: Mapping[str, Path],
    folder: Path,
    audits: Mapping[str, Any] | None = None,
) -> Path:
    """Write <folder>/report.html.

    Args:
        metrics: What metrics.schema.json describes; a missing number is shown as "–".
        figures: SVG files by "<case name>: <kind>", shown with that case, or by "<kind>", shown
            after the answer (with the case where there is only one). A kind is a key of `CAPTIONS`,
            or else is itself the caption. The trade-off, or else the first figure of a case, stands
            in its answer.
        folder: Made if need be.
        audits: `Audit.to_dict` by case name, of those that were audited.

    Returns:
        Path of the page.

    Raises:
        DataError: If a case lacks a score.
        StorageError: If a figure cannot be read or the page cannot be written.
    """
    page = render(metrics, figures, audits)
    return write_html(ensure_folder(folder) / "report.html", page)


def render(
    metrics: Mapping[str, Any],
    figures: Mapping[str, Path],
    audits: Mapping[str, Any] | None = None,
) -> str:
    """The page of `write_report` as text.

    Raises:
        DataError: If a case lacks a score.
        StorageError: If a figure cannot be read.
    """
    placed = _place(metrics["cases"], figures)
    return render_template(
        "report.html.j2",
        metrics=metrics,
        created=_when(metrics["created"]),
        thresholds=tables,
        share_loss=SHARE_LOSS,
        error_loss=ERROR_LOSS,
        cases=[_case(case, placed.get(i, [])) for i, case in enumerate(metrics["cases"])],
        figures=placed.get(None, []),
        audits=[_audit(name, found) for name, found in (audits or {}).items()],
        repeated=metrics["config"].get("noise_seed") is not None,
        settings=list(flat(metrics["config"])),
        caveat=tables.CAVEAT,
    )


def render_template(template: str, **values: Any) -> str:
    """A page of this folder's templates, with the script that sorts tables and the policy that
    allows nothing else."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # always, because the ending .j2 tells jinja2 nothing
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def write_html(path: Path, page: str) -> Path:
    """Write a page.

    Raises:
        StorageError: If it cannot be written.
    """
    write_text(path, page)
    return path


def _case(case: Case, figures: list[Figure]) -> dict[str, Any]:
    """What the template needs of a case."""
    runs, first = case["runs"], figures[0] if figures else None
    lead = next((f for f in figures if f.caption == CAPTIONS["trade-off"]), first)
    return {
        "name": case["name"],
        "forgotten": f"{case['forgotten']:,}",
        "retained": f"{case['retained']:,}",
        "seeds": len(runs),
        "members": case["members"],
        "conclusion": tables.conclusion(case),
        "sentence": tables.sentence(case),
        "likeness": tables.likeness(case),
        "cost": tables.cost(case),
        "timing": tables.timing(case),
        "numbers": _numbers(case),
        "lead": lead,
        "figures": [f for f in figures if f is not lead],
        "table": tables.case_table(case),
        "spread": tables.spread_note(case),
        "runs": tables.runs_table(case),
        "refreshed": any(run["forget"]["buffers_refreshed"] for run in runs),
    }


def _audit(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs of an audit."""
    return {
        "name": name,
        "answer": found["answer"],
        "table": findings_table(found["findings"]),
        "skipped": found["skipped"].items(),
        "note": found["note"],
    }


def _numbers(case: Case) -> list[Number]:
    """The three numbers of the conclusion, each with the value that it must be read against."""
    before, after, floor = (
        tables.estimate(case, "forget", key) for key in ("kl_original", "kl_scrubbed", "floor")
    )
    was = f"was {number(before.mean)}; floor {plus_minus(floor.mean, floor.std)}"
    shown = [Number("KL on forgotten data", number(after.mean), "nats", was)]
    closed = tables.gap(case, "forget").closed
    if closed is None:
        shown.append(Number("Gap closed", MISSING, "", tables.UNDEFINED))
    else:
        value, low, high = map(percent, (closed.value, closed.low, closed.high))
        shown.append(Number("Gap closed", value, "%", f"95 %: {low} to {high}; 100 % is the floor"))
    kept, score = tables.kept_part(case), Score.read(case)
    scrubbed, target = (
        tables.estimate(case, kept, key) for key in ("score_scrubbed", "score_retrained")
    )
    title = f"{score.name.capitalize()} ({tables.part_label(kept)})"
    beside = f"retrained {score.format(target.mean, target.std)}"
    shown.append(Number(title, score.format(scrubbed.mean, unit=False), score.unit, beside))
    return shown


def _when(created: str) -> str:
    """A time for people: "1 March 2026, 12:00 UTC"; anything else as it is."""
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".rstrip()


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("training.epochs", "30"), ... of nested settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list)
            plain = listed and not any(isinstance(item, (list, Mapping)) for item in value)
            text = ", ".join(map(str, value)) if plain else str(value)
            yield f"{prefix}{key}", MISSING if value is None else text


def _place(cases: list[Case], figures: Mapping[str, Path]) -> dict[int | None, list[Figure]]:
    """Figures by the position of their case; `None` for those of the whole run."""
    placed: dict[int | None, list[Figure]] = {}
    longest_first = sorted(range(len(cases)), key=lambda i: -len(cases[i]["name"]))
    for count, (key, path) in enumerate(figures.items()):
        position = next((i for i in longest_first if key.startswith(f"{cases[i]['name']}: ")), None)
        kind = key if position is None else key.removeprefix(f"{cases[position]['name']}: ")
        if position is None and len(cases) == 1:
            position = 0
        caption = CAPTIONS.get(kind, kind)
        placed.setdefault(position, []).append(Figure(caption, inline(path, f"f{count}-", caption)))
    return placed
