"""One measurement in a process of its own: `python -m benchmarks.measure '{"case": ..., "row":
...}'` prints JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import sys
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks import calls
from benchmarks.cases import CASES, Case, mnist, plain
from benchmarks.estimators import (
    ESTIMATORS,
    REFERENCE_BACKWARDS,
    eigendecompositions,
    relative_error,
    synchronise,
)
from fisher_forget import estimate_curvature
from fisher_forget.params import Params

ROUNDS = 3
QUICK = 0.25  # part of the samples
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SIZES = (1_000, 4_000, 16_000, 60_000)
PACKAGES = ("torch", "numpy", "backpack-for-pytorch", "curvlinops-for-pytorch", "transformers")


def measure(case: Case, row: str, *, quick: bool, cache: Path) -> dict[str, Any]:
    """Time, memory and error of one estimator on one case.

    plain, estimator, plain, estimator, ... after a warm-up of both. Memory is the peak of the first
    estimate above the peak of the plain passes before it.
    """
    estimator, device = (
        ESTIMATORS[row],
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    samples = max(
        case.batch_size // 4, int(case.samples * (QUICK if quick else 1) * estimator.share)
    )
    data = case.data(samples, case.batch_size).to(device)
    model = case.build().to(device)
    run = estimator.prepare(model)
    plain(model, data)
    run(data)
    times: dict[str, list[float]] = {"plain": [], "estimator": [], "eigh": []}
    peaks: list[int] = []
    for repeat in range(ROUNDS):
        reset_peak()
        times["plain"].append(_seconds(lambda: plain(model, data)))
        if repeat == 0:
            peaks.append(peak())
            reset_peak()
        with eigendecompositions() as spent:
            times["estimator"].append(_seconds(lambda: run(data)))
        times["eigh"].append(math.fsum(spent))
        if repeat == 0:
            peaks.append(peak())
    factor = 1.0
    if estimator.complete is not None:
        factor = data.y.numel() * case.classes / REFERENCE_BACKWARDS
    base, whole = statistics.median(times["plain"]), factor * statistics.median(times["estimator"])
    apart = statistics.median(
        [t - e for t, e in zip(times["estimator"], times["eigh"], strict=True)]
    )
    return {
        "samples": samples,
        "data": data.note,
        "plain_s": base,
        "seconds": whole,
        "ratio": whole / base,
        "ratio_without_eigh": factor * apart / base if any(times["eigh"]) else None,
        "eigh_s": statistics.median(times["eigh"]),
        "memory_mib": (peaks[1] - peaks[0]) / 2**20,
        "error": _error(case, row, cache),
        "rounds": times,
    }


def _seconds(work: Any) -> float:
    synchronise()
    start = perf_counter()
    work()
    synchronise()
    return perf_counter() - start


def reset_peak() -> None:
    """Begin anew, where that is possible."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets VmHWM, the peak resident set (Linux, proc(5))


def peak() -> int:
    """Bytes since `reset_peak`; where that is not possible, since the start of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if CLEAR_REFS.exists():
        lines = STATUS.read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _error(case: Case, row: str, cache: Path) -> float | None:
    """Relative L2 error of the diagonal on a few samples, in float32 against the exact one in
    float64."""
    estimator = ESTIMATORS[row]
    if estimator.complete is not None and case.classes > 100:
        return None
    data = case.error_data()
    model = case.build()
    run = (estimator.complete or estimator.prepare)(model)
    found = run(data)()
    return relative_error(found, _truth(case, cache)) if found else None


def _truth(case: Case, cache: Path) -> Params:
    """The exact diagonal in float64, or where that is too long the mean of many sketches; kept for
    the next row."""
    if not cache.exists():
        data = case.error_data().to(torch.device("cpu"), torch.float64)
        draws = case.reference_draws
        kind: Any = "sketch" if draws else "exact"
        model = case.build().double()
        options: dict[str, Any] = {
            "structure": "diagonal",
            "kind": kind,
            "draws": max(draws, 1),
            "seed": 1,
        }
        torch.save(estimate_curvature(model, data.loader(), **options).diagonal(), cache)
    found: Params = torch.load(cache)
    return found


def scaling(sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Seconds of the sketched diagonal of the MLP on growing parts of MNIST, and the exponent of a
    fitted power law."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = CASES["mlp"]
    model = case.build().to(device)
    data = mnist(max(sizes), case.batch_size).to(device)
    run = ESTIMATORS["sketch"].prepare(model)
    run(data.first(2 * case.batch_size))
    seconds = [
        min(_seconds(lambda n=n: run(data.first(n))) for _ in range(2 if n <= 20_000 else 1))
        for n in sizes
    ]
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    return {"data": data.note, "samples": list(sizes), "seconds": seconds, "exponent": exponent}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in info.open() if line.startswith("model name")),
            cpu,
        )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def describe(name: str) -> dict[str, Any]:
    """What the table says about a case, and its rows."""
    case = CASES[name]
    few = case.error_data()
    error_on = f"{len(few)} samples" + (
        f" of {case.error_tokens} tokens" if case.error_tokens else ""
    )
    if case.reference_draws:
        error_on += f" (not exact here: the mean of {case.reference_draws} sketches)"
    rows = {
        key: {"title": row.title, "note": row.note, "goal": case.goals.get(key)}
        for key, row in ESTIMATORS.items()
        if name in row.cases
    }
    return {
        "title": case.title,
        "data": f"{case.samples:,} samples, batch {case.batch_size}, {few.note}",
        "error_on": error_on,
        "rows": rows,
    }


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request of the driver."""
    torch.set_num_threads(request["threads"] or torch.get_num_threads())
    torch.manual_seed(0)  # BackPACK draws its labels from the global state
    if request["task"] == "machine":
        return machine()
    if request["task"] == "describe":
        return describe(request["case"])
    if request["task"] == "scaling":
        return scaling(tuple(n for n in SIZES if n <= 16_000 or not request["quick"]))
    try:
        if request["task"] == "calls":
            return calls.measure(request["recipe"], quick=request["quick"])
        return measure(
            CASES[request["case"]],
            request["row"],
            quick=request["quick"],
            cache=Path(request["cache"]),
        )
    except Exception as error:  # a peer may fail in any way; the table says how
        traceback.print_exc()
        reason = (str(error).strip() or "no message").splitlines()[0]
        return {"fails": f"{type(error).__name__}: {reason}"}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    print(json.dumps(main(json.loads(sys.argv[1]))))
