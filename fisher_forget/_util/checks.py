"""What model and options must be before anything is computed; every problem is found here, before
any work."""

from __future__ import annotations

import math
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
        raise ModelError(
            f"a model in training mode with Dropout or BatchNorm ({', '.join(moody[:4])})",
            "a model in eval mode, whose output for a sample is always the same",
            "Call model.eval() first.",
        )
    half = {
        str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)
    }
    if half:
        raise ModelError(
            f"weights of type {', '.join(sorted(half))}",
            "float32 or float64: curvature spans more orders of magnitude than half precision holds",
            "Call model.float() first, and model.half() on the result.",
        )
    broken = [
        name
        for name, p in model.named_parameters()
        # the sum is one quick pass; only where it is not finite (it may have overflowed) is every
        # entry looked at
        if not bool(torch.isfinite(p.detach().sum())) and not bool(torch.isfinite(p).all())
    ]
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


def check_options(
    *,
    weight_decay: Any,
    draws: Any,
    steps: Any,
    damping: Any,
    solver: Any,
    drift: Any,
    budget: Any,
    noise: Any,
    exponent: Any,
    seed: Any = 0,
) -> None:
    """Refuse values of `forget`'s options that no stage can use.

    Raises:
        ConfigError: For the first option that is out of range or of a wrong type.
    """
    number, positive = "a finite number of at least 0", "a finite number above 0"
    noises = "'auto', a NoiseTarget or None"
    for name, value, good, expected in (
        ("weight_decay", weight_decay, _number(weight_decay), number),
        ("draws", draws, _whole(draws, 1), "a whole number of at least 1"),
        (
            "steps",
            steps,
            steps == "auto" or _whole(steps, 1),
            "a whole number of at least 1, or 'auto'",
        ),
        ("damping", damping, damping == "auto" or _number(damping), f"{number}, or 'auto'"),
        (
            "damping",
            damping,
            damping == "auto" or steps != "auto" or damping > 0,
            f"{positive} with steps='auto'",
        ),
        ("solver", solver, solver in ("auto", "cg", "direct"), "'auto', 'cg' or 'direct'"),
        ("drift", drift, drift == "auto" or isinstance(drift, bool), "True, False or 'auto'"),
        (
            "budget",
            budget,
            budget is None or budget == math.inf or _number(budget),
            "nats of at least 0, or None",
        ),
        (
            "noise",
            noise,
            noise in (None, "auto") or _target(noise) or _number(noise),
            f"{number}, {noises}",
        ),
        ("exponent", exponent, _number(exponent), number),
        ("seed", seed, _whole(seed, 0), "a whole number of at least 0"),
    ):
        if not good:
            raise ConfigError(
                f"{name}={value!r}", expected, f"Correct {name}, or leave it at its default."
            )


def _number(value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


def _target(value: Any) -> bool:
    """Whether it is a `NoiseTarget`, which checks itself; its module builds on this one."""
    return type(value).__name__ == "NoiseTarget"


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
