r"""The Hessian of the mean loss, H = (1/N) sum_n d^2 l_n / dw^2: products, matrix, diagonal.

H = GGN + (1/N) sum_n sum_k r_nk d^2 f_nk / dw^2. The second part makes it indefinite away from a
minimum, and is not a sum of outer products: there are no columns to accumulate, only products H v
(Pearlmutter 1994, Neural Computation 6).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisher_forget.curvature.solvers import Product, flat, hutchinson, matrix
from fisher_forget.curvature.structures.dense import Dense, check_size, from_matrix
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.params import Params, flatten, unflatten


class HessianChunk:
    """v -> sum_n (d^2 l_n / dw^2) v over some samples, on the graph of one gradient.

    Args:
        loss: Sum of the samples' losses.
        live: The parameters, leaves of its graph.
    """

    def __init__(self, loss: Tensor, live: Params) -> None:
        grads = torch.autograd.grad(loss, list(live.values()), create_graph=True, allow_unused=True)
        pairs = zip(live.items(), grads, strict=True)
        # a parameter with a constant gradient has zero rows and columns
        self._used = {name: (p, g) for (name, p), g in pairs if g is not None and g.requires_grad}

    def __call__(self, v: Mapping[str, Tensor]) -> Params:
        """Keyed by the parameters that the samples use."""
        if not self._used:
            return {}
        leaves, grads = [p for p, _ in self._used.values()], [g for _, g in self._used.values()]
        along = [v[name] for name in self._used]
        found = torch.autograd.grad(grads, leaves, along, retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(self._used, found, strict=True) if g is not None}


def dense(product: Product, like: Params) -> Dense:
    """The full matrix by d products; its negative eigenvalues are kept.

    Raises:
        CurvatureError: If the model is too large for a d x d matrix.
    """
    check_size(like)
    return from_matrix(matrix(flat(product, like), flatten(like)), like, signed=True)


def diagonal(product: Product, like: Params, probes: int, seed: int) -> Diagonal:
    """An unbiased *estimate* of the diagonal, see `hutchinson`; entries may be negative."""
    return Diagonal(
        unflatten(hutchinson(flat(product, like), flatten(like), probes, seed), like), signed=True
    )
