"""The numbers of a run in words: one sentence and one word a case, tables, and the summary for a
terminal.

A case is one entry of `cases` in metrics.json (metrics.schema.json describes it). What it holds
over seeds is read through `estimate`, so that a table, a plot and a sentence never disagree about
which spread a "±" means.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from fisher_forget._util.numbers import MISSING, number, percent, plus_minus, share
from fisher_forget.errors import DataError
from fisher_forget.evaluate.gap import FEWEST, Gap
from fisher_forget.evaluate.intervals import Interval, t_interval
from fisher_forget.evaluate.verdict import ALARM
from fisher_forget.likelihood import Score

Case = Mapping[str, Any]
Tone = Literal["good", "fair", "poor", "none"]

UNDEFINED = "undefined: no clear gap"
CAVEAT = "An estimate, not a certificate."
CLOSE, PARTLY = 0.9, 0.5  # shares of the gap from which a case is called close, and partly closed
SAME = 1e-9  # nats: a KL of rounding errors, whatever the floor
WIDTH = 100  # columns of a terminal
PART_LABELS = {"forget": "forgotten data", "retain": "retained data", "test": "test data"}
# spreads over the retrained models, which are a property of the target and not of the method
_OVER_MEMBERS = {"floor": "floor_std", "score_retrained": "score_retrained_std"}


class MeanStd(NamedTuple):
    """A mean and its spread; NaN where there is none.

    Attributes:
        mean: Over the seeds for which the value is defined.
        std: Standard deviation, see `estimate`.
        n: Number of those seeds.
    """

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Conclusion:
    """What a case comes to.

    Attributes:
        word: "matches retraining" (not told apart, or a KL below `SAME`; and `CLOSE` of the gap is
            closed with 95 %), "close", "partly closed", "hardly closed", "worse", "costly" (quality
            lost on data that should be kept), "no clear gap" or "not measured".
        tone: How good that is.
        reason: What the word means, in one sentence.
    """

    word: str
    tone: Tone
    reason: str


def estimate(case: Case, part: str, key: str) -> MeanStd:
    """A score of a case, in its own unit: KL in nats, accuracy in [0, 1].

    The spread is the standard deviation over seeds; over the retrained models for the floor, for
    the retrained score, and for kl_scrubbed where only one seed was run.

    Raises:
        DataError: If the case lacks it.
    """
    mean = _entry(case, part, key)
    if key in _OVER_MEMBERS:
        std = _number(_entry(case, part, _OVER_MEMBERS[key])["mean"])
    elif key == "kl_scrubbed" and mean["n"] <= 1:
        std = _number(_entry(case, part, "kl_scrubbed_std")["mean"])
    else:
        std = _number(mean["std"])
    return MeanStd(_number(mean["mean"]), std, int(mean["n"]))


def _entry(case: Case, part: str, key: str) -> Mapping[str, Any]:
    try:
        entry: Mapping[str, Any] = case["summary"][part][key]
    except KeyError as error:
        got = f"a case without summary / {part} / {key}"
        fix = "Run the configuration again: trained models are kept, and metrics.json is new."
        raise DataError(got, "one that metrics.schema.json accepts", fix) from error
    return entry


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def parts_of(case: Case) -> list[str]:
    """The parts of the data, in the order of the run."""
    return list(case["summary"])


def part_label(part: str) -> str:
    """A part in words."""
    return PART_LABELS.get(part, part)


def kept_part(case: Case) -> str:
    """The data that no forgetting should have made worse and no training has seen: where a method's
    cost shows."""
    parts = parts_of(case)
    best = (part for part in ("test, retained classes", "test", "retain") if part in parts)
    return next(best, parts[-1])


def spread_note(case: Case) -> str:
    """What "±" stands for in this case."""
    seeds, models = len(case["runs"]), f"the {case['members']} retrained models"
    over = f"{seeds} seeds; for the floor and the retrained column, over " if seeds > 1 else ""
    return f"± is the standard deviation over {over}{models}."


def gap(case: Case, part: str) -> Gap:
    """Whether there is a gap on a part of the data, and how much of it is closed.

    Raises:
        DataError: If the case lacks it.
    """
    entry = _entry(case, part, "gap")
    closed = entry["closed"] and Interval(*(_number(x) for x in entry["closed"].values()))
    return Gap(closed, _number(entry["p_original"]), _number(entry["p_scrubbed"]))


def closed_share(case: Case, part: str) -> str:
    """The share of the gap that is closed and its 95 % interval, in %, or why there is none."""
    closed = gap(case, part).closed
    return UNDEFINED if closed is None else share(closed.value, closed.low, closed.high)


def growth(case: Case, part: str) -> Interval:
    """KL scrubbed - KL original and its 95 % interval over the retrained models, nats.

    Paired, model by model: the mean over the seeds of KL(r_i || scrubbed) - KL(r_i || original).
    Student's interval of these differences is that of a jackknife over the models. NaN where a KL
    is not finite.

    Raises:
        DataError: If the case lacks the KLs to each model.
    """
    try:
        runs = [run["evaluation"]["parts"][part] for run in case["runs"]]
        after, before = (
            np.array([run[f"{model}_each"] for run in runs], float).mean(0)
            for model in ("scrubbed", "original")
        )
    except KeyError as error:
        got = f"a case without {error} in its runs"
        fix = "Run the configuration again: trained models are kept, and metrics.json is new."
        raise DataError(got, "one that metrics.schema.json accepts", fix) from error
    finite = np.isfinite([after, before]).all()
    return t_interval(after - before) if finite else Interval(math.nan, math.nan, math.nan)


def likeness(case: Case) -> str | None:
    """Whether the scrubbed models are told apart from retrained ones, in one sentence; `None` where
    too few are retrained to tell."""
    p, after = gap(case, "forget").p_scrubbed, estimate(case, "forget", "kl_scrubbed").mean
    floor = estimate(case, "forget", "floor").mean
    if not all(map(math.isfinite, (p, after, floor))):
        return None
    models = "models" if len(case["runs"]) > 1 else "model"
    if after <= SAME:
        return f"The KL of the scrubbed {models} is one of rounding errors: below {SAME:.0e} nats."
    can = "can still be told" if p <= ALARM else "cannot be told"
    ratio = f"KL {number(after / floor)} times the floor, " if floor > 0 else ""
    return f"The scrubbed {models} {can} from retrained ones ({ratio}p = {number(p)})."


def sentence(case: Case) -> str:
    """The result on the forgotten data, in one plain sentence."""
    before, after = estimate(case, "forget", "kl_original"), estimate(case, "forget", "kl_scrubbed")
    floor, closed = estimate(case, "forget", "floor"), gap(case, "forget").closed
    where = "KL to the retrained models on the forgotten data"
    if not math.isfinite(after.mean):
        return f"{where} could not be measured."
    verb = "fell" if after.mean < before.mean else "rose" if after.mean > before.mean else "went"
    text = (
        f"{where} {verb} from {number(before.mean)} to {number(after.mean)} nats; "
        f"two retrained models differ by {number(floor.mean)}"
    )
    if closed is None:
        grown = growth(case, "forget")
        span = f"95 % interval {number(grown.low)} to {number(grown.high)}"
        return f"{text}; the change is {number(grown.value)} ({span}). {_why_no_gap(case)}"
    if closed.low > 0.999 and closed.high < 1:
        return f"{text}: {percent(closed.low)} % of the gap is closed."
    done, ends = f"{percent(closed.value)} % of the gap is closed", (closed.low, closed.high)
    if closed.value < 0:
        done, ends = f"the gap grew by {percent(-closed.value)} %", (-closed.high, -closed.low)
    return f"{text}: {done} (95 % interval {percent(ends[0])} to {percent(ends[1])} %)."


def _why_no_gap(case: Case) -> str:
    p = gap(case, "forget").p_original
    if case["members"] < FEWEST:
        return f"Whether there was a gap takes {FEWEST} retrained models to tell."
    if p <= ALARM:
        return "The gap is too small to say which share of it is closed."
    return f"The original is not told apart from retrained models (p = {number(p)})."


def cost(case: Case) -> str | None:
    """A sentence about quality lost on data that should have kept it, or `None` where there is no
    such loss.

    A loss counts when it is more than twice the spread of the retrained models, and more than
    `Score.allowed_loss`.
    """
    score = Score.read(case)
    losses = []
    for part in dict.fromkeys(p for p in ("retain", kept_part(case)) if p in case["summary"]):
        target = estimate(case, part, "score_retrained")
        loss = score.loss(estimate(case, part, "score_scrubbed").mean, target.mean)
        spread = target.std if math.isfinite(target.std) else 0.0
        if loss > max(score.allowed_loss(target.mean), 2 * spread):
            size = f"{score.factor * loss:.1f} points" if score.unit == "%" else number(loss)
            side = "below" if score.higher_is_better else "above"
            losses.append(f"{size} {side} the retrained models on the {part_label(part)}")
    return f"The cost: {score.name} is {' and '.join(losses)}." if losses else None


def conclusion(case: Case) -> Conclusion:
    """One word for a case, by fixed thresholds (`CLOSE`, `PARTLY`, `Score.allowed_loss`) and the
    test of `Gap`."""
    after, floor = estimate(case, "forget", "kl_scrubbed"), estimate(case, "forget", "floor")
    found = gap(case, "forget")
    if not (math.isfinite(after.mean) and math.isfinite(floor.mean)):
        return Conclusion("not measured", "none", "A KL is missing or not finite.")
    if found.scrubbed_told_apart and (grown := growth(case, "forget")).low > 0:
        size = f"{number(grown.value)} nats (95 % interval {number(grown.low)} to"
        why = f"Told apart, and farther from the retrained models than before by {size}"
        return Conclusion("worse", "poor", f"{why} {number(grown.high)}).")
    lost = cost(case)
    if lost is not None:
        return Conclusion("costly", "poor", lost)
    if found.closed is None:
        return Conclusion("no clear gap", "none", _why_no_gap(case))
    close, partly = f"{100 * CLOSE:.0f} %", f"{100 * PARTLY:.0f}"
    if after.mean <= SAME:
        why = f"The KL is one of rounding errors, below {SAME:.0e} nats."
        return Conclusion("matches retraining", "good", why)
    if found.closed.low >= CLOSE and not found.scrubbed_told_apart:
        why = f"Not told apart from retrained models, and more than {close} of the gap is closed."
        return Conclusion("matches retraining", "good", why)
    if found.closed.value >= CLOSE:
        return Conclusion("close", "good", f"At least {close} of the gap is closed.")
    if found.closed.value >= PARTLY:
        return Conclusion("partly closed", "fair", f"Between {partly} and {close} is closed.")
    return Conclusion("hardly closed", "poor", f"Less than {partly} % of the gap is closed.")


def timing(case: Case) -> str | None:
    """What forgetting took beside retraining once, or `None` where it was not measured."""
    seconds = case.get("seconds", {})
    spent, once = _number(seconds.get("forget")), _number(seconds.get("retrain_one"))
    if not (math.isfinite(spent) and math.isfinite(once)):
        return None
    shown = [f"{t:.1f} s" if t >= 0.1 else f"{1000 * t:.0f} ms" for t in (spent, once)]
    return f"Forgetting took {shown[0]}; retraining once takes {shown[1]}."


def case_table(case: Case) -> pd.DataFrame:
    """One row a part of the data, in words: KL in nats, scores in % where they are accuracies.

    Raises:
        DataError: If the case lacks a score.
    """
    score = Score.read(case)
    rows = []
    for part in parts_of(case):
        samples = _number(_entry(case, part, "samples")["mean"])
        row = {
            "part": part_label(part),
            "samples": f"{samples:,.0f}" if math.isfinite(samples) else MISSING,
        }
        for title in ("KL original", "KL scrubbed", "floor"):
            kl = estimate(case, part, title.lower().replace(" ", "_"))
            row[f"{title} (nats)"] = plus_minus(kl.mean, kl.std)
        row["gap closed"] = closed_share(case, part)
        for key in ("original", "scrubbed", "retrained"):
            value = estimate(case, part, f"score_{key}")
            row[score.title(key)] = score.format(value.mean, value.std, unit=False)
        rows.append(row)
    return pd.DataFrame(rows)


def runs_table(case: Case) -> pd.DataFrame:
    """One row a seed: what was done to the weights, and the mean losses in nats."""
    rows = []
    for run in case["runs"]:
        done = run["forget"]
        newton, noise, losses = done["newton"], done["noise"], done["losses"]
        rejected = f" (+{newton['rejected']} rejected)" if newton["rejected"] else ""
        row = {
            "seed": str(run["seed"]),
            "curvature": f"{done['curvature']['structure']}, {done['curvature']['kind']}",
            "sub-steps": f"{newton['substeps']}{rejected}",
            "last damping (nats per squared weight)": number(newton["damping"]),
            "step norm": number(newton["norm"]),
            "noise scale": "none" if noise is None else number(noise["scale"]),
            "noise norm": "none" if noise is None else number(noise["norm"]),
        }
        for part in ("retain", "forget"):
            before, after = (number(losses[f"{part}_{when}"]) for when in ("before", "after"))
            row[f"{part} loss (nats)"] = f"{before} → {after}"
        rows.append(row | {"folder": run["folder"]})
    return pd.DataFrame(rows)


def console(metrics: Mapping[str, Any]) -> str:
    """The end of a run in at most `WIDTH` columns.

    Raises:
        DataError: If a case lacks a score.
    """
    blocks = [_console_case(case) for case in metrics["cases"]]
    return "\n\n".join([*blocks, CAVEAT])


def _console_case(case: Case) -> str:
    seeds, members, word = len(case["runs"]), case["members"], conclusion(case)
    title = (
        f"{case['name']}: {word.word}. "
        f"{case['forgotten']:,} samples forgotten, {case['retained']:,} retained; "
        f"{seeds} seed{'s' * (seeds > 1)} against {members} retrained models."
    )
    lines = textwrap.wrap(title, WIDTH, subsequent_indent="  ")
    worse = word.reason if word.word == "worse" else None
    for text in filter(None, (sentence(case), likeness(case), worse, cost(case), timing(case))):
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines + [f"  {line}" for line in _console_table(case, WIDTH - 2)])


def _console_table(case: Case, width: int) -> list[str]:
    heads = [
        "",
        "original",
        "scrubbed",
        "floor",
        "closed (95 %)",
        "original",
        "scrubbed",
        "retrained",
    ]
    rows = [_console_row(case, part) for part in parts_of(case)]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    widths[0] = min(widths[0], max(8, width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    for row in rows:
        row[0] = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
    left = widths[0] + 2
    kl, score_title = "KL to retrained (nats)", Score.read(case).title()
    # the groups' titles stand over the right edge of their columns
    group = sum(widths[1:5]) + 3 * 2
    top = " " * left + f"{kl:<{group}}"[:group] + "  " + score_title[: width - left - group - 2]
    undefined = any(gap(case, part).closed is None for part in parts_of(case))
    note = [f'closed "{MISSING}" is {UNDEFINED}'] if undefined else []
    return [top, *(_console_line(row, widths) for row in [heads, *rows]), *note]


def _console_row(case: Case, part: str) -> list[str]:
    after, closed = estimate(case, part, "kl_scrubbed"), closed_share(case, part)
    return [
        part,
        number(estimate(case, part, "kl_original").mean),
        plus_minus(after.mean, after.std),
        number(estimate(case, part, "floor").mean),
        MISSING if closed == UNDEFINED else closed,
        *(_mean_score(case, part, key) for key in ("original", "scrubbed", "retrained")),
    ]


def _console_line(cells: list[str], widths: list[int]) -> str:
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()


def _mean_score(case: Case, part: str, key: str) -> str:
    return Score.read(case).format(estimate(case, part, f"score_{key}").mean, unit=False)
