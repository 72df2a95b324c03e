"""What a layer rule is: per-sample gradients from a layer's input and output gradient alone.

A layer with weight matrix W [O, I] that sees inputs a_nr and output gradients g_nr at the R
positions of sample n has the per-sample gradient M_n = sum_r g_nr a_nr^T. Where R = 1 it has rank
one, and sums of its squares need no per-sample gradient at all: sum_n M_n^2 = (G*G)^T (A*A), one
matrix product.

A rule is never trusted blindly: `tape.Tape` compares each with autograd on a few of the user's own
samples.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PIECE_BYTES = 2 << 20  # per-sample gradients formed at once; about the size of a core's own cache
PATCH_BYTES = 16 << 20  # patches formed at once
LARGEST_SIDE = 8192  # a longer side keeps the standard basis: eigenvectors cost O(side^3)

SETTINGS = (int, float, str, tuple, list, type(None))  # that layers keep as attributes


class Rule:
    """One kind of layer. `a` (layer input) and `g` (gradient at its output) lead with the samples.

    Attributes:
        module: The layer.
        rank_one: Whether an input [N, I] and its output gradient [N, O] make the gradient g a^T.
        sparse: Whether `added` only touches a few rows of what other uses have formed.
    """

    rank_one: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"module": _outline(self.module)}

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients [N, *shape] by local parameter name."""
        raise NotImplementedError

    def added(self, before: dict[str, Tensor], a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """`per_sample` on top of the gradients from other uses of the same parameters."""
        gradients = self.per_sample(a, g)
        return {n: before[n] + value if n in before else value for n, value in gradients.items()}

    def shared(self, a: Tensor, g: Tensor) -> Tensor | None:
        """What `add_squares` makes of the inputs, the same for every column; `None` if nothing
        worth keeping."""
        return None

    def add_squares(
        self, totals: dict[str, Tensor], a: Tensor, g: Tensor, shared: Tensor | None = None
    ) -> None:
        """Add sum_n of the squared per-sample gradients, by runs of samples, to the totals."""
        step = max(1, PIECE_BYTES // (4 * sum(total.numel() for total in totals.values())))
        for start in range(0, len(g), step):
            rows = slice(start, start + step)
            for name, value in self.per_sample(a[rows], g[rows]).items():
                if name in totals:
                    totals[name] += value.square().sum(0)


def _outline(layer: nn.Module) -> nn.Module:
    """A layer's settings and the shapes of its weights, without their values, hooks and data that
    forward has stored: what a stored curvature needs of it."""
    outline = type(layer).__new__(type(layer))
    numbers = {name: x for name, x in vars(layer).items() if isinstance(x, SETTINGS)}
    outline.__dict__ = vars(nn.Module()) | numbers
    for name, p in layer.named_parameters(recurse=False):
        outline.register_parameter(name, nn.Parameter(torch.empty_like(p, device="meta")))
    return outline


class MatrixRule(Rule):
    """A layer whose weight is a matrix [O, I]: it has a basis for rows and one for columns."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[..., *weight.shape] as [..., O, I]."""
        return weight.flatten(-self.module.weight.dim() + 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`."""
        return matrix.reshape(*matrix.shape[:-2], *self.module.weight.shape)

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Inputs [N, R, I], output gradients [N, R, O]: M_n = sum_r g_nr a_nr^T; `None` without."""
        return None

    def position_count(self, g: Tensor) -> int:
        """R."""
        return g[0].numel() // int(self.to_matrix(self.module.weight).shape[0])

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        """Add sum_nr g g^T to the upper triangle of `total` [O, O]."""
        raise NotImplementedError

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        """Add sum_nr a a^T to the upper triangle of `total` [I, I]; with a 1 below each a where it
        is [I+1, I+1]."""
        raise NotImplementedError

    def has_row_basis(self) -> bool:
        """Whether the rows' side has a basis of its own; else it keeps the standard one."""
        return int(self.to_matrix(self.module.weight).shape[0]) <= LARGEST_SIDE


def add_squared_products(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Add sum_n (y_n x_n)^2 to `total` [O, I], for y [N, O, R], x [N, R, I], piece by piece."""
    # a block of output rows at a time, so that what is squared has not left the cache
    rows = max(1, min(len(total), PIECE_BYTES // (4 * total.shape[1])))
    step = max(1, PIECE_BYTES // (4 * rows * total.shape[1]))
    for top in range(0, len(total), rows):
        for start in range(0, len(y), step):
            piece = y[start : start + step, top : top + rows] @ x[start : start + step]
            total[top : top + rows] += piece.square_().sum(0)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper triangle of `total`: blocks right of the diagonal, which
    is under two thirds of the products.

    `total` may have one more row and column than `rows` has columns: the vectors then end in a 1.
    """
    size = rows.shape[1]
    # four blocks of rows: 1 + 3/4 + 2/4 + 1/4 of 4, so 5/8 of the products
    step = max(64, size // 4)
    for start in range(0, size, step):
        stop = min(start + step, size)
        total[start:stop, start:size].addmm_(rows[:, start:stop].T, rows[:, start:])
    if len(total) > size:  # the products with the constant 1
        total[:size, size] += rows.sum(0)
        total[size, size] += len(rows)
