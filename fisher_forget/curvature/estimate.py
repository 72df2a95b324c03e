"""estimate_curvature(): walks the data once per pass, and feeds a structure the columns that a kind yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget.checks import check_model
from fisher_forget.curvature import kinds
from fisher_forget.curvature.dense import DenseSum
from fisher_forget.curvature.diagonal import DiagonalSum
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.kronecker import EkfacSum
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.tape import Record, Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Part, Split, resolve
from fisher_forget.errors import CurvatureError
from fisher_forget.likelihood import Likelihood
from fisher_forget.likelihood import resolve as resolve_likelihood
from fisher_forget.params import size
from fisher_forget.progress import bar

Structure = Literal["ekfac", "diagonal", "dense"]
MEMORY = 256 << 20  # bytes of recorded activations and per-sample gradients at a time


class Accumulator(Protocol):
    """What a structure gathers from the columns."""

    passes: int

    def add(self, record: Record, column: Tensor, grads: Sequence[Tensor | None], last: bool) -> None: ...

    def end_pass(self) -> None: ...

    def result(self, count: float) -> Curvature: ...


STRUCTURES: dict[str, Callable[[Tape], Accumulator]] = {"ekfac": EkfacSum, "diagonal": DiagonalSum, "dense": DenseSum}


def estimate_curvature(
    model: nn.Module,
    data: Split | DataLoader[Any] | Dataset[Any],
    likelihood: Likelihood | str = "categorical",
    *,
    structure: Structure = "ekfac",
    kind: Kind = "auto",
    draws: int = 1,
    part: Part | Indices = "retain",
    subset: str | tuple[str, ...] | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: bool = False,
) -> Curvature:
    r"""Per-sample curvature of the mean loss, B = (1/N) sum_n J_n^T H_n J_n, without weight decay or damping.

    J_n is the Jacobian of sample n's outputs with respect to the parameters and H_n the output Hessian of its loss;
    N counts samples, or scored positions where a sample has several. For the empirical kind H_n is r_n r_n^T.

    Args:
        model: In eval mode, float32 or float64. It is copied and never touched.
        data: A `Split`, or a loader or data set whose samples all count.
        likelihood: Name or instance.
        structure: `"ekfac"` (Kronecker basis, exact diagonal in it), `"diagonal"`, or `"dense"` (small models).
        kind: `"exact"`, `"sketch"` (one random column per draw, unbiased), `"sampled"` (Monte-Carlo labels),
            `"empirical"` (true labels), or `"auto"`: exact where that needs at most 16 columns, else sketch.
        draws: Columns a sample for `sketch` and `sampled`.
        part: `"retain"`, `"forget"`, `"all"`, or indices.
        subset: Shell patterns of parameter names; `None` takes every parameter with requires_grad.
        seed: Of the random kinds. The result does not depend on the batch size.
        memory: Bytes that recorded activations may take at a time.
        progress: Show a progress bar.

    Raises:
        ModelError, DataError, NumericalError: If model or data cannot be used; the message says what to do.
        CurvatureError: If kind or structure is unknown, or the structure does not fit the model.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> B = estimate_curvature(torch.nn.Linear(3, 2).eval(), data, structure="diagonal")
        >>> sorted(B.diagonal())
        ['bias', 'weight']
    """
    if structure not in get_args(Structure):
        raise CurvatureError(f"structure={structure!r}", f"one of {get_args(Structure)}", "Pass one of these names.")
    if draws < 1:
        raise CurvatureError(f"draws={draws}", "at least 1", "Pass draws=1 or more.")
    split = data if isinstance(data, Split) else resolve(data, [], allow_empty=True)
    likelihood = resolve_likelihood(likelihood)
    check_model(model)
    tape = Tape(model, subset)
    first = next(split.batches(part)).on(tape.model)
    tape.verify(first)
    kind = kinds.choose(kind, likelihood.column_count(tape.run(next(first.chunks(1))).outputs))
    total = STRUCTURES[structure](tape)
    count = 0.0
    pass_index = 0
    while pass_index < total.passes:  # a structure may find that it needs fewer
        generator = torch.Generator().manual_seed(seed)
        steps = bar(split.batches(part), split.steps(part), f"curvature {pass_index + 1}/{total.passes}", progress)
        for batch in steps:
            for record in _records(tape, batch.on(tape.model), memory):
                outputs, targets = record.outputs.detach(), record.batch.targets
                likelihood.check(outputs, targets)
                if pass_index == 0:
                    count += float(likelihood.counts(targets).double().sum())
                for column, last in _with_last(kinds.columns(kind, likelihood, outputs, targets, draws, generator)):
                    total.add(record, column, record.pull(column), last)
        total.end_pass()
        pass_index += 1
    return total.result(max(count, 1.0))


def _records(tape: Tape, batch: Batch, memory: int) -> Iterator[Record]:
    """Forward passes over chunks whose recorded tensors fit the memory."""
    probe = tape.run(next(batch.chunks(1)))
    recorded = sum(u.a.numel() * u.a.element_size() for u in probe.uses) * 4  # inputs, outputs, gradients, graph
    stray = size({name: tape.params[name] for name in tape.stray}) * 8
    yield from (tape.run(chunk) for chunk in batch.chunks(max(1, memory // max(recorded + stray, 1))))


def _with_last(columns: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each column, and whether it is the chunk's last."""
    held = next(columns, None)
    while held is not None:
        following = next(columns, None)
        yield held, following is None
        held = following
