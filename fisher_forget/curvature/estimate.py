"""estimate_curvature(): one name for every kind of curvature in every structure."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, cast, get_args, overload

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import check_model
from fisher_forget._util.markdown import markdown_table
from fisher_forget.curvature import cost, kinds
from fisher_forget.curvature.cost import Estimate
from fisher_forget.curvature.kinds import EXACT_UP_TO, Kind
from fisher_forget.curvature.operator import Curvature, Info
from fisher_forget.curvature.passes import Accumulator, Walk, default_memory
from fisher_forget.curvature.structures import hessian, mixed
from fisher_forget.curvature.structures.dense import DenseSum, check_size
from fisher_forget.curvature.structures.diagonal import DiagonalSum
from fisher_forget.curvature.structures.ekfac import EkfacSum
from fisher_forget.curvature.structures.low_rank import most_products, top_eigenpairs
from fisher_forget.curvature.structures.matrix_free import MatrixFree
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.split import Indices, Part, Split, resolve_split
from fisher_forget.errors import CurvatureError, SplitError
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.params import detached, size

Structure = Literal["ekfac", "diagonal", "dense", "low_rank", "matrix_free"]
ACCUMULATORS: dict[str, Callable[[Tape], Accumulator]] = {
    "ekfac": EkfacSum,
    "diagonal": DiagonalSum,
    "dense": DenseSum,
}

SUPPORT: dict[tuple[str, str], str | None] = {
    (kind, structure): None
    for kind in get_args(Kind)
    if kind != "auto"
    for structure in get_args(Structure)
}
"""Whether a kind (resolved) can be held in a structure: `None`, or the reason why not."""

SUPPORT["hessian", "ekfac"] = (
    "Kronecker factors are second moments of layer gradients, and the Hessian is no sum of such squares; use "
    "kind='exact' or 'sketch', or structure='diagonal', 'dense' or 'matrix_free'."
)
SUPPORT["hessian", "low_rank"] = (
    "The largest eigenpairs beside a non-negative rest describe a semi-definite operator, and a Hessian may be "
    "indefinite; use kind='exact', or structure='matrix_free' or 'dense'."
)

RANK = 32


def support_table() -> str:
    """`SUPPORT` as a Markdown table, kinds down and structures across, with the reasons as notes
    below."""
    reasons = list(dict.fromkeys(reason for reason in SUPPORT.values() if reason))
    structures = list(dict.fromkeys(structure for _, structure in SUPPORT))
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in SUPPORT):
        cells = [SUPPORT[kind, structure] for structure in structures]
        marks = ["yes" if cell is None else f"no ({reasons.index(cell) + 1})" for cell in cells]
        rows.append([kind, *marks])
    table = markdown_table(["kind", *structures], rows)
    return "\n".join([table, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


@overload
def estimate_curvature(
    model: nn.Module | Tape,
    data: Split | DataLoader[Any] | Dataset[Any],
    likelihood: Likelihood | str = ...,
    *,
    structure: Structure | Mapping[str, Structure] = ...,
    kind: Kind = ...,
    draws: int = ...,
    part: Part | Indices = ...,
    subset: str | tuple[str, ...] | None = ...,
    seed: int = ...,
    rank: int = ...,
    preconditioner: Curvature | None = ...,
    basis: Curvature | None = ...,
    max_samples: int | None = ...,
    memory: int | None = ...,
    progress: bool = ...,
    dry_run: Literal[False] = ...,
) -> Curvature: ...


@overload
def estimate_curvature(
    model: nn.Module | Tape,
    data: Split | DataLoader[Any] | Dataset[Any],
    likelihood: Likelihood | str = ...,
    *,
    structure: Structure | Mapping[str, Structure] = ...,
    kind: Kind = ...,
    draws: int = ...,
    part: Part | Indices = ...,
    subset: str | tuple[str, ...] | None = ...,
    seed: int = ...,
    rank: int = ...,
    preconditioner: Curvature | None = ...,
    basis: Curvature | None = ...,
    max_samples: int | None = ...,
    memory: int | None = ...,
    progress: bool = ...,
    dry_run: Literal[True],
) -> Estimate: ...


def estimate_curvature(
    model: nn.Module | Tape,
    data: Split | DataLoader[Any] | Dataset[Any],
    likelihood: Likelihood | str = "categorical",
    *,
    structure: Structure | Mapping[str, Structure] = "ekfac",
    kind: Kind = "auto",
    draws: int = 1,
    part: Part | Indices = "retain",
    subset: str | tuple[str, ...] | None = None,
    seed: int = 0,
    rank: int = RANK,
    preconditioner: Curvature | None = None,
    basis: Curvature | None = None,
    max_samples: int | None = None,
    memory: int | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Curvature | Estimate:
    r"""Per-sample curvature of the mean loss, B = (1/N) sum_n J_n^T H_n J_n, without weight decay
    or damping.

    J_n is the Jacobian of sample n's outputs with respect to the parameters and H_n the output
    Hessian of its loss; N counts samples, or scored positions where a sample has several. For the
    empirical kind H_n is r_n r_n^T; the Hessian adds sum_k r_nk d^2 f_nk / dw^2, which can make it
    indefinite. `support_table` says what goes with what.

    Args:
        model: In eval mode, float32 or float64. It is copied and never touched. Or a `Tape`, which
            is the private copy of a caller that needs it for more; `subset` then chooses among its
            parameters.
        data: A `Split`, or a loader or data set whose samples all count.
        likelihood: Name or instance.
        structure: `"ekfac"` (Kronecker basis, exact diagonal in it), `"diagonal"`, `"dense"` (small
            models), `"low_rank"` (largest eigenpairs and the mean of the rest), `"matrix_free"`
            (exact products over the data at every use). Or structures by shell pattern of parameter
            names, first match wins: `{"conv*": "diagonal", "*": "ekfac"}`; blocks of different
            patterns are taken as uncorrelated.
        kind: `"exact"`, `"sketch"` (one random column per draw, unbiased), `"sampled"` (Monte-Carlo
            labels), `"empirical"` (true labels), `"hessian"`, or `"auto"`: exact where that needs
            at most 16 columns or no columns at all (low_rank, matrix_free), else sketch.
        draws: Columns a sample for `sketch` and `sampled`. For the diagonal of a Hessian, the
            Rademacher probes z of the estimate z * Hz: entry i has the variance sum_{j != i} H_ij^2
            / draws, so take hundreds.
        part: `"retain"`, `"forget"`, `"all"`, or indices.
        subset: Shell patterns of parameter names; `None` takes every parameter with requires_grad.
        seed: Of everything random. The result does not depend on the batch size.
        rank: Eigenpairs of low_rank.
        preconditioner: For inverses of matrix_free: any curvature of the same parameters, without
            damping.
        basis: For ekfac: take the eigenbases of this EKFAC of the same model instead of estimating
            new ones. One pass is then enough, and the two add up (`merged`, `without`).
        max_samples: Walk through so many samples only, a uniform draw without replacement; the mean
            is over these.
        memory: Bytes that recorded tensors may take at a time. Default: a quarter of the available
            memory, at most 256 MiB. matrix_free and low_rank keep their graphs where all of them
            fit, which makes products faster.
        progress: Show a progress bar.
        dry_run: Time a few samples, and return the predicted cost instead of the curvature.

    Raises:
        ModelError, DataError, NumericalError: If model or data cannot be used; the message says
            what to do.
        SplitError: If the part has no samples.
        CurvatureError: If an option is out of range, kind and structure do not go together, a
            pattern matches nothing or a parameter no pattern, or the structure does not fit the
            model.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> B = estimate_curvature(torch.nn.Linear(3, 2).eval(), data, structure="diagonal")
        >>> sorted(B.diagonal())
        ['bias', 'weight']
        >>> B.info
        Info(count=3.0, kind='exact', structure='diagonal')
    """
    _check_structure(structure, kind)
    for name, value in (
        ("draws", draws),
        ("rank", rank),
        ("max_samples", max_samples),
        ("memory", memory),
    ):
        optional = value is None and name in ("max_samples", "memory")
        if not optional and (
            not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1
        ):
            raise CurvatureError(
                f"{name}={value!r}", "a whole number of at least 1", f"Pass {name}=1 or more."
            )
    check_model(model.model if isinstance(model, Tape) else model)
    split = data if isinstance(data, Split) else resolve_split(data, [], allow_empty=True)
    chosen = _chosen(split, part, max_samples, seed)
    likelihood = resolve_likelihood(likelihood)
    tape = _tape(model, subset)
    if isinstance(structure, Mapping):
        names = list(tape.params)
        groups = mixed.assign(structure, names)
        one = cast(
            Any, estimate_curvature
        )  # each with its own walk: the same samples and random columns
        found = [
            one(
                tape,
                split,
                likelihood,
                structure=own,
                kind=kind,
                draws=draws,
                part=chosen,
                subset=tuple(glob.escape(name) for name in members),
                seed=seed,
                rank=rank,
                preconditioner=preconditioner,
                basis=basis if own == "ekfac" else None,
                memory=memory,
                progress=progress,
                dry_run=dry_run,
            )
            for own, members in groups
        ]
        if dry_run:
            return cast(Estimate, sum(found[1:], found[0]))
        info = replace(found[0].info, structure=mixed.label(structure))
        return replace(mixed.join(groups, found, names), info=info)
    first = next(split.batches(chosen)).on(tape.model)
    outputs = tape.verify(first).outputs
    exact_columns = likelihood.column_count(outputs)
    by_products = structure in ("low_rank", "matrix_free")
    kind = kinds.choose(kind, 0 if by_products else exact_columns)
    if memory is None:
        memory = default_memory(outputs.device)
    walk = Walk(tape, split, chosen, likelihood, kind, draws, seed, memory, progress)
    # the trace of many exact columns costs as many backward passes; one random column a sample is
    # unbiased
    tracing = (
        replace(walk, kind="sketch") if kind == "exact" and exact_columns > EXACT_UP_TO else walk
    )
    if dry_run:
        columns = {"exact": exact_columns, "empirical": 1}.get(kind, draws)
        begun = time.perf_counter()  # again: the first time may have paid for lazy imports
        _tape(model, subset).verify(first)
        prepared = time.perf_counter() - begun
        predicted = _predict(walk, tracing, structure, rank, preconditioner, columns)
        return replace(predicted, seconds=predicted.seconds + prepared)
    if basis is not None:
        if structure != "ekfac":
            raise CurvatureError(
                f"basis= with structure={structure!r}", "structure='ekfac'", "Leave basis= out."
            )
        curvature, count = walk.estimate(EkfacSum(tape, basis))
    else:
        curvature, count = _estimate(walk, tracing, structure, rank, preconditioner)
    return replace(curvature, info=Info(count, kind, structure))


def _tape(model: nn.Module | Tape, subset: str | tuple[str, ...] | None) -> Tape:
    if isinstance(model, Tape):
        return model if subset is None else model.restricted(subset)
    return Tape(model, subset)


def _estimate(
    walk: Walk, tracing: Walk, structure: str, rank: int, preconditioner: Curvature | None
) -> tuple[Curvature, float]:
    """The curvature, and the scored positions that it is the mean over."""
    signed = walk.kind == "hessian"
    if structure in ACCUMULATORS and not signed:
        return walk.estimate(ACCUMULATORS[structure](walk.tape))
    like = detached(walk.tape.params)
    if structure == "low_rank":  # the trace first, before the product keeps its graphs
        trace = tracing.estimate(DiagonalSum(walk.tape))[0].trace()
        product = walk.product()
        estimated = tracing is not walk
        found = top_eigenpairs(
            product, like, rank, trace, seed=walk.seed, trace_estimated=estimated
        )
        return found, product.count
    product = walk.product()
    if structure == "dense":
        return hessian.dense(product, like), product.count
    if structure == "diagonal":
        return hessian.diagonal(product, like, walk.draws, walk.seed), product.count
    operator = MatrixFree(
        product=product, like=like, signed=signed, preconditioner=preconditioner, seed=walk.seed
    )
    return operator, product.count


def _predict(
    walk: Walk,
    tracing: Walk,
    structure: str,
    rank: int,
    preconditioner: Curvature | None,
    columns: int,
) -> Estimate:
    """What `_estimate` would cost."""
    if structure in ACCUMULATORS and walk.kind != "hessian":
        return cost.of_columns(walk, ACCUMULATORS[structure], columns)
    d = size(walk.tape.params)
    each = next(iter(walk.tape.params.values())).element_size()
    if structure == "dense":
        check_size(walk.tape.params)
        predicted = cost.of_products(walk, d, (d * d + 2 * d) * each)
        return replace(
            predicted,
            seconds=predicted.seconds + cost.eigh_seconds(walk, d),
            bytes_peak=predicted.bytes_peak + 3 * d * d * each,
        )
    if structure == "diagonal":
        return cost.of_products(walk, walk.draws, d * each)
    if structure == "matrix_free":
        own = d * each + (preconditioner.nbytes() if preconditioner is not None else 0)
        predicted = cost.of_products(walk, 0, own)
        return replace(predicted, bytes_result=own + cost.kept_bytes(walk))
    rank, most = min(rank, d), most_products(rank, d)
    predicted = cost.of_products(walk, most, (d * rank + rank + d) * each, vectors=most)
    trace = cost.of_columns(tracing, DiagonalSum, columns if tracing is walk else tracing.draws)
    both = predicted + trace
    return replace(both, bytes_result=predicted.bytes_result, columns=trace.columns)


def _check_structure(structure: Structure | Mapping[str, Structure], kind: Kind) -> None:
    """Refuse unknown names and cells of `SUPPORT` that have a reason."""
    if isinstance(structure, Mapping) and not structure:
        raise CurvatureError(
            "an empty structure=", "at least one pattern", "Pass {'*': 'ekfac'}, say."
        )
    kinds.choose(kind, 0)
    for name in structure.values() if isinstance(structure, Mapping) else (structure,):
        if name not in get_args(Structure):
            known = get_args(Structure)
            raise CurvatureError(
                f"structure={name!r}", f"one of {known}", "Pass one of these names."
            )
        if kind != "auto" and (reason := SUPPORT[kind, name]) is not None:
            raise CurvatureError(
                f"kind={kind!r} with structure={name!r}", "a supported pair", reason
            )


def _chosen(split: Split, part: Part | Indices, max_samples: int | None, seed: int) -> Indices:
    """Indices of the samples to walk through."""
    every = split.indices(part) if isinstance(part, str) else part
    if not len(every):
        raise SplitError(
            f"part={part!r} of {split}, without samples",
            "at least one sample",
            "Choose another part.",
        )
    if max_samples is None or max_samples >= len(every):
        return every
    return np.sort(np.random.default_rng(seed).choice(every, max_samples, replace=False))
