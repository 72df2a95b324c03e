"""The rule of convolutions: patches as positions, and their second moment without patches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget.curvature.rules.layers import (
    PATCH_BYTES,
    MatrixRule,
    add_gram,
    add_squared_products,
)

SHIFTS_FROM = 64  # output positions from which the autocorrelation is faster than forming patches
LOOP_FROM = 512  # output positions from which the convolution's own weight-gradient kernel serves each sample,
LOOP_ABOVE = (
    64  # if its matrix has more columns than this: images of few channels are faster as patches
)


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
        """What each output position sees, kernel offset by kernel offset: [N, R, K C], groups side
        by side in C.

        One copy of a strided view of the channels-last input, whose innermost runs are whole
        pixels.
        """
        m = self.module
        padded = self._padded(a).movedim(1, -1).contiguous()
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
        out = {} if m.bias is None else {"bias": g.flatten(2).sum(-1)}
        if self._loops(g):
            out["weight"] = torch.stack(
                [self._weight_gradient(a[i : i + 1], g[i : i + 1]) for i in range(n)]
            )
            return out
        x, y = self.patches(a, g.shape[2:]), g.flatten(2)
        if groups > 1:
            x = self._by_group(x)  # [N, G, R, K C/G]
            y = y.unflatten(1, (groups, -1))
            out["weight"] = self.from_matrix((y @ x).flatten(1, 2))
        else:
            out["weight"] = self.from_matrix(y @ x)
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
        m = self.module
        if "weight" in totals and self._loops(g):
            for i in range(len(g)):
                gradient = self._weight_gradient(a[i : i + 1], g[i : i + 1])
                totals["weight"].addcmul_(gradient, gradient)
            if "bias" in totals:
                totals["bias"] += g.flatten(2).sum(-1).square().sum(0)
            return
        if m.groups > 1 or "weight" not in totals:
            super().add_squares(totals, a, g)
            return
        squares = torch.zeros_like(
            self.to_matrix(totals["weight"]), memory_format=torch.contiguous_format
        )
        for x, y in self._chunks(a, g) if shared is None else [(shared, g.flatten(2))]:
            add_squared_products(squares, y, x)
        totals["weight"] += self.from_matrix(squares)
        if "bias" in totals:
            totals["bias"] += g.flatten(2).sum(-1).square().sum(0)

    def _chunks(self, a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches [n, R, K C] and output gradients [n, O, R] of a few samples at a time."""
        m = self.module
        step = max(1, PATCH_BYTES // (4 * m.weight[0].numel() * m.groups * g[0, 0].numel()))
        for start in range(0, len(a), step):
            rows = slice(start, start + step)
            yield self.patches(a[rows], g.shape[2:]), g[rows].flatten(2)

    def _weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """The library's own kernel on one sample: best where one sample's image is large."""
        m, d = self.module, self._spatial()
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g,
            a,
            m.weight.detach(),
            None,
            m.stride,
            m.padding,
            m.dilation,
            False,
            [0] * d,
            m.groups,
            [False, True, False],
        )[1]
        return gradient

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.module.groups > 1:
            return None
        return self.patches(a, g.shape[2:]), g.flatten(2).transpose(1, 2)

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.flatten(2).transpose(1, 2).flatten(0, 1))

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        m = self.module
        plain = (
            isinstance(m, nn.Conv2d)
            and m.groups == 1
            and m.stride == (1, 1)
            and m.kernel_size != (1, 1)
        )
        if plain and g[0, 0].numel() >= SHIFTS_FROM:
            self._add_shifts(total, a, g.shape[2:])
            return
        for x, _ in self._chunks(a, g):
            # the groups share one moment: any orthonormal basis serves
            add_gram(total, (self._by_group(x) if m.groups > 1 else x).flatten(0, -2))

    def _add_shifts(self, total: Tensor, a: Tensor, spatial: torch.Size) -> None:
        """Second moment of the patches from autocorrelations, without forming a patch.

        At stride 1 the block of the kernel offsets o and o' is sum_q x[q] x[q + o' - o]^T over the
        window of o. Over *all* q it depends on d = o' - o alone: K (2K - 1) shifts in two
        dimensions instead of K^4 pairs, and all of them are the weight gradient of one convolution
        of the image with itself. What a window leaves out at the borders is subtracted: strips of
        the same, a few pixels wide.
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
            """sum of x[q] x[q + d]^T over rows r0:r1 and columns c0:c1 of q: [C, C, kh, 2 kw -
            1]."""
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
        size = channels * kh * kw
        block = total[:size, :size].view(kh, kw, channels, kh, kw, channels)
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
                block[i, j, :, u, v] += inside[
                    :, :, u - i, v - j + kw - 1
                ]  # the upper triangle only
            if len(total) > size:
                total[:size, -1].view(kh, kw, channels)[i, j] += sums[
                    :, top:bottom, left:right
                ].sum((1, 2))
        if len(total) > size:
            total[-1, -1] += len(x) * h * w
