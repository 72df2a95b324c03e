"""The visual language that all figures share: colours, marks, axes, and how a figure becomes
files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fisher_forget._util.files import ensure_folder, write_file
from fisher_forget.report.plots.annotate import whole_figure
from fisher_forget.report.plots.hover import explain_all, titled

BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#595959"
STYLES: dict[str, dict[str, Any]] = {
    "original": {"color": VERMILLION, "marker": "s"},
    "scrubbed": {"color": BLUE, "marker": "o"},
    "retrained": {"color": GREEN, "marker": "D"},
    # hollow, as it lies on others
    "newton": {"color": ORANGE, "marker": "^", "fillstyle": "none", "markeredgewidth": 2.2},
}
LABELS = {"original": "original", "newton": "Newton, no noise", "retrained": "retrained: target"}
SERIES = (BLUE, ORANGE, "#CC79A7", "#56B4E9", "#000000")  # of curves, with their markers and lines
MARKERS = ("o", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
SIZE = (4.9, 3.8)  # inches: two fit side by side on a desktop page, one stays legible on a phone
DPI = 150
PAST, WIDE = 101.0, 15.0  # %, of accuracies that are stretched: see `score_limits`
LEAST_SPAN = 0.5  # %, of an axis of accuracies
EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    explain_all(root)
    stem = Path(stem)
    folder = ensure_folder(stem.parent)
    # with_suffix would cut "a.b" short
    png, svg = folder / f"{stem.name}.png", folder / f"{stem.name}.svg"
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fisher_forget"}):
        for path, about in ((png, None), (svg, {"Date": None})):
            buffer = io.BytesIO()
            root.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=about)
            content = titled(buffer.getvalue()) if path is svg else buffer.getvalue()
            write_file(path, partial(_fill, content))
    return png, svg


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def axes_or_new(ax: Axes | None, size: tuple[float, float] = SIZE) -> Axes:
    """The given axes, or those of a new pyplot figure, which notebooks show."""
    if ax is not None:
        return ax
    return plt.figure(figsize=size, layout="constrained").add_subplot()


def bar_or_none(std: float) -> list[float] | None:
    """The half-length of an error bar, where there is one."""
    return [std] if math.isfinite(std) else None


def band(color: str, hatch: str = "////") -> dict[str, Any]:
    """A light area with a hatch; opaque, because the SVG would give face and hatch one opacity and
    so one colour."""
    red, green, blue = mpl.colors.to_rgb(color)
    face, lines = (tuple(1 - share * (1 - c) for c in (red, green, blue)) for share in (0.2, 0.5))
    return {"facecolor": face, "edgecolor": lines, "hatch": hatch, "linewidth": 0}


def finish(ax: Axes, legend_columns: int) -> None:
    """What all figures share. The legend stands below the axes, where no data can be."""
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(which="both", labelsize=9, color=GREY)
    ax.tick_params(which="minor", length=2)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
    spacing: dict[str, Any] = {"frameon": False, "handlelength": 1.6, "columnspacing": 1.2}
    ax.legend(ncols=legend_columns, fontsize=9, **place, **spacing)
    whole_figure(ax.figure).draw_without_rendering()


def log_limits(
    ax: Axes, axis: Literal["x", "y"], values: Sequence[float], margin: float = 0.08
) -> None:
    """A logarithmic axis around the finite positive values; bars that reach to zero and below run
    out of it."""
    shown = [v for v in values if math.isfinite(v) and v > 0] or [0.1, 1.0]
    low, high = math.log10(min(shown)), math.log10(max(shown))
    if high - low < 1:  # a full decade, or nothing tells that the axis is logarithmic
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    pad = margin * (high - low)
    which, scale = (ax.xaxis, ax.set_xscale) if axis == "x" else (ax.yaxis, ax.set_yscale)
    scale("log", nonpositive="clip")
    limits = ax.set_xlim if axis == "x" else ax.set_ylim
    limits(10 ** (low - pad), 10 ** (high + pad))
    narrow = high - low < 1.5  # decades, of which some other ticks must then be named, too
    which.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    wide = low < -3.3 or high > 4
    text = power_text if wide else short
    which.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    which.set_minor_formatter(NullFormatter())


def score_limits(
    ax: Axes, values: Sequence[float], unit: str, *, margin: float = 0.06, stretch: bool = False
) -> None:
    """A horizontal axis around the finite values, which may be stretched towards 100 % where
    accuracies differ much.

    There the distance to 101 % is drawn logarithmically: a method that destroys the model must not
    press all others into one line. Values that agree, or differ by rounding alone, still get an
    axis that is wide enough for ticks.
    """
    shown = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if stretch and unit == "%" and high - low > WIDE:
        ax.set_xscale("function", functions=(_stretched, lambda t: PAST - 10.0**-t))
        at = np.array([_stretched(np.array(v)) for v in (low, high)])
        pad = margin * (at[1] - at[0])
        ax.set_xlim(PAST - 10 ** -(at[0] - pad), PAST - 10 ** -(at[1] + pad))
        ax.set_xticks([t for t in (0, 50, 80, 90, 95, 98, 100) if low - 5 <= t <= max(high, 98)])
        ax.set_xticks([t for t in (20, 40, 60, 70, 85, 97, 99) if low <= t <= high], minor=True)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    least = LEAST_SPAN if unit == "%" else max(0.05 * abs(high), 1e-3)
    pad = max(margin * (high - low), (least - (high - low)) / 2)
    ax.set_xlim(low - pad, high + pad)
    if unit == "%":  # no tick at an accuracy that cannot be
        ax.set_xticks(
            [t for t in ax.get_xticks() if max(low - pad, 0) <= t <= min(high + pad, 100)]
        )


def _stretched(accuracy: Any) -> Any:
    return -np.log10(np.maximum(PAST - accuracy, 1e-3))


def short(value: float, digits: int = 3) -> str:
    """A number without mathematics, whose fonts the reader of an SVG may lack.

    Example:
        >>> short(0.05), short(2.24e-5, digits=2), short(1e-5)
        ('0.05', '2.2·10⁻⁵', '10⁻⁵')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{float(f'{value:.{digits}g}'):g}"  # not 1e+03
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = power_text(10.0 ** int(exponent))
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def power_text(value: float) -> str:
    """A power of ten on an axis of many decades."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if exponent in (0, 1) else f"10{str(exponent).translate(_SUPERSCRIPTS)}"
