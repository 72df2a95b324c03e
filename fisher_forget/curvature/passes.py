"""Walks over the data: columns into an accumulator, pass by pass, or exact products by batch."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fisher_forget._util.isolation import isolated
from fisher_forget._util.progress import bar
from fisher_forget.curvature import kinds
from fisher_forget.curvature.double_backward import (
    hidden_from_hessian,
    hidden_from_products,
    refuse_hidden,
)
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature, Info
from fisher_forget.curvature.options import CurvatureOptions
from fisher_forget.curvature.products import (
    Chunk,
    DataProduct,
    GgnChunk,
    HessianChunk,
)
from fisher_forget.curvature.record import Grads, Record
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.pieces import OUTPUTS
from fisher_forget.data.split import Indices, Split
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params, call, size, zeros_like

MOST = 256 << 20  # bytes of recorded tensors at a time: larger chunks are no faster
REUSED = 128 << 20  # the same where several columns read them: smaller ones are faster then
SHARE = 4  # of the available memory, one part in so many


class Reader(ABC):
    """What reads the columns, pass by pass.

    Attributes:
        passes: How many passes over the data it needs.
        label: What the progress bar calls it.
    """

    passes: int = 1
    label: str = "curvature"

    @abstractmethod
    def add(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        """Read one column of a chunk.

        Args:
            record: The chunk's forward pass.
            column: [N, ...], of the outputs' shape.
            grads: What `record.pull(column)` returned.
            last: Whether it is the chunk's last column.
        """

    def end_pass(self) -> None:  # noqa: B027 - most have nothing to do between passes
        """All samples have been read once more."""


class Accumulator(Reader):
    """What a structure gathers from the columns."""

    @abstractmethod
    def result(self, count: float) -> Curvature:
        """The mean over `count` scored positions."""


@dataclass(frozen=True)
class Walk:
    """Which samples, seen how.

    Attributes:
        tape: Private copy of the model, verified.
        split: The data.
        samples: Indices of the samples.
        likelihood: Of the outputs.
        options: With the kind resolved.
        exact_columns: How many columns the exact kind has.
    """

    tape: Tape
    split: Split
    samples: Indices
    likelihood: Likelihood
    options: CurvatureOptions
    exact_columns: int = 1

    @property
    def kind(self) -> Kind:
        """What is back-propagated."""
        return self.options.kind

    @property
    def columns(self) -> int:
        """Columns a sample; of a Hessian's diagonal, probes."""
        return {"exact": self.exact_columns, "empirical": 1}.get(self.kind, self.options.draws)

    def info(self, count: float, structure: str) -> Info:
        """What is said of a curvature of so many scored positions."""
        random = self.kind in kinds.RANDOM
        drawn = (self.options.draws, self.options.seed) if random else (0, 0)
        return Info(count, self.kind, structure, *drawn)

    @cached_property
    def memory(self) -> int:
        """Bytes that recorded tensors may take at a time."""
        device = next(iter(self.tape.params.values())).device
        return self.options.memory or default_memory(device)

    def like(self) -> Params:
        """Zeros with the parameters' names and shapes: a curvature that is stored holds no
        weights."""
        return zeros_like(self.tape.params)

    def first(self, samples: int) -> Walk:
        """The same walk over its first samples, without a progress bar."""
        quiet = replace(self.options, progress=False, memory=self.memory)
        return replace(self, samples=self.samples[:samples], options=quiet)

    def batches(self) -> Iterator[Batch]:
        """Batches on the model's device."""
        return (batch.on(self.tape.model) for batch in self.split.batches(self.samples))

    def accumulate(self, total: Reader) -> float:
        """Feed every column of every sample to a reader, pass by pass; returns scored positions."""
        count, pass_index, options = 0.0, 0, self.options
        steps: dict[tuple[torch.Size, ...], int] = {}
        while pass_index < total.passes:  # a structure may find that it needs fewer
            label = f"{total.label} {pass_index + 1}/{total.passes}"
            batches = bar(self.batches(), self.split.steps(self.samples), label, options.progress)
            for record in (record for batch in batches for record in self._records(batch, steps)):
                outputs, targets = record.outputs.detach(), record.batch.targets
                self.likelihood.check(outputs, targets)
                if pass_index == 0:
                    count += float(self.likelihood.counts(targets).double().sum())
                streams = record.batch.streams(options.seed)  # the same columns every pass
                columns = kinds.columns(
                    self.kind, self.likelihood, outputs, targets, options.draws, streams
                )
                for column, last in _with_last(columns):
                    grads = record.pull(column)
                    with torch.no_grad():  # sums must not drag the graphs of all chunks along
                        total.add(record, column, grads, last)
                record.close()
            with torch.no_grad():
                total.end_pass()
            pass_index += 1
        return count or 1.0

    def estimate(self, total: Accumulator) -> tuple[Curvature, float]:
        """The structure's curvature, and the scored positions that it is the mean over."""
        count = self.accumulate(total)
        return total.result(count), count

    def check_products(self) -> None:
        """Refuse a model whose products would be wrong.

        Raises:
            CurvatureError: If its backward pass can't be differentiated.
        """
        model, live = self.tape.model, self.tape.params
        batch = self.split.few(self.samples).on(model)
        hidden = hidden_from_products(model, live, batch)
        if not hidden and self.kind == "hessian":
            hidden = hidden_from_hessian(model, live, batch, self.likelihood)
        instead = "Use structure='ekfac', 'diagonal' or 'dense' with a kind other than 'hessian'."
        refuse_hidden(hidden, instead)

    def product(self, keep: bool | None = None) -> DataProduct:
        """v -> B v, exact (for a random kind, for its columns); see `DataProduct` about `keep`."""
        model, live = self.tape.model, self.tape.params

        def build(batch: Batch) -> Chunk:
            outputs = call(model, {}, batch.args, batch.kwargs)
            values = outputs.detach()
            self.likelihood.check(values, batch.targets)
            if self.kind == "hessian":
                return HessianChunk(self.likelihood.losses(outputs, batch.targets).sum(), live)
            streams, draws = batch.streams(self.options.seed), self.options.draws
            weight = kinds.weight(self.kind, self.likelihood, values, batch.targets, draws, streams)
            return GgnChunk(outputs, live, weight)

        return DataProduct(
            model,
            self.batches,
            build,
            self.likelihood,
            memory=self.memory,
            keep=keep,
        )

    @property
    def _several(self) -> bool:
        """Whether a sample has more than one column."""
        return self.options.draws > 1 or self.kind == "exact"

    @property
    def chunk_bytes(self) -> int:
        """Bytes of recorded tensors at a time."""
        return min(self.memory, REUSED) if self._several else self.memory

    def recorded_bytes(self, batch: Batch) -> int:
        """Bytes that one sample's recorded tensors take: inputs, outputs, gradients, graph; stray
        parameters' rows; the model's outputs and columns.

        Where several columns follow each other, also what layers keep for all of them.
        """
        probe = self.tape.run(next(batch.chunks(1)))
        # input, output, its gradient and the graph are about as large as the input each
        recorded = sum(u.a.numel() * u.a.element_size() for u in probe.uses) * 4
        if self._several:
            for use, g in zip(probe.uses, probe.pull(torch.ones_like(probe.outputs)), strict=True):
                shared = None if g is None else use.layer.rule.shared(use.a, g)
                recorded += 0 if shared is None else shared.numel() * shared.element_size()
        # rows of stray parameters: the gradient and its square
        stray = size({name: self.tape.params[name] for name in self.tape.stray})
        outputs = probe.outputs.numel() * probe.outputs.element_size()
        return max(recorded + stray * 8 + OUTPUTS * outputs, 1)

    def _records(self, batch: Batch, steps: dict[tuple[torch.Size, ...], int]) -> Iterator[Record]:
        """Forward passes over chunks that fit the memory; `steps` has sizes by sample shape."""
        shape = batch.sample_shapes()
        if shape not in steps:
            steps[shape] = max(1, self.chunk_bytes // self.recorded_bytes(batch))
        yield from (self.tape.run(chunk) for chunk in batch.chunks(steps[shape]))


class _NormSum(Reader):
    """Accumulates the squared gradient norms of samples, in the order of the walk."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def add(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        self.norms.append(record.squared_norms(column, grads).cpu())


@isolated()
def squared_gradient_norms(
    tape: Tape, split: Split, indices: Indices, likelihood: Likelihood, *, memory: int | None = None
) -> Tensor:
    """|d l_n / dw|^2 of every sample [len(indices)], float64 on the CPU.

    l_n is the loss of sample n summed over its positions, w the parameters of the tape. It takes
    one forward and one backward pass over the samples; a Linear layer at one position forms no
    gradient, |g a^T|^2 = |g|^2 |a|^2.

    Args:
        tape: The model; rules that fail on a few samples are moved to its fallback.
        split: The data.
        indices: Of the samples.
        likelihood: Gives the loss.
        memory: Bytes that recorded tensors may take at a time; see `estimate_curvature`.

    Raises:
        ModelError, DataError: If the model or the data cannot be used.
    """
    if not len(indices):
        return torch.zeros(0, dtype=torch.float64)
    tape.verify(split.few(indices).on(tape.model))
    # the empirical kind's one column a sample is dl_n/df_n, which back-propagates to dl_n/dw
    options = CurvatureOptions(kind="empirical", memory=memory)
    walk = Walk(tape, split, indices, likelihood, options)

    def norms() -> Tensor:
        total = _NormSum()
        walk.accumulate(total)
        return torch.cat(total.norms)

    return tape.settled(norms)


def default_memory(device: torch.device) -> int:
    """A quarter of the device's available memory, at most `MOST` bytes."""
    if device.type == "cuda":
        return int(min(torch.cuda.mem_get_info(device)[0] // SHARE, MOST))
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return MOST
    return max(1, min(available // SHARE, MOST))


def _with_last(columns: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each column, and whether it is the chunk's last."""
    held = next(columns, None)
    while held is not None:
        following = next(columns, None)
        yield held, following is None
        held = following
