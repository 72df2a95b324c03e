"""What attacks find in pairs of releases: the tables of docs/attacks.md, and its picture.

    python -m benchmarks.attacks [PART ...] [--only-table]

Parts are "classical", "requests", "shadow", "inversion", "mnist", "slow-down", "chosen" and
"after-release" (these four need MNIST on disk); all of them by default. Numbers are stored in
benchmarks/attacks.json after each, so that a killed run goes on, and written to docs/attacks.md.
One thread; each part takes less than ten minutes.
"""

from __future__ import annotations

import time

from benchmarks.attacks.classical import Report
from benchmarks.attacks.tables import PAGE, PARTS, STORED, tables
from benchmarks.parts import asked_for, write_tables
from fisher_forget._util.files import read_json, write_json


def main() -> None:
    """The command line."""
    for part in asked_for(__doc__, PARTS, "PART"):
        begun = time.perf_counter()
        found = PARTS[part]()
        write_json(STORED, stored() | {part: found})  # another part may have ended meanwhile
        print(f"{part}: {time.perf_counter() - begun:.0f} s\n{tables(part, found)}")
    write_tables(PAGE, {part: tables(part, found) for part, found in stored().items()})


def stored() -> Report:
    """What is known so far."""
    report: Report = read_json(STORED) if STORED.exists() else {}
    return report


if __name__ == "__main__":
    main()
