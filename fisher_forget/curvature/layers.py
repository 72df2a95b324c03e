"""Layer rules: per-sample parameter gradients from a layer's input and the gradient at its output, without autograd.

A layer with weight matrix W [O, I] that sees inputs a_nr and output gradients g_nr at the R positions of sample n has
the per-sample gradient M_n = sum_r g_nr a_nr^T. Where R = 1 it has rank one, and sums of its squares need no
per-sample gradient at all: sum_n M_n^2 = (G*G)^T (A*A), one matrix product.

A rule is never trusted blindly: `tape.Tape` compares each with autograd on a few of the user's own samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE_BYTES = 2 << 20  # per-sample gradients formed at once; about the size of the cores' own caches
LOOP_FROM = 512  # output positions from which a convolution's own weight-gradient kernel serves each sample
PATCH_BYTES = 16 << 20  # patches formed at once
LARGEST_SIDE = 8192  # a side with more rows keeps the standard basis: its eigendecomposition would cost O(side^3)


class Rule:
    """One kind of layer. Tensors `a` (layer input) and `g` (gradient at its output) lead with the samples."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients [N, *shape] by local parameter name."""
        raise NotImplementedError

    def add_squares(self, totals: dict[str, Tensor], a: Tensor, g: Tensor) -> None:
        """Add sum_n of the squared per-sample gradients, run by run of samples, to the totals asked for."""
        step = max(1, PIECE_BYTES // (4 * sum(total.numel() for total in totals.values())))
        for start in range(0, len(g), step):
            for name, value in self.per_sample(a[start : start + step], g[start : start + step]).items():
                if name in totals:
                    totals[name] += value.square().sum(0)


class MatrixRule(Rule):
    """A layer whose weight is a matrix [O, I]: it has a basis for its rows and one for its columns."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[..., *weight.shape] as [..., O, I]."""
        return weight.flatten(-self.module.weight.dim() + 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`."""
        return matrix.reshape(*matrix.shape[:-2], *self.module.weight.shape)

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Inputs [N, R, I] and output gradients [N, R, O], where M_n = sum_r g_nr a_nr^T; `None` if there are none."""
        return None

    def position_count(self, g: Tensor) -> int:
        """R."""
        return g[0].numel() // int(self.to_matrix(self.module.weight).shape[0])

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        """Add sum_nr g g^T to the upper triangle of `total` [O, O]."""
        raise NotImplementedError

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        """Add sum_nr a a^T to the upper triangle of `total` [I, I]; with a 1 below each a where it is [I+1, I+1]."""
        raise NotImplementedError

    def has_row_basis(self) -> bool:
        """Whether the rows' side has a basis of its own; else it keeps the standard one."""
        return int(self.to_matrix(self.module.weight).shape[0]) <= LARGEST_SIDE


def add_squared_products(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Add sum_n (y_n x_n)^2 to `total` [O, I], for y [N, O, R] and x [N, R, I], in pieces that stay in the cache."""
    rows = max(1, min(len(total), PIECE_BYTES // (4 * total.shape[1])))
    step = max(1, PIECE_BYTES // (4 * rows * total.shape[1]))
    for top in range(0, len(total), rows):
        for start in range(0, len(y), step):
            piece = y[start : start + step, top : top + rows] @ x[start : start + step]
            total[top : top + rows] += piece.square_().sum(0)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the upper triangle of `total`: blocks right of the diagonal, two thirds of the products.

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

    def add_squares(self, totals: dict[str, Tensor], a: Tensor, g: Tensor) -> None:
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


class ConvRule(MatrixRule):
    """nn.Conv1d/2d/3d with stride, dilation, groups and padding modes.

    The kernel offsets are walked one by one on channels-last inputs: K matrix products [O, R] x [R, C] a sample
    instead of an unfolded input of K times the size.
    """

    def _spatial(self) -> int:
        return int(self.module.weight.dim() - 2)

    def _padded(self, a: Tensor) -> Tensor:
        m, d = self.module, self._spatial()
        if m.padding_mode != "zeros":
            return F.pad(a, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        if m.padding == "same":
            return F.pad(a, m._reversed_padding_repeated_twice)
        padding = (0,) * d if m.padding == "valid" else m.padding
        return F.pad(a, [p for size in reversed(padding) for p in (size, size)])

    def offsets(self, a: Tensor, spatial: torch.Size) -> Iterator[Tensor]:
        """The input seen by every output position through one kernel offset: [N, R, C], offset by offset."""
        m = self.module
        padded = self._padded(a).movedim(1, -1).contiguous()
        for offset in itertools.product(*(range(k) for k in m.kernel_size)):
            window = tuple(
                slice(o * d, o * d + s * (size - 1) + 1, s)
                for o, d, s, size in zip(offset, m.dilation, m.stride, spatial, strict=True)
            )
            yield padded[(slice(None), *window)].flatten(1, -2)

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        m, n, groups = self.module, len(a), self.module.groups
        out = {} if m.bias is None else {"bias": g.flatten(2).sum(-1)}
        if g[0, 0].numel() >= LOOP_FROM and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            out["weight"] = torch.stack([self._weight_gradient(a[i : i + 1], g[i : i + 1]) for i in range(n)])
            return out
        y = g.flatten(2).reshape(n * groups, m.out_channels // groups, -1)
        parts = []
        for x in self.offsets(a, g.shape[2:]):
            if groups > 1:
                x = x.unflatten(-1, (groups, -1)).transpose(1, 2).flatten(0, 1)
            parts.append(y @ x)
        weight = torch.stack(parts, 1)  # [N G, K, O/G, C/G]
        if groups > 1:
            weight = weight.unflatten(0, (n, groups)).transpose(1, 2).flatten(2, 3)
        weight = weight.permute(0, 2, 3, 1)  # a view: squares and sums do not mind the layout
        out["weight"] = weight.unflatten(-1, m.kernel_size)
        return out

    def add_squares(self, totals: dict[str, Tensor], a: Tensor, g: Tensor) -> None:
        m = self.module
        if m.groups > 1 or g[0, 0].numel() >= LOOP_FROM or "weight" not in totals:
            super().add_squares(totals, a, g)
            return
        y = g.flatten(2)
        squares = g.new_zeros(m.weight[0, 0].numel(), m.out_channels, m.in_channels)  # offset by offset
        for total, x in zip(squares, self.offsets(a, g.shape[2:]), strict=True):
            add_squared_products(total, y, x)
        totals["weight"] += squares.permute(1, 2, 0).view_as(totals["weight"])
        if "bias" in totals:
            totals["bias"] += y.sum(-1).square().sum(0)

    def _weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """The library's own kernel on one sample: best where one sample's image is large."""
        m, d = self.module, self._spatial()
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g, a, m.weight.detach(), None, m.stride, m.padding, m.dilation, False, [0] * d, m.groups, [False, True, False]
        )[1]
        return gradient

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.module.groups > 1:
            return None
        return self._patches(a, g.shape[2:]), g.flatten(2).transpose(1, 2)

    def _patches(self, a: Tensor, spatial: torch.Size) -> Tensor:
        """What each output position sees: [N, R, C K]."""
        return torch.stack(list(self.offsets(a, spatial)), -1).flatten(2)

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.flatten(2).transpose(1, 2).flatten(0, 1))

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        m = self.module
        if isinstance(m, nn.Conv2d) and m.groups == 1 and m.stride == (1, 1) and m.kernel_size != (1, 1):
            self._add_shifts(total, a, g.shape[2:])
            return
        step = max(1, PATCH_BYTES // max(4 * m.weight[0].numel() * m.groups * g[0, 0].numel(), 1))
        for start in range(0, len(a), step):
            rows = self._patches(a[start : start + step], g.shape[2:]).flatten(0, 1)
            if m.groups > 1:  # the groups share one moment: any orthonormal basis serves
                rows = rows.unflatten(1, (m.groups, -1)).flatten(0, 1)
            add_gram(total, rows)

    def _add_shifts(self, total: Tensor, a: Tensor, spatial: torch.Size) -> None:
        """Second moment of the patches from autocorrelations, without forming a patch.

        At stride 1 the block of the kernel offsets o and o' is sum_q x[q] x[q + o' - o]^T over the window of o. Over
        *all* q it depends on d = o' - o alone: K (2K - 1) shifts in two dimensions instead of K^4 pairs, and all of
        them are the weight gradient of one convolution of the image with itself. What a window leaves out at the
        borders is subtracted: strips of the same, a few pixels wide.
        """
        m = self.module
        (kh, kw), (dh, dw), (h, w) = m.kernel_size, m.dilation, spatial
        if m.padding_mode == "zeros" and not isinstance(m.padding, str):
            (ph, pw), x = m.padding, a
        else:
            (ph, pw), x = (0, 0), self._padded(a)
        height, width = x.shape[2:]
        wide = F.pad(x, ((kw - 1) * dw, (kw - 1) * dw, 0, (kh - 1) * dh))
        cache: dict[tuple[int, int, int, int], Tensor | float] = {}

        def shifts(r0: int, r1: int, c0: int, c1: int) -> Tensor | float:
            """sum of x[q] x[q + d]^T over rows r0:r1 and columns c0:c1 of q: [C, C, kh, 2 kw - 1]."""
            if r0 >= r1 or c0 >= c1:
                return 0.0
            key = (r0, r1, c0, c1)
            if key not in cache:
                cache[key] = torch.ops.aten.convolution_backward(
                    x[:, :, r0:r1, c0:c1].contiguous(),
                    wide[:, :, r0 : r1 + (kh - 1) * dh, c0 : c1 + 2 * (kw - 1) * dw].contiguous(),
                    x.new_empty(x.shape[1], x.shape[1], kh, 2 * kw - 1),
                    None,
                    [1, 1],
                    [0, 0],
                    [dh, dw],
                    False,
                    [0, 0],
                    1,
                    [False, True, False],
                )[1]
            return cache[key]

        channels = x.shape[1]
        block = total[: channels * kh * kw, : channels * kh * kw].view(channels, kh, kw, channels, kh, kw)
        sums = x.sum(0)
        for i, j in itertools.product(range(kh), range(kw)):
            top, bottom = max(0, i * dh - ph), min(height, i * dh - ph + h)
            left, right = max(0, j * dw - pw), min(width, j * dw - pw + w)
            inside = shifts(0, height, 0, width)
            for r0, r1 in ((0, top), (bottom, height)):
                inside = inside - shifts(r0, r1, 0, width)
                for c0, c1 in ((0, left), (right, width)):
                    inside = inside + shifts(r0, r1, c0, c1)
            for c0, c1 in ((0, left), (right, width)):
                inside = inside - shifts(0, height, c0, c1)
            assert isinstance(inside, Tensor)
            for u, v in itertools.product(range(i, kh), range(kw)):
                if (u, v) < (i, j):
                    continue
                pair = inside[:, :, u - i, v - j + kw - 1]
                block[:, i, j, :, u, v] += pair
                if (u, v) != (i, j):
                    block[:, u, v, :, i, j] += pair.T
            if len(total) > channels * kh * kw:
                total[: channels * kh * kw, -1].view(channels, kh, kw)[:, i, j] += sums[:, top:bottom, left:right].sum(
                    (1, 2)
                )
        if len(total) > channels * kh * kw:
            total[-1, -1] += len(x) * h * w


class EmbeddingRule(MatrixRule):
    """nn.Embedding: the weight as [V, D]; its rows' side is one-hot, so it keeps the standard basis."""

    def has_row_basis(self) -> bool:
        return False

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.reshape(-1, g.shape[-1]))

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        n, (vocabulary, width) = len(a), self.module.weight.shape
        index = a.reshape(n, -1) + torch.arange(n, device=a.device)[:, None] * vocabulary
        g = g.reshape(-1, width)
        if self.module.padding_idx is not None:
            g = g * (a.reshape(-1, 1) != self.module.padding_idx)
        out = g.new_zeros(n * vocabulary, width).index_add_(0, index.reshape(-1), g)
        return {"weight": out.view(n, vocabulary, width)}


class ElementwiseRule(Rule):
    """Scale and shift of a normalised input: the gradient is a sum over positions of g * a_hat and of g."""

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


RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.BatchNorm1d: BatchNormRule,
    nn.BatchNorm2d: BatchNormRule,
    nn.BatchNorm3d: BatchNormRule,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, by its class or a parent class; `None` if there is none."""
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return TransposedLinearRule(module)
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module)
    return None
