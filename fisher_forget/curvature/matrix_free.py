"""Matrix-free GGN: exact products, and conjugate gradients preconditioned by an estimated curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.errors import NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

Product = Callable[[Params], Params]


class GgnProduct:
    r"""v -> (1/count) sum_n J_n^T H_n J_n v, exact, with the graph of one forward and backward pass kept.

    J v comes from differentiating u -> J^T u (Pearlmutter's R-operator by double backward), so each product costs
    about one training pass over the samples and works for every layer that autograd can differentiate twice.

    Args:
        outputs: The model at the point of expansion.
        live: Its parameters, the leaves of the graph.
        likelihood: Gives H_n.
        batches: The samples.
        count: Divisor: the scored positions of *all* retained data, also where only some samples are given.
    """

    def __init__(
        self,
        outputs: Callable[[Batch], Tensor],
        live: Params,
        likelihood: Likelihood,
        batches: Iterable[Batch],
        count: float,
    ) -> None:
        self.count = count
        self._likelihood = likelihood
        self._live = live
        self._chunks: list[tuple[Tensor, Tensor, list[Tensor], list[str], Tensor]] = []
        for batch in batches:
            # the fused attention kernels can't be differentiated twice
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                out = outputs(batch)
                u = torch.zeros_like(out, requires_grad=True)
                grads = torch.autograd.grad(out, list(live.values()), u, create_graph=True, allow_unused=True)
            used = [(name, g) for name, g in zip(live, grads, strict=True) if g is not None]
            self._chunks.append((out, u, [g for _, g in used], [name for name, _ in used], batch.targets))

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """B v."""
        total = {name: torch.zeros_like(x) for name, x in v.items()}
        for outputs, u, grads, names, targets in self._chunks:
            (jv,) = torch.autograd.grad(grads, u, [v[name] for name in names], retain_graph=True)
            hjv = self._likelihood.hessian_product(outputs.detach(), jv, targets)
            back = torch.autograd.grad(outputs, [self._live[name] for name in names], hjv, retain_graph=True)
            for name, g in zip(names, back, strict=True):
                total[name] += g
        return P.scale(total, 1 / self.count)


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        x: The solution.
        iterations: Products used.
        residual: |b - A x| relative to |b|, both in the norm of the preconditioner.
    """

    x: Params
    iterations: int
    residual: float


def conjugate_gradient(
    product: Product, b: Params, precondition: Product, *, iterations: int = 10, tolerance: float = 0.05
) -> Solution:
    """Solve A x = b for a symmetric positive definite A by preconditioned conjugate gradients.

    Args:
        product: v -> A v.
        b: Right-hand side.
        precondition: r -> M^-1 r with M close to A.
        iterations: Most products.
        tolerance: Stop at this relative residual in the M^-1 norm.

    Raises:
        NumericalError: If A is not positive definite along a search direction.
    """
    x, r = P.zeros_like(b), dict(b)
    z = precondition(r)
    p, rz = z, P.dot(r, z)
    start = rz
    if start <= 0:
        return Solution(x, 0, 0.0)
    iteration = 0
    while iteration < iterations:
        iteration += 1
        ap = product(p)
        curvature = P.dot(p, ap)
        if not curvature > 0:
            raise NumericalError(
                f"curvature {curvature:g} along a search direction", "a positive definite operator", "Use more damping."
            )
        alpha = rz / curvature
        x, r = P.add(x, p, alpha), P.add(r, ap, -alpha)
        z = precondition(r)
        rz, before = P.dot(r, z), rz
        if rz <= tolerance**2 * start:
            break
        p = P.add(z, p, rz / before)
    return Solution(x, iteration, math.sqrt(max(rz, 0.0) / start))
