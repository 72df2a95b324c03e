"""Params = dict[str, Tensor]: arithmetic on named parameters, and functional calls into a model.

Names are those of `model.named_parameters()`: a tensor that two modules share appears once, under
its first name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget._util.copies import copy_model, unwrapped
from fisher_forget._util.torch_errors import reason_of
from fisher_forget.errors import ConfigError, ModelError

Params = dict[str, Tensor]


def trainable(model: nn.Module, subset: str | tuple[str, ...] | None = None) -> Params:
    """The parameters with `requires_grad`, optionally only those whose name matches a pattern.

    Args:
        model: Any module; `DataParallel` and the like count as the module within.
        subset: Shell-style pattern or patterns (`"head.*"`); `None` keeps all.

    Raises:
        ModelError: If nothing is left.
        ConfigError: If the patterns are no texts.
    """
    patterns = (subset,) if isinstance(subset, str) else subset
    texts = isinstance(patterns, (tuple, list)) and all(isinstance(p, str) for p in patterns)
    if patterns is not None and not texts:
        expected = "a pattern of parameter names such as 'head.*', several, or None"
        raise ConfigError(f"subset={subset!r}", expected, "Correct `subset`.")
    candidates: Params = {
        name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad
    }
    wanted = {
        name: p
        for name, p in candidates.items()
        if patterns is None or any(fnmatchcase(name, pat) for pat in patterns)
    }
    if not wanted:
        if candidates:
            got = f"no parameter that matches {patterns!r}"
            raise ModelError(got, f"a pattern for some of {list(candidates)}", "Correct `subset`.")
        got = "a model without trainable parameters"
        fix = "Unfreeze the parameters that were trained."
        raise ModelError(got, "at least one parameter with requires_grad=True", fix)
    return wanted


def detached(params: Mapping[str, Tensor]) -> Params:
    """A detached copy that shares no memory with the model."""
    return {name: p.detach().clone() for name, p in params.items()}


def load(model: nn.Module, params: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model` whose named parameters hold `params`."""
    twin = copy_model(model)
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in params.items():
            weights[name].copy_(value)
    twin.zero_grad(set_to_none=True)
    return twin


def channels_last(model: nn.Module) -> nn.Module:
    """The same model, its image convolutions laid out channels last, where kernels are faster."""
    for module in model.modules():
        for p in module.parameters() if isinstance(module, nn.Conv2d) else ():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def map_params(
    fn: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]
) -> Params:
    """Apply `fn` name by name."""
    return {name: fn(value, *(r[name] for r in rest)) for name, value in first.items()}


def add(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float | Mapping[str, float] = 1.0
) -> Params:
    """a + alpha b; alpha is one number, or one by name."""
    if isinstance(alpha, Mapping):
        return {name: torch.add(x, b[name], alpha=alpha[name]) for name, x in a.items()}
    return map_params(lambda x, y: torch.add(x, y, alpha=alpha), a, b)


def scale(a: Mapping[str, Tensor], c: float) -> Params:
    """c a."""
    return map_params(lambda x: x * c, a)


def zeros_like(a: Mapping[str, Tensor]) -> Params:
    """A zero of the same shapes."""
    return map_params(torch.zeros_like, a)


def outline(a: Mapping[str, Tensor]) -> Params:
    """Names, shapes and dtypes alone: tensors without values, on the device "meta"."""
    return map_params(lambda x: torch.empty_like(x, device="meta"), a)


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product, accumulated in float64."""
    return math.fsum(float(torch.sum(x.double() * b[name].double())) for name, x in a.items())


def norm(a: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all parameters together."""
    return math.sqrt(dot(a, a))


def size(a: Mapping[str, Tensor]) -> int:
    """Number of scalars d."""
    return sum(x.numel() for x in a.values())


def finite(a: Mapping[str, Tensor]) -> bool:
    """True if no entry is NaN or infinite."""
    return all(bool(torch.isfinite(x).all()) for x in a.values())


def randn_like(a: Mapping[str, Tensor], generator: torch.Generator) -> Params:
    """Standard normal of the same shapes, by the generator alone: no draw depends on the device."""
    return {
        name: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(
            x.device
        )
        for name, x in a.items()
    }


def expanded(values: Mapping[str, Tensor | float], like: Mapping[str, Tensor]) -> Params:
    """Numbers or tensors by name in the shapes of others; 0 for names without one."""
    return {
        name: torch.as_tensor(values.get(name, 0.0), dtype=x.dtype, device=x.device).expand(x.shape)
        for name, x in like.items()
    }


def flatten(a: Mapping[str, Tensor]) -> Tensor:
    """One vector [d], in the mapping's order."""
    return torch.cat([x.reshape(-1) for x in a.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    """Inverse of `flatten`."""
    pieces = vector.split([x.numel() for x in like.values()])
    return {name: piece.view_as(x) for (name, x), piece in zip(like.items(), pieces, strict=True)}


@contextmanager
def attached(model: nn.Module, at: Mapping[str, Tensor]) -> Iterator[None]:
    """The model at given weights, through forward and backward: checkpoints recompute with them.

    Its parameters stay the same objects, so that gradients are asked of them, and a graph is right
    as long as they hold these values: a later backward pass must be within such a context, too.
    Buffers that forward passes change are as before afterwards.

    Args:
        model: A private copy.
        at: Values by the names of its parameters and buffers; the others stay.
    """
    moved = [(p, p.data, at[name]) for name, p in model.named_parameters() if name in at]
    given = {id(b): at[name] for name, b in model.named_buffers() if name in at}
    slots = [
        (module._buffers, key, b, b._version)
        for module in model.modules()
        for key, b in module._buffers.items()
        if b is not None
    ]
    # graphs may hold the buffers as they are: what changes is replaced, not written back
    before = {id(b): b.detach().clone() for _, _, b, _ in slots}
    try:
        for p, _, value in moved:
            p.data = value.detach()
        for buffers, key, b, _ in slots:
            if id(b) in given:
                buffers[key] = given[id(b)].detach().clone()
        yield
    finally:
        for p, data, _ in moved:
            p.data = data
        for buffers, key, b, version in slots:
            buffers[key] = b if b._version == version else before[id(b)]


def pull(outputs: Tensor, leaves: Mapping[str, Tensor], column: Tensor | None = None) -> Params:
    """Gradient of <column, outputs> by autograd, dense, for the leaves that the outputs use.

    Args:
        outputs: With their graph, which is kept.
        leaves: Leaf tensors by name.
        column: Of the outputs' shape; left out for a scalar.
    """
    wanted = list(leaves.values())
    try:
        grads: Any = torch.autograd.grad(
            outputs, wanted, column, retain_graph=True, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        # torch's reentrant checkpoints know nothing but backward()
        for leaf in wanted:
            leaf.grad = None
        torch.autograd.backward(outputs, column, retain_graph=True)
        grads = [leaf.grad for leaf in wanted]
        for leaf in wanted:
            leaf.grad = None
    pairs = zip(leaves, grads, strict=True)
    return {name: g.to_dense() if g.is_sparse else g for name, g in pairs if g is not None}


def call(
    model: nn.Module,
    params: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    fix: str = "Forward runs on whole batches of the loader: let it read the number of samples off "
    "its inputs, so that it takes any.",
) -> Tensor:
    """The model's logits at given parameters: a tensor, or the `.logits` of what forward returns.

    Args:
        model: The module.
        params: Values by name; empty for the model's own.
        args: Of forward, by position.
        kwargs: Of forward, by keyword.
        fix: What to do where forward fails, and torch does not say why.

    Raises:
        ModelError: If forward fails or returns neither.
    """
    try:
        if params:
            out = torch.func.functional_call(model, dict(params), args, kwargs)
        else:
            out = model(*args, **kwargs)
    except Exception as error:
        given = [f"{_described(x)} by position" for x in args]
        given += [f"{name}={_described(x)}" for name, x in kwargs.items()]
        known = reason_of(error)
        raise ModelError(
            f"{type(error).__name__} from {type(model).__name__}.forward{_signature(model)} "
            f"on {', '.join(given)}: {error}",
            "a forward that takes these inputs" if known is None else known[2],
            fix if known is None else known[3],
        ) from error
    return logits(out)


def first_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The same on a batch as the loader gives it, before anything else has been tried: where it
    fails, the batch may be laid out in another way."""
    layout = (
        "Pass unpack=lambda batch: (inputs, targets) if the batch is laid out differently; forward "
        "must take any number of samples."
    )
    return call(model, {}, args, kwargs, fix=layout)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _signature(model: nn.Module) -> str:
    """Of forward, without annotations."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return "(...)"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def logits(out: Any) -> Tensor:
    """The logits in what a forward returned."""
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor):
        got = f"a forward that returned {type(out).__name__}"
        fix = "Wrap the model so that forward returns its logits."
        raise ModelError(got, "a tensor of logits, or an object with .logits", fix)
    if out.is_complex() or out.layout is not torch.strided:
        kind = "complex" if out.is_complex() else str(out.layout).removeprefix("torch.")
        fix = "Return real numbers (.real, .abs()) in a dense tensor (.to_dense()) from forward."
        raise ModelError(f"{kind} outputs", "a dense tensor of real logits", fix)
    return out
