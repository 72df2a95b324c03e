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
from fisher_forget.report.pages.html import Figure, render_template, write_html
from fisher_forget.report.pages.svg import inline
from fisher_forget.report.plots import plot_cost, plot_methods, save_figure
from fisher_forget.report.ranking import MAY_LOSE, REFERENCES, Row

OURS = "fisher-forget"
RUINED = 10.0  # points of accuracy below retrained from which on a figure leaves a method out
SMALLEST = "smallest ratio told from the first"  # the last row of the overview


def answer(table_rows: Sequence[Row]) -> str:
    """Who is first, who is tied with it, what could have been told, and where fisher-forget
    stands."""
    rivals = [r for r in table_rows if r["method"] not in REFERENCES]
    if not rivals or not rivals[0]["accurate"]:
        return "No method keeps the accuracy of retrained models."
    first, *others = rivals
    text = (
        f"Closest to retrained at equal accuracy: {first['method']}, {_nats(first)} "
        f"(floor {first['floor']:.2g}); {_told(first, [r for r in others if r['accurate']])}."
    )
    ours = next((r for r in others if r["method"] == OURS), None)
    if ours is not None and not (ours["tied"] or _undecided(ours)):
        text += f" {OURS} is {'behind' if ours['accurate'] else 'less accurate'}: {_nats(ours)}."
    return text


def _told(first: Row, others: Sequence[Row]) -> str:
    """Which of the others, all as accurate, are told apart from the first, in words."""
    if not others:
        return "every other is less accurate"
    if not math.isfinite(first["smallest_ratio"]):
        return f"{first['models']} original(s) tell no difference to the others"
    found = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("not told apart from it", [r["method"] for r in others if r["tied"]]),
            ("undecided", [r["method"] for r in others if _undecided(r)]),
        )
        if names
    ]
    return (
        f"{'; '.join(found) or 'every other is farther away'}; {first['models']} originals tell a "
        f"ratio of {first['smallest_ratio']:.3g} in 80 % of cases"
    )


def _undecided(row: Row) -> bool:
    """Whether the ratio to the first may be 1 and is yet too large to pass for equal."""
    return bool(row["accurate"] and not row["tied"] and not row["ratio_low"] > 1)


def _nats(row: Row) -> str:
    cost = row["cost"]
    return f"{row['kl']:.2g} nats for " + (
        f"{cost:.1f} retrainings" if cost >= 1 else f"{100 * cost:.2g} % of one"
    )


def frame(table_rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as people read them."""
    shown = []
    for row in table_rows:
        shown.append(
            {
                "method": row["method"] + (" *" if row["tied"] else ""),
                "KL forgotten (nats)": f"{row['kl']:.3g} {row['mark']}".strip(),
                "95 %": _interval(row, "kl"),
                "times the first": _times(row),
                "KL retained": f"{row['kl_retain']:.2g}",
                "test accuracy of what is retained (%)": f"{row['accuracy']:.1f}",
                "scores as retrained": f"{row['inside']} of {row['scored']}",
                "cost (retrainings)": f"{row['cost']:.2g}" if row["cost"] else "",
                "equally accurate": "yes" if row["accurate"] else "no",
            }
        )
    return pd.DataFrame(shown)


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{low:.3g} to {high:.3g}" if low < high < math.inf else ""


def _times(row: Row) -> str:
    """The ratio to the first, with its interval."""
    interval = _interval(row, "ratio")
    ratio = MISSING if math.isnan(row["ratio"]) else f"{row['ratio']:.3g}"
    return ratio + (f" ({interval})" if interval else "")


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
            mark = " *" if row["tied"] else "" if row["accurate"] or name in REFERENCES else " †"
            cells[case] = f"{row['kl']:.2g}{mark} ({row['accuracy']:.1f} %)"
            costs.append(row["cost"])
        cost = f"{np.median(costs):.2g}" if costs and name != "original" else ""
        row = {"method": name} | cells | {"retrainings": cost}
        shown.append((name in REFERENCES, float(np.mean(places)), row))
    table = [row for *_, row in sorted(shown, key=lambda entry: entry[:2])]
    firsts = {case: table_rows[0] for case, table_rows in cases.items()}
    targets = {case: f"{r['floor']:.2g} ({r['target']:.1f} %)" for case, r in firsts.items()}
    ratios = {case: r["smallest_ratio"] for case, r in firsts.items()}
    told = {case: f"{r:.2g}" if math.isfinite(r) else MISSING for case, r in ratios.items()}
    last = [
        {"method": name} | cells | {"retrainings": ""}
        for name, cells in (("retrained, among themselves", targets), (SMALLEST, told))
    ]
    return pd.DataFrame([*table, *last])


def overview_markdown(report: Mapping[str, Any]) -> str:
    """`overview` of what `fisher-forget compare` stores, for a Markdown file."""
    shown = _overview(report)
    return f"{markdown_table(shown, shown.itertuples(index=False))}\n\n{OVERVIEW}"


def _overview(report: Mapping[str, Any]) -> pd.DataFrame:
    refused = [
        o["method"] for case in report["cases"].values() for o in case["outcomes"] if o["refused"]
    ]
    return overview({name: case["rows"] for name, case in report["cases"].items()}, refused)


LEFT_OUT = f"Methods that lose more than {RUINED:g} points of accuracy are left out."
OVERVIEW = (
    "KL on the forgotten samples in nats, geometric mean over the originals (test accuracy of what "
    "is retained); * first, or not told apart from the first; † less accurate than retrained "
    "models; – no result; retrainings: median wall time over that of one retraining. Sorted by "
    f"mean place. {SMALLEST[0].upper()}{SMALLEST[1:]}: with 80 % power in a paired test at 5 %."
)
LEGEND = (
    "KL: geometric mean over the originals. * not told apart from the first: the interval of the "
    "ratio holds 1 (paired over the originals, 95 %, each row by itself), and the ratio is at most "
    f"the smallest that could have been told; {MARKS_LEGEND}. "
    "Equally accurate: not below what 97.5 % of retrained models reach, or at most "
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
    retrained = pd.DataFrame([target | {"pareto": False, "ours": False}])
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
        ("cost", plot_cost, "wall time, as a share of one retraining"),
    ):
        caption = f"KL on the forgotten samples against {what}. {LEFT_OUT}"
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
