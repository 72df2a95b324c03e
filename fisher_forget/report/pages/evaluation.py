"""The page of `fisher-forget evaluate`: the answer first, then a picture, then every score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fisher_forget._util.files import ensure_folder
from fisher_forget._util.numbers import MISSING
from fisher_forget.evaluate.evaluation import CONTROL, MARKS, MARKS_LEGEND, Evaluation
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.evaluate.scoring import UNDEFINED, EvaluationRow
from fisher_forget.report.pages.html import Figure, Number, flat, render_template, write_html
from fisher_forget.report.pages.svg import inline
from fisher_forget.report.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, save_figure
from fisher_forget.report.plots.hover import explain

COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, "#CC79A7", GREY, "#56B4E9")
STYLES = tuple(zip("soD^vPX", COLOURS, strict=True))
CAPTION = (
    "Distance of every score from the mean of the retrained models, in half-widths of the band: "
    "the range expected of a retrained model, for all scores together (95 %). "
    "Hold the pointer on a mark for its numbers."
)
FEW = 0.25  # share of the scores that may differ before the page calls the result poor
EXPECTED = "expected range (95 %)"
FAR = 30.0  # half-widths, where the axis ends


def write_page(
    name: str, tables: Mapping[str, Evaluation], folder: Path, run: Mapping[str, Any] | None = None
) -> Path:
    """Write <folder>/evaluation.html and the figures it shows.

    Args:
        name: Of the run.
        tables: Forget set -> scores.
        folder: Made if need be.
        run: The run's metrics.json, whose settings and environment the page then shows, too.
    """
    ensure_folder(folder)
    cases = []
    for index, (case, table) in enumerate(tables.items()):
        ax = plot_scores(table)
        _, svg = save_figure(ax.figure, folder / f"evaluation-{index}")
        plt.close("all")
        cases.append(_case(case, table, Figure(CAPTION, inline(svg, f"e{index}-", CAPTION))))
    definitions = pd.DataFrame(
        [(m.name, m.unit, m.definition, m.formula, m.source) for m in METRICS.values()],
        columns=["metric", "unit", "what it tells", "formula", "source"],
    )
    page = render_template(
        "evaluation.html.j2",
        run=name,
        cases=cases,
        legend=MARKS_LEGEND,
        definitions=definitions,
        settings=list(flat(run["config"])) if run else [],
        environment=list(run["environment"].items()) if run else [],
        command=f"fisher-forget evaluate {folder}",
    )
    return write_html(folder / "evaluation.html", page)


def _case(name: str, table: Evaluation, figure: Figure) -> dict[str, Any]:
    """What the template needs of one forget set."""
    word, tone = conclusion(table)
    return {
        "name": name,
        "word": word,
        "tone": tone,
        "numbers": numbers(table),
        "sentence": sentence(table),
        "counts": counts(table),
        "retrained": table.retrained,
        "figures": [figure],
        "table": wide(table),
        "reasons": table.to_pandas()[["metric", "part", "method", "label", "reason"]],
        "left_out": "; ".join(f"{key} ({why})" for key, why in table.left_out.items()),
    }


def defined(table: Evaluation, method: str) -> list[EvaluationRow]:
    """The rows of a method that have a value."""
    return [s for s in table.scores if s.method == method and s.label != UNDEFINED]


def main_method(table: Evaluation) -> str:
    """The method that the page is about: the first one given."""
    return next((m for m in methods(table) if m not in ("original", CONTROL)), "original")


def outside(table: Evaluation) -> list[EvaluationRow]:
    """The rows of the main method outside the range expected of a retrained model."""
    return [s for s in defined(table, main_method(table)) if not within(s)]


def conclusion(table: Evaluation) -> tuple[str, str]:
    """The answer in a few words, and its tone."""
    rows, wrong = len(defined(table, main_method(table))), len(outside(table))
    if not wrong:
        return "not told apart from retrained", "good"
    return f"{wrong} of {rows} scores differ", "fair" if wrong <= FEW * rows else "poor"


def numbers(table: Evaluation) -> list[Number]:
    """How many scores pass, the KL on the forgotten data, and the score on test data that should be
    kept."""
    method = main_method(table)
    rows = defined(table, method)
    passed, beside = f"{sum(map(within, rows))} of {len(rows)}", counts(table, but=method)
    shown = [Number("Scores that a retrained model could have", passed, "", beside)]
    tests = [s.part for s in table.scores if s.part.startswith("test")]
    kept = tests[-1] if tests else "retain"
    for metric, part, label in (
        ("kl", "forget", "KL on forgotten data"),
        ("score", kept, f"Score on {kept}"),
    ):
        by_method = {s.method: s for s in table.scores if (s.metric, s.part) == (metric, part)}
        if method in by_method:
            row, before = by_method[method], by_method["original"]
            beside = f"was {before.value:.3g}; retrained {row.target:.3g}"
            shown.append(Number(label, f"{row.value:.3g}", row.unit, beside))
    return shown


def counts(table: Evaluation, but: str = "") -> str:
    """How many scores of each method a retrained model could have."""
    rows = {method: defined(table, method) for method in methods(table) if method != but}
    return ", ".join(
        f"{m} {sum(map(within, scored))} of {len(scored)}" for m, scored in rows.items()
    )


def sentence(table: Evaluation) -> str:
    """Which scores give the main method away."""
    wrong, method = outside(table), main_method(table)
    if not wrong:
        count = len(defined(table, method))
        return f"All {count} scores are in the range expected of a retrained model."
    places: dict[str, list[str]] = {}
    for score in wrong:
        places.setdefault(score.metric, []).append(score.part)
    named = "; ".join(f"{metric} ({', '.join(parts)})" for metric, parts in places.items())
    return f"Scores of {method} outside the range expected of a retrained model: {named}."


def within(score: EvaluationRow) -> bool:
    """Whether the score lies in the range expected of a retrained model."""
    return score.target_low <= score.value <= score.target_high


def methods(table: Evaluation) -> list[str]:
    """Original first, the retrained control last."""
    names = list(dict.fromkeys(s.method for s in table.scores))
    return sorted(names, key=lambda n: (n == CONTROL) - (n == "original"))


def wide(table: Evaluation) -> pd.DataFrame:
    """One row a metric and part, one column a method."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    cells = dict.fromkeys(methods(table), "")
    for score in table.scores:
        blank = {
            "metric": score.metric + (f" ({score.unit})" if score.unit else ""),
            "part": score.part,
            "retrained": _short(score.target),
            EXPECTED: f"{_short(score.target_low)} … {_short(score.target_high)}",
        } | cells
        row = rows.setdefault((score.metric, score.part), blank)
        row[score.method] = f"{_short(score.value)} {MARKS[score.label]}"
    return pd.DataFrame(list(rows.values()))


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def plot_scores(table: Evaluation, ax: Axes | None = None) -> Axes:
    """Every score as its distance from the retrained mean, in half-widths of the expected range."""
    keys = list(dict.fromkeys((s.metric, s.part) for s in table.scores))
    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 0.8 + 0.24 * len(keys)), layout="constrained")
    place = {key: len(keys) - 1 - i for i, key in enumerate(keys)}
    names = methods(table)
    for (marker, colour), method in zip(itertools.cycle(STYLES), names, strict=False):
        rows = defined(table, method)
        x = np.array([distance(s) for s in rows])
        shift = 0.24 * (names.index(method) / max(len(names) - 1, 1) - 0.5)
        y = np.array([place[s.metric, s.part] for s in rows]) - shift
        fill = "none" if method == CONTROL else colour
        style: dict[str, Any] = {"facecolors": fill, "edgecolors": colour, "linewidths": 1}
        dots = ax.scatter(x, y, marker=marker, s=26, label=method, zorder=3, **style)
        explain(dots, [_told(s) for s in rows])
    ax.axvspan(-1, 1, color=GREEN, alpha=0.15, lw=0, label=EXPECTED)
    ax.axvline(0, color=GREEN, lw=0.8)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_xlim(-FAR * 1.15, FAR * 1.15)
    ticks = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
    labels = ["≤ -30", *map(str, ticks[1:-1]), "≥ 30"]
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()
    ax.set_yticks(list(place.values()), [f"{metric}, {part}" for metric, part in place], fontsize=8)
    ax.set_ylim(-0.7, len(keys) - 0.3)
    ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("distance from the retrained mean (half-widths of the range)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _told(score: EvaluationRow) -> str:
    """A score in words, for the pointer."""
    unit = f" {score.unit}" if score.unit else ""
    interval = f"{score.target_low:.3g} … {score.target_high:.3g}"
    return (
        f"{score.method}\n{score.metric}, {score.part}: {score.value:.3g}{unit}\n"
        f"retrained {score.target:.3g}, {EXPECTED} {interval}\n{score.label}"
    )


def distance(score: EvaluationRow) -> float:
    """(value - target) over the half-width of the expected range, at most `FAR` either way."""
    half, off = (score.target_high - score.target_low) / 2, score.value - score.target
    if half > 0:
        return float(np.clip(off / half, -FAR, FAR))
    return FAR * float(np.sign(off))
