"""What a model and its numbers must be before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fisher_forget._util.copies import unwrapped
from fisher_forget.errors import ConfigError, ModelError

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be scrubbed.

    Raises:
        ModelError: Not a module; no module of Python (TorchScript) or sharded; in training mode
            with Dropout or BatchNorm; weights that are missing, quantised, complex, in half
            precision, in memory that two share, NaN or infinite; nothing trainable.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a model of type {type(model).__name__}", "a torch.nn.Module", "Wrap it in a module."
        )
    model = unwrapped(model)
    _check_modules(model)
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        for unfit, got, expected, fix in UNFIT:
            if unfit(p):
                raise ModelError(f"{got} ({name})", expected, fix)
    moody = [
        name or type(m).__name__
        for name, m in model.named_modules()
        if m.training and isinstance(m, STOCHASTIC)
    ]
    if moody:
        got = f"a model in training mode with Dropout or BatchNorm ({', '.join(moody[:4])})"
        expected = "a model in eval mode, whose output for a sample is always the same"
        raise ModelError(got, expected, "Call model.eval() first.")
    _check_types(model)
    _check_memory(model)
    broken = _not_finite(model)
    if broken:
        got = f"NaN or infinite weights in {', '.join(broken[:4])}"
        raise ModelError(got, "finite weights", "Load a checkpoint from before training diverged.")
    if not any(p.requires_grad for p in model.parameters()):
        got = "a model without trainable parameters"
        fix = "Unfreeze the parameters that were trained."
        raise ModelError(got, "at least one parameter with requires_grad=True", fix)


# tensors that no model can be scrubbed with: which, what they are, what is expected, what to do
UNFIT: tuple[tuple[Callable[[Tensor], bool], str, str, str], ...] = (
    (
        is_lazy,
        "a lazy module that has seen no batch yet",
        "weights that have a shape and were trained",
        "Run one batch through the model, and load or train its weights.",
    ),
    (
        lambda x: any(kind.__name__ in ("DTensor", "FlatParameter") for kind in type(x).__mro__),
        "sharded weights, of which each process holds a part",
        "whole weights in one process",
        "Gather the state dict (full_tensor(), or FSDP's FULL_STATE_DICT) into a plain model.",
    ),
    (
        lambda x: x.is_meta,
        "weights on the meta device, which have no values",
        "weights with values",
        "Call model.to_empty(device='cpu') and load a state dict.",
    ),
    (
        lambda x: x.is_quantized,
        "quantised weights",
        "float32 or float64",
        "Forget with the model as it was trained, and quantise the result's.",
    ),
    (
        lambda x: x.is_complex() and isinstance(x, nn.Parameter),
        "complex weights",
        "real ones: the curvature is of real parameters",
        "Hold real and imaginary part as one real parameter, and use torch.view_as_complex in "
        "forward.",
    ),
)


def _check_modules(model: nn.Module) -> None:
    """Refuse modules whose forward or weights are not Python's."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'}, a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            got, expected = f"TorchScript ({where})", "a module of Python, whose layers can be seen"
            fix = "Pass the module that was scripted or traced, and script the result's model."
            raise ModelError(got, expected, fix)
        if "quantized" in type(module).__module__.split("."):
            fix = "Forget with the model as it was trained, and quantise the result's."
            raise ModelError(f"quantised layers ({where})", "float32 or float64 weights", fix)
        if type(module).__name__ == "FullyShardedDataParallel":
            got = f"sharded weights ({where}), of which each process holds a part"
            fix = "Gather the state dict (FSDP's FULL_STATE_DICT) into a plain model."
            raise ModelError(got, "whole weights in one process", fix)


def _check_memory(model: nn.Module) -> None:
    """Refuse parameters that are two for autograd and one in memory: whatever moves one of them
    moves the other.

    Raises:
        ModelError: If a trainable parameter starts where another one does.
    """
    known: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in model.named_parameters():
        other, q = known.setdefault(p.data_ptr(), (name, p)) if p.numel() else (name, p)
        if q is not p and (p.requires_grad or q.requires_grad):
            got = f"parameters that share their memory, but not their gradients ({other}, {name})"
            fix = "Tie them by assigning the parameter itself: b.weight = a.weight, without .data."
            raise ModelError(got, "one parameter for each piece of memory", fix)


def _check_types(model: nn.Module) -> None:
    """Refuse parameters of another type than float32 and float64."""
    others = {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}
    names = ", ".join(sorted(map(str, others)))
    if any(not dtype.is_floating_point for dtype in others):
        got, expected = f"quantised weights of type {names}", "float32 or float64 weights"
        fix = "Load the model without quantisation, and quantise the result's."
        raise ModelError(got, expected, fix)
    if others:
        expected = "float32 or float64: half precision does not hold the range of a curvature"
        fix = "Call model.float() first, and model.half() on the result."
        raise ModelError(f"weights of type {names}", expected, fix)


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


LARGEST = 2.0**127  # of single precision


def is_number(value: Any) -> bool:
    """Whether it is a number of at least 0, finite in single precision."""
    if isinstance(value, (bool, str)):
        return False
    try:
        return 0 <= float(value) < LARGEST
    except (TypeError, ValueError, OverflowError):
        return False


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
