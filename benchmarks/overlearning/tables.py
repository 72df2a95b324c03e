"""The tables of docs/how-to/overlearning.md, from stored numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.overlearning.cases import Report
from fisher_forget._util.markdown import markdown_table

FOLDER = Path(__file__).parent
STORED = FOLDER.with_suffix(".json")
PAGE = FOLDER.parents[1] / "docs" / "how-to" / "overlearning.md"
COLUMNS = (
    "before", "after", "trained without tint", "never trained",
    "control: random attribute", "control: the task's label",
)  # fmt: skip


def tables(report: Report) -> dict[str, str]:
    """All tables by name."""
    return {"layers": _layers(report), "price": _price(report), "undone": _undone(report)}


def _layers(report: Report) -> str:
    rows = []
    for case, found in report.items():
        known = found["layers"]
        for i, layer in enumerate(known["before"]["layers"]):
            cells = [_points(known[k]["layers"][i]["gain"]) if k in known else "–" for k in COLUMNS]
            rows.append([case, layer["layer"], *cells])
    return markdown_table(["data", "layer", *COLUMNS], rows)


def _price(report: Report) -> str:
    rows = [
        [case, method, f"{100 * told['accuracy']:.1f} %", f"{told['loss']:.3f}",
         _points(told["linear"][0]["gain"]), _nats(told["linear"][0]["information"]),
         _points(told["nonlinear"][0]["gain"]), _points(told["nonlinear"][1]["gain"])]
        for case, found in report.items()
        for method, told in found["price"].items()
    ]  # fmt: skip
    probes = ["linear probe", "its information (nats)", "nonlinear probe"]
    heads = ["data", "model", "task", "its loss (nats)", *probes, "nonlinear, after the ReLU"]
    return markdown_table(heads, rows)


def _undone(report: Report) -> str:
    rows = []
    for case, found in report.items():
        for model, told in found["attacks"].items():
            start, map_ = told["repurposed"], told.get("decensored")
            gains = [
                _points(map_[k]) if map_ else "–" for k in ("censored", "mapped", "uncensored")
            ]
            shares = [f"{100 * start[k]:.1f} %" for k in ("tuned", "scratch")]
            rows.append([case, model, *shares, _points(start["gain"]), *gains])
    heads = [
        "data", "model", "100 labels, from the model", "from scratch", "difference",
        "probe, censored", "mapped", "uncensored",
    ]  # fmt: skip
    return markdown_table(heads, rows)


def _points(interval: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * interval[k]:z.0f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _nats(interval: Mapping[str, float]) -> str:
    value, low, high = (f"{interval[k]:z.2f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
