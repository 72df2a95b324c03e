"""Curvatures add up: of two data sets, of one without a part of it (downdate), and of a prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fisher_forget.curvature.operator import Curvature, Info
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
    return _weighted(a, b, 1.0)


def without(a: Curvature, b: Curvature) -> Curvature:
    """Curvature of the mean loss over a's samples less b's: (N_a A - N_b B) / (N_a - N_b).

    Args:
        a: From `estimate_curvature`, without damping.
        b: The same kind, structure and parameters, of a part of a's samples; of a random kind with
            the same seed and draws, so that the columns taken away are those that a holds.

    Raises:
        CurvatureError: If the two don't go together, b has all of a's samples, or B is no sum.
    """
    if a.info and b.info and _drawn(a.info) != _drawn(b.info):
        got = f"columns drawn otherwise: {a.info} and {b.info}"
        fix = "Estimate the part with the draws= and seed= of the whole."
        raise CurvatureError(got, "the same seed and draws for both", fix)
    return _weighted(a, b, -1.0)


def _weighted(a: Curvature, b: Curvature, sign: float) -> Curvature:
    one, other = a.info, b.info
    same = one and other and (one.kind, one.structure) == (other.kind, other.structure)
    if one is None or other is None or not same:
        got = f"curvatures from {one} and {other}"
        raise CurvatureError(got, "the same kind and structure", "Estimate both in the same way.")
    total = one.count + sign * other.count
    if total <= 0:
        got = f"{other.count:g} scored positions to take from {one.count:g}"
        raise CurvatureError(got, "fewer than there are", "Take away a proper part of the samples.")
    # both are means over their own samples: weights turn them back into sums over the new number
    result = a.combined(b, one.count / total, sign * other.count / total)
    drawn = _drawn(one) if _drawn(one) == _drawn(other) else (0, 0)
    return replace(result, info=Info(total, one.kind, one.structure, *drawn))


def _drawn(info: Info) -> tuple[int, int]:
    """What the columns of a random kind depend on, beside the samples."""
    return info.draws, info.seed


def with_prior(curvature: Curvature, precision: Mapping[str, Tensor | float]) -> Curvature:
    """B + diag(precision): add the curvature of a Gaussian prior on the weights, not per sample.

    Weight decay of strength wd on all parameters is `curvature.damped(wd)`; this is for decay on
    some of them, or for precisions of their own.

    Args:
        curvature: Diagonal, dense, or blocks; an EKFAC block only where the precision is one number
            for its weight and bias, since other precisions have no closed form in its basis.
        precision: By parameter name, a number or a tensor of its shape, >= 0; 0 if missing.

    Raises:
        CurvatureError: If a name is unknown, a precision negative, or the structure can't hold it.
    """
    names = list(curvature.zeros())
    unknown = [name for name in precision if name not in names]
    if unknown or any(float(torch.as_tensor(value).min()) < 0 for value in precision.values()):
        got = f"a prior on {unknown}" if unknown else "a negative precision"
        fix = "Correct the prior."
        raise CurvatureError(got, f"non-negative precisions for some of {names[:6]}", fix)
    return curvature.with_prior(precision)
