"""Time, memory and error of the curvature estimators beside other libraries' on the same model,
data and batches; and the time of whole calls beside that of a retraining.

    python -m benchmarks.bench [--quick] [--only CASE ...] [--rows ROW ...] [--threads N] [--json
    FILE] [--scaling]

Every row is measured in a process of its own, which alternates plain forward and backward passes
with the estimator. A ratio is the median time of the estimator over the median time of the plain
passes of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing here imports torch: only the measuring processes do, so that a child starts small.
CASES = ("mlp", "all_cnn", "resnet18", "gpt2")
RECIPES = ("digits", "mnist", "cifar10")  # of whole calls
ROWS = (
    "sketch",
    "exact",
    "ekfac",
    "backpack-mc",
    "backpack-exact",
    "curvlinops-kfac",
    "curvlinops-ekfac",
    "curvlinops-kfac-exact",
    "curvlinops-ekfac-exact",
    "curvlinops-kfac-converted",
    "curvlinops-ekfac-converted",
    "vmap",
    "reference",
)
HEADER = ("estimator", "ratio", "goal", "no eigh", "seconds", "samples", "memory", "error", "note")
LEGEND = """\
ratio    time over that of plain forward and backward passes on the same batches (medians of
         alternating rounds)
goal     what is aimed at: for EKFAC in the column "no eigh", else in the column "ratio"
no eigh  the ratio without the eigendecompositions
samples  that the row, and the plain passes beside it, were timed on; seconds are for these
memory   peak resident set (VmHWM; CUDA: peak allocation) above that of the plain passes, MiB
error    |d - d*| / |d*| of the diagonal, untrained weights, d* exact in float64 on {error_on}"""

CALLS = """
Whole calls, of networks trained by configs/<recipe>.yaml, each in % of a retraining on the same
machine, whose seconds are its epochs times those of one: forget without 100 random samples; and
once prepared (what is not part of a request), requests of so many random samples"""


def ask(timeout: float, **request: Any) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"fails": f"longer than {timeout:g} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"fails": f"the process ended with {done.returncode}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    goal = "" if row["goal"] is None else f"<= {row['goal']:g}"
    if "fails" in row:
        return (row["title"], "", goal, "", "", "", "", "", f"fails: {row['fails'][:120]}")
    without = row["ratio_without_eigh"]
    return (
        row["title"],
        f"{row['ratio']:,.2f}",
        goal,
        "" if without is None else f"{without:,.2f}",
        f"{row['seconds']:,.2f}",
        str(row["samples"]),
        f"{row['memory_mib']:+,.0f}",
        "" if row["error"] is None else f"{row['error']:.1e}",
        row["note"],
    )


def call(recipe: str, found: dict[str, Any]) -> str:
    """What whole calls of a recipe take."""
    if "fails" in found:
        return f"{recipe}: fails: {found['fails'][:120]}"

    def share(seconds: float) -> str:
        return f"{100 * seconds / found['retraining_s']:.3g} %"

    requests = ", ".join(f"{size}: {share(s)}" for size, s in found["prepared_s"].items())
    return (
        f"{recipe}, {found['samples']:,} samples, {found['epochs']} epochs of training in "
        f"{found['retraining_s']:.3g} s: forget {share(found['forget_s'])}; prepared in "
        f"{share(found['prepare_s'])}, requests of {requests}"
    )


def aligned(cells: tuple[str, ...]) -> str:
    """Cells in columns of a fixed width, so that a row can be printed as soon as it is there."""
    first, *numbers, note = cells
    return f"{first:<40}{''.join(f'{cell:>11}' for cell in numbers)}  {note}".rstrip()


def main() -> None:
    """Measure, print one table a case, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    known = CASES + RECIPES
    parser.add_argument(
        "--only", nargs="+", choices=known, default=known, metavar="CASE", help=", ".join(known)
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; its default if 0")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a row may take")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument(
        "--scaling", action="store_true", help="only: time against the number of samples"
    )
    args = parser.parse_args()
    common = {"threads": args.threads, "quick": args.quick}
    about = ask(args.timeout, task="machine", **common)
    result: dict[str, Any] = {"machine": about, "quick": args.quick}
    print(f"{about['cuda'] or about['cpu']}, {about['threads']} threads, python {about['python']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    if args.scaling:
        found = result["scaling"] = ask(args.timeout, task="scaling", **common)
        network = "the MLP 784-1024-1024-10"
        print(f"\nfisher_forget diagonal, sketch, 1 draw, on {network}, {found['data']}")
        for count, seconds in zip(found["samples"], found["seconds"], strict=True):
            print(
                f"{count:7,d} samples  {seconds:8.2f} s  {1e6 * seconds / count:8.1f} us a sample"
            )
        print(f"seconds ~ samples^{found['exponent']:.2f}")
    else:
        result["cases"], result["calls"] = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for case in (c for c in CASES if c in args.only):
                result["cases"][case] = _case(case, args, common, Path(folder) / f"{case}.pt")
        recipes = [r for r in RECIPES if r in args.only]
        if recipes:
            print(CALLS, flush=True)
        for recipe in recipes:
            found = ask(args.timeout, task="calls", recipe=recipe, **common)
            result["calls"][recipe] = found
            print(call(recipe, found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _case(
    case: str, args: argparse.Namespace, common: dict[str, Any], cache: Path
) -> dict[str, Any]:
    about = ask(args.timeout, task="describe", case=case, **common)
    rows = []
    print(f"\n{about['title']}\n{about['data']}\n{aligned(HEADER)}", flush=True)
    for key in (key for key in args.rows if key in about["rows"]):
        found = ask(args.timeout, task="measure", case=case, row=key, cache=str(cache), **common)
        rows.append({"row": key, **about["rows"][key], **found})
        print(aligned(line(rows[-1])), flush=True)
    print(LEGEND.format(error_on=about["error_on"]), flush=True)
    return {**about, "rows": rows}


if __name__ == "__main__":
    main()
