"""Figures: every number stands where it should, checked against computations of its own; and no
text covers another."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WEIGHT_DECAY, seeded, small_net
from made_up import CLASS_3, make_case, make_sweep
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from scipy.special import log_softmax, logsumexp, rel_entr
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fisher_forget import ForgetResult, Reference, forget
from fisher_forget.errors import DataError
from fisher_forget.report import plots, tables
from fisher_forget.sweep import SweepTable

FORGET = list(range(0, 30, 3))


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


@pytest.fixture
def case() -> dict[str, Any]:
    return make_case("class 3", CLASS_3)


@pytest.fixture(scope="module")
def result(trained: nn.Module, blobs: TensorDataset) -> ForgetResult:
    generator = torch.Generator().manual_seed(0)
    options = {"weight_decay": WEIGHT_DECAY, "noise": 0.05, "generator": generator}
    return forget(trained, blobs, FORGET, progress=False, **options)


@pytest.fixture(scope="module")
def reference(trained: nn.Module, blobs: TensorDataset) -> Reference:
    parts = {"forget": Subset(blobs, FORGET), "retain": blobs, "test": blobs}
    return Reference(trained, [seeded(small_net, seed) for seed in (1, 2, 3)], parts)


def _line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def _points(ax: Axes) -> set[tuple[float, float]]:
    """Of all markers."""
    marked = [line for line in ax.lines if line.get_marker() not in ("None", " ", "")]
    return {(float(x), float(y)) for line in marked for x, y in line.get_xydata()}


def _kl(reference: Reference, outputs: torch.Tensor, part: str) -> np.ndarray:
    """By SciPy: mean over the retrained models, a sample."""
    q = log_softmax(outputs.double().numpy(), 1)
    p = [log_softmax(m[part].double().numpy(), 1) for m in reference.retrained]
    return np.mean([rel_entr(np.exp(a), np.exp(q)).sum(1) for a in p], 0)


# sweeps


def test_the_tradeoff_shows_the_marks_and_the_floor_where_they_are():
    table = make_sweep()
    ax = plots.plot_tradeoff(table)
    assert "(%)" in ax.get_xlabel()
    assert "(nats)" in ax.get_ylabel()
    assert ax.get_yscale() == "log"
    for name in ("original", "retrained"):
        x, y = _line(ax, plots.LABELS[name])
        assert (x.item(), y.item()) == (
            100 * table.marks[name]["score_test"],
            table.marks[name]["kl_forget"],
        )
    newton = table.frame[table.frame["scale"] == 0].iloc[0]
    x, y = _line(ax, plots.LABELS["newton"])
    assert (x.item(), y.item()) == (100 * newton["score_test"], newton["kl_forget"])
    assert set(_line(ax, "floor ± std")[1]) == {0.55}
    band = next(p for p in ax.patches if p.get_hatch())
    assert band.get_extents().transformed(ax.transData.inverted()).intervaly == pytest.approx(
        [0.49, 0.61]
    )


def test_the_tradeoff_has_a_point_a_scale_at_the_mean_over_draws_with_its_interval():
    table = make_sweep(scales=(1e-2, 1e-4, 1e-3))
    ax = plots.plot_tradeoff(table)
    path = next(
        line for line in ax.lines if len(line.get_xdata()) == 3 and line.get_marker() == "None"
    )
    groups = table.frame.groupby("scale")[["score_test", "kl_forget"]]  # in order of scale
    means = groups.mean()
    assert path.get_xdata() == pytest.approx(100 * means["score_test"].to_numpy())
    assert path.get_ydata() == pytest.approx(means["kl_forget"].to_numpy())
    assert len(ax.collections[0].get_offsets()) == 12  # the single draws
    bars = [segment for c in ax.collections[1:] for segment in c.get_segments()]
    for scale, rows in groups:
        half = stats.t.ppf(0.975, 3) * rows["kl_forget"].sem()
        centre = means.loc[scale, "kl_forget"]
        wanted = [[100 * means.loc[scale, "score_test"], centre + end] for end in (-half, half)]
        assert any(np.allclose(segment, wanted) for segment in bars)


def test_the_front_joins_what_no_other_setting_beats():
    table = make_sweep()
    ax = plots.plot_tradeoff(table)
    x, y = _line(ax, "Pareto front")
    best = table.frontier()
    best = best[best["pareto"]].sort_values("kl_forget")
    assert y == pytest.approx(best["kl_forget"].to_numpy())
    assert x == pytest.approx(100 * best["score_test"].to_numpy())
    assert len(x) > 1


def test_ruined_settings_are_hollow():
    ax = plots.plot_tradeoff(table := make_sweep())
    ruined = table.frontier().query("ruined == 1")
    hollow = {
        round(float(line.get_ydata()[0]), 9)
        for line in ax.lines
        if line.get_markerfacecolor() == "white" and len(line.get_ydata())
    }
    assert hollow == set(ruined["kl_forget"].round(9))
    assert len(hollow) > 1


def test_methods_without_noise_stand_beside_the_curves():
    table = make_sweep(scales=(1e-4, 1e-3))
    other = table.frame.iloc[:2].assign(
        method="finetune", noise=np.nan, scale=np.nan, kl_forget=3.0, score_test=0.8
    )
    frame = pd.concat([table.frame, other], ignore_index=True)
    ax = plots.plot_tradeoff(SweepTable(frame, table.axes, table.marks, table.score, table.ruin))
    assert "finetune" in [text.get_text() for text in ax.texts]
    assert (80.0, 3.0) in _points(ax)
    assert "fisher-forget" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_accuracies_that_differ_much_are_stretched_towards_the_top():
    ax = plots.plot_tradeoff(make_sweep())
    at = ax.transData.transform([(10, 1), (50, 1), (90, 1), (97, 1)])[:, 0]
    assert at[3] - at[2] > (at[2] - at[1]) / 2  # 7 points of accuracy take as much room as 20
    near = plots.plot_tradeoff(make_sweep(scales=(1e-5, 1e-4)))
    at = near.transData.transform([(88, 1), (92, 1), (96, 1)])[:, 0]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])


@pytest.mark.parametrize(
    "table",
    [make_sweep(), make_sweep(exponents=(0.25, 0.5)), make_sweep((0.0, 1e-4, 1e-3), seeds=1)],
)
def test_no_text_of_the_tradeoff_covers_another(table):
    ax = plots.plot_tradeoff(table)
    assert len(ax.texts) >= 2
    no_overlap(ax)


def no_overlap(ax: Axes) -> None:
    """No text covers another, and all lie on the page."""
    figure = ax.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = []
    for text in ax.texts:
        text.update_positions(renderer)
        boxes.append(super(type(text), text).get_window_extent(renderer))
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    rest = [
        ax.xaxis.label,
        ax.yaxis.label,
        ax.get_legend(),
        *ax.get_xticklabels(),
        *ax.get_yticklabels(),
    ]
    shown = [r.get_window_extent(renderer) for r in rest if r.get_visible()]
    shown = [b for b in shown if b.width > 0 and b.height > 0]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes + shown[:3], 2))
    page = figure.bbox.padded(1)
    assert all(
        page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1
        for b in boxes + shown[:3]
    )


@pytest.mark.parametrize("quantity", ["kl", "loss"])
def test_the_noise_figure_shows_means_bands_and_targets(quantity):
    table = make_sweep()
    ax = plots.plot_noise(table, quantity)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert "no unit" in ax.get_xlabel()
    assert "(nats)" in ax.get_ylabel()
    groups = table.frame[table.frame["scale"] > 0].groupby("scale")
    target = "floor" if quantity == "kl" else "retrained"
    for (part, label), area in zip(
        (("forget", "forgotten data"), ("retain", "retained data")), ax.collections, strict=True
    ):
        means = groups[f"{quantity}_{part}"].mean()
        x, y = _line(ax, label)
        assert x == pytest.approx(means.index.to_numpy())
        assert y == pytest.approx(means.to_numpy())
        assert set(_line(ax, f"{target}, {label}")[1]) == {
            table.marks["retrained"][f"{quantity}_{part}"]
        }
        half = stats.t.ppf(0.975, 3) * groups[f"{quantity}_{part}"].sem()
        edge = area.get_paths()[0].vertices
        for scale in means.index[[0, 5, -1]]:
            ends = edge[np.isclose(edge[:, 0], scale), 1]
            assert ends.max() == pytest.approx(means[scale] + half[scale])
            assert ends.min() == pytest.approx(means[scale] - half[scale])


def test_the_damping_figure_leaves_out_what_has_no_place(blobs, trained, reference):
    from fisher_forget import sweep

    grid = {"damping": [0.1, 0.01, "auto"], "steps": [1]}
    table = sweep(
        trained,
        blobs,
        FORGET,
        grid,
        reference=reference,
        weight_decay=WEIGHT_DECAY,
        noise=None,
        progress=False,
    )
    ax = plots.plot_damping(table)
    x, y = _line(ax, "forgotten data")
    rows = table.frame.set_index("damping")["kl_forget"]
    assert x.tolist() == [0.01, 0.1]
    assert y.tolist() == [rows["0.01"], rows["0.1"]]


def test_a_sweep_that_cannot_be_drawn_is_refused():
    with pytest.raises(DataError, match="all zero"):
        plots.plot_noise(make_sweep(scales=(0.0,)))
    with pytest.raises(DataError, match="without dampings"):
        plots.plot_damping(make_sweep())
    table = make_sweep()
    with pytest.raises(DataError, match="without cells"):
        plots.plot_tradeoff(SweepTable(table.frame.iloc[:0], table.axes, table.marks, table.score))


# methods


def make_methods(count: int, seed: int = 0) -> pd.DataFrame:
    """Methods that crowd around the original, as in life, and some that ruin the model."""
    rng = np.random.default_rng(seed)
    kl = np.exp(rng.uniform(np.log(0.4), np.log(14), count))
    kl[-5:] = 12 * (1 + 0.03 * rng.standard_normal(5))
    accuracy = np.clip(97.5 - 1.5 * np.abs(rng.standard_normal(count)), 0, 100)
    accuracy[2:4] = 10, 62
    names = ["fisher-forget", *(f"method-{i}" for i in range(1, count))]
    frame = pd.DataFrame({"method": names, "kl": kl, "accuracy": accuracy})
    frame = frame.assign(
        kl_low=0.8 * kl,
        kl_high=1.25 * kl,
        accuracy_low=accuracy - 0.4,
        accuracy_high=accuracy + 0.4,
    )
    frame["cost"] = np.exp(rng.uniform(np.log(0.01), np.log(3), count))
    frame["ours"] = frame["method"] == "fisher-forget"
    marks = {
        "method": ["original", "retrained"],
        "kl": [12.3, 0.5],
        "accuracy": [97.8, 97.6],
        "cost": [0.0, 1.0],
    }
    return pd.concat([frame, pd.DataFrame(marks).assign(ours=False)], ignore_index=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("plot", "column"),
    [(plots.plot_methods, "accuracy"), (plots.plot_cost, "cost")],
    ids=["accuracy", "cost"],
)
def test_the_front_of_each_figure_is_marked_and_joined(plot, column, seed):
    """Against a loop: a diamond for each method that no other beats, and the line through them
    alone."""
    ax, methods = plot(frame := make_methods(24, seed)), frame.iloc[:24]
    sign = -1 if column == "accuracy" else 1
    points = list(zip(methods[column], methods["kl"], methods["ours"], strict=True))
    front = {
        (x, y): ours
        for x, y, ours in points
        if not any(sign * a <= sign * x and b <= y and (a, b) != (x, y) for a, b, _ in points)
    }
    diamonds = next(line for line in ax.lines if line.get_marker() == "d")
    assert {tuple(p) for p in diamonds.get_xydata()} == {p for p, ours in front.items() if not ours}
    stair = next(
        line for line in ax.lines if line.get_linestyle() == ":" and line.get_color() == "black"
    )
    assert {tuple(p) for p in stair.get_xydata()[::2]} == set(front)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("plot", "column"),
    [(plots.plot_methods, "accuracy"), (plots.plot_cost, "cost")],
    ids=["accuracy", "cost"],
)
def test_each_of_many_methods_is_drawn_and_can_be_told(plot, column, seed):
    frame = make_methods(24, seed)
    ax = plot(frame)
    rows = frame.iloc[:24]
    assert {(x, y) for x, y in zip(rows[column], rows["kl"], strict=True)} <= _points(ax)
    x = rows[column].to_numpy() * (-1 if column == "accuracy" else 1)
    kl = rows["kl"].to_numpy()
    worse = (kl[:, None] >= kl) & (x[:, None] >= x)
    direct = rows["ours"] | (worse.sum(1) == 1)  # by itself alone
    texts = [text.get_text() for text in ax.texts]
    numbered = (~direct).sum()
    assert sorted(texts) == sorted([*rows[direct]["method"], *map(str, range(1, numbered + 1))])
    key = [text.get_text() for text in ax.get_legend().get_texts()]
    ranked = rows[~direct].sort_values("kl")["method"]
    assert [k for k in key if k[0].isdigit()] == [
        f"{i}  {name}" for i, name in enumerate(ranked, 1)
    ]
    assert set(_line(ax, "floor")[1]) == {0.5}
    assert ax.get_yscale() == "log"
    no_overlap(ax)


def test_the_kinds_of_methods_differ_in_shape_and_fill():
    ax = plots.plot_methods(make_methods(12))
    looks = {
        label: ax.get_legend_handles_labels()[1].index(label)
        for label in ("other methods", "fisher-forget")
    }
    handles = ax.get_legend_handles_labels()[0]
    fills = {label: handles[i].get_markerfacecolor() for label, i in looks.items()}
    assert fills["other methods"] == "white" != fills["fisher-forget"]
    shapes = [
        h.get_marker()
        for h, label in zip(*ax.get_legend_handles_labels(), strict=True)
        if label in ("on the Pareto front", "fisher-forget", "original", "retrained: target")
    ]
    assert len(set(shapes)) == len(shapes) == 4


@pytest.mark.parametrize("plot", [plots.plot_methods, plots.plot_cost])
@pytest.mark.parametrize("equal", [["accuracy"], ["accuracy", "kl", "cost"]])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rounding", [0.0, 1e-14])
def test_methods_that_agree_have_an_axis_with_ticks(tmp_path, plot, equal, count, rounding):
    frame = make_methods(12).iloc[[*range(count), 12, 13]].copy()
    steps = 1 + rounding * np.arange(len(frame))
    for column in equal:
        value = 100 * 172 / 180 if column == "accuracy" else 0.02
        for name in [c for c in frame if c.startswith(column)]:
            frame[name] = value * steps
    ax = plot(frame)
    _, svg = plots.save_figure(ax.figure, tmp_path / "equal")  # explains every point
    assert "method" in svg.read_text() or count == 1
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        ticks = axis.get_majorticklocs()
        assert ((limits[0] <= ticks) & (ticks <= limits[1])).sum() >= 2


def test_few_methods_are_all_named():
    frame = make_methods(12).iloc[[0, 1, 4, 12, 13]]
    for plot in (plots.plot_methods, plots.plot_cost):
        ax = plot(frame)
        assert sorted(t.get_text() for t in ax.texts) == ["fisher-forget", "method-1", "method-4"]
        assert "interval, 95 %" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_a_method_on_the_mark_of_the_original_is_seen():
    ax = plots.plot_methods(make_methods(12))
    by_label = {line.get_label(): line for line in ax.lines}
    original = by_label["original"]
    assert by_label["other methods"].get_zorder() > original.get_zorder()
    assert by_label["other methods"].get_markersize() < original.get_markersize()


def test_intervals_of_methods():
    frame = make_methods(12)
    ax = plots.plot_methods(frame)
    (bars,) = [c for c in ax.containers if hasattr(c, "has_yerr")]
    segments = [s for c in bars.lines[2] for s in c.get_segments()]
    for _, row in frame.iloc[:12].iterrows():
        upright = [[row["accuracy"], row["kl_low"]], [row["accuracy"], row["kl_high"]]]
        lying = [[row["accuracy_low"], row["kl"]], [row["accuracy_high"], row["kl"]]]
        assert any(np.allclose(s, upright) for s in segments)
        assert any(np.allclose(s, lying) for s in segments)


@pytest.mark.parametrize("draw", [plots.plot_cost, plots.plot_methods])
def test_a_comparison_without_an_accurate_method_shows_its_marks(draw):
    ax = draw(make_methods(8).iloc[8:])
    assert "retrained: target" in ax.get_legend_handles_labels()[1]


def test_a_comparison_that_lacks_something_is_refused():
    with pytest.raises(DataError, match="cost"):
        plots.plot_cost(make_methods(8).drop(columns="cost"))
    with pytest.raises(DataError, match="retrained"):
        plots.plot_methods(make_methods(8).iloc[:-1])


# samples


def test_classes_show_the_kl_of_each(reference, result):
    ax = plots.plot_classes(reference, result.model, classes=["a", "b", "c"])
    y = reference.targets["test"].numpy()
    for name, outputs in (
        ("original", reference.original),
        ("scrubbed", reference.outputs(result.model)),
    ):
        kl = _kl(reference, outputs["test"], "test")
        assert _line(ax, name)[0] == pytest.approx([kl[y == c].mean() for c in range(3)], rel=1e-5)
    others = [[m for m in reference.retrained if m is not one] for one in reference.retrained]
    pairs = [
        rel_entr(*(np.exp(log_softmax(m["test"].double().numpy(), 1)) for m in (b, a))).sum(1)
        for a, rest in zip(reference.retrained, others, strict=True)
        for b in rest
    ]
    floor = np.mean(pairs, 0)
    drawn = [segment[0][0] for segment in ax.collections[0].get_segments()]
    assert drawn == pytest.approx([floor[y == c].mean() for c in range(3)], rel=1e-5)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]


def test_samples_before_and_after(reference, result):
    ax = plots.plot_samples(reference, result.model)
    dots = np.asarray(ax.collections[-1].get_offsets())
    assert dots[:, 0] == pytest.approx(
        _kl(reference, reference.original["forget"], "forget"), rel=1e-5
    )
    after = _kl(reference, reference.outputs(result.model)["forget"], "forget")
    assert dots[:, 1] == pytest.approx(after, rel=1e-5)


def test_margins_are_shares_of_the_samples(reference, result):
    ax = plots.plot_margins(reference, result.model)
    y = reference.targets["forget"].numpy()

    def margins(outputs: torch.Tensor) -> np.ndarray:
        z = outputs.double().numpy()
        return np.array(
            [row[c] - logsumexp(np.delete(row, c)) for row, c in zip(z, y, strict=True)]
        )

    pooled = np.concatenate([margins(m["forget"]) for m in reference.retrained])
    wanted = {
        plots.LABELS["retrained"]: pooled,
        "original": margins(reference.original["forget"]),
        "scrubbed": margins(reference.outputs(result.model)["forget"]),
    }
    for patch in ax.patches:
        shares, edges, _ = patch.get_data()
        assert shares.sum() == pytest.approx(100)
        centre = (shares * (edges[1:] + edges[:-1])).sum() / 200
        assert abs(centre - wanted[patch.get_label()].mean()) < edges[1] - edges[0]
    assert {patch.get_label() for patch in ax.patches} == set(wanted)


def test_the_samples_that_resisted_are_the_farthest(reference, result):
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    ax = plots.plot_resistant(reference, result.model, images, count=4)
    outputs = reference.outputs(result.model)["forget"]
    kl = _kl(reference, outputs, "forget")
    order = np.argsort(-kl)[:4]
    assert [float(image.get_array()[0, 0]) for image in ax.images] == pytest.approx(order / 9)
    said = [text.get_text() for text in ax.texts]
    y = reference.targets["forget"]
    assert [text.split("\n")[0] for text in said] == [
        f"{int(y[i])} → {int(outputs[i].argmax())}" for i in order
    ]
    assert [float(text.split("\n")[1].split()[0]) for text in said] == pytest.approx(
        kl[order], rel=5e-3
    )
    with pytest.raises(DataError, match="10 samples"):
        plots.plot_resistant(reference, result.model, images[:5])
    with pytest.raises(DataError, match="one of"):
        plots.plot_margins(reference, result.model, part="validation")


# inside a result


def test_the_path_of_the_flow(result):
    ax = plots.plot_path(result)
    x, y = _line(ax, "KL moved by a sub-step, forgotten data")
    steps = result.newton.accepted
    assert x == pytest.approx(np.cumsum([s.share / s.damping for s in steps]))
    assert y.tolist() == [s.moved for s in steps]
    _, rise = _line(ax, "rise of the retained loss, where it rose")
    wanted = np.array([s.loss for s in steps]) - result.newton.loss_before
    assert np.nan_to_num(rise) == pytest.approx(np.maximum(wanted, 0))
    assert set(_line(ax, "budget of the rise")[1]) == {result.newton.budget}


@pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense", "low_rank"])
def test_spectra_are_those_of_the_curvature(trained, blobs, structure):
    found = forget(
        trained,
        blobs,
        FORGET,
        weight_decay=WEIGHT_DECAY,
        structure=structure,
        noise=None,
        progress=False,
    )
    ax = plots.plot_spectrum(found)
    names = [t.get_text() for t in ax.get_yticklabels()]
    largest = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == ">"]
    if structure == "diagonal":
        diagonal = found.curvature.diagonal()
        assert names == list(diagonal)
        assert largest == pytest.approx([float(v.max()) for v in diagonal.values()], rel=1e-5)
        middle = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert middle == pytest.approx([np.median(v.numpy()) for v in diagonal.values()], rel=1e-5)
    elif structure == "dense":
        basis = {n: torch.zeros_like(p) for n, p in found.newton.params.items()}
        columns = []
        for name, p in basis.items():
            for i in range(p.numel()):
                unit = basis | {name: torch.eye(p.numel())[i].view_as(p)}
                columns.append(
                    torch.cat([v.flatten() for v in found.curvature.power(unit, 1).values()])
                )
        assert names == ["all layers"]
        assert largest == pytest.approx(
            [float(np.linalg.eigvalsh(torch.stack(columns).double()).max())], rel=1e-4
        )
    else:
        assert names == (["0", "2"] if structure == "ekfac" else list(found.newton.params))


def test_steps_are_relative_to_the_weights(trained, result):
    ax = plots.plot_steps(result, trained)
    before, after = (dict(m.named_parameters()) for m in (trained, result.model))
    for label, moved in (
        ("Newton step", {n: p - before[n] for n, p in result.newton.params.items()}),
        ("noise", {n: after[n] - p for n, p in result.newton.params.items()}),
    ):
        wanted = [float((moved[n].norm() / before[n].norm()).detach()) for n in before]
        assert _line(ax, label)[0] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(DataError, match="an original without"):
        plots.plot_steps(result, nn.Linear(2, 2))


# runs and files


@pytest.mark.parametrize(
    ("plot", "factor", "first", "unit"),
    [(plots.plot_parts, 1, "kl", "(nats)"), (plots.plot_scores, 100, "score", "(%)")],
)
def test_the_figures_by_part_show_every_value(case, plot, factor, first, unit):
    ax = plot(case)
    assert unit in ax.get_xlabel()
    assert ax.get_xscale() == ("log" if first == "kl" else "linear")
    assert [t.get_text().replace("\n", " ") for t in ax.get_yticklabels()] == tables.case_table(
        case
    )["part"].tolist()
    drawn: dict[str, Axes] = {
        (line.get_marker(), *map(float, (line.get_xdata()[0], line.get_ydata()[0])))
        for line in ax.lines
    }
    for row, part in enumerate(CLASS_3):
        for name, marker in (("original", "s"), ("scrubbed", "o")):
            assert (
                marker,
                factor * tables.estimate(case, part, f"{first}_{name}").mean,
                float(row),
            ) in drawn
        target = (
            factor
            * tables.estimate(case, part, "floor" if first == "kl" else "score_retrained").mean
        )
        assert ("None", target, row - 0.32) in drawn
    assert ax.yaxis_inverted()


def test_figures_can_share_a_figure_of_the_users(case):
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plots.plot_parts(case, left) is left
    assert plots.plot_tradeoff(make_sweep(), right) is right


def test_files_are_the_same_to_the_byte_in_every_process(case, tmp_path):
    before = dict(mpl.rcParams)
    png, svg = plots.save_figure(plots.plot_parts(case).figure, tmp_path / "a" / "parts.1")
    assert (png.name, svg.name) == ("parts.1.png", "parts.1.svg")
    assert dict(mpl.rcParams) == before
    assert "<text" in svg.read_text()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import made_up; from pathlib import Path;"
        "from fisher_forget.report import plots;"
        "ax = plots.plot_parts(made_up.make_case('class 3', made_up.CLASS_3));"
        "plots.save_figure(ax.figure, Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "b")], check=True
    )
    assert (tmp_path / "b.svg").read_bytes() == svg.read_bytes()
    again = plots.save_figure(plots.plot_tradeoff(make_sweep()).figure, tmp_path / "c")[
        1
    ].read_bytes()
    assert (
        again
        == plots.save_figure(plots.plot_tradeoff(make_sweep()).figure, tmp_path / "d")[
            1
        ].read_bytes()
    )


def test_a_new_figure_is_one_that_notebooks_show_and_given_axes_open_none(case):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    new = plots.plot_parts(case)
    assert len(plt.get_fignums()) == len(before) + 1
    plots.plot_parts(case, ax=new)
    assert len(plt.get_fignums()) == len(before) + 1
    plt.close(new.figure)
    assert plt.get_fignums() == before


class TestShards:
    def table(self):
        rows = [
            (s, k, a)
            for k in (1, 3)
            for s, a in ((1, 97.0), (1, 95.0), (5, 90.0 + k), (5, 88.0 + k))
        ]
        return pd.DataFrame(rows, columns=["shards", "slices", "accuracy"])

    def test_a_line_for_each_number_of_slices_and_one_model(self):
        ax = plots.plot_shards(self.table(), single=98.0)
        lines = {container.get_label(): container.lines[0] for container in ax.containers}
        assert list(lines) == ["1 slice a shard", "3 slices a shard"]
        assert lines["1 slice a shard"].get_xydata().tolist() == [[1.0, 96.0], [5.0, 90.0]]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "5"]
        assert any(line.get_ydata()[0] == 98.0 for line in ax.lines)

    def test_refusals(self):
        with pytest.raises(DataError, match="accuracy"):
            plots.plot_shards(self.table().drop(columns="accuracy"), 98.0)
        with pytest.raises(DataError, match="without rows"):
            plots.plot_shards(self.table().iloc[:0], 98.0)
