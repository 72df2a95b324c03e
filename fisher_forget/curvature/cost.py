"""What an estimate will cost, from timing a few samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fisher_forget.curvature.passes import Accumulator, Walk
from fisher_forget.curvature.structures.dense import DenseSum
from fisher_forget.curvature.structures.ekfac import REPLAY_BYTES, EkfacSum
from fisher_forget.curvature.tape import Tape
from fisher_forget.params import flatten, randn_like, size

FEW = 8  # samples of the first look
LONG = 0.2  # seconds: where a batch would take longer, it is extrapolated from few samples
CERTAIN = 0.1  # seconds: a shorter time is taken twice
EIGH = 512  # side of the largest eigenproblem that is timed; others scale with the third power


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of `estimate_curvature`.

    Attributes:
        seconds: Wall time on this machine; an upper bound for low_rank, which stops when it has
            converged.
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

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other, both results held."""
        return Estimate(
            self.seconds + other.seconds,
            self.bytes_result + other.bytes_result,
            max(self.bytes_peak + other.bytes_result, self.bytes_result + other.bytes_peak),
            max(self.samples, other.samples),
            self.passes + other.passes,
            max(self.columns, other.columns),
        )


def of_columns(walk: Walk, build: Callable[[Tape], Accumulator], columns: int) -> Estimate:
    """Cost of feeding columns to a structure; eigendecompositions are left out of the run and added
    by their size."""
    total = build(walk.tape)
    sides: list[int] = []
    samples, replays, bytes_result = len(walk.chosen), True, 0

    def skipped(moment: torch.Tensor) -> torch.Tensor:
        sides.append(len(moment))
        return moment

    def run(n: int) -> float:
        nonlocal total, sides, replays, bytes_result
        begun = time.perf_counter()
        sides = []
        total = (
            EkfacSum(walk.tape, decompose=skipped, replay=replays)
            if build is EkfacSum
            else build(walk.tape)
        )
        count = walk.first(n).accumulate(total)
        if not isinstance(total, DenseSum):
            bytes_result = total.result(count).nbytes()
        if isinstance(total, EkfacSum) and replays:
            replays = (
                total.remembered / n * samples <= REPLAY_BYTES
            )  # from the first look on, as with all samples
        return time.perf_counter() - begun

    seconds = _extrapolate(run, walk) + sum(eigh_seconds(walk, side) for side in sides)
    d, each = size(walk.tape.params), _itemsize(walk)
    recorded = walk.recorded_bytes(next(walk.batches()))
    peak = d * each + max(
        recorded, min(recorded * min(walk.split.batch_size, samples), walk.chunk_bytes)
    )
    if isinstance(total, DenseSum):
        bytes_result = (d * d + 2 * d) * each
        seconds += eigh_seconds(walk, d)
        peak += 3 * bytes_result
    if isinstance(total, EkfacSum) and replays:
        peak += int(total.remembered / min(samples, 2 * walk.split.batch_size) * samples)
    return Estimate(seconds, bytes_result, peak + 2 * bytes_result, samples, total.passes, columns)


def of_products(walk: Walk, products: int, bytes_result: int, vectors: int = 0) -> Estimate:
    """Cost of so many products over the data.

    Args:
        walk: The data.
        products: How many.
        bytes_result: Of the result's tensors, kept graphs excluded.
        vectors: Vectors of the parameters' size that are orthogonalised against each other on the
            way.
    """
    samples = len(walk.chosen)
    probe = walk.first(FEW).product(keep=False)
    kept = samples * probe.sample_bytes <= max(walk.memory, probe.sample_bytes)
    v = randn_like(walk.tape.params, torch.Generator().manual_seed(0))

    def build(n: int) -> float:
        begun = time.perf_counter()
        walk.first(n).product(keep=kept)
        return time.perf_counter() - begun

    def apply(n: int) -> float:
        product = walk.first(n).product(keep=kept)
        product(v)
        begun = time.perf_counter()
        product(v)
        return time.perf_counter() - begun

    d, each = size(walk.tape.params), _itemsize(walk)
    seconds = _extrapolate(build, walk) + 2 * vectors**2 * _dot_seconds(walk)
    if products:
        seconds += products * _extrapolate(apply, walk)
    graph = probe.sample_bytes * samples if kept else min(probe.sample_bytes * samples, walk.memory)
    peak = bytes_result + graph + (3 + vectors) * d * each
    return Estimate(seconds, bytes_result, peak, samples, max(products, 1), 0)


def kept_bytes(walk: Walk) -> int:
    """Bytes of the graphs that a product over the walk keeps."""
    each = walk.first(1).product(keep=False).sample_bytes
    samples = len(walk.chosen)
    return each * samples if samples <= max(1, walk.memory // each) else 0


def eigh_seconds(walk: Walk, side: int) -> float:
    """Time of the eigendecomposition of a symmetric matrix, on the model's device and in its
    type."""
    k = min(side, EIGH)
    first = next(iter(walk.tape.params.values()))
    a = torch.randn(k, k, dtype=first.dtype, generator=torch.Generator().manual_seed(0)).to(
        first.device
    )
    begun = time.perf_counter()
    float(torch.linalg.eigh(a + a.T)[0][0])
    return (time.perf_counter() - begun) * (side / k) ** 3


def _extrapolate(run: Callable[[int], float], walk: Walk) -> float:
    """Fixed and marginal time from two runs that differ by a batch, or by few samples where a batch
    takes long."""
    total = len(walk.chosen)
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
    taken = run(samples)
    return taken if taken > CERTAIN else min(taken, run(samples))


def _dot_seconds(walk: Walk) -> float:
    """Time of one of the inner products of an orthogonalisation, measured on a block of them."""
    v = flatten({name: p.detach() for name, p in walk.tape.params.items()})
    block = v.expand(16, -1).contiguous()
    begun = time.perf_counter()
    float((block @ v)[0])
    return (time.perf_counter() - begun) / 16


def _itemsize(walk: Walk) -> int:
    return next(iter(walk.tape.params.values())).element_size()
