"""Figures: what forgetting gained and what it cost, always beside the retrained models.

Every function draws into the axes it is given, or into a new pyplot figure (so that notebooks show it), and returns the
axes. Colours are Okabe and Ito's; marker shapes, hatches and line styles say the
same again for a print in grey. Text stays text in the SVG, and numbers on the axes are plain text, not mathematics.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fisher_forget.errors import DataError, StorageError
from fisher_forget.report.annotate import along, annotate, whole_figure
from fisher_forget.report.tables import Case, estimate, part_label, parts_of, score_scale
from fisher_forget.storage import ensure_folder

BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#595959"
STYLES: dict[str, dict[str, Any]] = {
    "original": {"color": VERMILLION, "marker": "s"},
    "scrubbed": {"color": BLUE, "marker": "o"},
    "retrained": {"color": GREEN, "marker": "D"},
    "newton": {
        "color": ORANGE,
        "marker": "^",
        "fillstyle": "none",
        "markeredgewidth": 2.2,
    },  # hollow, as it lies on others
}
LABELS = {"original": "original", "newton": "Newton, no noise", "retrained": "retrained: target"}
EXPONENT_MARKERS = ("o", "v", "P", "X")
SIZE = (4.9, 3.8)  # inches: two fit side by side on a desktop page, one stays legible on a phone
DPI = 150
SHADE = "cividis"  # grows monotonically in grey, too

_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.8}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class SweepTable(Protocol):
    """What the figures need of a sweep over noise scales.

    Attributes:
        marks: "original", "retrained" (whose kl_* is the floor), "newton" (without noise) and "retrained_std", each
            with kl_forget, kl_retain, kl_test in nats and score_forget, score_retain, score_test.
        score_name: What the scores are.
    """

    @property
    def marks(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def score_name(self) -> str: ...

    def to_pandas(self) -> pd.DataFrame:
        """One row a draw: scale, exponent, seed, kl_*, score_*, gap_closed."""
        ...


def plot_tradeoff(table: SweepTable, ax: Axes | None = None) -> Axes:
    """Forgetting against usefulness: KL on the forgotten data over the test score, one point a noise scale.

    A point is the mean over seeds with its standard deviation both ways; light dots are single draws. The target is
    the retrained models' point, on the floor.

    Raises:
        DataError: If the table has no rows.
    """
    ax = _axes(ax)
    frame = _frame(table)
    factor, unit = score_scale(table.score_name)
    points = _over_seeds(frame, ["score_test", "kl_forget"])
    shade = _shades(points["scale"])

    colors = [shade(s) for s in frame["scale"]]
    ax.scatter(frame["score_test"] * factor, frame["kl_forget"], s=12, c=colors, alpha=0.4, linewidths=0, zorder=2)
    busy = [*zip(frame["score_test"] * factor, frame["kl_forget"], strict=True)]
    for (exponent, rows), marker in zip(points.groupby("exponent"), _markers(points), strict=True):
        several = points["exponent"].nunique() > 1
        label = f"scrubbed, p = {exponent:g}" if several else "scrubbed, by noise s"
        x, y = rows["score_test"].to_numpy() * factor, rows["kl_forget"].to_numpy()
        ax.plot(x, y, color=GREY, linewidth=1, zorder=3)
        dx, dy = rows["score_test_std"].to_numpy() * factor, rows["kl_forget_std"].to_numpy()
        ax.errorbar(x, y, xerr=dx, yerr=dy, fmt="none", ecolor=GREY, elinewidth=0.8, capsize=2, zorder=3)
        for i, (scale, size) in enumerate(zip(rows["scale"], np.linspace(5, 9, len(rows)), strict=True)):
            style = {"color": shade(scale), "marker": marker, "markersize": size, **_EDGE}
            ax.plot(x[i : i + 1], y[i : i + 1], linestyle="none", zorder=4, **style)
        middle = shade(rows["scale"].median())
        ax.plot([], [], color=GREY, marker=marker, markerfacecolor=middle, markersize=7, linewidth=1, label=label)
        busy += along(x[:-1], y[:-1], x[1:], y[1:]) + along(x - dx, y, x + dx, y) + along(x, y - dy, x, y + dy)
    for name, label in LABELS.items():
        mark, spread = table.marks[name], table.marks["retrained_std"] if name == "retrained" else {}
        at = [mark["score_test"] * factor], [mark["kl_forget"]]
        bars = _bar(spread.get("score_test", math.nan) * factor), _bar(spread.get("kl_forget", math.nan))
        ax.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt="none", ecolor="black", elinewidth=1, capsize=2, zorder=5)
        style = {"markeredgecolor": "black", "markersize": 9, **STYLES[name]}
        if name == "newton":
            style["markeredgecolor"] = style["color"]
        ax.plot(*at, linestyle="none", label=label, zorder=5, **style)
    floor, spread_of_floor = (table.marks[name]["kl_forget"] for name in ("retrained", "retrained_std"))
    _floor(ax, floor, spread_of_floor)

    marks = [(table.marks[name]["score_test"] * factor, table.marks[name]["kl_forget"]) for name in LABELS]
    _log_limits(ax, "y", [*frame["kl_forget"], *(y for _, y in marks)])
    _linear_limits(ax, [*frame["score_test"] * factor, *(x for x, _ in marks)], unit)
    ax.set_xlabel(_with_unit(f"{table.score_name} on test data", unit))
    ax.set_ylabel("KL(retrained ‖ scrubbed)\non forgotten data (nats)")
    _finish(ax, legend_columns=2)
    centres = list(zip(points["score_test"] * factor, points["kl_forget"], strict=True))
    annotate(ax, centres, [f"s = {_short(s, digits=2)}" for s in points["scale"]], marks, busy)
    return ax


def plot_noise(table: SweepTable, ax: Axes | None = None) -> Axes:
    """KL on forgotten and on retained data against the noise scale, with bands over seeds and the floor of each.

    Raises:
        DataError: If the table has no rows, or no scale above zero.
    """
    ax = _axes(ax)
    frame = _frame(table)
    frame = frame[frame["scale"] > 0]  # which a logarithmic axis cannot show
    if frame.empty:
        raise DataError("noise scales that are all zero", "scales above zero", "Sweep over positive scales.")
    points = _over_seeds(frame, ["kl_forget", "kl_retain"])
    parts = {"forget": (BLUE, "-", "////"), "retain": (VERMILLION, "--", "\\\\\\\\")}
    values = list(frame["kl_forget"]) + list(frame["kl_retain"])
    for part, (color, line, hatch) in parts.items():
        for (exponent, rows), marker in zip(points.groupby("exponent"), _markers(points), strict=True):
            several = points["exponent"].nunique() > 1
            label = part_label(part) + (f", p = {exponent:g}" if several else "")
            x, y, std = (rows[c].to_numpy() for c in ("scale", f"kl_{part}", f"kl_{part}_std"))
            low, high = np.maximum(y - std, y * 1e-3), y + std  # a logarithmic axis has no zero
            ax.fill_between(x, low, high, zorder=1, **_band(color, hatch))
            symbol: dict[str, Any] = {"marker": marker, "markersize": 6, **_EDGE}
            ax.plot(x, y, label=label, color=color, linestyle=line, linewidth=1.6, zorder=4, **symbol)
        floor = table.marks["retrained"][f"kl_{part}"]
        values.append(floor)
        ax.axhline(floor, color=color, linestyle=":", linewidth=1.4, label=f"floor, {part_label(part)}", zorder=2)
    ax.set_xscale("log")
    _log_limits(ax, "x", frame["scale"].to_list(), margin=0.05)
    _log_limits(ax, "y", values)
    ax.set_xlabel("noise scale s, in w + s · B⁻ᵖ ξ (no unit)")
    ax.set_ylabel("KL(retrained ‖ scrubbed) (nats)")
    _finish(ax, legend_columns=2)
    return ax


def plot_parts(case: Case, ax: Axes | None = None) -> Axes:
    """KL to the retrained models, part by part: from the original to the scrubbed model, beside the floor.

    Raises:
        DataError: If the case lacks a score.
    """
    ax = _axes(ax)
    keys = {"original": "kl_original", "scrubbed": "kl_scrubbed", "retrained": "floor"}
    _log_limits(ax, "x", _dumbbells(ax, case, keys, 1.0, "floor: target"))
    ax.set_xlabel("KL(retrained ‖ model) (nats)")
    _finish(ax, legend_columns=3)
    return ax


def plot_scores(case: Case, ax: Axes | None = None) -> Axes:
    """Accuracy (%) or error, part by part: from the original to the scrubbed model, beside the retrained ones.

    Raises:
        DataError: If the case lacks a score.
    """
    ax = _axes(ax)
    factor, unit = score_scale(case["score_name"])
    keys = {name: f"score_{name}" for name in ("original", "scrubbed", "retrained")}
    _linear_limits(ax, _dumbbells(ax, case, keys, factor, LABELS["retrained"]), unit)
    ax.set_xlabel(_with_unit(case["score_name"], unit))
    _finish(ax, legend_columns=3)
    return ax


def save_figure(figure: Figure | SubFigure, stem: Path) -> tuple[Path, Path]:
    """Write <stem>.png and <stem>.svg; the SVG is the same to the byte for the same figure.

    Args:
        figure: Any; of a part of a figure, the whole is written.
        stem: Path without an ending; its folder is made if need be.

    Returns:
        (PNG, SVG)

    Raises:
        StorageError: If the files cannot be written.
    """
    root = whole_figure(figure)
    stem = Path(stem)
    folder = ensure_folder(stem.parent)
    paths = folder / f"{stem.name}.png", folder / f"{stem.name}.svg"  # with_suffix would cut "a.b" short
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fisher_forget"}):
        for path in paths:
            ending: Literal["png", "svg"] = "png" if path.suffix == ".png" else "svg"
            buffer = io.BytesIO()
            root.savefig(buffer, format=ending, dpi=DPI, metadata={"Date": None} if ending == "svg" else None)
            try:
                path.write_bytes(buffer.getvalue())
            except OSError as error:
                fix = "Check the folder and its space."
                raise StorageError(f"{path}: {error}", "a file that can be written", fix) from error
    return paths


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return plt.figure(figsize=SIZE, layout="constrained").add_subplot()


def _frame(table: SweepTable) -> pd.DataFrame:
    frame = table.to_pandas()
    if frame.empty:
        raise DataError("a sweep without draws", "at least one", "Sweep over at least one scale and one seed.")
    return frame


def _over_seeds(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation (0 for one seed) of each (exponent, scale), in order of scale."""
    groups = frame.groupby(["exponent", "scale"])[list(columns)]
    std = groups.std().fillna(0.0).add_suffix("_std")
    return groups.mean().join(std).reset_index().sort_values(["exponent", "scale"])


def _markers(points: pd.DataFrame) -> list[str]:
    count = points["exponent"].nunique()
    return [EXPONENT_MARKERS[i % len(EXPONENT_MARKERS)] for i in range(count)]


def _shades(scales: pd.Series[float]) -> Any:
    """scale -> colour; a scale of zero is as light as the smallest."""
    positive = scales[scales > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    colors = mpl.colormaps[SHADE]
    return lambda scale: colors(0.85 * (1 - float(norm(max(scale, low)))))  # the last sixth is too pale on white


def _dumbbells(ax: Axes, case: Case, keys: Mapping[str, str], factor: float, target: str) -> list[float]:
    """A row a part: a line from the original's value to the scrubbed one, and the target as a bar with its spread.

    Returns:
        Every value that the axis must show.
    """
    parts = parts_of(case)
    color = STYLES["retrained"]["color"]
    shown: list[float] = []
    for row, part in enumerate(parts):
        values = {name: estimate(case, part, key) for name, key in keys.items()}
        before, after, goal = (factor * values[name].mean for name in ("original", "scrubbed", "retrained"))
        spread = factor * values["retrained"].std
        if math.isfinite(before) and math.isfinite(after):
            ax.plot([before, after], [row, row], color=GREY, linewidth=1, zorder=2)
        for name, mean in (("original", before), ("scrubbed", after)):
            error = _bar(factor * values[name].std)
            ax.errorbar([mean], [row], xerr=error, fmt="none", ecolor=STYLES[name]["color"], capsize=3, zorder=4)
            style = {"linestyle": "none", "markersize": 9, **_EDGE, **STYLES[name]}
            ax.plot([mean], [row], zorder=5, label=name if row == 0 else None, **style)
        if math.isfinite(goal):
            low, high = (goal - spread, goal + spread) if math.isfinite(spread) else (goal, goal)
            if factor == 100:
                low, high = max(low, 0.0), min(high, 100.0)
            ax.add_patch(Rectangle((low, row - 0.32), high - low, 0.64, zorder=1, **_band(color)))
            shown += [low, high]
        label = f"{target} ± std" if row == 0 else None
        ax.plot([goal, goal], [row - 0.32, row + 0.32], color=color, linewidth=2.4, zorder=3, label=label)
        shown += [before, after, goal, after + factor * values["scrubbed"].std]
    ax.set_yticks(range(len(parts)), [part_label(part).replace(", ", ",\n") for part in parts])
    ax.set_ylim(len(parts) - 0.4, -0.6)  # the first part on top
    return shown


def _bar(std: float) -> list[float] | None:
    return [std] if math.isfinite(std) else None


def _band(color: str, hatch: str = "////") -> dict[str, Any]:
    """A light area with a hatch; opaque, because the SVG would give face and hatch one opacity and so one colour."""
    red, green, blue = mpl.colors.to_rgb(color)
    face, lines = (tuple(1 - share * (1 - c) for c in (red, green, blue)) for share in (0.2, 0.5))
    return {"facecolor": face, "edgecolor": lines, "hatch": hatch, "linewidth": 0}


def _floor(ax: Axes, floor: float, std: float) -> None:
    color = STYLES["retrained"]["color"]
    if math.isfinite(std) and std > 0:
        ax.axhspan(max(floor - std, floor * 1e-3), floor + std, zorder=1, **_band(color))
    ax.axhline(floor, color=color, linestyle="--", linewidth=1.4, label="floor ± std", zorder=1)


def _finish(ax: Axes, legend_columns: int) -> None:
    """What all figures share. The legend stands below the axes, where no data can be."""
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(which="both", labelsize=9, color=GREY)
    ax.tick_params(which="minor", length=2)
    root = whole_figure(ax.figure)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        columnspacing=1.2,
    )
    root.draw_without_rendering()


def _log_limits(ax: Axes, axis: Literal["x", "y"], values: Sequence[float], margin: float = 0.08) -> None:
    """A logarithmic axis around the finite positive values; bars that reach to zero and below run out of it."""
    shown = [v for v in values if math.isfinite(v) and v > 0] or [0.1, 1.0]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    if high - low < 1:  # a full decade, or nothing tells that the axis is logarithmic
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    pad = margin * (high - low)
    if axis == "x":
        ax.set_xscale("log", nonpositive="clip")
        ax.set_xlim(10 ** (low - pad), 10 ** (high + pad))
    else:
        ax.set_yscale("log", nonpositive="clip")
        ax.set_ylim(10 ** (low - pad), 10 ** (high + pad))
    which = ax.xaxis if axis == "x" else ax.yaxis
    narrow = high - low < 1.5  # decades, of which some other ticks must then be named, too
    which.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    wide = low < -3.3 or high > 4
    which.set_major_formatter(FuncFormatter(lambda value, _: _power(value) if wide else _short(value)))
    which.set_minor_formatter(NullFormatter())


def _linear_limits(ax: Axes, values: Sequence[float], unit: str) -> None:
    shown = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    pad = 0.06 * (high - low) if high > low else max(1.0 if unit else 0.1 * abs(high), 1e-3)
    ax.set_xlim(low - pad, high + pad)
    if unit == "%":  # no tick at an accuracy that cannot be
        ax.set_xticks([t for t in ax.get_xticks() if max(low - pad, 0) <= t <= min(high + pad, 100)])


def _short(value: float, digits: int = 3) -> str:
    """A number without mathematics, whose fonts the reader of an SVG may lack.

    Example:
        >>> _short(0.05), _short(2.24e-5, digits=2), _short(1e-5)
        ('0.05', '2.2·10⁻⁵', '10⁻⁵')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = _power(10.0 ** int(exponent))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def _power(value: float) -> str:
    """A power of ten on an axis of many decades."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if exponent in (0, 1) else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _with_unit(text: str, unit: str) -> str:
    return f"{text} ({unit})" if unit else text
