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
from fisher_forget.evaluate.evaluation import (
    CONTROL,
    MARKS,
    MARKS_LEGEND,
    READING,
    Evaluation,
    expected,
)
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.evaluate.scoring import UNDEFINED, EvaluationRow
from fisher_forget.evaluate.verdict import ALARM, AS_RETRAINED, DIFFERENT, UNDECIDED
from fisher_forget.report.pages.html import Figure, Number, flat, render_template, write_html
from fisher_forget.report.pages.svg import inline
from fisher_forget.report.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, save_figure
from fisher_forget.report.plots.hover import explain

COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, "#CC79A7", GREY, "#56B4E9")
STYLES = tuple(zip("soD^vPX", COLOURS, strict=True))
CAPTION = (
    "Distance of every score from the mean of the retrained models, in multiples of the least one "
    "that is different: one in twenty scores of a retrained model is outside of the band; a "
    "distance on its left is less than retrained models have. Rows with * decide. "
    "Hold the pointer on a mark for its numbers."
)
EXPECTED = "95 % of new ones"
BAND = "not told apart"
FAR = 30.0  # multiples, where the axis ends
TONES = {AS_RETRAINED: "good", UNDECIDED: "fair"}


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
        legend=f"{MARKS_LEGEND}. {READING}",
        definitions=definitions,
        settings=list(flat(run["config"])) if run else [],
        environment=list(run["environment"].items()) if run else [],
        command=f"fisher-forget evaluate {folder}",
    )
    return write_html(folder / "evaluation.html", page)


def _case(name: str, table: Evaluation, figure: Figure) -> dict[str, Any]:
    """What the template needs of one forget set."""
    conclusion = table.conclusion(main_method(table))
    return {
        "name": name,
        "word": "nothing visible" if conclusion.blind else conclusion.word,
        "tone": TONES.get(conclusion.label, "poor"),
        "numbers": numbers(table),
        "sentence": sentence(table),
        "counts": counts(table),
        "counted": table.counted(),
        "control": CONTROL in table.methods,
        "figures": [figure],
        "table": wide(table),
        "reasons": table.to_pandas()[["metric", "part", "method", "label", "p_value", "reason"]],
        "conclusions": table.conclusions(),
        "left_out": " ".join(table.omitted()),
    }


def defined(table: Evaluation, method: str) -> list[EvaluationRow]:
    """The rows of a method that have a value."""
    return [s for s in table.scores if s.method == method and s.label != UNDEFINED]


def main_method(table: Evaluation) -> str:
    """The method that the page is about: the first one given."""
    return next((m for m in table.methods if m not in ("original", CONTROL)), "original")


def outside(table: Evaluation) -> list[EvaluationRow]:
    """The rows of the main method that are different, each by itself."""
    return [s for s in defined(table, main_method(table)) if not within(s)]


def numbers(table: Evaluation) -> list[Number]:
    """How many scores pass, the KL on the forgotten data, and the score on test data that should be
    kept."""
    method = main_method(table)
    rows = defined(table, method)
    passed, beside = f"{sum(map(within, rows))} of {len(rows)}", counts(table, but=method)
    shown = [Number("Scores not told apart from retrained", passed, "", beside)]
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
    """How many scores of each method are not told apart from retrained."""
    rows = {method: defined(table, method) for method in table.methods if method != but}
    return ", ".join(
        f"{m} {sum(map(within, scored))} of {len(scored)}" for m, scored in rows.items()
    )


def sentence(table: Evaluation) -> str:
    """What the rows that decide say, and how many of the others give the main method away."""
    method = main_method(table)
    others = [row for row in defined(table, method) if not row.primary]
    wrong, usual = sum(row in outside(table) for row in others), math.ceil(ALARM * len(others))
    return (
        f"{method}: {table.conclusion(method)}. Of its {len(others)} other scores {wrong} are "
        f"told apart, each by itself; of a retrained model about {usual} would be."
    )


def within(score: EvaluationRow) -> bool:
    """Whether the score is not told apart from retrained models."""
    return score.label not in DIFFERENT


def wide(table: Evaluation) -> pd.DataFrame:
    """One row a metric and part, one column a method."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    cells = dict.fromkeys(table.methods, "")
    for score in table.scores:
        blank = {
            "metric": score.metric
            + (f" ({score.unit})" if score.unit else "")
            + " *" * score.primary,
            "part": score.part,
            "retrained": _short(score.target),
            EXPECTED: expected(score, "{} … {}"),
        } | cells
        row = rows.setdefault((score.metric, score.part), blank)
        row[score.method] = f"{_short(score.value)} {MARKS[score.label]}"
    return pd.DataFrame(list(rows.values()))


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def plot_scores(table: Evaluation, ax: Axes | None = None) -> Axes:
    """Every score as its distance from the retrained mean, in multiples of the least one that is
    different."""
    keys = list(dict.fromkeys((s.metric, s.part) for s in table.scores))
    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 0.8 + 0.24 * len(keys)), layout="constrained")
    place = {key: len(keys) - 1 - i for i, key in enumerate(keys)}
    names = table.methods
    for (marker, colour), method in zip(itertools.cycle(STYLES), names, strict=False):
        rows = defined(table, method)
        x = np.array([distance(s) for s in rows])
        shift = 0.24 * (names.index(method) / max(len(names) - 1, 1) - 0.5)
        y = np.array([place[s.metric, s.part] for s in rows]) - shift
        fill = "none" if method == CONTROL else colour
        style: dict[str, Any] = {"facecolors": fill, "edgecolors": colour, "linewidths": 1}
        dots = ax.scatter(x, y, marker=marker, s=26, label=method, zorder=3, **style)
        explain(dots, [_told(s) for s in rows])
    ax.axvspan(-1, 1, color=GREEN, alpha=0.15, lw=0, label=BAND)
    ax.axvline(0, color=GREEN, lw=0.8)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_xlim(-FAR * 1.15, FAR * 1.15)
    ticks = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
    labels = ["≤ -30", *map(str, ticks[1:-1]), "≥ 30"]
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()
    stars = {(s.metric, s.part): " *" * s.primary for s in table.scores}
    words = [f"{metric}, {part}{stars[metric, part]}" for metric, part in place]
    ax.set_yticks(list(place.values()), words, fontsize=8)
    ax.set_ylim(-0.7, len(keys) - 0.3)
    ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("distance from the retrained mean (1: different, p = 0.05)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _told(score: EvaluationRow) -> str:
    """A score in words, for the pointer."""
    unit = f" {score.unit}" if score.unit else ""
    interval = expected(score, f", {EXPECTED} {{}} … {{}}")
    return (
        f"{score.method}\n{score.metric}, {score.part}: {score.value:.3g}{unit}\n"
        f"retrained {score.target:.3g}{interval}\n{score.label}, p = {score.p_value:.2g}"
    )


def distance(score: EvaluationRow) -> float:
    """How far from the retrained models, where the axis shows it; NaN is not drawn."""
    return float(np.clip(score.distance, -FAR, FAR))
