"""Curvatures add up: of two data sets together, of one without a part of it (downdate), and of a
prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Info
from fisher_forget.curvature.structures.dense import Dense, from_matrix
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.curvature.structures.ekfac import Kronecker
from fisher_forget.errors import CurvatureError


def merged(a: Curvature, b: Curvature) -> Curvature:
    """Curvature of the mean loss over the samples of both: (N_a A + N_b B) / (N_a + N_b).

    Exact for diagonal and dense structures, and for EKFAC in a common basis
    (`estimate_curvature(..., basis=a)`).

    Args:
        a: From `estimate_curvature`, without damping.
        b: The same kind, structure and parameters, of other samples.

    Raises:
        CurvatureError: If the two don't go together, or the structure is not a sum over samples.
    """
    return _combined(a, b, 1.0)


def without(a: Curvature, b: Curvature) -> Curvature:
    """Curvature of the mean loss over a's samples less b's: (N_a A - N_b B) / (N_a - N_b).

    Args:
        a: From `estimate_curvature`, without damping.
        b: The same kind, structure and parameters, of a part of a's samples. For the random kinds
            the two draw other columns, so that the difference is unbiased but noisier; eigenvalues
            that come out negative count as 0.

    Raises:
        CurvatureError: If the two don't go together, b has as many samples as a, or the structure
            is not a sum.
    """
    return _combined(a, b, -1.0)


def _combined(a: Curvature, b: Curvature, sign: float) -> Curvature:
    if (
        a.info is None
        or b.info is None
        or (a.info.kind, a.info.structure) != (b.info.kind, b.info.structure)
    ):
        raise CurvatureError(
            f"curvatures from {a.info} and {b.info}",
            "the same kind and structure",
            "Estimate both in the same way.",
        )
    total = a.info.count + sign * b.info.count
    if total <= 0:
        raise CurvatureError(
            f"{b.info.count:g} scored positions to take from {a.info.count:g}",
            "fewer than there are",
            "Take away a proper part of the samples.",
        )
    result = _mix(a, b, a.info.count / total, sign * b.info.count / total)
    return replace(result, info=Info(total, a.info.kind, a.info.structure))


def _mix(a: Curvature, b: Curvature, x: float, y: float) -> Curvature:
    """x A + y B."""
    if (
        isinstance(a, BlockDiagonal)
        and isinstance(b, BlockDiagonal)
        and len(a.parts) == len(b.parts)
    ):
        pairs = zip(a.parts, b.parts, strict=True)
        return replace(a, parts=tuple((names, _mix(p, q, x, y)) for (names, p), (_, q) in pairs))
    damping = getattr(a, "tau", 0.0), getattr(b, "tau", 0.0)
    if any(damping):
        raise CurvatureError(
            f"dampings {damping}", "undamped curvatures", "Add first, damp afterwards."
        )
    if isinstance(a, Dense) and isinstance(b, Dense) and a.basis.shape == b.basis.shape:
        return replace(from_matrix(x * a.matrix() + y * b.matrix(), a.like), signed=a.signed)
    same = (
        isinstance(a, Diagonal)
        and isinstance(b, Diagonal)
        and list(a.eigenvalues) == list(b.eigenvalues)
    )
    if isinstance(a, Kronecker) and isinstance(b, Kronecker):
        if not (_equal(a.row, b.row) and _equal(a.col, b.col)):
            raise CurvatureError(
                f"EKFAC blocks of {a.layout.names} in different bases",
                "one basis for both",
                "Estimate the second with estimate_curvature(..., basis=first).",
            )
        same = True
    if not same:
        raise CurvatureError(
            f"{type(a).__name__} and {type(b).__name__}",
            "two diagonal, EKFAC or dense curvatures of the same parameters",
            "The other structures are no sums over samples: estimate them anew.",
        )
    assert isinstance(a, (Diagonal, Kronecker))
    assert isinstance(b, (Diagonal, Kronecker))
    return replace(
        a,
        eigenvalues={
            key: x * value + y * b.eigenvalues[key] for key, value in a.eigenvalues.items()
        },
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def with_prior(curvature: Curvature, precision: Mapping[str, Tensor | float]) -> Curvature:
    """Add the curvature of a Gaussian prior on the weights, B + diag(precision), as what it is: not
    per sample.

    Weight decay of strength wd on all parameters is `curvature.damped(wd)`; this is for decay on
    some of them, or for precisions of their own.

    Args:
        curvature: Diagonal, dense, or blocks; an EKFAC block only where the precision is one number
            for its weight and bias, since other precisions have no closed form in its basis.
        precision: By parameter name, a number or a tensor of the parameter's shape, >= 0; missing
            names get 0.

    Raises:
        CurvatureError: If a name is unknown, a precision negative, or the structure can't hold it.
    """
    names = (
        list(curvature.diagonal())
        if not isinstance(curvature, BlockDiagonal)
        else list(curvature.order)
    )
    unknown = [name for name in precision if name not in names]
    if unknown or any(float(torch.as_tensor(value).min()) < 0 for value in precision.values()):
        raise CurvatureError(
            f"a prior on {unknown}" if unknown else "a negative precision",
            f"non-negative precisions for some of {names[:6]}",
            "Correct the prior.",
        )
    if isinstance(curvature, BlockDiagonal):
        parts = [
            (own, with_prior(part, {n: precision[n] for n in own if n in precision}))
            for own, part in curvature.parts
        ]
        return replace(curvature, parts=tuple(parts))
    if isinstance(curvature, Diagonal):
        found = {n: value + precision.get(n, 0.0) for n, value in curvature.eigenvalues.items()}
        return replace(curvature, eigenvalues=found)
    like = curvature.like if isinstance(curvature, Dense) else curvature.diagonal()
    each = [
        torch.as_tensor(precision.get(n, 0.0), dtype=p.dtype, device=p.device).expand(p.shape)
        for n, p in like.items()
    ]
    full = torch.cat([value.reshape(-1) for value in each])
    if isinstance(curvature, Dense):
        plain = replace(curvature, tau=0.0).matrix()
        return replace(
            from_matrix(plain + full.diag(), like, signed=curvature.signed),
            tau=curvature.tau,
            info=curvature.info,
        )
    if bool((full == full[0]).all()):
        return curvature.damped(float(full[0]))
    raise CurvatureError(
        f"precisions that differ within a {type(curvature).__name__}",
        "one number for all its parameters",
        "Use structure='diagonal' or 'dense', or blocks: structure={'*bias': 'diagonal', '*': 'ekfac'}.",
    )
