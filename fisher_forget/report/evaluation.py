"""The page of `fisher-forget evaluate`: verdicts first, then a picture, then every score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fisher_forget.evaluate.evaluation import MARKS, MEANING, UNDEFINED, Evaluation, Score
from fisher_forget.evaluate.metrics import METRICS
from fisher_forget.report.html import Figure, inline, render_template, write_html
from fisher_forget.report.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, save_figure
from fisher_forget.storage import ensure_folder

CONTROL = "retrained, left out"
STYLES = (("s", VERMILLION), ("o", BLUE), ("D", GREEN), ("^", ORANGE), ("v", "#CC79A7"), ("P", GREY), ("X", "#56B4E9"))
FAR = 30.0  # half-widths, where the axis ends


def write_page(name: str, tables: Mapping[str, Evaluation], folder: Path) -> Path:
    """Write <folder>/evaluation.html and the figures it shows.

    Args:
        name: Of the run.
        tables: Forget set -> scores.
        folder: Made if need be.
    """
    ensure_folder(folder)
    cases = []
    for index, (case, table) in enumerate(tables.items()):
        ax = plot_scores(table)
        _, svg = save_figure(ax.figure, folder / f"evaluation-{index}")
        plt.close("all")
        caption = (
            "Distance of every score from the mean of the retrained models, in half-widths of the band, in which all "
            "scores of a further retrained model would lie in 95 % of cases."
        )
        cases.append(
            {
                "name": case,
                "sentence": sentence(table),
                "retrained": table.retrained,
                "figures": [Figure(caption, inline(svg, f"e{index}-", caption))],
                "table": wide(table),
                "reasons": table.to_pandas()[["metric", "part", "method", "label", "reason"]],
                "left_out": "; ".join(f"{key} ({why})" for key, why in table.left_out.items()),
            }
        )
    definitions = pd.DataFrame(
        [(m.name, m.unit, m.definition, m.formula, m.source) for m in METRICS.values()],
        columns=["metric", "unit", "what it tells", "formula", "source"],
    )
    command = f"fisher-forget evaluate {folder / 'config.yaml'}"
    legend = "; ".join(f"{MARKS[label]} {meaning}" for label, meaning in MEANING.items())
    values = {"legend": legend, "run": name, "cases": cases, "definitions": definitions, "command": command}
    page = render_template("evaluation.html.j2", **values)
    return write_html(folder / "evaluation.html", page)


def sentence(table: Evaluation) -> str:
    """How many scores of each method a retrained model could have."""
    parts = []
    for method in methods(table):
        rows = [s for s in table.scores if s.method == method and s.label != UNDEFINED]
        inside = sum(within(s) for s in rows)
        parts.append(f"{method}: {inside} of {len(rows)}")
    return "Scores that a retrained model could have. " + "; ".join(parts) + "."


def within(score: Score) -> bool:
    """Whether the score lies in the interval of further retrained models."""
    return score.target_low <= score.value <= score.target_high


def methods(table: Evaluation) -> list[str]:
    """Original first, the retrained control last."""
    names = list(dict.fromkeys(s.method for s in table.scores))
    return sorted(names, key=lambda n: (n == CONTROL) - (n == "original"))


def wide(table: Evaluation) -> pd.DataFrame:
    """One row a metric and part, one column a method."""
    rows: list[dict[str, Any]] = []
    for metric, part in dict.fromkeys((s.metric, s.part) for s in table.scores):
        found = {s.method: s for s in table.scores if (s.metric, s.part) == (metric, part)}
        first = next(iter(found.values()))
        row: dict[str, Any] = {
            "metric": metric + (f" ({first.unit})" if first.unit else ""),
            "part": part,
            "retrained": f"{first.target:.3g}",
            "further ones": f"{first.target_low:.3g} … {first.target_high:.3g}",
        }
        row |= {m: f"{found[m].value:.3g} {MARKS[found[m].label]}" if m in found else "" for m in methods(table)}
        rows.append(row)
    return pd.DataFrame(rows)


def plot_scores(table: Evaluation, ax: Axes | None = None) -> Axes:
    """Every score as its distance from the retrained mean, in half-widths of their interval."""
    keys = list(dict.fromkeys((s.metric, s.part) for s in table.scores))
    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 0.8 + 0.24 * len(keys)), layout="constrained")
    place = {key: len(keys) - 1 - i for i, key in enumerate(keys)}
    names = methods(table)
    for (marker, colour), method in zip(STYLES * (1 + len(names) // len(STYLES)), names, strict=False):
        rows = [s for s in table.scores if s.method == method and s.label != UNDEFINED]
        x = np.array([distance(s) for s in rows])
        shift = 0.24 * (names.index(method) / max(len(names) - 1, 1) - 0.5)
        y = np.array([place[s.metric, s.part] for s in rows]) - shift
        fill = "none" if method == CONTROL else colour
        ax.scatter(x, y, marker=marker, s=26, facecolors=fill, edgecolors=colour, label=method, zorder=3, linewidths=1)
    ax.axvspan(-1, 1, color=GREEN, alpha=0.15, lw=0, label="retrained models")
    ax.axvline(0, color=GREEN, lw=0.8)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_xlim(-FAR * 1.15, FAR * 1.15)
    ticks = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
    ax.set_xticks(ticks, [f"{t}" if abs(t) < FAR else f"≤ {t}" if t < 0 else f"≥ {t}" for t in ticks])
    ax.minorticks_off()
    ax.set_yticks(list(place.values()), [f"{metric}, {part}" for metric, part in place], fontsize=8)
    ax.set_ylim(-0.7, len(keys) - 0.3)
    ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("distance from the retrained mean, in half-widths of their interval")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def distance(score: Score) -> float:
    """(value - target) over the half-width of the prediction interval, at most `FAR` either way."""
    half = (score.target_high - score.target_low) / 2
    if not half > 0:
        return 0.0 if score.value == score.target else float(np.copysign(FAR, score.value - score.target))
    return float(np.clip((score.value - score.target) / half, -FAR, FAR))
