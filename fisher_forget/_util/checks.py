"""What a model and its numbers must be before anything is computed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import nn

from fisher_forget.errors import ConfigError, ModelError

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be scrubbed.

    Raises:
        ModelError: Not a module; in training mode with Dropout or BatchNorm; half precision; NaN or
            infinite weights; nothing trainable.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a model of type {type(model).__name__}", "a torch.nn.Module", "Wrap it in a module."
        )
    moody = [
        name or type(m).__name__
        for name, m in model.named_modules()
        if m.training and isinstance(m, STOCHASTIC)
    ]
    if moody:
        got = f"a model in training mode with Dropout or BatchNorm ({', '.join(moody[:4])})"
        expected = "a model in eval mode, whose output for a sample is always the same"
        raise ModelError(got, expected, "Call model.eval() first.")
    half = {
        str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)
    }
    if half:
        got = f"weights of type {', '.join(sorted(half))}"
        expected = "float32 or float64: half precision does not hold the range of a curvature"
        raise ModelError(got, expected, "Call model.float() first, and model.half() on the result.")
    broken = _not_finite(model)
    if broken:
        got = f"NaN or infinite weights in {', '.join(broken[:4])}"
        raise ModelError(got, "finite weights", "Load a checkpoint from before training diverged.")
    if not any(p.requires_grad for p in model.parameters()):
        got = "a model without trainable parameters"
        fix = "Unfreeze the parameters that were trained."
        raise ModelError(got, "at least one parameter with requires_grad=True", fix)


def _not_finite(model: nn.Module) -> list[str]:
    """Names of parameters with an entry that is NaN or infinite."""
    return [
        name
        for name, p in model.named_parameters()
        # the sum is one quick pass; only where it is not finite (it may have overflowed) is every
        # entry looked at
        if not bool(torch.isfinite(p.detach().sum())) and not bool(torch.isfinite(p).all())
    ]


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that nothing reads.

    Args:
        given: Their names.
        known: The names that there are.

    Raises:
        ConfigError: For the first unknown one, with the nearest right name.
    """
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
            fix = f"Did you mean {near[0]!r}?" if near else "Leave it out."
            raise ConfigError(f"the option {name!r}", f"one of {names}", fix)


def is_number(value: Any) -> bool:
    """Whether it is a finite number of at least 0."""
    if isinstance(value, (bool, str)):
        return False
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
