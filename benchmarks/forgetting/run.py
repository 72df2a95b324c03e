"""What the command does once it is known whose package is asked."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fisher_forget
from benchmarks.forgetting.cells import Networks, cell, key
from benchmarks.forgetting.rows import ROWS, SEEDS, Row
from benchmarks.forgetting.table import table
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.errors import ConfigError

ROOT = Path(__file__).parents[2]
NETWORKS = ROOT / "runs" / "forgetting"
STORED, PAGE = ROOT / "benchmarks" / "forgetting.json", ROOT / "docs" / "results.md"
GROUPS = {"development": False, "held-out": True}  # whether their rows are held out
BEGIN, END = "<!-- forgetting -->\n", "<!-- end of forgetting -->\n"


def run(options: argparse.Namespace) -> None:
    """List, train, or forget and write the table."""
    torch.set_num_threads(1)
    stored = options.out or STORED
    asked = [(row, seed) for row in named(options.only) for seed in options.seeds or SEEDS]
    if options.list:
        print(listing(read(stored)))
        return
    if options.train:
        for row, seed in asked:
            _timed(
                f"networks of {row.name}, seed {seed}",
                lambda r=row, s=seed: Networks.of(r, s, NETWORKS),
            )
        return
    if not options.only_table:
        print(f"The package of {Path(fisher_forget.__file__).parent}", flush=True)
        fill(stored, options.label, asked, again=options.again)
    text = table(list(ROWS.values()), read(stored))
    print(text)
    if stored == STORED:
        write_page(text)


def named(names: Sequence[str]) -> list[Row]:
    """The rows of these names, each of which may be that of a `GROUPS`; all without a name.

    Raises:
        ConfigError: If there is no such row.
    """
    if unknown := sorted(set(names) - set(ROWS) - set(GROUPS)):
        expected = f"among {', '.join([*GROUPS, *ROWS])}"
        raise ConfigError(f"the rows {unknown}", expected, "See --list.")
    groups = [GROUPS[name] for name in names if name in GROUPS]
    return [r for r in ROWS.values() if not names or r.name in names or r.held_out in groups]


def read(stored: Path) -> dict[str, Any]:
    """Label -> row -> seed -> cell; nothing where nothing is stored."""
    report: dict[str, Any] = read_json(stored) if stored.exists() else {}
    return report


def fill(
    stored: Path, label: str, asked: Sequence[tuple[Row, int]], *, again: bool = False
) -> None:
    """Make the cells that are not stored yet, or all anew, and store each."""
    for row, seed in asked:
        old = read(stored).get(label, {}).get(row.name, {}).get(str(seed), {})
        if again or old.get("key") != key(row, seed):
            name = f"{label}, {row.name}, seed {seed}"
            found = _timed(name, lambda r=row, s=seed: cell(r, s, NETWORKS))
            report = read(stored)  # anew, since another run may have added to it
            report.setdefault(label, {}).setdefault(row.name, {})[str(seed)] = found
            write_json(stored, report)


def write_page(text: str) -> None:
    """Put the table between its marks in docs/results.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def listing(report: Mapping[str, Any]) -> str:
    """Every row, and which seeds of it are stored."""

    def seeds(row: Row, label: str) -> str:
        return " ".join(report.get(label, {}).get(row.name, {}))

    lines = [
        [
            row.name,
            row.setup.title,
            row.forgotten,
            row.setup.training.optimizer,
            "early" if row.setup.early else "to the end",
            "held out" if row.held_out else "",
            " ".join(map(str, SEEDS)),
            seeds(row, "before"),
            seeds(row, "after"),
        ]
        for row in ROWS.values()
    ]
    columns = ["row", "network", "forget", "trained by", "until", "", "seeds", "before", "after"]
    return markdown_table(columns, lines)


def _timed(what: str, work: Any) -> Any:
    begun = time.perf_counter()
    found = work()
    print(f"{what}: {time.perf_counter() - begun:.1f} s", flush=True)
    return found
