"""Sums over samples add up: the curvature of two data sets together, or of one without a part of it (downdate)."""

from __future__ import annotations

from dataclasses import replace

import torch

from fisher_forget.curvature.dense import Dense, from_matrix
from fisher_forget.curvature.diagonal import Diagonal
from fisher_forget.curvature.kronecker import Kronecker
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Info
from fisher_forget.errors import CurvatureError


def merged(a: Curvature, b: Curvature) -> Curvature:
    """Curvature of the mean loss over the samples of both: (N_a A + N_b B) / (N_a + N_b).

    Exact for diagonal and dense structures, and for EKFAC in a common basis (`estimate_curvature(..., basis=a)`).

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
        b: The same kind, structure and parameters, of a part of a's samples. For the random kinds the two draw other
            columns, so that the difference is unbiased but noisier; eigenvalues that come out negative count as 0.

    Raises:
        CurvatureError: If the two don't go together, b has as many samples as a, or the structure is not a sum.
    """
    return _combined(a, b, -1.0)


def _combined(a: Curvature, b: Curvature, sign: float) -> Curvature:
    if a.info is None or b.info is None or (a.info.kind, a.info.structure) != (b.info.kind, b.info.structure):
        raise CurvatureError(
            f"curvatures from {a.info} and {b.info}", "the same kind and structure", "Estimate both in the same way."
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
    if isinstance(a, BlockDiagonal) and isinstance(b, BlockDiagonal) and len(a.parts) == len(b.parts):
        pairs = zip(a.parts, b.parts, strict=True)
        return replace(a, parts=tuple((names, _mix(p, q, x, y)) for (names, p), (_, q) in pairs))
    damping = getattr(a, "tau", 0.0), getattr(b, "tau", 0.0)
    if any(damping):
        raise CurvatureError(f"dampings {damping}", "undamped curvatures", "Add first, damp afterwards.")
    if isinstance(a, Dense) and isinstance(b, Dense) and a.basis.shape == b.basis.shape:
        return replace(from_matrix(x * a.matrix() + y * b.matrix(), a.like), signed=a.signed)
    same = isinstance(a, Diagonal) and isinstance(b, Diagonal) and list(a.eigenvalues) == list(b.eigenvalues)
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
    return replace(a, eigenvalues={key: x * value + y * b.eigenvalues[key] for key, value in a.eigenvalues.items()})


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
