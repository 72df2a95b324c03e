"""Rules of normalisation layers: scale and shift of a normalised input."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fisher_forget.curvature.rules.base import Rule


class ElementwiseRule(Rule):
    """Scale and shift of a normalised input: the gradients sum g * a_hat and g over positions."""

    channel_last: ClassVar[bool] = True

    def normalised(self, a: Tensor) -> Tensor:
        """a_hat, what scale and shift are applied to."""
        raise NotImplementedError

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        m, n = self.module, len(g)
        # y = weight * a_hat + bias, so dl/dweight = sum g * a_hat and dl/dbias = sum g
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


class LanguageModelNormRule(ElementwiseRule):
    """RMS normalisation over the last dimension as language models define it, in float32: scaled by
    the weight, or by 1 + the weight."""

    def normalised(self, a: Tensor) -> Tensor:
        m = self.module
        eps: float = m.variance_epsilon if hasattr(m, "variance_epsilon") else m.eps
        return a * (a.float().square().mean(-1, keepdim=True) + eps).rsqrt().to(a.dtype)


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
