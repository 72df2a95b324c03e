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

LARGEST_SIDE = 8192  # a side with more rows keeps the standard basis: its eigendecomposition would cost O(side^3)


class Rule:
    """One kind of layer. Tensors `a` (layer input) and `g` (gradient at its output) lead with the samples."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients [N, *shape] by local parameter name."""
        raise NotImplementedError


class MatrixRule(Rule):
    """A layer whose weight is a matrix [O, I]: it has a basis for its rows and one for its columns."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """[..., *weight.shape] as [..., O, I]."""
        return weight.flatten(-self.module.weight.dim() + 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `to_matrix`."""
        return matrix.reshape(*matrix.shape[:-2], *self.module.weight.shape)

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Inputs [N, R, I] and output gradients [N, R, O], or `None` if M_n is cheaper to form directly."""
        return None

    def row_covariance(self, a: Tensor, g: Tensor) -> Tensor | None:
        """Second moment of the rows' side [O, O], summed over samples and positions; `None` keeps the basis I."""
        raise NotImplementedError

    def column_covariance(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        """Second moment [I, I], sum [I] and number of the columns' side (the sum serves the bias)."""
        raise NotImplementedError


class LinearRule(MatrixRule):
    """nn.Linear on inputs [N, ..., I]."""

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])

    def row_covariance(self, a: Tensor, g: Tensor) -> Tensor | None:
        rows = g.reshape(-1, g.shape[-1])
        return rows.T @ rows if rows.shape[1] <= LARGEST_SIDE else None

    def column_covariance(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        rows = a.reshape(-1, a.shape[-1])
        return rows.T @ rows, rows.sum(0), len(rows)

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, y = self.positions(a, g)
        out = {"weight": y.transpose(1, 2) @ x}
        if self.module.bias is not None:
            out["bias"] = y.sum(1)
        return out


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
        out: dict[str, Tensor] = {}
        y = g.flatten(2).reshape(n * groups, m.out_channels // groups, -1)
        parts = []
        for x in self.offsets(a, g.shape[2:]):
            if groups > 1:
                x = x.unflatten(-1, (groups, -1)).transpose(1, 2).flatten(0, 1)
            parts.append(y @ x)
        weight = torch.stack(parts, 1).unflatten(0, (n, groups))  # [N, G, K, O/G, C/G]
        weight = weight.permute(0, 1, 3, 4, 2).flatten(1, 2)
        out["weight"] = weight.unflatten(-1, m.kernel_size)
        if m.bias is not None:
            out["bias"] = g.flatten(2).sum(-1)
        return out

    def row_covariance(self, a: Tensor, g: Tensor) -> Tensor | None:
        rows = g.flatten(2).transpose(1, 2).flatten(0, 1)
        return rows.T @ rows if rows.shape[1] <= LARGEST_SIDE else None

    def column_covariance(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        rows = torch.stack(list(self.offsets(a, g.shape[2:])), -1).flatten(0, 1)  # [N R, C, K]
        if self.module.groups > 1:  # the groups share one covariance: any orthonormal basis serves
            rows = rows.unflatten(1, (self.module.groups, -1)).flatten(0, 1)
        rows = rows.flatten(1)
        return rows.T @ rows, rows.sum(0), len(rows)


class EmbeddingRule(MatrixRule):
    """nn.Embedding: the weight as [V, D]; its rows' side is one-hot, so it keeps the standard basis."""

    def row_covariance(self, a: Tensor, g: Tensor) -> Tensor | None:
        return None

    def column_covariance(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
        rows = g.reshape(-1, g.shape[-1])
        return rows.T @ rows, rows.sum(0), len(rows)

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
