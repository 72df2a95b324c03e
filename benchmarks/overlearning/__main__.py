"""What a probe reads of an attribute from each layer, before and after it was forgotten: the tables
of docs/how-to/overlearning.md.

    python -m benchmarks.overlearning [CASE ...] [--only-table]

Cases are "digits-tint", "mnist-tint", "mnist-parity" (these two need MNIST on disk) and "names"
(needs the extra `scenarios`); all of them by default. Numbers are stored in
benchmarks/overlearning.json after each, so that a killed run goes on, and written to the page. One
thread, less than ten minutes.
"""

from __future__ import annotations

import time

from benchmarks.overlearning.cases import CASES, measured
from benchmarks.overlearning.tables import PAGE, STORED, tables
from benchmarks.parts import asked_for, write_tables
from fisher_forget._util.files import read_json, write_json


def main() -> None:
    """The command line."""
    stored = read_json(STORED) if STORED.exists() else {}
    for case in asked_for(__doc__, CASES, "CASE"):
        begun = time.perf_counter()
        stored[case] = measured(case)
        write_json(STORED, stored)
        print(f"{case}: {time.perf_counter() - begun:.0f} s", flush=True)
    write_tables(PAGE, tables(stored))


if __name__ == "__main__":
    main()
