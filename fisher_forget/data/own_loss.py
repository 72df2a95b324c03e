"""The user's own loss on a batch, and whether a likelihood has it.

The own loss is `loss_fn`, or that of a model which takes `labels` and returns a `.loss`, as those
of `transformers` do.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ConfigError, DataError, FisherForgetWarning, NumericalError
from fisher_forget.likelihood import Gaussian, Likelihood

LossFn = Callable[[Tensor, Tensor], Any]  # (outputs, targets) -> loss

RELATIVE = 1e-4  # difference of two losses that are the same, in float32
# Losses in nats below this say nothing: so much is lost where the logits are large. Squared errors
# have no such scale.
NATS = 1e-6


@dataclass(frozen=True)
class Look:
    """One batch.

    Attributes:
        outputs: Of the model.
        targets: As unpacked.
        own: The user's mean loss, read in each way that makes sense; none where it is not known.
    """

    outputs: Tensor
    targets: Tensor
    own: tuple[float, ...]


def look_at(model: nn.Module, batch: Batch, loss_fn: LossFn | None, given: Likelihood) -> Look:
    """Outputs of a batch, and the user's own loss on it.

    Args:
        model: A private copy, in eval mode.
        batch: Where the model is.
        loss_fn: What the model was trained with; `None` asks the model itself.
        given: Says which targets are ignored.
    """
    outputs = P.first_call(model, batch.args, batch.kwargs)
    if loss_fn is None:
        own = _model_loss(model, batch)
        return Look(outputs, batch.targets, () if own is None else (own,))
    ignored = getattr(given, "ignore_index", -100)
    return Look(outputs, batch.targets, values_of(loss_fn, outputs, batch.targets, ignored))


def _model_loss(model: nn.Module, batch: Batch) -> float | None:
    """`model(..., labels=targets).loss`; `None` where there is no such thing."""
    accepted = inspect.signature(model.forward).parameters
    # wrappers pass on what they are given: forward(*args, **kwargs)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if not ("labels" in accepted or passes_on) or "labels" in batch.kwargs:
        return None
    try:
        loss = getattr(model(*batch.args, **batch.kwargs, labels=batch.targets), "loss", None)
    except Exception as error:
        if "labels" not in accepted:
            return None  # what is within takes none
        warnings.warn(
            f"The model's own loss could not be compared ({type(error).__name__}: {error}). Pass "
            "loss_fn=, what the model was trained with.",
            FisherForgetWarning,
            stacklevel=6,
        )
        return None
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def values_of(loss_fn: LossFn, outputs: Tensor, targets: Tensor, ignored: int) -> tuple[float, ...]:
    """The loss, once for each way in which a training loop may hand it outputs and targets.

    Raises:
        ConfigError: None of them works.
    """
    if isinstance(loss_fn, type):
        got, fix = f"the class {loss_fn.__name__} as loss_fn", f"Pass loss_fn={loss_fn.__name__}()."
        raise ConfigError(got, "a function of outputs and targets", fix)
    torchs_own = str(getattr(loss_fn, "__module__", "")).startswith("torch.nn")
    ways, elementwise = [(outputs, targets)], outputs.numel() == targets.numel()
    if elementwise:  # [B, 1] and [B]; whole numbers as labels in [0, 1]
        fitted = outputs, targets.reshape(outputs.shape).to(outputs.dtype)
        ways.insert(0 if torchs_own else 1, fitted)  # torch's would broadcast [B, 1] against [B]
    elif outputs.dim() > 2 and targets.shape == outputs.shape[:-1]:
        ways.append((outputs.flatten(0, -2), targets.flatten()))
    values, failure = list[float](), ""
    for f, y in ways:
        try:
            # clones, since the function may work in place
            loss = torch.as_tensor(loss_fn(f.clone(), y.clone())).double()
        except Exception as error:
            failure = failure or f"{type(error).__name__}: {error}"
            continue
        if loss.dim() and not y.is_floating_point() and loss.numel() == y.numel():
            loss = loss.flatten()[y.flatten() != ignored]
        values.append(float(loss.mean()))
        if elementwise or not torchs_own:
            break  # the others are for losses that fail, or that were given positions in a row
    if not values:
        shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
        raise ConfigError(
            f"loss_fn that fails on {shapes} ({failure})",
            "a function of outputs and targets, as the training had them, that returns the loss",
            "Pass loss_fn=lambda outputs, targets: ..., which may reshape both first.",
        )
    return tuple(dict.fromkeys(values))


def agrees(likelihood: Likelihood, looks: Sequence[Look]) -> bool:
    """Whether the mean loss is the user's, on both batches."""
    least = 0.0 if isinstance(likelihood, Gaussian) else NATS
    for look in looks:
        ours = mean_loss(likelihood, look)
        if ours is not None and math.isnan(ours):
            continue  # no position is scored
        if ours is None or not any(
            math.isclose(ours, own, rel_tol=RELATIVE, abs_tol=least) for own in look.own
        ):
            return False
    return True


def mean_loss(likelihood: Likelihood, look: Look) -> float | None:
    """`None` where outputs and targets do not fit the likelihood."""
    try:
        likelihood.check(look.outputs, look.targets)
    except (DataError, NumericalError):
        return None
    scored = bool(likelihood.counts(look.targets).sum() > 0)
    # the mean over no position is not a number in torch
    return float(likelihood.mean_loss(look.outputs, look.targets)) if scored else math.nan
