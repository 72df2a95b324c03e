"""Layer rules: per-sample parameter gradients from a layer's input and the gradient at its output,
without autograd.

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
from torch import Tensor
from torch.nn import functional as F

PIECE_BYTES = (
    2 << 20
)  # per-sample gradients formed at once; about the size of the cores' own caches
PATCH_BYTES = 16 << 20  # patches formed at once
LARGEST_SIDE = 8192  # a side with more rows keeps the standard basis: its eigendecomposition would cost O(side^3)


class Rule:
    """One kind of layer. Tensors `a` (layer input) and `g` (gradient at its output) lead with the
    samples."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients [N, *shape] by local parameter name."""
        raise NotImplementedError

    def added(self, found: dict[str, Tensor], a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """`per_sample` on top of the gradients found for other uses of the same parameters."""
        own = self.per_sample(a, g)
        return {
            name: found[name] + value if name in found else value for name, value in own.items()
        }

    def shared(self, a: Tensor, g: Tensor) -> Tensor | None:
        """What `add_squares` makes of the inputs, the same for every column; `None` if nothing
        worth keeping."""
        return None

    def add_squares(
        self, totals: dict[str, Tensor], a: Tensor, g: Tensor, shared: Tensor | None = None
    ) -> None:
        """Add sum_n of the squared per-sample gradients, run by run of samples, to the totals asked
        for."""
        step = max(1, PIECE_BYTES // (4 * sum(total.numel() for total in totals.values())))
        for start in range(0, len(g), step):
            for name, value in self.per_sample(
                a[start : start + step], g[start : start + step]
            ).items():
                if name in totals:
                    totals[name] += value.square().sum(0)


class MatrixRule(Rule):
    """A layer whose weight is a matrix [O, I]: it has a basis for its rows and one for its
    columns."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[..., *weight.shape] as [..., O, I]."""
        return weight.flatten(-self.module.weight.dim() + 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`."""
        return matrix.reshape(*matrix.shape[:-2], *self.module.weight.shape)

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Inputs [N, R, I] and output gradients [N, R, O], where M_n = sum_r g_nr a_nr^T; `None` if
        there are none."""
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
    """Add sum_n (y_n x_n)^2 to `total` [O, I], for y [N, O, R] and x [N, R, I], in pieces that stay
    in the cache."""
    rows = max(1, min(len(total), PIECE_BYTES // (4 * total.shape[1])))
    step = max(1, PIECE_BYTES // (4 * rows * total.shape[1]))
    for top in range(0, len(total), rows):
        for start in range(0, len(y), step):
            piece = y[start : start + step, top : top + rows] @ x[start : start + step]
            total[top : top + rows] += piece.square_().sum(0)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper triangle of `total`: blocks right of the diagonal, two thirds of
    the products.

    `total` may have one more row and column than `rows` has columns: the vectors then end in a 1.
    """
    size = rows.shape[1]
    step = max(64, size // 4)
    for start in range(0, size, step):
        stop = min(start + step, size)
        total[start:stop, start:size].addmm_(rows[:, start:stop].T, rows[:, start:])
    if len(total) > size:
        total[:size, size] += rows.sum(0)
        total[size, size] += len(rows)


class LinearRule(MatrixRule):
    """nn.Linear on inputs [N, ..., I]."""

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.reshape(-1, g.shape[-1]))

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, a.reshape(-1, a.shape[-1]))

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, y = self.positions(a, g)
        out = {"weight": y.transpose(1, 2) @ x}
        if self.module.bias is not None:
            out["bias"] = y.sum(1)
        return out

    def add_squares(
        self, totals: dict[str, Tensor], a: Tensor, g: Tensor, shared: Tensor | None = None
    ) -> None:
        x, y = self.positions(a, g)
        if "weight" in totals:
            add_squared_products(self.to_matrix(totals["weight"]), y.transpose(1, 2), x)
        if "bias" in totals:
            totals["bias"] += y.sum(1).square().sum(0)


class TransposedLinearRule(LinearRule):
    """transformers' Conv1D: a Linear layer that stores its weight as [I, O]."""

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, y = self.positions(a, g)
        return {"weight": x.transpose(1, 2) @ y, "bias": y.sum(1)}

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(-1, -2)


class EmbeddingRule(MatrixRule):
    """nn.Embedding: the weight as [V, D]; its rows' side is one-hot, so it keeps the standard
    basis."""

    def has_row_basis(self) -> bool:
        return False

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.reshape(-1, g.shape[-1]))

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        return self.added({"weight": g.new_zeros(len(a), *self.module.weight.shape)}, a, g)

    def added(self, found: dict[str, Tensor], a: Tensor, g: Tensor) -> dict[str, Tensor]:
        if "weight" not in found:
            return self.per_sample(a, g)
        n, (vocabulary, width) = len(a), self.module.weight.shape
        index = a.reshape(n, -1) + torch.arange(n, device=a.device)[:, None] * vocabulary
        g = g.reshape(-1, width)
        if self.module.padding_idx is not None:
            g = g * (a.reshape(-1, 1) != self.module.padding_idx)
        # a tied output layer has formed the whole matrix already: only the rows that were seen
        # change
        return {
            "weight": found["weight"]
            .view(-1, width)
            .index_add_(0, index.reshape(-1), g)
            .view(n, vocabulary, width)
        }


class ElementwiseRule(Rule):
    """Scale and shift of a normalised input: the gradient is a sum over positions of g * a_hat and
    of g."""

    channel_last: ClassVar[bool] = True

    def normalised(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        m, n = self.module, len(g)
        product = self.normalised(a) * g
        out: dict[str, Tensor] = {}
        for name, value in (("weight", product), ("bias", g)):
            if getattr(m, name, None) is None:
                continue
            if self.channel_last:
                out[name] = value.reshape(n, -1, *m.weight.shape).sum(1)
            else:
                out[name] = value.flatten(2).sum(-1) if value.dim() > 2 else value
        return out


class LayerNormRule(ElementwiseRule):
    """nn.LayerNorm."""

    def normalised(self, a: Tensor) -> Tensor:
        return F.layer_norm(a, self.module.normalized_shape, None, None, self.module.eps)


class RMSNormRule(ElementwiseRule):
    """nn.RMSNorm."""

    def normalised(self, a: Tensor) -> Tensor:
        return F.rms_norm(a, self.module.normalized_shape, None, self.module.eps)


class GroupNormRule(ElementwiseRule):
    """nn.GroupNorm."""

    channel_last = False

    def normalised(self, a: Tensor) -> Tensor:
        return F.group_norm(a, self.module.num_groups, None, None, self.module.eps)


class BatchNormRule(ElementwiseRule):
    """nn.BatchNorm1d/2d/3d in eval mode: a fixed affine map, so samples stay independent."""

    channel_last = False

    def normalised(self, a: Tensor) -> Tensor:
        m = self.module
        shape = (1, -1) + (1,) * (a.dim() - 2)
        mean: Tensor = m.running_mean.view(shape)
        deviation: Tensor = (m.running_var.view(shape) + m.eps).sqrt()
        return (a - mean) / deviation
