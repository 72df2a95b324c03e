"""A finished run, part by part of the data: from the original to the scrubbed model, beside the
retrained ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fisher_forget.likelihood import Score
from fisher_forget.report.plots.style import (
    EDGE,
    GREY,
    LABELS,
    STYLES,
    axes_or_new,
    band,
    bar_or_none,
    finish,
    log_limits,
    score_limits,
)
from fisher_forget.report.tables import Case, estimate, part_label, parts_of


def plot_parts(case: Case, ax: Axes | None = None) -> Axes:
    """KL to the retrained models, part by part: from the original to the scrubbed model, beside the
    floor.

    Raises:
        DataError: If the case lacks a score.
    """
    ax = axes_or_new(ax)
    keys = {"original": "kl_original", "scrubbed": "kl_scrubbed", "retrained": "floor"}
    log_limits(ax, "x", _dumbbells(ax, case, keys, 1.0, "floor: target"))
    ax.set_xlabel("KL(retrained ‖ model) (nats)")
    finish(ax, legend_columns=3)
    return ax


def plot_scores(case: Case, ax: Axes | None = None) -> Axes:
    """Accuracy (%) or error, part by part: from the original to the scrubbed model, beside the
    retrained ones.

    Raises:
        DataError: If the case lacks a score.
    """
    ax = axes_or_new(ax)
    score = Score.read(case)
    keys = {name: f"score_{name}" for name in ("original", "scrubbed", "retrained")}
    score_limits(ax, _dumbbells(ax, case, keys, score.factor, LABELS["retrained"]), score.unit)
    ax.set_xlabel(score.title())
    finish(ax, legend_columns=3)
    return ax


def _dumbbells(
    ax: Axes, case: Case, keys: Mapping[str, str], factor: float, target: str
) -> list[float]:
    """A row a part: a line from the original's value to the scrubbed one, and the target as a bar
    with its spread.

    Returns:
        Every value that the axis must show.
    """
    parts = parts_of(case)
    shown: list[float] = []
    for row, part in enumerate(parts):
        values = {name: estimate(case, part, key) for name, key in keys.items()}
        before, after = (factor * values[name].mean for name in ("original", "scrubbed"))
        if math.isfinite(before) and math.isfinite(after):
            ax.plot([before, after], [row, row], color=GREY, linewidth=1, zorder=2)
        for name, mean in (("original", before), ("scrubbed", after)):
            bars: dict[str, Any] = {"ecolor": STYLES[name]["color"], "capsize": 3, "zorder": 4}
            error = bar_or_none(factor * values[name].std)
            ax.errorbar([mean], [row], xerr=error, fmt="none", **bars)
            style = {"linestyle": "none", "markersize": 9, **EDGE, **STYLES[name]}
            ax.plot([mean], [row], zorder=5, label=name if row == 0 else None, **style)
        goal, spread = factor * values["retrained"].mean, factor * values["retrained"].std
        label = f"{target} ± std" if row == 0 else None
        shown += _draw_target(ax, row, goal, spread, label, most=100.0 if factor == 100 else None)
        shown += [before, after, goal, after + factor * values["scrubbed"].std]
    ax.set_yticks(range(len(parts)), [part_label(part).replace(", ", ",\n") for part in parts])
    ax.set_ylim(len(parts) - 0.4, -0.6)  # the first part on top
    return shown


def _draw_target(
    ax: Axes, row: int, goal: float, spread: float, label: str | None, most: float | None
) -> list[float]:
    """The retrained models' value as a bar, with its spread as a band within 0 ... `most`."""
    color, ends = STYLES["retrained"]["color"], []
    if math.isfinite(goal):
        low, high = (goal - spread, goal + spread) if math.isfinite(spread) else (goal, goal)
        if most is not None:
            low, high = max(low, 0.0), min(high, most)
        ax.add_patch(Rectangle((low, row - 0.32), high - low, 0.64, zorder=1, **band(color)))
        ends = [low, high]
    bar = {"color": color, "linewidth": 2.4, "zorder": 3, "label": label}
    ax.plot([goal, goal], [row - 0.32, row + 0.32], **bar)
    return ends
