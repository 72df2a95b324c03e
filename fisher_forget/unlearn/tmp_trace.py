from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.curvature.solvers import rademacher
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.params import Params

PROBES = 8


def power_trace(
    curvature: Curvature, like: Params, p: float, *, times_curvature: bool = False, seed: int = 0
) -> float:
    r"""tr((B + tau I)^p), or tr(B (B + tau I)^p): what noise of exponent -p/2 needs.

    Exact where the eigenvalues are known. Of an operator that only has products it is the mean of
    y^T y, or of y^T B y, over y = (B + tau I)^{p/2} z with `PROBES` vectors z of random signs
    (Hutchinson 1990): unbiased, and the estimate of tr A has a standard error of at most (2 tr(A^2)
    / PROBES)^1/2.

    Args:
        curvature: Already damped: B + tau I.
        like: Names and shapes.
        p: Exponent.
        times_curvature: Whether B, without damping, stands before the power.
        seed: Of the probes.
    """
    if isinstance(curvature, BlockDiagonal):
        return math.fsum(
            power_trace(
                part,
                {name: like[name] for name in names},
                p,
                times_curvature=times_curvature,
                seed=seed,
            )
            for names, part in curvature.parts
        )
    tau: float = getattr(curvature, "tau", 0.0)
    known: list[tuple[Tensor, int]]  # eigenvalues of B and their multiplicity
    if isinstance(curvature, Spectral):
        known = [(x, 1) for x in replace(curvature, tau=0.0).spectrum().values()]
    elif isinstance(curvature, LowRank):
        rest = len(curvature.basis) - len(curvature.eigenvalues)
        others = torch.full((min(rest, 1),), curvature.delta, dtype=torch.float64)
        known = [(curvature.eigenvalues, 1), (others, rest)]
    else:
        generator, first, found = torch.Generator().manual_seed(seed), P.flatten(like), []
        for _ in range(PROBES):
            y = curvature.power(P.unflatten(rademacher(len(first), first, generator), like), p / 2)
            found.append(
                P.dot(y, curvature.power(y, 1.0)) - tau * P.dot(y, y)
                if times_curvature
                else P.dot(y, y)
            )
        return float(np.mean(found))
    powers = [(x.double(), (x.double() + tau).pow(p), count) for x, count in known]
    return math.fsum(
        count * float((x * y if times_curvature else y).sum()) for x, y, count in powers
    )


def _method(self, p, *, times_curvature=False, seed=0):
    like = self.diagonal()
    return power_trace(self, like, p, times_curvature=times_curvature, seed=seed)


Curvature.power_trace = _method
