"""What a model must be before anything is computed; every problem is found here, before any work."""

from __future__ import annotations

import torch
from torch import nn

from fisher_forget.errors import ModelError

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be scrubbed.

    Raises:
        ModelError: In training mode with Dropout or BatchNorm; half precision; NaN or infinite weights; nothing
            trainable.
    """
    moody = [name or type(m).__name__ for name, m in model.named_modules() if m.training and isinstance(m, STOCHASTIC)]
    if moody:
        raise ModelError(
            f"a model in training mode with Dropout or BatchNorm ({', '.join(moody[:4])})",
            "a model in eval mode, whose output for a sample is always the same",
            "Call model.eval() first.",
        )
    half = {str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)}
    if half:
        raise ModelError(
            f"weights of type {', '.join(sorted(half))}",
            "float32 or float64: curvature spans more orders of magnitude than half precision holds",
            "Call model.float() first, and model.half() on the result.",
        )
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ModelError(
            f"NaN or infinite weights in {', '.join(broken[:4])}",
            "finite weights",
            "Load a checkpoint from before training diverged.",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            "a model without trainable parameters",
            "at least one parameter with requires_grad=True",
            "Unfreeze the parameters that were trained.",
        )
