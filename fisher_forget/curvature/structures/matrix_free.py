"""Matrix-free structure: the operator that needs nothing but its products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget.curvature import cost
from fisher_forget.curvature.checks import check_definite, checked_damping, needs_definite
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.operator import Curvature
from fisher_forget.curvature.passes import Walk
from fisher_forget.curvature.solvers import (
    Lanczos,
    Product,
    conjugate_gradient,
    flat,
    hutchinson,
    matrix,
    rademacher,
)
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.errors import CurvatureError, NumericalError
from fisher_forget.params import Params

SMALL = 512  # parameters up to which diagonal, trace and logdet come from the matrix itself
LOWEST_STEPS = 100  # Lanczos steps that look for a negative eigenvalue of a larger Hessian
QUADRATURE_STEPS = 80  # of each probe of a larger operator's logdet
CHECK_EVERY = 5  # Lanczos steps between two looks at the convergence of f(A) v


@dataclass(frozen=True, kw_only=True)
class MatrixFree(Curvature):
    """B + tau I by its products: exact wherever products are, slow where an inverse is needed.

    `power` needs one product for p = 1, conjugate gradients for p = -1 and Lanczos, f(A) v = |v| Q
    f(T) e_1, for other exponents. `diagonal` and `trace` are exact up to `SMALL` parameters and
    Hutchinson estimates beyond; `logdet` is exact up to `SMALL` and stochastic Lanczos quadrature
    beyond (Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. 38).

    Attributes:
        product: v -> B v, without damping.
        like: Parameters that give names, order and shapes.
        tau: Damping.
        signed: Whether B may be indefinite.
        preconditioner: Any curvature close to B, without damping; for p = -1.
        tolerance: Relative residual of conjugate gradients (in the preconditioner's norm), and
            relative change of f(A) v over the last `CHECK_EVERY` steps.
        iterations: Most products of one power. Lanczos keeps as many vectors.
        probes: Random vectors of the estimates.
        seed: Of these.
        known: Quantities of the undamped B that were computed already; shared with damped copies.
    """

    product: Product
    like: Params
    tau: float = 0.0
    signed: bool = False
    preconditioner: Curvature | None = None
    tolerance: float = 1e-6
    iterations: int = 500
    probes: int = 64
    seed: int = 0
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"product": _not_stored}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return replace(self, known=dict(self.known))  # nothing else of it ever changes

    @isolated()
    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        v = {name: v[name] for name in self.like}
        if p == 0:
            return dict(v)
        if p == 1:
            return self._damped_product(v)
        if self.signed and needs_definite(p):
            self._check(f"power {p:g}", singular=p < 0)
        return self._inverse(v) if p == -1 else self._function(v, p)

    def damped(self, tau: float) -> Self:
        return replace(self, tau=self.tau + checked_damping(tau))

    def with_prior(
        self, precision: Mapping[str, Tensor | float], *, nearest: bool = False
    ) -> Curvature:
        prior = P.expanded(precision, self.like)
        plain, near = self.product, self.preconditioner

        def product(v: Params) -> Params:
            return P.map_params(lambda bv, d, x: bv + d * x, plain(v), prior, v)

        near = None if near is None else near.with_prior(precision, nearest=True)
        return replace(self, product=product, preconditioner=near, known={})

    def zeros(self) -> Params:
        return P.zeros_like(self.like)

    @isolated()
    def diagonal(self) -> Params:
        if "diagonal" not in self.known:
            flat_product, first = flat(self.product, self.like), P.flatten(self.like)
            if len(first) <= SMALL:
                entries = self._matrix().diag()
            else:
                entries = hutchinson(flat_product, first, self.probes, self.seed)
            self.known["diagonal"] = P.unflatten(entries, self.like)
        return P.map_params(lambda x: x + self.tau, self.known["diagonal"])

    def trace(self) -> float:
        return math.fsum(float(x.double().sum()) for x in self.diagonal().values())

    @isolated()
    def logdet(self) -> float:
        if self.signed:
            self._check("logdet")
        nodes, weights = self._quadrature()
        return float((weights * self._damped_values(nodes).log()).sum())

    def _damped_values(self, values: Tensor) -> Tensor:
        """Eigenvalues of B + tau I; negative rounding errors of B (all, if not `signed`) are 0."""
        eps = torch.finfo(next(iter(self.like.values())).dtype).eps
        rounding = 10 * len(values) * eps * float(values.abs().max())
        kept = values > rounding
        return values.where(kept | (values < -rounding) if self.signed else kept, 0.0) + self.tau

    def _damped_product(self, v: Mapping[str, Tensor]) -> Params:
        return P.add(self.product(dict(v)), v, self.tau) if self.tau else self.product(dict(v))

    def _matrix(self) -> Tensor:
        """B [d, d], for small d."""
        if "matrix" not in self.known:
            self.known["matrix"] = matrix(flat(self.product, self.like), P.flatten(self.like))
        b: Tensor = self.known["matrix"]
        return b

    def _quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights, tr f(B) = sum w f(node): of B itself, or of random Krylov spaces."""
        if "quadrature" not in self.known:
            if P.size(self.like) <= SMALL:
                symmetric = (self._matrix() + self._matrix().T).double() / 2
                nodes = torch.linalg.eigvalsh(symmetric).cpu()
                self.known["quadrature"] = nodes, torch.ones_like(nodes)
            else:
                self.known["quadrature"] = self._lanczos_quadrature()
        nodes, weights = self.known["quadrature"]
        return nodes, weights

    def _lanczos_quadrature(self) -> tuple[Tensor, Tensor]:
        """For random signs z, z^T f(B) z ~ |z|^2 sum_i (e_1^T y_i)^2 f(theta_i) with the eigenpairs
        (theta_i, y_i) of T, and its mean over z is tr f(B)."""
        d, first = P.size(self.like), P.flatten(self.like)
        generator, rules = seeded(self.seed), []
        for _ in range(self.probes):
            signs = rademacher(d, first, generator)
            space = Lanczos(flat(self.product, self.like), signs, min(d, QUADRATURE_STEPS))
            while space.extend():
                pass
            values, vectors = space.eigh()
            rules.append((values, vectors[0].square() * d / self.probes))
        nodes, weights = zip(*rules, strict=True)
        return torch.cat(nodes), torch.cat(weights)

    def _check(self, what: str, *, singular: bool = False) -> None:
        """Refuse an indefinite operator; beyond `SMALL` by the lowest Ritz value, never too low."""
        if "lowest" not in self.known:
            if P.size(self.like) <= SMALL:
                self.known["lowest"] = self._quadrature()[0], 0.0
            else:
                generator = seeded(self.seed)
                start = P.flatten(P.randn_like(self.like, generator))
                space = Lanczos(flat(self.product, self.like), start, LOWEST_STEPS, generator)
                while space.extend():
                    pass
                values, vectors = space.eigh()
                self.known["lowest"] = values, space.residual * abs(float(vectors[-1, 0]))
        values, slack = self.known["lowest"]
        lowest = float(self._damped_values(values).min())
        # an eigenvalue lies within the slack of the Ritz value: advise for the lower end
        check_definite(lowest - slack if lowest < 0 else lowest, what, singular=singular)

    def _inverse(self, v: Params) -> Params:
        damped = self.preconditioner.damped(self.tau) if self.preconditioner is not None else None
        precondition: Product = dict if damped is None else lambda r: damped.power(r, -1)
        try:
            solution = conjugate_gradient(
                self._damped_product,
                v,
                precondition,
                iterations=self.iterations,
                tolerance=self.tolerance,
            )
        except NumericalError:
            if self.tau == 0:
                check_definite(0.0, "power -1", singular=True)
            raise
        if not solution.residual <= self.tolerance:
            raise self._unfinished("conjugate gradients", solution.residual, solution.iterations)
        return solution.x

    def _function(self, v: Params, p: float) -> Params:
        """(B + tau I)^p v in the Krylov space of v."""
        # x_m = Q y_m, and Q is orthonormal: |x_m - x_k| = |y_m - y_k|, without forming either
        most = min(self.iterations, P.size(v))
        space = Lanczos(flat(self.product, self.like), P.flatten(v), most)
        y, change = torch.zeros(0, dtype=torch.float64), math.inf
        while change > self.tolerance and space.extend():
            if space.rows % CHECK_EVERY == 0 or space.exhausted or space.rows == most:
                before, y = y, self._coefficients(space, p)
                longer = torch.cat([before, y.new_zeros(len(y) - len(before))])
                change = float((y - longer).norm() / y.norm())
        if not (space.exhausted or space.rows == P.size(v) or change <= self.tolerance):
            raise self._unfinished("Lanczos", change, space.rows)
        return P.unflatten(space.basis.T @ y.to(space.basis), self.like)

    def _coefficients(self, space: Lanczos, p: float) -> Tensor:
        """|v| T^p e_1 [m]."""
        values, vectors = space.eigh()
        damped = self._damped_values(values)
        if needs_definite(p):
            check_definite(float(damped.min()), f"power {p:g}", singular=p < 0)
        return space.length * (vectors @ (damped.pow(p) * vectors[0]))

    def _unfinished(self, method: str, reached: float, products: int) -> NumericalError:
        return NumericalError(
            f"{method} at {reached:.2g} after {products} products",
            f"the tolerance {self.tolerance:g}",
            "Use more damping, a preconditioner=, or "
            "dataclasses.replace(curvature, iterations=..., tolerance=...).",
        )


def _not_stored(v: Mapping[str, Tensor]) -> Params:
    """In place of the product, in a pickle."""
    got = "a product with a matrix-free curvature that was loaded from a file"
    expected = "the training data, which no file of it holds"
    fix = "Estimate it again, or use structure='ekfac', which is stored whole."
    raise CurvatureError(got, expected, fix)


def _estimate(walk: Walk) -> tuple[Curvature, float]:
    product = walk.product()
    operator = MatrixFree(
        product=product,
        like=walk.like(),
        signed=walk.kind == "hessian",
        preconditioner=walk.options.preconditioner,
        seed=walk.options.seed,
    )
    return operator, product.count


def _cost(walk: Walk) -> CostEstimate:
    preconditioner = walk.options.preconditioner
    held = P.size(walk.tape.params) * cost.itemsize(walk)
    held += 0 if preconditioner is None else preconditioner.nbytes()
    prepared = cost.of_products(walk, 0, held)
    return replace(prepared, bytes_result=held + cost.kept_bytes(walk))


MATRIX_FREE = StructureSpec("matrix_free", (MatrixFree,), _estimate, _cost, by_products=True)
