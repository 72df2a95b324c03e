"""The table, plots and page of `fisher-forget compare`: who comes closest to retrained, and at what
price."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from fisher_forget._util.files import ensure_folder
from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.numbers import MISSING
from fisher_forget.evaluate.evaluation import MARKS, MARKS_LEGEND
from fisher_forget.evaluate.verdict import DIFFERENT
from fisher_forget.report.pages.html import Figure, render_template, write_html
from fisher_forget.report.pages.svg import inline
from fisher_forget.report.plots import plot_cost, plot_methods, save_figure
from fisher_forget.report.ranking import MAY_LOSE, REFERENCES, TELLS, Row

OURS = "fisher-forget"
RUINED = 10.0  # points of accuracy below retrained from which on a figure leaves a method out
TOLD_APART = [MARKS[label] for label in DIFFERENT]
NOTHING = (
    "Nothing to forget is visible by KL, since the original is not told apart from retrained "
    "models either; the order means little. "
)


def answer(table_rows: Sequence[Row]) -> str:
    """Whether there is anything to forget, who is first, who is as close, what could have been
    told, and where fisher-forget stands."""
    rivals = [r for r in table_rows if r["method"] not in REFERENCES]
    if not rivals or not rivals[0]["accurate"]:
        return "No method keeps the accuracy of retrained models."
    first, *others = rivals
    original = next((r for r in table_rows if r["method"] == "original"), None)
    text = (NOTHING if original is not None and original["mark"] not in TOLD_APART else "") + (
        f"Closest to retrained at equal accuracy: {first['method']}, {_nats(first)} "
        f"(floor {first['floor']:.2g}); {_told(first, [r for r in others if r['accurate']])}."
    )
    ours = next((r for r in others if r["method"] == OURS), None)
    if ours is not None and not (ours["tied"] or ours["undecided"]):
        text += f" {OURS} is {'behind' if ours['accurate'] else 'less accurate'}: {_nats(ours)}."
    return text


def _told(first: Row, others: Sequence[Row]) -> str:
    """Which of the others, all as accurate, are told apart from the first, in words."""
    if not others:
        return "every other is less accurate"
    if first["models"] < 2:
        return "one original tells no difference to the others"
    found = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("as close", [r["method"] for r in others if r["tied"]]),
            ("undecided", [r["method"] for r in others if r["undecided"]]),
        )
        if names
    ]
    text = "; ".join(found) or "every other is farther away"
    ratios = [r["smallest_ratio"] for r in others if math.isfinite(r["smallest_ratio"])]
    if not ratios:
        return text
    ends = [f"{r:.2g}" for r in (min(ratios), max(ratios))]
    span = ends[0] if len(ratios) == 1 else f"{' to '.join(ends)}, by method"
    return f"{text}; with {first['models']} originals the smallest ratio told is {span}"


def _nats(row: Row) -> str:
    cost = row["cost"]
    share = f"{100 * cost:.2g} % of " if cost < 0.995 else f"{cost:.2g} times "
    share = "" if share == "1 times " else share
    return f"{row['kl']:.2g} nats at {share}the time of a retraining"


def frame(table_rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as people read them."""
    shown = []
    for row in table_rows:
        shown.append(
            {
                "method": row["method"] + _sign(row),
                "KL forgotten (nats)": f"{row['kl']:.3g} {row['mark']}".strip(),
                "95 %": _interval(row, "kl"),
                "times the first": _times(row),
                "smallest told": _ratio(row["smallest_ratio"]),
                "KL retained": f"{row['kl_retain']:.2g}",
                "test accuracy of what is retained (%)": f"{row['accuracy']:.1f}",
                "scores not told apart": f"{row['inside']} of {row['scored']}",
                "cost (retrainings)": f"{row['cost']:.2g}" if row["cost"] else "",
            }
        )
    return pd.DataFrame(shown)


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{low:.3g} to {high:.3g}" if low < high < math.inf else ""


def _times(row: Row) -> str:
    """The ratio to the first, with its interval."""
    interval = _interval(row, "ratio")
    return _ratio(row["ratio"]) + (f" ({interval})" if interval else "")


def _ratio(ratio: float) -> str:
    return MISSING if math.isnan(ratio) else f"{ratio:.3g}"


def _sign(row: Row) -> str:
    """How a method stands beside the first, as the legends say."""
    if row["method"] in REFERENCES:
        return ""
    return " *" if row["tied"] else " ?" if row["undecided"] else "" if row["accurate"] else " †"


def to_markdown(table_rows: Sequence[Row]) -> str:
    """The table of one forget set for a Markdown file."""
    first, shown = table_rows[0], frame(table_rows)
    return (
        f"{markdown_table(shown, shown.itertuples(index=False))}\n\n"
        f"{answer(table_rows)} "
        f"Retrained models: {first['floor']:.3g} nats, {first['target']:.1f} %. {LEGEND}"
    )


def overview(cases: Mapping[str, Sequence[Row]], refused: Iterable[str] = ()) -> pd.DataFrame:
    """All forget sets in one table: KL on the forgotten samples in nats, test accuracy of what is
    retained in brackets.

    Sorted by the mean over forget sets of a method's place; one without a result there is last, and
    one that is not as accurate as retrained models comes after all that are (as in `rows`). Then
    what they are read against.

    Args:
        cases: Forget set -> its `rows`.
        refused: Methods that have no result on some of them.
    """
    names = dict.fromkeys(
        [*(row["method"] for table_rows in cases.values() for row in table_rows), *refused]
    )
    shown = []
    for name in names:
        places, cells, costs = [], {}, []
        for case, table_rows in cases.items():
            place = next((i for i, row in enumerate(table_rows) if row["method"] == name), None)
            places.append(len(names) if place is None else place)
            if place is None:
                cells[case] = "–"
                continue
            row = table_rows[place]
            cells[case] = f"{row['kl']:.2g}{_sign(row)} ({row['accuracy']:.1f} %)"
            costs.append(row["cost"])
        cost = f"{np.median(costs):.2g}" if costs and name != "original" else ""
        row = {"method": name} | cells | {"retrainings": cost}
        shown.append((name in REFERENCES, float(np.mean(places)), row))
    table = [row for *_, row in sorted(shown, key=lambda entry: entry[:2])]
    firsts = {case: table_rows[0] for case, table_rows in cases.items()}
    targets = {case: f"{r['floor']:.2g} ({r['target']:.1f} %)" for case, r in firsts.items()}
    return pd.DataFrame(
        [*table, {"method": "retrained, among themselves"} | targets | {"retrainings": ""}]
    )


def overview_markdown(report: Mapping[str, Any]) -> str:
    """`overview` of what `fisher-forget compare` stores, for a Markdown file."""
    shown = _overview(report)
    return f"{markdown_table(shown, shown.itertuples(index=False))}\n\n{OVERVIEW}"


def _overview(report: Mapping[str, Any]) -> pd.DataFrame:
    refused = [
        o["method"] for case in report["cases"].values() for o in case["outcomes"] if o["refused"]
    ]
    return overview({name: case["rows"] for name, case in report["cases"].items()}, refused)


JOINED = (
    "Diamonds on the dotted line: no other method is better in both. Bars: 95\u00a0% intervals, "
    "some run off."
)
LEFT_OUT = f"Methods that lose more than {RUINED:g} points of accuracy are left out."
SIGNS = (
    "* first, or as close: not told apart from the first, though a KL "
    f"{TELLS:g} times the first's would have been; ? undecided: not told apart, and "
    f"{TELLS:g} times might not have been either; † less accurate than retrained models"
)
OVERVIEW = (
    "KL on the forgotten samples in nats, geometric mean over the originals (test accuracy of what "
    f"is retained); {SIGNS}; – no result; retrainings: median wall time over that of one "
    "retraining. Sorted by mean place."
)
LEGEND = (
    f"KL: geometric mean over the originals. {SIGNS}. Times the first: the ratio of KL, paired "
    "over the originals, with its 95 % interval; each row by itself. Smallest told: the ratio that "
    "this test finds in 80 % of cases, by the spread of this row's own differences from the "
    f"first. Behind the KL: {MARKS_LEGEND}. Scores not told apart: from those of retrained models. "
    "Less accurate: below what 97.5 % of retrained models reach, and more than "
    f"{MAY_LOSE:g} point below their mean."
)


def plotted(table_rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as `plot_methods` and `plot_cost` take them; "retrained" is the target itself.

    Models that lost more than `RUINED` points of accuracy are left out, so that the others can be
    told apart.
    """
    rows = [
        row
        for row in table_rows
        if row["method"] == "original"
        or (row["method"] not in REFERENCES and row["accuracy"] >= row["target"] - RUINED)
    ]
    table = pd.DataFrame(rows).assign(ours=[row["method"] == OURS for row in rows])
    first = table_rows[0]
    target = {"method": "retrained", "kl": first["floor"], "accuracy": first["target"], "cost": 1.0}
    names = ["kl", "accuracy"]
    target |= {f"{name}_{end}": target[name] for name in names for end in ("low", "high")}
    retrained = pd.DataFrame([target | {"ours": False}])
    return pd.concat([table, retrained], ignore_index=True)


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write <folder>/comparison.html and the figures it shows.

    Args:
        report: What `fisher-forget compare` stores as comparison.json.
        folder: Made if need be.
    """
    ensure_folder(folder)
    cases = [
        _case(name, case, _figures(case["rows"], index, folder))
        for index, (name, case) in enumerate(report["cases"].items())
    ]
    page = render_template(
        "comparison.html.j2",
        overview=_overview(report) if len(cases) > 1 else None,
        about=OVERVIEW,
        run=report["name"],
        cases=cases,
        legend=LEGEND,
        command=report["command"],
        config=report["config"],
    )
    return write_html(folder / "comparison.html", page)


def _figures(table_rows: Sequence[Row], index: int, folder: Path) -> list[Figure]:
    """KL against accuracy, and against time, of one forget set."""
    figures = []
    for kind, plot, what in (
        ("tradeoff", plot_methods, "test accuracy of what is retained"),
        ("cost", plot_cost, "wall time, in retrainings"),
    ):
        caption = f"KL on the forgotten samples against {what}. {JOINED} {LEFT_OUT}"
        _, svg = save_figure(plot(plotted(table_rows)).figure, folder / f"{kind}-{index}")
        plt.close("all")
        figures.append(Figure(caption, inline(svg, f"{kind[0]}{index}-", caption)))
    return figures


def _case(name: str, case: Mapping[str, Any], figures: list[Figure]) -> dict[str, Any]:
    """What the template needs of one forget set."""
    refused = [(o["method"], o["refused"]) for o in case["outcomes"] if o["refused"]]
    return {
        "name": name,
        "answer": answer(case["rows"]),
        "forgotten": case["forgotten"],
        "models": max(row["models"] for row in case["rows"]),
        "retrained": case["evaluation"]["retrained"],
        "table": frame(case["rows"]),
        "figures": figures,
        "settings": _settings(case["outcomes"]),
        "scores": _scores(case["evaluation"]),
        "refused": pd.DataFrame(refused, columns=["method", "why"]) if refused else None,
    }


def _setting(settings: Mapping[str, Any]) -> str:
    shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
    return ", ".join(shown) or "defaults"


def _settings(outcomes: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every setting that was tried; the chosen one first."""
    shown = []
    for outcome in outcomes:
        for trial in sorted(outcome["trials"], key=lambda t: t["settings"] != outcome["settings"]):
            best = trial["settings"] == outcome["settings"] and not outcome["refused"]
            points = [trial[key] for key in ("damage", "memory")]
            shown.append(
                {
                    "method": outcome["method"],
                    "setting": _setting(trial["settings"]),
                    "damage (points)": "" if points[0] is None else f"{points[0]:.1f}",
                    "memory (points)": "" if points[1] is None else f"{points[1]:.1f}",
                    "chosen": "chosen" if best else "",
                    "error": trial["error"],
                }
            )
    return pd.DataFrame(shown)


def _scores(evaluation: Mapping[str, Any]) -> pd.DataFrame:
    """Every metric and part, one column a method."""
    shown: dict[tuple[str, str], Row] = {}
    for score in evaluation["scores"]:
        metric, part = score["metric"], score["part"]
        unit = f" ({score['unit']})" if score["unit"] else ""
        first = {"metric": metric + unit, "part": part, "retrained": _short(score["target"])}
        row = shown.setdefault((metric, part), first)
        row[score["method"]] = f"{_short(score['value'])} {MARKS[score['label']]}".strip()
    return pd.DataFrame(list(shown.values())).fillna("")


def _short(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
