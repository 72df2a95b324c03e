"""What products v -> A v tell about a symmetric A: Krylov spaces, solutions, diagonal, matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.isolation import seeded
from fisher_forget.errors import NumericalError
from fisher_forget.params import Params, flatten, unflatten

Product = Callable[[Params], Params]
FlatProduct = Callable[[Tensor], Tensor]


class Lanczos:
    """Orthonormal rows Q [m, d] of a Krylov space of a symmetric A; T = Q A Q^T is tridiagonal.

    Full reorthogonalisation, two Gram-Schmidt passes a step: without it rounding brings back copies
    of eigenvalues that were found already (Golub & Van Loan, Matrix Computations, section 10.3).

    Args:
        product: v [d] -> A v [d].
        start: First direction [d], of any length.
        steps: Most rows.
        generator: Gives another direction where the space is exhausted. Without one, stop there.

    Attributes:
        length: |start|.
        rows: m so far.
        exhausted: Whether Q spans an invariant subspace, so that T knows all that A does to it.
        residual: Coupling of the last row to what is not in Q; 0 where exhausted.
    """

    def __init__(
        self,
        product: FlatProduct,
        start: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.length = float(start.double().norm())
        self.exhausted = self.length == 0.0
        self.residual = 0.0
        self.rows = 0
        self._product, self._generator = product, generator
        self._most = min(steps, len(start))
        self._basis = start.new_empty(min(16, self._most), len(start))
        self._next = start / (self.length or 1.0)
        self._alpha: list[float] = []
        self._beta: list[float] = []
        self._scale = 0.0

    @property
    def basis(self) -> Tensor:
        """Q [m, d]."""
        return self._basis[: self.rows]

    def extend(self) -> bool:
        """Take one product more; False if nothing is left to explore, or no row is left.

        Raises:
            NumericalError: If the product is not finite.
        """
        if self.exhausted or self.rows == self._most:
            return False
        q, m = self._next, self.rows
        if m == len(self._basis):  # twice as many rows: few need the most that was allowed
            room = self._basis.new_empty(min(2 * m, self._most) - m, len(q))
            self._basis = torch.cat([self._basis, room])
        if m:
            self._beta.append(self.residual)
        self._basis[m] = q
        self.rows = m + 1
        # A q_m = beta_(m-1) q_(m-1) + alpha_m q_m + beta_m q_(m+1)
        w = self._product(q)
        self._alpha.append(float(w.double() @ q.double()))
        w = self._orthogonal(w)
        self.residual = float(w.double().norm())
        self._scale = max(self._scale, abs(self._alpha[-1]), self.residual)
        if not self._scale < float("inf"):
            got = "a curvature product that is not finite"
            raise NumericalError(got, "finite weights and data", "Check for NaN.")
        # what rounding alone leaves of a w in the span of Q
        if self.residual > len(q) ** 0.5 * 8 * torch.finfo(q.dtype).eps * self._scale:
            self._next = w / self.residual
            return True
        # an invariant subspace: T falls into blocks, and the next block starts anywhere outside it
        self.residual = 0.0
        self.exhausted = self._generator is None or self.rows == len(q)
        if not self.exhausted:
            fresh = torch.randn(len(q), generator=self._generator, dtype=q.dtype).to(q.device)
            fresh = self._orthogonal(fresh)
            self._next = fresh / fresh.norm()
        return True

    def _orthogonal(self, w: Tensor) -> Tensor:
        for _ in range(2):  # "twice is enough": the second pass mends what rounding spoilt
            w = w - self.basis.T @ (self.basis @ w)
        return w

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ascending eigenvalues [m] and eigenvectors [m, m] of T, float64 on the CPU."""
        t = torch.diag(torch.tensor(self._alpha, dtype=torch.float64))
        if self._beta:
            b = torch.tensor(self._beta, dtype=torch.float64)
            t = t + torch.diag(b, 1) + torch.diag(b, -1)
        values, vectors = torch.linalg.eigh(t)
        return values, vectors


def eigh(matrix: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues [k] and eigenvectors [k, k] of a symmetric matrix, in its type.

    In single precision LAPACK may not converge where the rank is low (dead pixels, tokens that
    never occur), or returns NaN without a word; double precision does it then.

    Args:
        matrix: [k, k], finite; one triangle is read.
        upper: Which.

    Raises:
        NumericalError: If it cannot be decomposed.
    """
    side = "U" if upper else "L"
    try:
        values, vectors = torch.linalg.eigh(matrix, UPLO=side)
        failed = not bool(values.isfinite().all() and vectors.isfinite().all())
    except RuntimeError:
        failed = True
    if failed:
        try:
            values, vectors = torch.linalg.eigh(matrix.double(), UPLO=side)
        except RuntimeError as error:
            raise _no_eigenvectors(matrix) from error
        if not bool(values.isfinite().all() and vectors.isfinite().all()):
            raise _no_eigenvectors(matrix)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _no_eigenvectors(matrix: Tensor) -> NumericalError:
    got = f"a matrix {list(matrix.shape)} without eigenvectors in double precision"
    return NumericalError(got, "finite curvature", "Check the model for huge weights or inputs.")


def flat(product: Product, like: Params) -> FlatProduct:
    """The product on vectors [d], in the order of `like`."""
    return lambda x: flatten(product(unflatten(x, like)))


def rademacher(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs [size], device and type of `like`; the draw does not depend on the device."""
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(like)


def matrix(product: FlatProduct, like: Tensor) -> Tensor:
    """A [d, d] by d products; `like` [d] gives type and device."""
    unit = torch.zeros_like(like)
    rows = unit.new_empty(len(unit), len(unit))
    for i in range(len(unit)):
        unit[i] = 1.0
        rows[i] = product(unit)
        unit[i] = 0.0
    return rows


def hutchinson(product: FlatProduct, like: Tensor, probes: int, seed: int) -> Tensor:
    """Unbiased estimate [d] of A's diagonal: mean of z * (A z), random signs z (Bekas et al. 2007).

    Entry i has the variance sum_{j != i} A_ij^2 / probes, their sum 2 sum_{i != j} A_ij^2 / probes.
    """
    generator = seeded(seed)
    total = torch.zeros_like(like)
    for _ in range(probes):
        z = rademacher(len(like), like, generator)  # E z_i z_j = 0 for i != j, and z_i^2 = 1
        total += z * product(z)
    return total / probes


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        x: The solution.
        iterations: Products used.
        residual: |b - A x| relative to |b|, both in the norm of the preconditioner.
        left: b - A x; empty where nobody asks.
    """

    x: Params
    iterations: int
    residual: float
    left: Params = field(default_factory=dict, repr=False)


class Directions:
    """Directions p_i, conjugate in one A (p_i^T A p_j = 0), and A p_i: each answers, without
    another product, for its part of every system with that A.

    Args:
        room: How many are kept, at most: two vectors each.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self._kept: list[tuple[Tensor, Tensor, float]] = []

    def keep(self, p: Params, ap: Params, curvature: float) -> bool:
        """Keep p, A p and p^T A p; whether there was room."""
        if len(self._kept) >= self.room:
            return False
        self._kept.append((flatten(p), flatten(ap), curvature))
        return True

    def conjugate(self, z: Params) -> Params:
        """z less its part along them: p_i^T A z = 0."""
        if not self._kept:
            return z
        rest = flatten(z)
        for p, ap, curvature in self._kept:
            rest = torch.add(rest, p, alpha=-float(ap @ rest) / curvature)
        return unflatten(rest, z)

    def solve(self, b: Params) -> tuple[Params, Params]:
        """x in their span, the nearest to the solution in the norm of A; and b - A x."""
        if not self._kept:
            return P.zeros_like(b), b
        left = flatten(b)
        x = torch.zeros_like(left)
        for p, ap, curvature in self._kept:
            alpha = float(p @ left) / curvature
            x, left = torch.add(x, p, alpha=alpha), torch.add(left, ap, alpha=-alpha)
        return unflatten(x, b), unflatten(left, b)


def conjugate_gradient(
    product: Product,
    b: Params,
    precondition: Product,
    *,
    iterations: int = 10,
    tolerance: float = 0.05,
    known: Directions | None = None,
) -> Solution:
    """Solve A x = b for a symmetric positive definite A by preconditioned conjugate gradients.

    Args:
        product: v -> A v.
        b: Right-hand side.
        precondition: r -> M^-1 r with M close to A.
        iterations: Most products.
        tolerance: Stop at this relative residual in the M^-1 norm.
        known: Directions of earlier systems with this A; new ones are added.

    Raises:
        NumericalError: If A is not positive definite along a search direction, or numbers overflow.
    """
    known = known or Directions()
    z = precondition(b)
    start = P.dot(b, z)
    if not math.isfinite(start):
        got = f"a right-hand side of squared length {start:g} in the preconditioner's norm"
        raise NumericalError(got, "a finite one", "Use more damping.")
    if start <= 0:
        return Solution(P.zeros_like(b), 0, 0.0, b)
    # r = b - A x is the residual, z = M^-1 r, and the directions p are conjugate
    x, r = known.solve(b)
    z = z if r is b else precondition(r)
    rz, p, iteration = P.dot(r, z), known.conjugate(z), 0
    # r^T M^-1 r is the squared residual in the norm of M^-1
    while iteration < iterations and rz > tolerance**2 * start:
        iteration += 1
        ap = product(p)
        curvature = P.dot(p, ap)
        if not curvature > 0:
            got = f"curvature {curvature:g} along a search direction"
            raise NumericalError(got, "a positive definite operator", "Use more damping.")
        alpha = P.dot(p, r) / curvature  # the minimum of 1/2 x^T A x - b^T x along p
        x, r = P.add(x, p, alpha), P.add(r, ap, -alpha)
        z = precondition(r)
        rz, before = P.dot(r, z), rz
        kept = known.keep(p, ap, curvature)
        p = known.conjugate(z) if kept else P.add(known.conjugate(z), p, rz / before)
    return Solution(x, iteration, math.sqrt(max(rz, 0.0) / start), r)
