"""Weights of few bits, as models are published to save space: does what was forgotten come back?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget._util.checks import is_whole
from fisher_forget._util.copies import copy_model
from fisher_forget.attack.after_release import AfterRelease
from fisher_forget.errors import ConfigError

LARGEST_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Quantisation(AfterRelease):
    """Round the weights to few bits, as is done to publish a smaller model.

    Threat model: none is needed; an attacker has the weights.

    Attributes:
        bits: 2 to 32.
        per: "channel": each output channel has a step of its own; "tensor": one for the whole.

    Raises:
        ConfigError: If a value is out of range.

    Source: Zhang et al. 2024, arXiv:2410.16454: a change of the weights that is smaller than half a
    step is undone.
    """

    bits: int = 8
    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        _check_bits(self.bits, self.per)

    @property
    def name(self) -> str:
        return f"quantisation to {self.bits} bits"

    def changed(self, model: nn.Module, deleted: TensorDataset | None) -> nn.Module:
        return quantised(model, self.bits, self.per)


def quantised(
    model: nn.Module, bits: int, per: Literal["channel", "tensor"] = "channel"
) -> nn.Module:
    r"""A copy whose weights are multiples of a step: symmetric, round to nearest,

        w_q = step round(w / step),    step = max |w| / (2^(bits - 1) - 1),

    the maximum over an output channel (the first dimension) or over the tensor. Parameters of one
    dimension (biases, norms) and buffers stay, as is usual. Values are held in the type that they
    had.

    Args:
        model: Untouched.
        bits: 2 to 32.
        per: "channel" or "tensor".

    Raises:
        ConfigError: If a value is out of range.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.7, -0.25, 0.04]]))
        >>> quantised(layer, 4).weight.data
        tensor([[ 0.7000, -0.3000,  0.0000]])
    """
    _check_bits(bits, per)
    twin = copy_model(model)
    with torch.no_grad():
        for p in twin.parameters():
            if p.dim() > 1 and p.numel():
                p.copy_(_rounded(p.double(), 2 ** (bits - 1) - 1, per))
    return twin


def _rounded(w: Tensor, levels: int, per: str) -> Tensor:
    """w at the nearest of 2 `levels` + 1 values."""
    size = w.abs().flatten(1).amax(1) if per == "channel" else w.abs().max()
    step = (size / levels).reshape(-1, *([1] * (w.dim() - 1)))
    return torch.where(step > 0, step * torch.round(w / step), w)


def _check_bits(bits: int, per: str) -> None:
    if not is_whole(bits, 2) or bits > LARGEST_BITS:
        got = f"bits={bits!r}"
        raise ConfigError(got, f"a whole number from 2 to {LARGEST_BITS}", "Pass bits=8, say.")
    if per not in ("channel", "tensor"):
        raise ConfigError(f"per={per!r}", "'channel' or 'tensor'", "Pass one of these names.")
