"""estimate_curvature(): one name for every kind of curvature in every structure."""

from __future__ import annotations

import glob
import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import check_model, check_names
from fisher_forget._util.isolation import isolated
from fisher_forget._util.markdown import markdown_table
from fisher_forget.curvature import kinds
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.options import CurvatureOptions
from fisher_forget.curvature.passes import Walk
from fisher_forget.curvature.structures import STRUCTURES, Structure, mixed
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.settle import settled_likelihood
from fisher_forget.data.split import Indices, Part, Split, check_scored, resolve_split, some
from fisher_forget.errors import CurvatureError, SplitError
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.params import first_call

__all__ = ["CurvatureKeywords", "Structure", "estimate_curvature", "support", "support_table"]

Data = Split | DataLoader[Any] | Dataset[Any]


class CurvatureKeywords(TypedDict, total=False):
    """The fields of `CurvatureOptions` as keyword arguments, for type checkers."""

    structure: Structure | Mapping[str, Structure]
    kind: Kind
    draws: int
    part: Part | Indices
    subset: str | tuple[str, ...] | None
    seed: int
    rank: int
    preconditioner: Curvature | None
    basis: Curvature | None
    max_samples: int | None
    memory: int | None
    progress: bool


def support() -> dict[tuple[str, str], str | None]:
    """Whether a kind (resolved) can be held in a structure: `None`, or the reason why not."""
    resolved = [kind for kind in get_args(Kind) if kind != "auto"]
    return {(k, name): spec.refused.get(k) for k in resolved for name, spec in STRUCTURES.items()}


def support_table() -> str:
    """`support` as a Markdown table, kinds down, structures across, reasons as notes below."""
    cells = support()
    reasons = list(dict.fromkeys(reason for reason in cells.values() if reason))
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in cells):
        row = [cells[kind, structure] for structure in STRUCTURES]
        marks = ["yes" if cell is None else f"no ({reasons.index(cell) + 1})" for cell in row]
        rows.append([kind, *marks])
    table = markdown_table(["kind", *STRUCTURES], rows)
    return "\n".join([table, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


@overload
def estimate_curvature(
    model: nn.Module | Tape,
    data: Data,
    likelihood: Likelihood | str = ...,
    *,
    dry_run: Literal[False] = ...,
    **options: Unpack[CurvatureKeywords],
) -> Curvature: ...


@overload
def estimate_curvature(
    model: nn.Module | Tape,
    data: Data,
    likelihood: Likelihood | str = ...,
    *,
    dry_run: Literal[True],
    **options: Unpack[CurvatureKeywords],
) -> CostEstimate: ...


@isolated()
def estimate_curvature(
    model: nn.Module | Tape,
    data: Data,
    likelihood: Likelihood | str = "categorical",
    *,
    dry_run: bool = False,
    **options: Unpack[CurvatureKeywords],
) -> Curvature | CostEstimate:
    r"""Curvature of the mean loss, B = (1/N) sum_n J_n^T H_n J_n, without weight decay or damping.

    J_n is the Jacobian of sample n's outputs with respect to the parameters and H_n the output
    Hessian of its loss; N counts samples, or scored positions where a sample has several. For the
    empirical kind H_n is r_n r_n^T; the Hessian adds sum_k r_nk d^2 f_nk / dw^2, which can make it
    indefinite. `support_table` says what goes with what.

    Args:
        model: In eval mode, float32 or float64. It is copied and never touched. Or a `Tape`, which
            is the private copy of a caller that needs it for more; `subset` then chooses among its
            parameters.
        data: A `Split`, or a loader or data set whose samples all count.
        likelihood: Name or instance. A name gives way to the loss that a model which takes `labels`
            has itself; an instance is taken at its word.
        dry_run: Time a few samples, and return the predicted cost instead of the curvature.
        **options: See below.

    Keyword Args:
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
        seed: Of everything random. A random column is a function of (seed, index of the sample in
            the data set, draw, position), so that the result does not depend on the batches, and
            estimates of parts add up to that of the whole (`merged`, `without`).
        rank: Eigenpairs of low_rank.
        preconditioner: For inverses of matrix_free: a curvature of these parameters, undamped.
        basis: For ekfac: take the eigenbases of this EKFAC of the same model instead of estimating
            new ones. One pass is then enough, and the two add up (`merged`, `without`).
        max_samples: Walk through so many samples only, drawn uniformly without replacement.
        memory: Bytes that recorded tensors may take at a time. Default: a quarter of the available
            memory, at most 256 MiB. matrix_free and low_rank keep their graphs where all of them
            fit, which makes products faster.
        progress: Show a progress bar.

    Raises:
        ModelError, DataError, NumericalError: If model or data cannot be used; says what to do.
        SplitError: If the part has no samples.
        CurvatureError: If an option is out of range, kind and structure do not go together, a
            pattern matches nothing or a parameter no pattern, the structure does not fit the
            model, or products are needed and its backward pass can't be differentiated.

    Example:
        >>> import torch
        >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> B = estimate_curvature(torch.nn.Linear(3, 2).eval(), data, structure="diagonal")
        >>> sorted(B.diagonal())
        ['bias', 'weight']
        >>> B.info
        Info(count=3.0, kind='exact', structure='diagonal', draws=0, seed=0)
    """
    check_names(options, CurvatureKeywords.__annotations__)
    settings = CurvatureOptions(**options)
    _check_structure(settings)
    check_model(model.model if isinstance(model, Tape) else model)
    split = data if isinstance(data, Split) else resolve_split(data, [], allow_empty=True)
    settings = replace(settings, part=_samples(split, settings))
    if not isinstance(model, Tape):
        tape = Tape(model, settings.subset)
        if isinstance(likelihood, str):
            likelihood = settled_likelihood(tape.model, split, likelihood)
        else:  # which has looked at a batch
            first = next(split.batches(settings.part)).on(tape.model)
            with torch.no_grad():
                first_call(tape.model, first.args, first.kwargs)
        check_scored(split, likelihood, [settings.part])
    else:
        tape = model if settings.subset is None else model.restricted(settings.subset)
    likelihood = resolve_likelihood(likelihood)
    if isinstance(settings.structure, Mapping):
        return _mixed(tape, split, likelihood, settings, dry_run)
    spec, walk = STRUCTURES[settings.structure], _walk(tape, split, likelihood, settings)
    if dry_run:
        return tape.settled(partial(spec.cost, walk))
    curvature, count = tape.settled(partial(spec.estimate, walk))
    return replace(curvature, info=walk.info(count, spec.name))


def _walk(tape: Tape, split: Split, likelihood: Likelihood, options: CurvatureOptions) -> Walk:
    """The verified tape, and the kind resolved."""
    assert isinstance(options.structure, str)
    assert not isinstance(options.part, str)
    spec = STRUCTURES[options.structure]
    outputs = tape.verify(split.few(options.part).on(tape.model)).outputs
    columns = likelihood.column_count(outputs)
    kind = kinds.choose(options.kind, 0 if spec.by_products else columns)
    walk = Walk(tape, split, options.part, likelihood, replace(options, kind=kind), columns)
    if spec.by_products or kind == "hessian":
        walk.check_products()
    return walk


def _mixed(
    tape: Tape, split: Split, likelihood: Likelihood, options: CurvatureOptions, dry_run: bool
) -> Curvature | CostEstimate:
    """Each group of parameters by a walk of its own: the same samples and random columns."""
    assert isinstance(options.structure, Mapping)
    groups, parts = mixed.assign(options.structure, list(tape.params)), []
    for structure, names in groups:
        spec = STRUCTURES[structure]
        basis = options.basis if spec.takes_basis else None
        group = tape.restricted(tuple(glob.escape(name) for name in names))
        single = replace(options, structure=structure, subset=None, basis=basis)
        parts.append((spec, _walk(group, split, likelihood, single)))
    if dry_run:
        costs = (walk.tape.settled(partial(spec.cost, walk)) for spec, walk in parts)
        return reduce(operator.add, costs)
    estimates = [walk.tape.settled(partial(spec.estimate, walk)) for spec, walk in parts]
    joined = mixed.join(groups, [curvature for curvature, _ in estimates], list(tape.params))
    label = ", ".join(f"{pattern}: {name}" for pattern, name in options.structure.items())
    return replace(joined, info=parts[0][1].info(estimates[0][1], label))


def _check_structure(options: CurvatureOptions) -> None:
    """Refuse unknown names, kinds that a structure can't hold, and bases for one that has none."""
    kinds.choose(options.kind, 0)
    structure = options.structure
    names = structure.values() if isinstance(structure, Mapping) else (structure,)
    for name in names:
        if not isinstance(name, str) or name not in STRUCTURES:
            known = tuple(STRUCTURES)
            raise CurvatureError(
                f"structure={name!r}", f"one of {known}", "Pass one of these names."
            )
        if options.kind != "auto" and (reason := STRUCTURES[name].refused.get(options.kind)):
            raise CurvatureError(
                f"kind={options.kind!r} with structure={name!r}", "a supported pair", reason
            )
    if options.basis is not None and not any(STRUCTURES[name].takes_basis for name in names):
        raise CurvatureError(
            f"basis= with structure={structure!r}", "structure='ekfac'", "Leave basis= out."
        )


def _samples(split: Split, options: CurvatureOptions) -> Indices:
    """Indices of the samples to walk through."""
    part, samples = options.part, split.indices(options.part)
    if not len(samples):
        got = f"part={part!r} of {split}, without samples"
        raise SplitError(got, "at least one sample", "Choose another part.")
    most = options.max_samples
    return samples if most is None else some(samples, most, options.seed)
