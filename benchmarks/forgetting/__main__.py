"""How close the call comes to retraining as people write it: `forget(model, loader, forget_idx)`.

    python -m benchmarks.forgetting [--only ROW ...] [--seeds N ...] [--label before --code FOLDER]

Every row is a network, a way to train it and a set of samples to forget, with five networks
retrained without them. Originals of seeds 3 to 5, which the table shows, had no part in any choice,
and rows marked * in one only (docs/results.md). Networks are kept in runs/forgetting.
Numbers are stored in benchmarks/forgetting.json after every call, so that a killed run goes on, and
written to docs/results.md.

"before" is the same with the package of another folder: `git worktree add FOLDER cf039dc`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

LABELS = ("before", "after")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ROW", help="see --list; or development, held-out"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="of originals; by default 3 to 5")
    parser.add_argument("--label", choices=LABELS, default="after", help="whose column is filled")
    parser.add_argument("--code", type=Path, help="folder of the package that is asked")
    parser.add_argument("--again", action="store_true", help="make stored numbers anew")
    parser.add_argument("--out", type=Path, help="another file of numbers; no page is written")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show the rows")
    action.add_argument("--train", action="store_true", help="train networks only")
    action.add_argument("--only-table", action="store_true", help="write the table only")
    options = parser.parse_args(arguments)
    if options.code:
        sys.path.insert(0, str(options.code.resolve()))
    # not earlier: the folder decides which package is imported
    from benchmarks.forgetting.run import run

    run(options)


if __name__ == "__main__":
    main()
