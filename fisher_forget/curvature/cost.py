"""What an estimate will cost, from timing a few samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fisher_forget.curvature.passes import Accumulator, Walk
from fisher_forget.params import flatten, randn_like, size

FEW = 8  # samples of the first look
LONG = 0.2  # seconds: where a batch would take longer, it is extrapolated from few samples
CERTAIN = 0.1  # seconds: a shorter time is taken twice
EIGH = 512  # side of the largest eigenproblem that is timed; others scale with the third power


@dataclass(frozen=True)
class CostEstimate:
    """The predicted cost of `estimate_curvature`.

    Attributes:
        seconds: Wall time on this machine; of low_rank an upper bound, as it may converge early.
        bytes_result: Bytes of the result's tensors, exact where no graph is kept.
        bytes_peak: Bytes held at the worst moment: result, sums, recorded tensors and graphs, copy
            of the model. What single operations need while they run (unfolded convolutions,
            eigendecompositions) comes on top.
        samples: How many samples are walked through.
        passes: How often; at most, for low_rank.
        columns: Backward passes a sample and pass; 0 where products are used.
    """

    seconds: float
    bytes_result: int
    bytes_peak: int
    samples: int
    passes: int
    columns: int

    def __add__(self, other: CostEstimate) -> CostEstimate:
        """One after the other, both results held."""
        return CostEstimate(
            self.seconds + other.seconds,
            self.bytes_result + other.bytes_result,
            max(self.bytes_peak + other.bytes_result, self.bytes_result + other.bytes_peak),
            max(self.samples, other.samples),
            self.passes + other.passes,
            max(self.columns, other.columns),
        )


def of_columns(
    walk: Walk, build: Callable[[], Accumulator], bytes_result: int | None = None
) -> CostEstimate:
    """Cost of feeding columns to a structure.

    Args:
        walk: The data.
        build: Makes an empty accumulator.
        bytes_result: Of the result's tensors; `None` makes a result of a few samples to see.
    """
    samples, total = len(walk.samples), build()

    def run(n: int) -> float:
        nonlocal total, bytes_result
        begun = time.perf_counter()
        total = build()
        count = walk.first(n).accumulate(total)
        if bytes_result is None:
            bytes_result = total.result(count).nbytes()
        return time.perf_counter() - begun

    seconds = _extrapolate(run, walk)
    recorded = walk.recorded_bytes(walk.split.first(walk.samples).on(walk.tape.model))
    at_once = min(recorded * min(walk.split.batch_size, samples), walk.chunk_bytes)
    # the copy of the model, one chunk, the sums and the result made of them
    result = bytes_result or 0
    peak = size(walk.tape.params) * itemsize(walk) + max(recorded, at_once) + 2 * result
    return CostEstimate(seconds, result, peak, samples, total.passes, walk.columns)


def of_products(walk: Walk, products: int, bytes_result: int, vectors: int = 0) -> CostEstimate:
    """Cost of so many products over the data.

    Args:
        walk: The data.
        products: How many.
        bytes_result: Of the result's tensors, kept graphs excluded.
        vectors: Vectors of the parameters' size that are orthogonalised against each other.
    """
    samples = len(walk.samples)
    each = _sample_bytes(walk)
    kept = samples * each <= walk.memory
    v = randn_like(walk.tape.params, torch.Generator().manual_seed(0))

    def build(n: int) -> float:
        begun = time.perf_counter()
        walk.first(n).product(keep=kept)
        return time.perf_counter() - begun

    def apply(n: int) -> float:
        product = walk.first(n).product(keep=kept)
        begun = time.perf_counter()
        product(v)
        return time.perf_counter() - begun

    # each vector is orthogonalised twice against all before it: 2 sum_k 2k inner products or so
    seconds = _extrapolate(build, walk) + 2 * vectors**2 * _dot_seconds(walk)
    if products:
        seconds += products * _extrapolate(apply, walk)
    graph = each * samples if kept else min(each * samples, walk.memory)
    peak = bytes_result + graph + (3 + vectors) * size(walk.tape.params) * itemsize(walk)
    return CostEstimate(seconds, bytes_result, peak, samples, max(products, 1), 0)


def kept_bytes(walk: Walk) -> int:
    """Bytes of the graphs that a product over the walk keeps."""
    needed = _sample_bytes(walk) * len(walk.samples)
    return needed if needed <= walk.memory else 0


def _sample_bytes(walk: Walk) -> int:
    """Bytes of the graph of one sample."""
    return walk.first(1).product(keep=False).needed


def eigh_seconds(walk: Walk, side: int) -> float:
    """Time of an eigendecomposition of a symmetric matrix, on the model's device, in its type."""
    k = min(side, EIGH)
    first = next(iter(walk.tape.params.values()))
    a = torch.randn(k, k, dtype=first.dtype, generator=torch.Generator().manual_seed(0))
    a = a.to(first.device)
    begun = time.perf_counter()
    float(torch.linalg.eigh(a + a.T)[0][0])
    return (time.perf_counter() - begun) * (side / k) ** 3


def itemsize(walk: Walk) -> int:
    """Bytes of one number."""
    return next(iter(walk.tape.params.values())).element_size()


def _extrapolate(run: Callable[[int], float], walk: Walk) -> float:
    """Fixed and marginal time from two runs: a batch apart, or less where a batch takes long."""
    total = len(walk.samples)
    few = min(FEW, total)
    run(few)  # the first one pays for caches and allocations
    quick = run(few) * walk.split.batch_size / few < LONG
    low = min(walk.split.batch_size if quick else few, total)
    high = min(2 * low, total)
    first = _timed(run, low)
    if high == low:
        return first
    slope = max(_timed(run, high) - first, 0.0) / (high - low)
    return first + slope * (total - low)


def _timed(run: Callable[[int], float], samples: int) -> float:
    """The shorter of two, where other work on the machine may have spoilt one."""
    taken = run(samples)
    return taken if taken > CERTAIN else min(taken, run(samples))


def _dot_seconds(walk: Walk) -> float:
    """Time of one of the inner products of an orthogonalisation, measured on a block of them."""
    v = flatten({name: p.detach() for name, p in walk.tape.params.items()})
    block = v.expand(16, -1).contiguous()
    begun = time.perf_counter()
    float((block @ v)[0])
    return (time.perf_counter() - begun) / 16
