"""What a probe reads of an attribute from each layer, before and after it was forgotten: the tables
of docs/how-to/overlearning.md.

    python -m benchmarks.overlearning [CASE ...] [--only-table]

Cases are "digits-tint", "mnist-tint", "mnist-parity" (these two need MNIST on disk) and "names"
(needs the extra `scenarios`); all of them by default. Numbers are stored in
benchmarks/overlearning.json after each, so that a killed run goes on, and written to the page. One
thread, less than ten minutes.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.overlearning.cases import CASES, measured
from benchmarks.overlearning.tables import STORED, write_page
from fisher_forget._util.files import read_json, write_json


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = read_json(STORED) if STORED.exists() else {}
    for case in () if options.only_table else options.cases:
        begun = time.perf_counter()
        stored[case] = measured(case)
        write_json(STORED, stored)
        print(f"{case}: {time.perf_counter() - begun:.0f} s", flush=True)
    write_page(stored)


if __name__ == "__main__":
    main()
