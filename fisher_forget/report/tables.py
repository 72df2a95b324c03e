"""The numbers of a run in words: one sentence and one verdict a case, tables, and the summary for a
terminal.

A case is one entry of `cases` in metrics.json (metrics.schema.json describes it). What it holds
over seeds is read through `estimate`, so that a table, a plot and a sentence never disagree about
which spread a "±" means.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd

from fisher_forget.errors import DataError

Case = Mapping[str, Any]
Tone = Literal["good", "fair", "poor", "none"]

MISSING = "–"
UNDEFINED = "undefined: original within the floor"
CAVEAT = "An estimate, not a certificate."
CLOSE, PARTLY = 0.9, 0.5  # shares of the gap from which a case is called close, and partly closed
SCORE_LOSS = 0.01  # accuracy below the retrained models' that counts as a cost, unless their own spread is wider
ERROR_LOSS = 0.05  # the same for an error, as a share of the retrained models' error
WIDTH = 100  # columns of a terminal
PART_LABELS = {"forget": "forgotten data", "retain": "retained data", "test": "test data"}
# spreads over the retrained models, which are a property of the target and not of the method
_OVER_MEMBERS = {"floor": "floor_std", "score_retrained": "score_retrained_std"}


class Estimate(NamedTuple):
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
class Verdict:
    """What a case comes to.

    Attributes:
        word: "matches retraining" (KL within the floor's spread), "close", "partly closed", "hardly
            closed", "worse", "costly" (quality lost on data that should be kept), "no gap" or "not
            measured".
        tone: How good that is.
        reason: What the word means, in one sentence.
    """

    word: str
    tone: Tone
    reason: str


def estimate(case: Case, part: str, key: str) -> Estimate:
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
    return Estimate(_number(mean["mean"]), std, int(mean["n"]))


def _entry(case: Case, part: str, key: str) -> Mapping[str, Any]:
    try:
        entry: Mapping[str, Any] = case["summary"][part][key]
    except KeyError as error:
        raise DataError(
            f"a case without summary / {part} / {key}",
            "one that metrics.schema.json accepts",
            "Write metrics.json with the version that reads it.",
        ) from error
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
    return next(
        (p for p in ("test, retained classes", "test", "retain") if p in case["summary"]),
        parts_of(case)[-1],
    )


def score_scale(score_name: str) -> tuple[float, str]:
    """(factor, unit) that a score is shown in: accuracies in %, all else as it is.

    Example:
        >>> score_scale("label accuracy"), score_scale("squared error")
        ((100.0, '%'), (1.0, ''))
    """
    return (100.0, "%") if "accuracy" in score_name else (1.0, "")


def spread_note(case: Case) -> str:
    """What "±" stands for in this case."""
    seeds, members = len(case["runs"]), case["members"]
    models = f"the {members} retrained models"
    if seeds == 1:
        return f"± is the standard deviation over {models}."
    return f"± is the standard deviation over {seeds} seeds; for the floor and the retrained column, over {models}."


def number(value: float | None) -> str:
    """Three significant digits from 1 on, two below.

    Example:
        >>> [number(v) for v in (12.345, 0.5, 0.0001234, 20000.0, 0.0, None)]
        ['12.3', '0.50', '1.2e-04', '2.0e+04', '0', '–']
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return f"{value:.{_decimals(value)}f}" if _plain(value) else f"{value:.1e}"


def plus_minus(mean: float, std: float) -> str:
    """Mean ± standard deviation, rounded alike.

    Example:
        >>> plus_minus(1.2345, 0.1), plus_minus(12.3, 0.04), plus_minus(1.2, float("nan"))
        ('1.23 ± 0.10', '12.30 ± 0.04', '1.20')
    """
    if not (math.isfinite(mean) and math.isfinite(std)):
        return number(mean)
    if not _plain(mean):
        return f"{number(mean)} ± {std:.0e}"
    decimals = _decimals(mean) if mean else 2
    if std > 1e-9 * abs(mean):  # one digit of a spread that is not rounding error must survive
        decimals = min(max(decimals, -math.floor(math.log10(std))), decimals + 2)
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _plain(value: float) -> bool:
    return value == 0 or 1e-3 <= abs(value) < 1e4


def _decimals(value: float) -> int:
    power = math.floor(math.log10(abs(value)))
    return max(0, (2 if power >= 0 else 1) - power)


def score(value: Estimate, score_name: str, *, unit: bool = False) -> str:
    """A score as it is shown: percentages with one decimal.

    Args:
        value: In its own unit.
        score_name: Says whether it is an accuracy.
        unit: Whether to append the unit.
    """
    factor, symbol = score_scale(score_name)
    if factor == 1.0:
        return plus_minus(value.mean, value.std)
    if not math.isfinite(value.mean):
        return MISSING
    spread = f" ± {factor * value.std:.1f}" if math.isfinite(value.std) else ""
    return f"{factor * value.mean:.1f}{spread}{f' {symbol}' if unit else ''}"


def gap(case: Case, part: str) -> str:
    """The share of the gap that is closed, in %, or why there is none."""
    value = estimate(case, part, "gap_closed")
    if value.n == 0:
        return UNDEFINED
    if not math.isfinite(value.mean):
        return MISSING
    seeds = len(case["runs"])
    return _share(value.mean) + (f" ({value.n} of {seeds} seeds)" if value.n < seeds else "")


def _share(closed: float) -> str:
    """A gap that more than doubled says no more than that: its size is mostly that of the gap it is
    divided by."""
    return f"{_percent(closed)} %" if closed >= -1 else "< -100 %"


def _percent(share: float) -> int:
    """Rounded, but never up to a whole that was not reached."""
    return math.floor(100 * share) if 0.99 <= share < 1 else round(100 * share)


def sentence(case: Case) -> str:
    """The result on the forgotten data, in one plain sentence."""
    before, after = estimate(case, "forget", "kl_original"), estimate(case, "forget", "kl_scrubbed")
    floor, closed = estimate(case, "forget", "floor"), estimate(case, "forget", "gap_closed")
    where = "KL to the retrained models on the forgotten data"
    if not math.isfinite(after.mean):
        return f"{where} could not be measured."
    verb = "fell" if after.mean < before.mean else "rose" if after.mean > before.mean else "went"
    text = (
        f"{where} {verb} from {number(before.mean)} to {number(after.mean)} nats; "
        f"two retrained models differ by {number(floor.mean)}"
    )
    if closed.n == 0 or not math.isfinite(closed.mean):
        return f"{text}, and the original was already within that: there was no gap to close."
    if closed.mean >= 1:
        return f"{text}: the gap is closed."
    if closed.mean < -1:
        return f"{text}: the gap more than doubled."
    if closed.mean < 0:
        return f"{text}: the gap grew by {-_percent(closed.mean)} %."
    return f"{text}: {_percent(closed.mean)} % of the gap is closed."


def cost(case: Case) -> str | None:
    """A sentence about quality lost on data that should have kept it, or `None` where there is no
    such loss.

    A loss counts when it is more than twice the spread of the retrained models, and more than
    `SCORE_LOSS` of accuracy or `ERROR_LOSS` of an error.
    """
    name = case["score_name"]
    factor, unit = score_scale(name)
    losses = []
    for part in dict.fromkeys(p for p in ("retain", kept_part(case)) if p in case["summary"]):
        scrubbed, target = (
            estimate(case, part, "score_scrubbed"),
            estimate(case, part, "score_retrained"),
        )
        higher_is_better = unit == "%"
        loss = target.mean - scrubbed.mean if higher_is_better else scrubbed.mean - target.mean
        allowed = SCORE_LOSS if higher_is_better else ERROR_LOSS * abs(target.mean)
        spread = target.std if math.isfinite(target.std) else 0.0
        if loss > max(allowed, 2 * spread):
            shown = (
                f"{factor * loss:.1f} points below" if higher_is_better else f"{number(loss)} above"
            )
            losses.append(f"{shown} the retrained models on the {part_label(part)}")
    return f"The cost: {name} is {' and '.join(losses)}." if losses else None


def verdict(case: Case) -> Verdict:
    """One word for a case, by fixed thresholds (`CLOSE`, `PARTLY`, `SCORE_LOSS`, `ERROR_LOSS`)."""
    before, after = estimate(case, "forget", "kl_original"), estimate(case, "forget", "kl_scrubbed")
    floor, closed = estimate(case, "forget", "floor"), estimate(case, "forget", "gap_closed")
    if not (math.isfinite(after.mean) and math.isfinite(floor.mean)):
        return Verdict("not measured", "none", "A KL is missing or not finite.")
    within = after.mean <= floor.mean + (floor.std if math.isfinite(floor.std) else 0.0)
    if not within and after.mean > before.mean:
        return Verdict("worse", "poor", "Farther from the retrained models than before.")
    lost = cost(case)
    if lost is not None:
        return Verdict("costly", "poor", lost)
    if closed.n == 0:
        return Verdict(
            "no gap", "none", "The original was already as close as two retrained models are."
        )
    if within:
        return Verdict(
            "matches retraining",
            "good",
            "As close to the retrained models as they are to each other.",
        )
    if closed.mean >= CLOSE:
        return Verdict(
            "close", "good", f"At least {CLOSE:.0%} of the gap is closed.".replace("%", " %")
        )
    if closed.mean >= PARTLY:
        return Verdict(
            "partly closed",
            "fair",
            f"Between {100 * PARTLY:.0f} and {100 * CLOSE:.0f} % is closed.",
        )
    return Verdict("hardly closed", "poor", f"Less than {100 * PARTLY:.0f} % of the gap is closed.")


def timing(case: Case) -> str | None:
    """What forgetting took beside retraining once, or `None` where it was not measured."""
    seconds = case.get("seconds", {})
    spent, once = _number(seconds.get("forget")), _number(seconds.get("retrain_one"))
    if not (math.isfinite(spent) and math.isfinite(once)):
        return None
    shown = [f"{t:.1f} s" if t >= 0.1 else f"{1000 * t:.0f} ms" for t in (spent, once)]
    return f"Forgetting took {shown[0]}; retraining once takes {shown[1]}."


def reference_code(case: Case) -> Case | None:
    """The case with the scores of the public code in place of the scrubbed model's; `None` where it
    was not run."""
    return {**case, "summary": case["reference_code"]} if "reference_code" in case else None


def case_table(case: Case) -> pd.DataFrame:
    """One row a part of the data, in words: KL in nats, scores in % where they are accuracies.

    With two more columns where the reference code was run.

    Raises:
        DataError: If the case lacks a score.
    """
    name = case["score_name"]
    unit = score_scale(name)[1]
    title = f"{name} {{}} ({unit})" if unit else f"{name} {{}}"
    rows = []
    rival = reference_code(case)
    for part in parts_of(case):
        values = {key: estimate(case, part, key) for key in ("kl_original", "kl_scrubbed", "floor")}
        scores = {
            key: estimate(case, part, f"score_{key}")
            for key in ("original", "scrubbed", "retrained")
        }
        samples = _number(_entry(case, part, "samples")["mean"])
        rows.append(
            {
                "part": part_label(part),
                "samples": f"{samples:,.0f}" if math.isfinite(samples) else MISSING,
                "KL original (nats)": plus_minus(
                    values["kl_original"].mean, values["kl_original"].std
                ),
                "KL scrubbed (nats)": plus_minus(
                    values["kl_scrubbed"].mean, values["kl_scrubbed"].std
                ),
                "floor (nats)": plus_minus(values["floor"].mean, values["floor"].std),
                "gap closed": gap(case, part),
                **{title.format(key): score(value, name) for key, value in scores.items()},
            }
        )
        if rival:
            other = estimate(rival, part, "kl_scrubbed")
            rows[-1]["KL reference code (nats)"] = plus_minus(other.mean, other.std)
            rows[-1][title.format("reference code")] = score(
                estimate(rival, part, "score_scrubbed"), name
            )
    return pd.DataFrame(rows)


def runs_table(case: Case) -> pd.DataFrame:
    """One row a seed: what was done to the weights, and the mean losses in nats."""
    rows = []
    for run in case["runs"]:
        done = run["forget"]
        newton, noise, losses = done["newton"], done["noise"], done["losses"]
        rows.append(
            {
                "seed": str(run["seed"]),
                "curvature": f"{done['curvature']['structure']}, {done['curvature']['kind']}",
                "sub-steps": str(newton["substeps"])
                + (f" (+{newton['rejected']} rejected)" * (newton["rejected"] > 0)),
                "last damping": number(newton["damping"]),
                "step norm": number(newton["norm"]),
                "noise scale": "none" if noise is None else number(noise["scale"]),
                "noise norm": "none" if noise is None else number(noise["norm"]),
                "retain loss (nats)": f"{number(losses['retain_before'])} → {number(losses['retain_after'])}",
                "forget loss (nats)": f"{number(losses['forget_before'])} → {number(losses['forget_after'])}",
                "folder": run["folder"],
            }
        )
    return pd.DataFrame(rows)


def to_markdown(frame: pd.DataFrame) -> str:
    """A GitHub table, padded to be read as it is; every column but the first is right-aligned.

    Example:
        >>> print(to_markdown(pd.DataFrame({"part": ["a|b"], "KL": ["1.0"]})))
        | part |  KL |
        | :--- | --: |
        | a\\|b | 1.0 |
    """
    header = [_cell(column) for column in frame.columns]
    body = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    widths = [max(3, *(len(row[i]) for row in [header, *body])) for i in range(len(header))]
    rules = [
        ":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join(
        "| " + " | ".join(_align(row, widths)) + " |" for row in [header, rules, *body]
    )


def _cell(value: object) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return MISSING if missing else " ".join(str(value).split()).replace("|", "\\|")


def _align(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
        for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]


def console(metrics: Mapping[str, Any]) -> str:
    """The end of a run in at most `WIDTH` columns.

    Raises:
        DataError: If a case lacks a score.
    """
    blocks = [_console_case(case) for case in metrics["cases"]]
    return "\n\n".join([*blocks, CAVEAT])


def _console_case(case: Case) -> str:
    seeds, members = len(case["runs"]), case["members"]
    title = (
        f"{case['name']}: {verdict(case).word}. "
        f"{case['forgotten']:,} samples forgotten, {case['retained']:,} retained; {seeds} seed{'s' * (seeds > 1)} "
        f"against {members} retrained models."
    )
    said = [title, *(f"  {line}" for line in (sentence(case), cost(case), timing(case)) if line)]
    lines = [line for text in said for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    return "\n".join(lines + [f"  {line}" for line in _console_table(case, WIDTH - 2)])


def _console_table(case: Case, width: int) -> list[str]:
    name = case["score_name"]
    unit = score_scale(name)[1]
    heads = ["", "original", "scrubbed", "floor", "closed", "original", "scrubbed", "retrained"]
    rows = [_console_row(case, part, part) for part in parts_of(case)]
    rival = reference_code(case)
    if rival:
        rows.append(_console_row(rival, "forget", "reference code"))
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    widths[0] = min(widths[0], max(8, width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    for row in rows:
        row[0] = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
    left = widths[0] + 2
    kl, score_title = "KL to retrained (nats)", f"{name} ({unit})" if unit else name
    # the groups' titles stand over the right edge of their columns
    group = sum(widths[1:5]) + 3 * 2
    top = " " * left + f"{kl:<{group}}"[:group] + "  " + score_title[: width - left - group - 2]
    undefined = any(estimate(case, part, "gap_closed").n == 0 for part in parts_of(case))
    note = [f'closed "{MISSING}" is {UNDEFINED}'] if undefined else []
    if rival:
        kept = [
            f"{part} {_mean_score(rival, part, 'scrubbed')}"
            for part in parts_of(rival)
            if part != "forget"
        ]
        text = f"reference code: on forget, at the best of twelve scales; {score_title} on {'; '.join(kept)}"
        note += textwrap.wrap(text, width, subsequent_indent="  ")
    return [top, *("  ".join(_align(row, widths)).rstrip() for row in [heads, *rows]), *note]


def _console_row(case: Case, part: str, label: str) -> list[str]:
    after, closed = estimate(case, part, "kl_scrubbed"), estimate(case, part, "gap_closed")
    return [
        label,
        number(estimate(case, part, "kl_original").mean),
        plus_minus(after.mean, after.std),
        number(estimate(case, part, "floor").mean),
        _share(closed.mean) if math.isfinite(closed.mean) else MISSING,
        *(_mean_score(case, part, key) for key in ("original", "scrubbed", "retrained")),
    ]


def _mean_score(case: Case, part: str, key: str) -> str:
    return score(estimate(case, part, f"score_{key}")._replace(std=math.nan), case["score_name"])
