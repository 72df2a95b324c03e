"""The laws that every curvature obeys, against dense float64 matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import Categorical
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.curvature.structures.kronecker import Kronecker
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.curvature.structures.matrix_free import MatrixFree
from fisher_forget.likelihood.streams import Streams
from fisher_forget.params import Params, flatten, randn_like, unflatten

POWERS = (1.0, 0.5, -0.25, -0.5, -1.0)
RANK, DRAWS, SEED = 10, 3, 7


def blocks(curvature: BlockDiagonal) -> list[tuple[tuple[str, ...], Spectral]]:
    parts = []
    for names, part in curvature.parts:
        assert isinstance(part, Spectral)
        parts.append((names, part))
    return parts


def truth(model: nn.Module, data: TensorDataset, kind: str) -> Tensor:
    """The kind's matrix [d, d], by brute force; random kinds take the columns of the seed."""
    x, y = data.tensors
    likelihood = Categorical()
    if kind == "hessian":
        return oracle.hessian(model, x, y, likelihood)
    if kind in ("exact", "empirical"):
        return oracle.ggn(model, x, y, likelihood, empirical=kind == "empirical")
    draw = likelihood.sketch if kind == "sketch" else likelihood.sampled
    with torch.no_grad():
        columns = draw(model(x), DRAWS, Streams(SEED, torch.arange(len(x))), y)
    return oracle.from_columns(model, x, y, likelihood, columns)


def rows_of(names: tuple[str, ...], like: Params) -> Tensor:
    ends = dict(zip(like, np.cumsum([p.numel() for p in like.values()]).tolist(), strict=True))
    return torch.cat([torch.arange(ends[n] - like[n].numel(), ends[n]) for n in names])


def claim(found: Curvature, matrix: Tensor, like: Params) -> Tensor:
    """What the operator should be as a matrix, given the kind's true matrix."""
    if isinstance(found, (Dense, MatrixFree)):
        return matrix
    if isinstance(found, Diagonal):
        return matrix.diag().diag()
    if isinstance(found, Kronecker):  # the exact diagonal in its own orthonormal basis
        unit = torch.eye(len(matrix), dtype=matrix.dtype)
        basis = torch.stack([flatten(found.rotate(unflatten(e, like))) for e in unit], 1)
        assert float((basis @ basis.T - unit).abs().max()) < 1e-10
        return basis.T @ (basis @ matrix @ basis.T).diag().diag() @ basis
    if isinstance(found, LowRank):
        values, vectors = torch.linalg.eigh(matrix)
        rank = min(RANK, len(matrix))
        top = vectors[:, -rank:]
        rest = float(values[:-rank].mean())
        return (top * (values[-rank:] - rest)) @ top.T + rest * torch.eye(
            len(matrix), dtype=matrix.dtype
        )
    assert isinstance(found, BlockDiagonal)
    whole = torch.zeros_like(matrix)
    for names, part in found.parts:
        rows = rows_of(names, like)
        grid = rows[:, None], rows[None, :]
        whole[grid] = claim(part, matrix[grid], {n: like[n] for n in names})
    return whole


def exactly(found: Curvature) -> Curvature:
    """A tight tolerance, where there is one."""
    return replace(found, tolerance=1e-11) if isinstance(found, MatrixFree) else found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def obeys(found: Curvature, matrix: Tensor, like: Params, accuracy: float = 1e-6) -> None:
    """All methods, against a dense matrix."""
    v = randn_like(like, torch.Generator().manual_seed(0))
    for p in POWERS:
        assert (
            relative(flatten(found.power(v, p)), oracle.power(matrix, p) @ flatten(v)) < accuracy
        ), p
    assert relative(flatten(found.diagonal()), matrix.diag()) < accuracy
    assert found.trace() == pytest.approx(float(matrix.trace()), rel=accuracy)
    assert found.logdet() == pytest.approx(float(torch.linalg.slogdet(matrix)[1]), rel=accuracy)
    if not isinstance(found, MatrixFree):  # whose traces are estimates
        values = torch.linalg.eigvalsh(matrix).clamp(min=1e-300)
        for p in POWERS:
            expected = float(values.pow(p).sum())
            assert found.power_trace(p) == pytest.approx(expected, rel=10 * accuracy), p
            terms = (values - found.tau) * values.pow(p)  # of an indefinite one they may cancel
            traced = found.power_trace(p, times_curvature=True)
            assert abs(traced - float(terms.sum())) < 10 * accuracy * float(terms.abs().sum()), p
    assert found.damped(0.5).tau == pytest.approx(found.tau + 0.5)
    zeros = found.zeros()
    assert list(zeros) == list(found.diagonal())
    assert not flatten(zeros).any()
    more = flatten(found.damped(0.5).power(v, 1.0))
    assert relative(more, matrix @ flatten(v) + 0.5 * flatten(v)) < accuracy
