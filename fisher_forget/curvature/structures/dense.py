"""Dense structure: the full matrix, for small models and as the oracle of every other structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fisher_forget._util.isolation import full_precision
from fisher_forget.curvature import cost
from fisher_forget.curvature.checks import check_undamped
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.operator import (
    Curvature,
    Spectral,
    Stored,
    not_sums,
    spectral_fields,
)
from fisher_forget.curvature.passes import Accumulator, Walk
from fisher_forget.curvature.record import Grads, Record
from fisher_forget.curvature.solvers import eigh, flat, matrix
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.curvature.tape import Tape
from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params, expanded, flatten, size, unflatten, zeros_like

LARGEST = 20_000  # parameters; the eigendecomposition holds three such matrices
KEY = "all"


@dataclass(frozen=True, kw_only=True)
class Dense(Spectral):
    """B = Q diag(eigenvalues) Q^T over all parameters at once.

    Attributes:
        basis: Q [d, d].
        like: Parameters that give names, order and shapes.
    """

    basis: Tensor
    like: Params
    stored_as: ClassVar[str] = "dense"
    whole: ClassVar[bool] = True

    def rotate(self, v: Mapping[str, Tensor]) -> Params:
        return {KEY: self.basis.T @ flatten({name: v[name] for name in self.like})}

    def unrotate(self, z: Mapping[str, Tensor]) -> Params:
        return unflatten(self.basis @ z[KEY], self.like)

    def diagonal(self) -> Params:
        # B_ii = sum_k Q_ik^2 lambda_k
        return unflatten((self.basis.square() * self.spectrum()[KEY]).sum(1), self.like)

    @full_precision()
    def matrix(self) -> Tensor:
        """B + tau I [d, d]."""
        return (self.basis * self.spectrum()[KEY]) @ self.basis.T

    def combined(self, other: Curvature, x: float, y: float) -> Curvature:
        check_undamped(self.tau, other.tau)
        if not isinstance(other, Dense) or self.basis.shape != other.basis.shape:
            raise not_sums(self, other)
        # the two have different bases: add the matrices and decompose anew
        mixed = from_matrix(x * self.matrix() + y * other.matrix(), self.like)
        return replace(mixed, signed=self.signed)

    def with_prior(
        self, precision: Mapping[str, Tensor | float], *, nearest: bool = False
    ) -> Curvature:
        plain = replace(self, tau=0.0).matrix()
        prior = flatten(expanded(precision, self.like)).diag()
        moved = from_matrix(plain + prior, self.like, signed=self.signed)
        return replace(moved, tau=self.tau, info=self.info)

    def pack(self) -> Stored:
        plain = super().pack().with_params("like", self.like, "like")
        return replace(plain, tensors=plain.tensors | {"basis": self.basis})

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        like, basis = stored.params("like", "like"), stored.tensors["basis"]
        return cls(basis=basis, like=like, **spectral_fields(stored))


def from_matrix(b: Tensor, like: Params, *, signed: bool = False) -> Dense:
    """Eigendecompose a symmetric matrix [d, d].

    Args:
        b: B.
        like: Parameters that give names, order and shapes.
        signed: Whether it may be indefinite. If not, negative rounding errors become 0.

    Raises:
        CurvatureError: If a matrix that is not `signed` has a negative eigenvalue beyond rounding.
    """
    # symmetric but for rounding: eigh reads one triangle only
    eigenvalues, basis = eigh((b + b.T) / 2)
    largest, smallest = float(eigenvalues.abs().max()), float(eigenvalues.min())
    eps = torch.finfo(b.dtype).eps
    # a sum of squares is semi-definite; differences of such sums lose more digits, hence the square
    # root
    rounding = (len(b) * eps if signed else eps**0.5) * largest
    if not signed and smallest < -rounding:
        got = f"a matrix with the eigenvalue {smallest:.3g} beside {largest:.3g}"
        fix = "Pass signed=True if it may be indefinite."
        raise CurvatureError(got, "a positive semi-definite one", fix)
    return Dense(
        eigenvalues={KEY: eigenvalues.where((eigenvalues >= 0) | (eigenvalues < -rounding), 0.0)},
        basis=basis,
        like=like,
        signed=signed,
    )


def check_size(like: Params) -> int:
    """The number of parameters d.

    Raises:
        CurvatureError: If the model is too large for a d x d matrix.
    """
    d = size(like)
    if d > LARGEST:
        raise CurvatureError(
            f"a dense curvature of {d:,} parameters ({d * d * 4 / 2**30:.0f} GiB)",
            f"at most {LARGEST:,} parameters",
            "Use structure='ekfac', 'matrix_free' or 'diagonal', or choose fewer parameters with "
            "subset=.",
        )
    return d


class DenseSum(Accumulator):
    """Accumulates sum_n J_n^T H_n J_n [d, d].

    Raises:
        CurvatureError: If the model is too large for a d x d matrix.
    """

    def __init__(self, tape: Tape) -> None:
        self.like = zeros_like(tape.params)
        d = check_size(self.like)
        first = next(iter(self.like.values()))
        self.sums = torch.zeros(d, d, dtype=first.dtype, device=first.device)

    def add(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        gradients = record.per_sample(column, grads)
        rows = torch.cat([x.reshape(len(x), -1) for x in gradients.values()], 1)
        # the rows are J_n^T s_n, one a sample: their outer products add up in one matrix product
        self.sums.addmm_(rows.T, rows)

    def result(self, count: float) -> Dense:
        return from_matrix(self.sums / count, self.like)


def _estimate(walk: Walk) -> tuple[Curvature, float]:
    if walk.kind != "hessian":
        return walk.estimate(DenseSum(walk.tape))
    like = walk.like()
    check_size(like)
    product = walk.product()
    # the Hessian by d products; its negative eigenvalues are kept
    return from_matrix(matrix(flat(product, like), flatten(like)), like, signed=True), product.count


def _cost(walk: Walk) -> CostEstimate:
    d, each = check_size(walk.tape.params), cost.itemsize(walk)
    nbytes = (d * d + 2 * d) * each  # basis, eigenvalues, names and shapes
    if walk.kind == "hessian":
        plain = cost.of_products(walk, d, nbytes)
    else:
        plain = cost.of_columns(walk, lambda: DenseSum(walk.tape), nbytes)
    # the decomposition holds three matrices more
    seconds, peak = plain.seconds + cost.eigh_seconds(walk, d), plain.bytes_peak + 3 * nbytes
    return replace(plain, seconds=seconds, bytes_peak=peak)


DENSE = StructureSpec("dense", (Dense,), _estimate, _cost, additive=True)
