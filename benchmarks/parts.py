"""What benchmarks of several parts share: which parts are asked for, and where their tables go."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

BEGIN, END = "<!-- {} -->\n", "<!-- end of {} -->\n"


def asked_for(about: str | None, parts: Iterable[str], what: str) -> list[str]:
    """The parts named on the command line, by default all; none with --only-table. One thread.

    Args:
        about: Docstring of the command.
        parts: All there are.
        what: One is called this.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(parts)
    # nobody named is a list, which must be a choice, too
    parser.add_argument("parts", nargs="*", metavar=what, choices=[*known, []])
    parser.add_argument("--only-table", action="store_true", help="from what is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    return [] if options.only_table else options.parts or known


def placed(text: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its marks, in place of what stood there."""
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its marks on the page."""
    page.write_text(placed(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
