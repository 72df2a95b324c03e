"""Class by class and sample by sample: what was forgotten, and which samples resisted.

Most take a `Reference`, which holds the outputs of the original and the retrained models, and the
scrubbed model. The KL of a sample is the mean over the retrained models; its target is the KL that
these have among themselves there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from fisher_forget.errors import DataError
from fisher_forget.evaluate.closeness import Reference
from fisher_forget.evaluate.divergence import per_class
from fisher_forget.evaluate.klom import margins
from fisher_forget.influence import Suggestions
from fisher_forget.report.plots.hover import explain
from fisher_forget.report.plots.style import (
    EDGE,
    GREEN,
    GREY,
    LABELS,
    STYLES,
    axes_or_new,
    band,
    finish,
    log_limits,
    short,
)
from fisher_forget.report.tables import part_label

TINY = 1e-6  # nats: what is drawn for less, which float32 logits cannot tell from 0
BINS = 30
BAND = (0.05, 0.5, 0.95)  # quantiles of the retrained models' band


def plot_classes(
    reference: Reference,
    model: nn.Module,
    part: str = "test",
    classes: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """KL to the retrained models, class by class: from the original to the scrubbed model, beside
    the floor.

    Args:
        reference: Of a classification.
        model: Scrubbed.
        part: Of the reference's data.
        classes: Names of the classes; by default their numbers.
        ax: Where to draw.

    Raises:
        DataError: If the reference lacks the part, or its targets are no classes.
    """
    targets = _targets(reference, part)
    kls = (
        _kl(reference, reference.original[part], part),
        _kl(reference, reference.outputs(model)[part], part),
        _floor(reference, part),
    )
    means = [per_class(values, targets) for values in kls]
    names = list(means[0])
    ax, rows = axes_or_new(ax), np.arange(len(names))
    before, after, floors = (np.maximum(list(mean.values()), TINY) for mean in means)
    target: dict[str, Any] = {"colors": GREEN, "linewidth": 2.4, "zorder": 3}
    ax.vlines(floors, rows - 0.32, rows + 0.32, label="floor: target", **target)
    ends = np.minimum(before, after), np.maximum(before, after)
    ax.hlines(rows, *ends, colors=GREY, linewidth=1, zorder=2)
    for name, values in (("original", before), ("scrubbed", after)):
        look = {"linestyle": "none", "markersize": 8, "zorder": 4, **EDGE, **STYLES[name]}
        ax.plot(values, rows, label=name, **look)
    log_limits(ax, "x", [*floors, *before, *after])
    ax.set_yticks(rows, [classes[c] if classes else f"class {c}" for c in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel(f"KL(retrained ‖ model) on {part_label(part)} (nats)")
    finish(ax, legend_columns=3)
    return ax


def plot_samples(
    reference: Reference, model: nn.Module, part: str = "forget", ax: Axes | None = None
) -> Axes:
    """KL to the retrained models sample by sample: scrubbed over original.

    Samples below the diagonal came closer. The band is where 90 % of the samples lie if a retrained
    model is held against the others.

    Raises:
        DataError: If the reference lacks the part.
    """
    _targets(reference, part)
    before = np.maximum(_kl(reference, reference.original[part], part).numpy(), TINY)
    after = np.maximum(_kl(reference, reference.outputs(model)[part], part).numpy(), TINY)
    low, middle, high = np.maximum(np.quantile(_floor(reference, part).numpy(), BAND), TINY)
    ax = axes_or_new(ax)
    ax.axhspan(low, high, zorder=0.9, **band(GREEN))
    median: dict[str, Any] = {"color": GREEN, "linestyle": "--", "linewidth": 1.4, "zorder": 1}
    ax.axhline(middle, label="retrained: median, 5 to 95 %", **median)
    ends = [min(before.min(), after.min()), max(before.max(), after.max())]
    ax.plot(ends, ends, color=GREY, linestyle=":", linewidth=1.2, label="no change", zorder=1)
    look: dict[str, Any] = {"facecolors": "none", "edgecolors": STYLES["scrubbed"]["color"]}
    dots = ax.scatter(before, after, s=22, linewidths=1, label="a sample", zorder=3, **look)
    pairs = enumerate(zip(before, after, strict=True))
    explain(dots, [f"sample {i}\nKL {a:.3g} -> {b:.3g} nats" for i, (a, b) in pairs])
    log_limits(ax, "x", before.tolist())
    log_limits(ax, "y", [*after, low, high])
    ax.set_xlabel("KL(retrained ‖ original) (nats)")
    ax.set_ylabel(f"KL(retrained ‖ scrubbed) (nats)\n{part_label(part)}")
    finish(ax, legend_columns=2)
    return ax


def plot_margins(
    reference: Reference, model: nn.Module, part: str = "forget", ax: Axes | None = None
) -> Axes:
    """Distribution of the margin log p_y / (1 - p_y) over samples: what membership attacks look at.

    The retrained models, all taken together, are the target; a scrubbed model that lies elsewhere
    gives itself away.

    Raises:
        DataError: If the reference lacks the part, or its targets are no classes.
    """
    targets = _targets(reference, part)
    shown = {
        "retrained": torch.cat([margins(member[part], targets) for member in reference.retrained]),
        "original": margins(reference.original[part], targets),
        "scrubbed": margins(reference.outputs(model)[part], targets),
    }
    values = torch.cat(list(shown.values()))
    edges = np.linspace(float(values.min()), float(values.max()), BINS + 1)
    ax = axes_or_new(ax)
    lines = {"original": "--", "scrubbed": "-"}
    for name, values in shown.items():
        counts, _ = np.histogram(values.numpy(), edges)
        shares, color = 100 * counts / counts.sum(), STYLES[name]["color"]
        if name == "retrained":
            ax.stairs(shares, edges, fill=True, label=LABELS[name], zorder=1, **band(color))
        else:
            look: dict[str, Any] = {"color": color, "linestyle": lines[name], "linewidth": 1.8}
            ax.stairs(shares, edges, label=name, zorder=3, **look)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("margin log p / (1 − p) of the label (nats)")
    ax.set_ylabel(f"share of {part_label(part)} (%)")
    finish(ax, legend_columns=3)
    return ax


def plot_resistant(
    reference: Reference,
    model: nn.Module,
    images: Tensor,
    count: int = 12,
    part: str = "forget",
    classes: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """The samples that are farthest from the retrained models after forgetting, with their KL and
    the class predicted.

    Args:
        reference: Of a classification.
        model: Scrubbed.
        images: Of the part, in its order: [N, C, H, W] with one or three channels, or [N, H, W].
        count: How many.
        part: Of the reference's data.
        classes: Names of the classes; by default their numbers.
        ax: Where to draw.

    Raises:
        DataError: If images and part do not match, or the reference lacks the part.
    """
    targets = _targets(reference, part)
    _check_images(images, len(targets))
    outputs = reference.outputs(model)[part]
    kl, predicted = _kl(reference, outputs, part), outputs.argmax(1)
    worst = kl.argsort(descending=True)[:count].tolist()
    words = []
    for i in worst:
        pair = (_class_name(c, classes) for c in (targets[i], predicted[i]))
        words.append(f"{' → '.join(pair)}\n{short(float(kl[i]))} nats")
    title = f"{part_label(part)}: label → predicted, KL(retrained ‖ scrubbed)"
    return _draw_images(images, worst, words, title, ax)


def plot_suggestions(
    found: Suggestions,
    images: Tensor,
    count: int = 12,
    classes: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """The samples that `suggest` puts first, with index, label, class predicted and score.

    Args:
        found: What `suggest` returned.
        images: Of all samples of the data set: [N, C, H, W] with one or three channels, or
            [N, H, W].
        count: How many.
        classes: Names of the classes; by default their numbers.
        ax: Where to draw.

    Raises:
        DataError: If these are no images, or fewer than the samples.
    """
    top, words = found.table.head(count), []
    _check_images(images, max(len(images), int(found.table["sample"].max()) + 1))
    for row in top.to_dict("records"):
        pair = [_class_name(row[c], classes) for c in ("label", "predicted") if c in row]
        error = f" ± {short(row['standard_error'])}" if "standard_error" in row else ""
        words.append(f"#{row['sample']}: {' → '.join(pair)}\n{short(row['score'])}{error}")
    title = f"first by {found.kind.replace('_', ' ')}: sample, label → predicted, score"
    return _draw_images(images, top["sample"].tolist(), words, title, ax)


def _class_name(index: Any, classes: Sequence[str]) -> str:
    known = 0 <= index < len(classes)  # a label that the loss ignores has no name
    return classes[int(index)] if known else str(int(index))


def _draw_images(
    images: Tensor, shown: Sequence[int], words: Sequence[str], title: str, ax: Axes | None
) -> Axes:
    """Images in rows of six, with words below each."""
    columns, lines = min(len(shown), 6), -(-len(shown) // 6)
    ax = axes_or_new(ax, (1.3 * columns, 0.5 + 1.75 * lines))
    low, high = float(images.min()), float(images.max())
    for place, (i, text) in enumerate(zip(shown, words, strict=True)):
        row, column = divmod(place, columns)
        picture = images[i] if images.dim() == 3 else images[i].movedim(0, -1).squeeze(-1)
        shade = ((picture.double() - low) / max(high - low, 1e-12)).numpy()
        left, top = 1.3 * column, -1.7 * row
        look: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        ax.imshow(shade, extent=(left, left + 1, top - 1, top), **look)
        ax.text(left, top - 1.08, text, fontsize=9, va="top")
    ax.set_xlim(-0.05, 1.3 * columns - 0.2)
    ax.set_ylim(-1.7 * lines + 0.05, 0.05)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_axis_off()
    return ax


def _check_images(images: Tensor, samples: int) -> None:
    fits = images.dim() == 3 or (images.dim() == 4 and images.shape[1] in (1, 3))
    if len(images) != samples or not fits:
        got = f"images of shape {tuple(images.shape)} for {samples} samples"
        fix = (
            "Pass all samples of that part or data set, in its order, as images: of 64 pixels in a "
            "row, x.reshape(-1, 1, 8, 8). Of a table there is no picture: look at its rows."
        )
        raise DataError(got, "[N, C, H, W] with one or three channels, or [N, H, W]", fix)


def _targets(reference: Reference, part: str) -> Tensor:
    if part not in reference.targets:
        got = f"the part {part!r}"
        raise DataError(got, f"one of {list(reference.targets)}", "Pass one of these.")
    return reference.targets[part]


def _kl(reference: Reference, outputs: Tensor, part: str) -> Tensor:
    """KL(retrained || outputs) of each sample, mean over the retrained models: [N]."""
    y = reference.targets[part]
    return torch.stack(
        [reference.likelihood.kl(m[part], outputs, y).double() for m in reference.retrained]
    ).mean(0)


def _floor(reference: Reference, part: str) -> Tensor:
    """The same of a retrained model against the others, mean over ordered pairs: [N]."""
    y, members = reference.targets[part], [m[part] for m in reference.retrained]
    pairs = [
        reference.likelihood.kl(a, b, y).double() for a in members for b in members if a is not b
    ]
    return torch.stack(pairs).mean(0)
