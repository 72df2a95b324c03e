"""What an attack found: a number, its interval, the yardstick beside it, and a sentence; and what
all of them found in one deletion."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisher_forget._util.markdown import markdown_table
from fisher_forget.evaluate.groups import Harm
from fisher_forget.evaluate.intervals import Interval
from fisher_forget.ledger import Ledger

TONES = {
    "nothing found": "good",
    "as after retraining": "good",
    "less than after retraining": "fair",
    "cannot tell": "fair",
    "found": "fair",
    "the other way round": "poor",
    "more than after retraining": "poor",
    "beyond the limit": "poor",
}
"""Verdicts on a finding, and whether that is well."""
BOUNDED = ("AUC", "cosine", "probability")  # measures of which all there is to find is 1
SLIGHT = 0.005  # what two decimals show as nothing
NOTE = (
    "Every interval is a 95 % one by itself: of twenty, one is wrong by chance. An attack that "
    "finds nothing shows that this attack finds nothing."
)


@dataclass(frozen=True)
class Finding:
    """What one attack found.

    Attributes:
        attack: Its name.
        measure: What the number is: "AUC" or "cosine".
        found: The number, with a 95 % interval. 1 finds everything.
        nothing: The number of someone who has not seen the models.
        retrained: The same number where exactly retrained models take the place of the second
            release; `None` where none were given.
        samples: Of how many deleted samples it is.
        meaning: What the number says, in plain English.
        details: Further numbers by name.
        warning: What must not be done with these models; empty where nothing speaks against it.
        limit: The most that it may be, where somebody has set one.
    """

    attack: str
    measure: str
    found: Interval
    nothing: float
    retrained: Interval | None
    samples: int
    meaning: str
    details: Mapping[str, float] = field(default_factory=dict)
    warning: str = ""
    limit: float | None = None

    @property
    def leaks(self) -> bool:
        """Whether more is found than without the models: the whole interval is above that, by more
        than two decimals show as nothing."""
        return self.found.low > self.nothing + SLIGHT

    @property
    def reversed(self) -> bool:
        """Whether an AUC lies below guessing with its whole interval: what is turned around tells
        as much."""
        return self.measure == "AUC" and self.found.high < self.nothing - SLIGHT

    @property
    def against_retraining(self) -> str:
        """ "more", "less" or "as much" than after exact retraining; empty without a yardstick.

        Told by a 95 % interval of the difference, from the ends that face each other (Zou and
        Donner 2008, doi:10.1002/sim.3095): a - b +- sqrt(distances squared). Both numbers are of
        the same samples, so that it is, if anything, too wide.
        """
        if self.retrained is None:
            return ""
        ours, exact = self.found, self.retrained
        if _above(ours, exact):
            return "more"
        return "less" if _above(exact, ours) else "as much"

    @property
    def verdict(self) -> str:
        """What to think of it: a key of `TONES`."""
        found, against = self.found, self.against_retraining
        if self.limit is not None and found.value > self.limit:
            return "beyond the limit" if found.low > 0 else "cannot tell"
        if not (self.leaks or self.reversed):
            far = self.nothing - found.low if self.measure == "AUC" else 0.0
            wide = max(found.high - self.nothing, far) > (1 - self.nothing) / 2
            wide = wide and self.measure in BOUNDED
            return "cannot tell" if wide else "nothing found"
        if against == "as much":
            return "as after retraining"
        if self.reversed:
            return "less than after retraining" if against == "more" else "the other way round"
        return f"{against} than after retraining" if against else "found"

    @property
    def numbers(self) -> str:
        """What is found, what is nothing, and what retrained models show."""
        text = f"{self.measure} {shown(self.found)}; {decimals(self.nothing)} by chance."
        exact = self.retrained
        return text if exact is None else f"{text} After exact retraining: {shown(exact)}."

    @property
    def sentence(self) -> str:
        """All of it in plain words."""
        text = f"{self.meaning[:1].upper()}{self.meaning[1:]} {self.numbers}"
        alarming = TONES[self.verdict] != "good"
        return text + (f" Warning: {self.warning}." if alarming and self.warning else "")

    def __str__(self) -> str:
        nothing = f"{decimals(self.nothing)}, which is nothing"
        told = f"More than {nothing}" if self.leaks else f"Not told from {nothing}"
        lines = [
            f"{self.attack}: {self.meaning} {self.measure} {shown(self.found)}.",
            f"{told}, on {self.samples:,} deleted samples.",
        ]
        if self.retrained is not None:
            words = {"more": "more than", "less": "less than", "as much": "not told apart from"}
            lines.append(
                f"After exact retraining {shown(self.retrained)}: "
                f"{words[self.against_retraining]} that."
            )
        lines += [f"{name}: {value:.3g}." for name, value in self.details.items()]
        return "\n".join([*lines, *([f"Warning: {self.warning}"] if self.warning else [])])

    def to_dict(self) -> dict[str, Any]:
        """Everything but tensors, as JSON takes it."""
        stored = {name: getattr(self, name) for name in Finding.__dataclass_fields__}
        for name in ("found", "retrained"):
            stored[name] = None if stored[name] is None else asdict(stored[name])
        return stored | {
            "details": dict(self.details),
            "leaks": self.leaks,
            "against_retraining": self.against_retraining,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


def _above(a: Interval, b: Interval) -> bool:
    """Whether a - b is above 0 with its whole interval."""
    return a.value - b.value > math.hypot(a.value - a.low, b.high - b.value)


def shown(x: Interval) -> str:
    """ "0.73 (0.65 to 0.80)"; a number that is known exactly by itself."""
    if x.low == x.high:
        return decimals(x.value)
    return f"{decimals(x.value)} ({decimals(x.low)} to {decimals(x.high)})"


def decimals(x: float) -> str:
    """Two of them, and no -0.00."""
    return f"{round(x, 2) + 0.0:.2f}"


@dataclass(frozen=True, repr=False)
class Audit:
    """What attacks find in one deletion.

    Attributes:
        findings: One an attack.
        skipped: Attack -> why it was not made.
        harm: What became of each group of unseen samples, of each model; empty where there are no
            groups.
        models: Fingerprints of the audited models; empty ones of functions.
    """

    findings: tuple[Finding, ...]
    skipped: Mapping[str, str]
    harm: tuple[Harm, ...]
    models: tuple[str, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What exact retraining would not show, or what is beyond a limit."""
        return tuple(f for f in self.findings if TONES[f.verdict] == "poor")

    @property
    def answer(self) -> str:
        """All of it in a sentence."""
        if not self.findings:
            return "No attack could be made: see why."
        total, verdicts = len(self.findings), [f.verdict for f in self.findings]
        if self.wrong:
            names = "; ".join(f"{f.attack}: {f.verdict}" for f in self.wrong)
            return f"Too much is found by {len(self.wrong)} of {total} attacks. {names}."
        if all(f.retrained is None for f in self.findings):
            return (
                f"Something is found by {verdicts.count('found')} of {total} attacks. Whether "
                "exact deletion shows as much is not known: that takes retrained models."
            )
        text = f"None of {total} attacks finds more than after exact retraining."
        if less := verdicts.count("less than after retraining"):
            text += (
                f" Less is found by {less}: were the samples moved as far as retraining moves them?"
            )
        if unclear := verdicts.count("cannot tell"):
            text += f" Too few samples or models to tell: {unclear}."
        return text

    def to_pandas(self) -> pd.DataFrame:
        """A row an attack, in numbers."""
        rows = []
        for f in self.findings:
            exact = f.retrained or Interval(np.nan, np.nan, np.nan)
            ends = [(x.value, x.low, x.high) for x in (f.found, exact)]
            rows.append((f.attack, f.verdict, f.measure, *ends[0], f.nothing, *ends[1]))
        heads = ["attack", "verdict", "measure", "found", "found_low", "found_high", "nothing"]
        return pd.DataFrame(
            rows, columns=[*heads, *(f"retrained{x}" for x in ("", "_low", "_high"))]
        )

    def table(self) -> pd.DataFrame:
        """A row an attack, for people: numbers with intervals, and a sentence."""
        return findings_table([f.to_dict() for f in self.findings])

    def to_markdown(self) -> str:
        """The answer, a table, what was not done, and how to read it."""
        table = self.table()
        text = markdown_table(table.columns, table.itertuples(index=False))
        left_out = "\n".join(f"- Not made: {name}. {why}." for name, why in self.skipped.items())
        return "\n\n".join(filter(None, [self.answer, text, left_out, NOTE]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "answer": self.answer,
            "models": list(self.models),
            "findings": [f.to_dict() for f in self.findings],
            "skipped": dict(self.skipped),
            "harm": [harm.to_dict() for harm in self.harm],
            "note": NOTE,
        }

    def record(self, ledger: Ledger | str | Path, **details: Any) -> None:
        """Append it to a ledger, as an entry "audited".

        Args:
            ledger: Or its folder.
            **details: What else is to be known, such as the name of the request.

        Raises:
            StorageError: If it cannot be written.
        """
        book = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        kept = {f.attack: f"{f.verdict}. {f.numbers}" for f in self.findings}
        own = {
            "answer": self.answer,
            "models": list(self.models),
            "findings": kept,
            "not_made": sorted(self.skipped),
        }
        book.record("audited", **(details | own))

    def __str__(self) -> str:
        told = [(f.attack, f"{f.verdict}. {f.sentence}") for f in self.findings]
        told += [(name, f"not made. {why}.") for name, why in self.skipped.items()]
        lines = [
            textwrap.fill(f"{name}: {says}", 100, initial_indent="- ", subsequent_indent="  ")
            for name, says in told
        ]
        return "\n".join([self.answer, *lines])

    __repr__ = __str__


def findings_table(findings: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Findings for people, from what `Finding.to_dict` gives."""
    rows = []
    for f in findings:
        exact = f["retrained"]
        rows.append(
            (
                f["attack"],
                f["verdict"],
                f"{f['measure']} {shown(Interval(**f['found']))}",
                decimals(f["nothing"]),
                "–" if exact is None else shown(Interval(**exact)),
                f["meaning"].removesuffix(" with").removesuffix(":") + ".",
            )
        )
    heads = ["attack", "verdict", "found", "by chance", "retrained", "in words"]
    return pd.DataFrame(rows, columns=heads)
