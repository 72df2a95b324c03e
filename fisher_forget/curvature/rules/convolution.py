"""The rule of convolutions: patches as positions, and their second moment without patches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget.curvature.rules.base import (
    PATCH_BYTES,
    MatrixRule,
    add_gram,
    add_squared_products,
)

SHIFTS_FROM = 64  # output positions from which the autocorrelation is faster than forming patches
# Output positions from which the library's own weight-gradient kernel serves each sample, if the
# matrix has more columns than LOOP_ABOVE: images of few channels are faster as patches
LOOP_FROM, LOOP_ABOVE = 512, 64
Range = tuple[int, int]  # start and stop of pixels


def positions_last(g: Tensor) -> Tensor:
    """Output gradients [N, O, *spatial] as [N, O, R], without a copy in either memory layout."""
    if g.is_contiguous():
        return g.flatten(2)
    return g.movedim(1, -1).flatten(1, -2).transpose(1, 2)


def weight_gradient(
    g: Tensor,
    a: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """d <g, conv(a, weight)> / d weight by the library's own kernel; `weight` gives the shape."""
    straight, no_padding, weight_only = False, [0] * len(stride), [False, True, False]
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g, a, weight, None, stride, padding, dilation, straight, no_padding, groups, weight_only
    )[1]
    return gradient


class ConvRule(MatrixRule):
    """nn.Conv1d/2d/3d with stride, dilation, groups and padding modes.

    The matrix [O, K C] orders its columns kernel offset by kernel offset, channels innermost, as
    patches of a channels-last image lie in memory.
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

    def patches(self, a: Tensor, spatial: torch.Size) -> Tensor:
        """What each output position sees, by kernel offset: [N, R, K C], groups side by side in C.

        One copy of a strided view of the channels-last input, whose innermost runs are whole
        pixels.
        """
        m = self.module
        padded = self._padded(a).movedim(1, -1).contiguous()
        # output position r and kernel offset k see the pixel r * stride + k * dilation
        n, *pixels, c = padded.stride()
        steps = [p * s for p, s in zip(pixels, m.stride, strict=True)]
        kernel = [p * d for p, d in zip(pixels, m.dilation, strict=True)]
        view = padded.as_strided(
            (len(a), *spatial, *m.kernel_size, padded.shape[-1]), (n, *steps, *kernel, c)
        )
        patches: Tensor = view.reshape(len(a), -1, m.weight[0, 0].numel() * padded.shape[-1])
        return patches

    def to_matrix(self, weight: Tensor) -> Tensor:
        d = self._spatial()
        return weight.movedim(-d - 1, -1).flatten(-d - 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        m, d = self.module, self._spatial()
        weight: Tensor = matrix.unflatten(-1, (*m.kernel_size, m.in_channels // m.groups))
        return weight.movedim(-1, -d - 1)

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        m, n, groups = self.module, len(a), self.module.groups
        out = {} if m.bias is None else {"bias": positions_last(g).sum(-1)}
        if self._loops(g):
            out["weight"] = torch.stack(
                [self._weight_gradient(a[i : i + 1], g[i : i + 1]) for i in range(n)]
            )
            return out
        # M_n = sum_r g_nr a_nr^T, group by group
        x, y = self.patches(a, g.shape[2:]), positions_last(g)
        if groups > 1:
            matrix = (y.unflatten(1, (groups, -1)) @ self._by_group(x)).flatten(1, 2)
        else:
            matrix = y @ x
        out["weight"] = self.from_matrix(matrix)
        return out

    def _by_group(self, patches: Tensor) -> Tensor:
        """[N, R, K C] as [N, G, R, K C/G]."""
        kernel, groups = self.module.weight[0, 0].numel(), self.module.groups
        parted: Tensor = patches.unflatten(-1, (kernel, groups, -1))
        return parted.movedim(3, 1).flatten(-2)

    def _loops(self, g: Tensor) -> bool:
        m = self.module
        large = g[0, 0].numel() >= LOOP_FROM and m.weight[0].numel() > LOOP_ABOVE
        return large and m.padding_mode == "zeros" and not isinstance(m.padding, str)

    def shared(self, a: Tensor, g: Tensor) -> Tensor | None:
        """The patches [N, R, K C]."""
        return None if self._loops(g) or self.module.groups > 1 else self.patches(a, g.shape[2:])

    def add_squares(
        self, totals: dict[str, Tensor], a: Tensor, g: Tensor, shared: Tensor | None = None
    ) -> None:
        if "bias" in totals:
            totals["bias"] += positions_last(g).sum(-1).square().sum(0)
        if "weight" not in totals:
            return
        if self._loops(g):
            for i in range(len(g)):
                gradient = self._weight_gradient(a[i : i + 1], g[i : i + 1])
                totals["weight"].addcmul_(gradient, gradient)
        elif self.module.groups > 1:
            super().add_squares({"weight": totals["weight"]}, a, g)
        else:
            # summed as a matrix, whose columns are ordered as the patches', and turned back once
            matrix = self.to_matrix(totals["weight"])
            squares = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
            for x, y in self._chunks(a, g) if shared is None else [(shared, positions_last(g))]:
                add_squared_products(squares, y, x)
            totals["weight"] += self.from_matrix(squares)

    def _chunks(self, a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches [n, R, K C] and output gradients [n, O, R] of a few samples at a time."""
        m = self.module
        step = max(1, PATCH_BYTES // (4 * m.weight[0].numel() * m.groups * g[0, 0].numel()))
        for start in range(0, len(a), step):
            rows = slice(start, start + step)
            yield self.patches(a[rows], g.shape[2:]), positions_last(g[rows])

    def _weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """The library's own kernel on one sample: best where one sample's image is large."""
        m = self.module
        weight = m.weight.detach()
        return weight_gradient(g, a, weight, m.stride, m.padding, m.dilation, m.groups)

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.module.groups > 1:
            return None
        return self.patches(a, g.shape[2:]), positions_last(g).transpose(1, 2)

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, positions_last(g).transpose(1, 2).flatten(0, 1))

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        m = self.module
        plain = isinstance(m, nn.Conv2d) and m.groups == 1 and m.stride == (1, 1)
        if plain and m.kernel_size != (1, 1) and g[0, 0].numel() >= SHIFTS_FROM:
            self._add_shifts(total, a, g.shape[2:])
            return
        for x, _ in self._chunks(a, g):
            # the groups share one moment: any orthonormal basis serves
            add_gram(total, (self._by_group(x) if m.groups > 1 else x).flatten(0, -2))

    def _add_shifts(self, total: Tensor, a: Tensor, spatial: torch.Size) -> None:
        """Second moment of the patches from autocorrelations, without forming a patch.

        At stride 1 the block of the kernel offsets o and o' is sum_q x[q] x[q + o' - o]^T over the
        window of o: what the output positions see of the image at that offset.
        """
        m = self.module
        (kh, kw), (dh, dw), (h, w) = m.kernel_size, m.dilation, spatial
        if m.padding_mode == "zeros" and not isinstance(m.padding, str):
            (ph, pw), x = m.padding, a  # zeros add nothing: leave them out
        else:
            (ph, pw), x = (0, 0), self._padded(a)
        correlation = Autocorrelation(x, (kh, kw), (dh, dw))
        channels, height, width = x.shape[1:]
        size = channels * kh * kw
        block = total[:size, :size].view(kh, kw, channels, kh, kw, channels)
        sums = x.sum(0)
        for i, j in itertools.product(range(kh), range(kw)):
            rows = max(0, i * dh - ph), min(height, i * dh - ph + h)
            columns = max(0, j * dw - pw), min(width, j * dw - pw + w)
            shifted = correlation.within(rows, columns)
            for u, v in itertools.product(range(i, kh), range(kw)):
                if (u, v) >= (i, j):  # the upper triangle only
                    block[i, j, :, u, v] += shifted[:, :, u - i, v - j + kw - 1]
            if len(total) > size:
                seen = sums[:, slice(*rows), slice(*columns)].sum((1, 2))
                total[:size, -1].view(kh, kw, channels)[i, j] += seen
        if len(total) > size:
            total[-1, -1] += len(x) * h * w


class Autocorrelation:
    """sum over samples and pixels q of x[q] x[q + d]^T, for all shifts d between kernel offsets.

    There are K (2K - 1) shifts in two dimensions instead of K^4 pairs of offsets, and all of them
    are the weight gradient of one convolution of the image with itself.

    Args:
        x: Images [N, C, H, W].
        kernel: Sides of the kernel.
        dilation: Of the kernel.
    """

    def __init__(self, x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
        self.x, self.kernel, self.dilation = x, kernel, dilation
        self.reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        below, aside = self.reach  # shifts go down, and to either side
        self.wide = F.pad(x, (aside, aside, 0, below))
        self._known: dict[tuple[Range, Range], Tensor] = {}

    def over(self, rows: Range, columns: Range) -> Tensor | float:
        """The sum over q in a rectangle: [C, C, kh, 2 kw - 1]; 0 where it is empty."""
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            return 0.0
        key = rows, columns
        if key not in self._known:
            channels, (kh, kw), (below, aside) = self.x.shape[1], self.kernel, self.reach
            pixels = self.x[:, :, slice(*rows), slice(*columns)]
            seen = self.wide[:, :, rows[0] : rows[1] + below, columns[0] : columns[1] + 2 * aside]
            shape = self.x.new_empty(channels, channels, kh, 2 * kw - 1)
            pair = pixels.contiguous(), seen.contiguous()
            self._known[key] = weight_gradient(*pair, shape, (1, 1), (0, 0), self.dilation, 1)
        return self._known[key]

    def within(self, rows: Range, columns: Range) -> Tensor:
        """`over` a window that leaves out thin borders: the whole image, which all windows share,
        less strips a few pixels wide, whose corners would else be taken away twice."""
        height, width = self.x.shape[2:]
        every_row, every_column = (0, height), (0, width)
        left_right = (0, columns[0]), (columns[1], width)
        inside = self.over(every_row, every_column)
        for strip in ((0, rows[0]), (rows[1], height)):
            inside = inside - self.over(strip, every_column)
            for side in left_right:
                inside = inside + self.over(strip, side)
        for side in left_right:
            inside = inside - self.over(every_row, side)
        assert isinstance(inside, Tensor)
        return inside
