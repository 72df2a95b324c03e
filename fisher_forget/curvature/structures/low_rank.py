"""Low-rank structure: the largest eigenpairs, and one number for all the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.isolation import full_precision, seeded
from fisher_forget.curvature import cost
from fisher_forget.curvature.checks import check_definite, checked_damping
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.kinds import EXACT_UP_TO
from fisher_forget.curvature.operator import Curvature, Stored
from fisher_forget.curvature.passes import Walk
from fisher_forget.curvature.solvers import Lanczos, Product, flat
from fisher_forget.curvature.structures.diagonal import DiagonalSum
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.params import Params


@dataclass(frozen=True, kw_only=True)
class LowRank(Curvature):
    """B = U diag(s) U^T + delta (I - U U^T): every method is exact for this operator.

    Attributes:
        basis: U [d, r], orthonormal columns.
        eigenvalues: s [r], descending, without damping.
        delta: Mean of the other d - r eigenvalues, max(0, (tr B - sum s) / (d - r)): keeps tr B.
        like: Parameters that give names, order and shapes.
        tau: Damping.
        residual: max_i |B u_i - s_i u_i| / s_1, how well the eigenpairs have converged.
        trace_estimated: Whether tr B came from random output signs, not from all exact columns.
        products: Products with B that the eigenpairs took.
    """

    basis: Tensor
    eigenvalues: Tensor
    delta: float
    like: Params
    tau: float = 0.0
    residual: float = 0.0
    trace_estimated: bool = False
    products: int = 0
    stored_as: ClassVar[str] = "low_rank"

    @full_precision()
    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        if p < 0:
            smallest = float(self.eigenvalues.min()) if len(self.eigenvalues) else math.inf
            smallest = min(smallest, self.delta) if self._rest else smallest
            check_definite(smallest + self.tau, f"power {p:g}", singular=True)
        x = P.flatten({name: v[name] for name in self.like})
        # U (s + tau)^p U^T x, and (delta + tau)^p of what is not in the span of U
        inside = self.basis.T @ x
        powered = self.basis @ ((self.eigenvalues + self.tau).pow(p) * inside)
        if self._rest:
            powered += (self.delta + self.tau) ** p * (x - self.basis @ inside)
        return P.unflatten(powered, self.like)

    def damped(self, tau: float) -> Self:
        return replace(self, tau=self.tau + checked_damping(tau))

    @full_precision()
    def diagonal(self) -> Params:
        rest = self.delta if self._rest else 0.0
        entries = self.basis.square() @ (self.eigenvalues - rest) + rest + self.tau
        return P.unflatten(entries, self.like)

    def trace(self) -> float:
        d = len(self.basis)
        return float(self.eigenvalues.double().sum()) + self._rest * self.delta + d * self.tau

    def logdet(self) -> float:
        inside = float((self.eigenvalues.double() + self.tau).log().sum())
        if not self._rest:
            return inside
        rest = self.delta + self.tau
        return inside + self._rest * math.log(rest) if rest > 0 else -math.inf

    def zeros(self) -> Params:
        return P.zeros_like(self.like)

    def known_eigenvalues(self) -> Sequence[tuple[Tensor, int]]:
        # where the rank is full there is no delta, whose power -1 might be infinite
        others = self.eigenvalues.new_full((min(self._rest, 1),), self.delta, dtype=torch.float64)
        return [(self.eigenvalues, 1), (others, self._rest)]

    def nearest_prior(self, prior: Params) -> Curvature:
        # u_i^T D u_i of each eigenvector, and the mean of D over what is not in their span
        vector = P.flatten(prior)
        inside = self.basis.square().T @ vector
        outside = float(vector.sum() - inside.sum()) / max(self._rest, 1)
        moved = self.eigenvalues + inside
        return replace(self, eigenvalues=moved, delta=self.delta + max(outside, 0.0))

    def pack(self) -> Stored:
        settings = {"delta": self.delta, "tau": self.tau}
        tensors = {"basis": self.basis, "eigenvalues": self.eigenvalues}
        return Stored(self.stored_as, settings, tensors).with_params("like", self.like, "like")

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        numbers: dict[str, Any] = {key: stored.settings[key] for key in ("delta", "tau")}
        tensors: dict[str, Any] = {key: stored.tensors[key] for key in ("basis", "eigenvalues")}
        return cls(like=stored.params("like", "like"), **numbers, **tensors)

    @property
    def _rest(self) -> int:
        """d - r."""
        return len(self.basis) - len(self.eigenvalues)


def most_products(rank: int, size: int) -> int:
    """The most Lanczos steps for so many of `size` eigenpairs."""
    return min(size, 3 * rank + 20)


def top_eigenpairs(
    product: Product,
    like: Params,
    rank: int,
    trace: float,
    *,
    seed: int = 0,
    trace_estimated: bool = False,
) -> LowRank:
    """The `rank` largest eigenpairs by Lanczos, fully reorthogonalised; no d x d matrix is formed.

    It stops when every |B u_i - s_i u_i| is below sqrt(eps) s_1, which makes the eigenvalues
    accurate to about eps, or after `most_products` steps. Where eigenvalues lie close together the
    vectors then span the right space only roughly (`residual` says how roughly), but U stays
    orthonormal and s are its Rayleigh quotients.

    Args:
        product: v -> B v, positive semi-definite.
        like: Parameters.
        rank: r; at most d are taken.
        trace: tr B.
        seed: Of the start vector.
        trace_estimated: Whether `trace` is an estimate.
    """
    d = P.size(like)
    rank = min(rank, d)
    generator = seeded(seed)
    start = P.flatten(P.randn_like(like, generator))
    eps = torch.finfo(start.dtype).eps
    space = Lanczos(flat(product, like), start, most_products(rank, d), generator)
    residual = math.inf
    values, vectors = torch.zeros(0), torch.zeros(0, 0)
    while space.extend():
        if space.rows < rank or ((space.rows - rank) % 4 and space.rows < most_products(rank, d)):
            continue
        values, vectors = space.eigh()
        # B Q^T y - theta Q^T y = residual * y_m q_(m+1): the last entries say how far off each is
        worst = space.residual * float(vectors[-1, -rank:].abs().max())
        residual = worst / max(float(values[-1]), 1e-300)
        # a residual of exactly 0 is an invariant subspace: other eigenvalues may hide outside it
        if 0 < residual <= eps**0.5:
            break
    s = values[-rank:].flip(0).clamp(min=0)
    basis = space.basis.T @ vectors[:, -rank:].flip(1).to(space.basis)
    # what the trace leaves for the other eigenvalues, unless that is rounding
    left = trace - float(s.sum())
    rounding = 10 * d * eps * trace
    delta = left / (d - rank) if d > rank and left > rounding else 0.0
    return LowRank(
        basis=basis.contiguous(),
        eigenvalues=s.to(basis),
        delta=delta,
        like=like,
        residual=residual,
        trace_estimated=trace_estimated,
        products=space.rows,
    )


def _for_trace(walk: Walk) -> Walk:
    """Where exact columns are many, one random column a sample gives an unbiased trace."""
    if walk.kind != "exact" or walk.exact_columns <= EXACT_UP_TO:
        return walk
    return replace(walk, options=replace(walk.options, kind="sketch"))


def _estimate(walk: Walk) -> tuple[Curvature, float]:
    tracing = _for_trace(walk)
    # the trace first, before the product keeps its graphs
    trace = tracing.estimate(DiagonalSum(walk.tape))[0].trace()
    product = walk.product()
    operator = top_eigenpairs(
        product,
        walk.like(),
        walk.options.rank,
        trace,
        seed=walk.options.seed,
        trace_estimated=tracing is not walk,
    )
    return operator, product.count


def _cost(walk: Walk) -> CostEstimate:
    d, each = P.size(walk.tape.params), cost.itemsize(walk)
    rank, most = min(walk.options.rank, d), most_products(min(walk.options.rank, d), d)
    products = cost.of_products(walk, most, (d * rank + rank + d) * each, vectors=most)
    trace = cost.of_columns(_for_trace(walk), lambda: DiagonalSum(walk.tape))
    both = products + trace
    return replace(both, bytes_result=products.bytes_result, columns=trace.columns)


LOW_RANK = StructureSpec(
    "low_rank",
    (LowRank,),
    _estimate,
    _cost,
    refused={
        "hessian": "The largest eigenpairs beside a non-negative rest describe a semi-definite "
        "operator, and a Hessian may be indefinite; use kind='exact', or structure='matrix_free' "
        "or 'dense'."
    },
    by_products=True,
)
