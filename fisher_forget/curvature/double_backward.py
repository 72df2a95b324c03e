"""What a backward pass hides from products: they differentiate it once more.

A backward pass that cannot be differentiated raises then. Or, worse, a part of it counts as
constant (`once_differentiable`, `detach()` or `no_grad()` in a function of the user's own), and
products lack what lies below. So they are compared with plain gradients, once for a model and data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded
from fisher_forget.curvature.products import HessianChunk, Linearised, twice_differentiable
from fisher_forget.data.batches import Batch
from fisher_forget.errors import CurvatureError, ModelError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

PROBED = 4  # samples on which products are compared with plain gradients
TOLERANCE = 0.01  # of a parameter's share; one that is hidden misses by 1
STEP = 1e-6  # of differences of gradients, in float64: few rectifiers switch within so little


def hidden_from_products(
    model: nn.Module, live: Params, batch: Batch, at: Mapping[str, Tensor] | None = None
) -> str:
    r"""Why products with J would fail or be wrong; empty where they are right.

    With g = J^T u by plain autograd, parameter by parameter, <u, J v> must be <g, v>. v = g / |g|^2
    makes the share of every parameter 1, so that no large one hides a small one.

    Args:
        model: A private copy.
        live: The parameters that products are for.
        batch: Samples; the first few are looked at.
        at: The weights, by default the model's.

    Raises:
        ModelError: If the model can't be differentiated even once.
    """
    probe = next(batch.chunks(PROBED))
    with torch.enable_grad(), P.attached(model, at or {}):
        outputs = P.call(model, {}, probe.args, probe.kwargs)
        if not outputs.requires_grad:
            return ""
        u = P.randn_like({"": outputs}, torch.Generator().manual_seed(0))[""]
        grads = P.pull(outputs, live, u)
    if not P.finite(grads):
        return ""  # the data or the weights are to blame
    lengths = {name: P.norm({name: g}) for name, g in grads.items()}
    # of a gradient far below the largest one, rounding is a large part
    least = torch.finfo(outputs.dtype).eps ** 0.5 * max(lengths.values(), default=0.0)
    along = {n: g / (lengths[n] * max(lengths[n], least)) for n, g in grads.items() if lengths[n]}
    shares = {name: lengths[name] / max(lengths[name], least) for name in along}

    try:
        with twice_differentiable(model, at):
            jacobian = Linearised(P.call(model, {}, probe.args, probe.kwargs), live)

            def missing(names: Iterable[str]) -> float:
                names = list(names)
                pushed = jacobian.push({name: along[name] for name in names})
                return abs(math.fsum(shares[name] for name in names) - P.dot({"": u}, {"": pushed}))

            if missing(along) <= TOLERANCE:
                return ""
            wrong = [name for name in along if not missing([name]) <= TOLERANCE]
    except Exception as error:  # whatever a backward raises that was never made for this
        return f"{type(error).__name__}: {error}"
    # without any it is rounding, which many parameters add up
    return _missing(wrong) if wrong else ""


def hidden_from_hessian(
    model: nn.Module, live: Params, batch: Batch, likelihood: Likelihood
) -> str:
    r"""Why products with the Hessian would fail or be wrong; empty where they are right.

    H v is compared with (g(w + e v) - g(w - e v)) / 2e, g by plain autograd in float64.

    Args:
        model: A private copy.
        live: The parameters that products are for.
        batch: Samples; the first few are looked at.
        likelihood: Gives the loss.
    """
    twin = copy_model(model).double()
    probe = next(batch.chunks(PROBED)).on(twin)
    weights: Params = {name: p for name, p in twin.named_parameters() if name in live}
    start = P.detached(weights)

    def loss() -> Tensor:
        return likelihood.losses(P.call(twin, {}, probe.args, probe.kwargs), probe.targets).sum()

    def gradient(at: Params) -> Params:
        with torch.enable_grad(), P.attached(twin, at):
            return P.zeros_like(start) | P.pull(loss(), weights)

    v = P.randn_like(start, seeded(0))
    v = P.map_params(lambda x: x / max(float(x.norm()), 1.0), v)

    def difference(step: float) -> Params:
        above, below = (gradient(P.add(start, v, e)) for e in (step, -step))
        return P.scale(P.add(above, below, -1), 1 / (2 * step))

    try:
        near, far, slope = difference(STEP), difference(3 * STEP), P.norm(gradient(start))
    except (ModelError, RuntimeError):
        return ""  # it runs in its own precision only
    try:
        with twice_differentiable(twin):
            found = P.zeros_like(start) | HessianChunk(loss(), weights)(v)
    except Exception as error:  # whatever a backward raises that was never made for this
        return f"{type(error).__name__}: {error}"

    def apart(a: Params, b: Params, name: str) -> float:
        return float((a[name] - b[name]).norm())

    least = 1e-3 * P.norm(near) + STEP * slope
    wrong = []
    for name, expected in near.items():
        gap = apart(found, near, name)
        # at a kink, or where the model rounds to single precision, differences say nothing: those
        # over two steps differ, too
        known = apart(near, far, name) < gap / 10
        if known and gap > TOLERANCE * max(float(expected.norm()), least):
            wrong.append(name)
    return _missing(wrong) if wrong else ""


def _missing(names: list[str]) -> str:
    return (
        f"products with {', '.join(names[:4])} miss what a backward hides from autograd, as by "
        "once_differentiable, detach() or no_grad()"
    )


def refuse_hidden(reason: str, instead: str) -> None:
    """Refuse products with what `hidden_from_products` found.

    Raises:
        CurvatureError: If there is a reason.
    """
    if reason:
        got = f"a model whose backward pass can't be differentiated again ({reason})"
        raise CurvatureError(got, "one that can: products J v are made of that", instead)
