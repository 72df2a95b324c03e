"""Inside a result: the way of the Newton flow, and the curvature and the step layer by layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn

from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.errors import DataError
from fisher_forget.params import trainable
from fisher_forget.report.plots.style import (
    BLUE,
    EDGE,
    GREEN,
    GREY,
    ORANGE,
    SIZE,
    VERMILLION,
    axes_or_new,
    finish,
    log_limits,
)
from fisher_forget.unlearn.result import ForgetResult

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TINY = 1e-12  # of an eigenvalue, relative to the largest: rounding


def plot_path(result: ForgetResult, ax: Axes | None = None) -> Axes:
    """Along the Newton flow: how far each sub-step moved the forget set's predictions, and what it
    cost.

    The time of a sub-step is one over its damping, times the share of it that was taken. Crosses
    are sub-steps that left the budget and were not taken.

    Raises:
        DataError: If no sub-step was tried.
    """
    newton = result.newton
    if not newton.path:
        got = "a result without sub-steps"
        raise DataError(got, "at least one", "Look at result.newton: nothing was tried.")
    ax, x = axes_or_new(ax), _times(result)
    moved = np.array([s.moved for s in newton.path])
    rise = np.array([s.loss - newton.loss_before for s in newton.path])
    rise = np.where(rise > 0, rise, math.nan)  # which a logarithmic axis cannot show
    taken = np.array([s.accepted for s in newton.path])
    for label, y, color, line in (
        ("KL moved by a sub-step, forgotten data", moved, BLUE, "o-"),
        ("rise of the retained loss, where it rose", rise, VERMILLION, "s--"),
    ):
        ax.plot(x[taken], y[taken], line, color=color, markersize=7, label=label, **EDGE)
        ax.plot(x[~taken], y[~taken], "x", color=color, markersize=7)
    if not taken.all():
        ax.plot([], [], color=GREY, marker="x", linestyle="none", label="not taken")
    ax.axhline(newton.budget, color=GREY, linestyle=":", linewidth=1.4, label="budget of the rise")
    log_limits(ax, "x", x.tolist())
    log_limits(ax, "y", [*np.abs(moved), *rise, newton.budget])
    ax.set_xlabel("time of the flow, 1 / damping (squared weight / nats)")
    ax.set_ylabel("nats")
    finish(ax, legend_columns=1)
    return ax


def _times(result: ForgetResult) -> NDArray[np.float64]:
    """Time of the flow after each sub-step: backward Euler with damping tau advances it by 1 / tau,
    and by nothing where the sub-step was not taken."""
    times, at = [], 0.0
    for step in result.newton.path:
        times.append(at + step.share / step.damping if step.damping > 0 else math.nan)
        at = times[-1] if step.accepted else at
    return np.array(times)


def plot_spectrum(result: ForgetResult, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the curvature, layer by layer: a thin line from 5 % to 95 %, a thick one from
    25 % to 75 %.

    The dotted line is the damping of the last sub-step with weight decay: below it the noise cannot
    tell directions apart. Structures without eigenvalues of each layer show the diagonal.
    """
    layers = _spectra(result.curvature)
    ax = axes_or_new(ax, _tall(len(layers)))
    shown: list[float] = []
    for row, values in enumerate(layers.values()):
        shown += _draw_spectrum(ax, row, values.double().flatten().numpy())
    tau = result.noise_curvature().tau
    ax.axvline(tau, color=ORANGE, linestyle=":", linewidth=1.6, label="damping", zorder=1)
    log_limits(ax, "x", [*shown, tau])
    _name_rows(ax, list(layers))
    ax.set_xlabel("eigenvalue of the curvature (nats per squared weight)")
    finish(ax, legend_columns=3)
    return ax


def _draw_spectrum(ax: Axes, row: int, values: NDArray[np.float64]) -> tuple[float, float]:
    """One layer's line; returns what the axis must show."""
    eigenvalues = np.maximum(values, TINY * max(values.max(), TINY))
    low, left, middle, right, high = np.quantile(eigenvalues, QUANTILES)
    lines = ((low, high), 1, 2, "5 to 95 %"), ((left, right), 4, 3, "25 to 75 %")
    for ends, width, order, label in lines:
        line: dict[str, Any] = {"linewidth": width, "zorder": order, "label": _first(row, label)}
        ax.plot(ends, [row, row], color=BLUE, **line)
    look: dict[str, Any] = {"color": BLUE, "markersize": 7, "linestyle": "none", "zorder": 4}
    ax.plot(middle, row, marker="o", label=_first(row, "median"), **(look | EDGE))
    look |= {"marker": ">", "markerfacecolor": "white"}
    ax.plot(eigenvalues.max(), row, label=_first(row, "largest"), **look)
    return float(low), float(eigenvalues.max())


def plot_steps(result: ForgetResult, original: nn.Module, ax: Axes | None = None) -> Axes:
    """How far forgetting moved each parameter: root mean square of the Newton step and of the
    noise, over the weights'.

    Args:
        result: Of `forget`.
        original: The model before.
        ax: Where to draw.

    Raises:
        DataError: If the original has other parameters, or the result was loaded from a file,
            which has no weights before noise.
    """
    before = trainable(original)
    if missing := [name for name in result.newton.params if name not in before]:
        got = f"an original without {missing[:3]}"
        raise DataError(got, "the model given to `forget`", "Pass that one.")
    corrected, names = result.corrected, list(result.newton.params)
    size = [max(_rms(before[name]), TINY) for name in names]
    steps = {name: corrected[name] - before[name] for name in names}
    look: dict[str, Any] = {"color": GREEN, "marker": "D", **EDGE}
    series = [("Newton step", steps, look)]
    if result.noise is not None:
        look = {"color": ORANGE, "marker": "o", "fillstyle": "none"}
        after = trainable(result.model)
        series.append(("noise", {name: after[name] - corrected[name] for name in names}, look))
    ax, rows, shown = axes_or_new(ax, _tall(len(names))), np.arange(len(names)), []
    for label, moves, look in series:
        lengths = [_rms(moves[name]) / s for name, s in zip(names, size, strict=True)]
        ax.plot(lengths, rows, linestyle="none", markersize=7, label=label, **look)
        shown += lengths
    log_limits(ax, "x", shown)
    _name_rows(ax, names)
    ax.set_xlabel("root mean square, relative to the weights' (no unit)")
    finish(ax, legend_columns=2)
    return ax


def _spectra(curvature: Curvature) -> dict[str, Tensor]:
    """Layer -> eigenvalues; the diagonal of each parameter, where the structure has no eigenvalues
    of its own there."""
    found: dict[str, Tensor] = {}
    whole = (tuple(curvature.diagonal()), curvature)
    for names, part in curvature.parts if isinstance(curvature, BlockDiagonal) else (whole,):
        spectrum = part.spectrum() if isinstance(part, Spectral) else part.diagonal()
        if set(spectrum) == set(names):
            found |= {name: spectrum[name] for name in names}
        else:
            name = names[0] if len(names) == 1 else _common(names)
            found[name] = torch.cat([v.flatten() for v in spectrum.values()])
    return found


def _common(names: tuple[str, ...]) -> str:
    """The module whose parameters these are.

    Example:
        >>> _common(("conv.weight", "conv.bias")), _common(("a.weight", "b.weight"))
        ('conv', 'all layers')
    """
    modules = {name.rpartition(".")[0] for name in names}
    return modules.pop() if len(modules) == 1 else "all layers"


def _tall(rows: int) -> tuple[float, float]:
    return SIZE[0], max(SIZE[1], 1.4 + 0.24 * rows)


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)  # the first layer on top


def _first(row: int, label: str) -> str:
    return label if row == 0 else "_"


def _rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())
