"""The likelihood that has the user's own loss: settled once, before any work.

On a few samples, in two batches of different sizes, the likelihood's mean loss must equal the
user's own. Where another likelihood's does, it takes the place of one that was given by name; where
none does, the difference is named.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy
from fisher_forget._util.isolation import isolated
from fisher_forget.data.batches import Batch
from fisher_forget.data.own_loss import (
    RELATIVE,
    Look,
    LossFn,
    agrees,
    look_at,
    mean_loss,
    values_of,
)
from fisher_forget.data.pieces import MEMORY, OUTPUTS, PIECE
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, FisherForgetWarning, ModelError
from fisher_forget.likelihood import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    named,
    resolve_likelihood,
)

SAMPLES = 96  # that are looked at; two thirds of them in the first batch
DIGITS = (2, 3, 6)  # of a number that is solved for: a round one, if that will do


def settled_likelihood(
    model: nn.Module,
    split: Split,
    likelihood: Likelihood | str,
    loss_fn: LossFn | None = None,
    *,
    memory: int = MEMORY,
) -> Likelihood:
    """The likelihood whose mean loss is the user's own loss.

    Args:
        model: A private copy, in eval mode; its forward pass may leave traces in it.
        split: The data.
        likelihood: What was asked for: a name may give way to another likelihood, an instance not.
        loss_fn: What the model was trained with, (outputs, targets) -> a mean loss, or losses by
            sample or position; `None` asks the model itself, where it can tell.
        memory: Bytes that outputs may take; fewer samples are looked at where they are large.

    Raises:
        ConfigError: No likelihood has this loss, or another one than the instance that was given.
        ModelError: The outputs are probabilities, and no `loss_fn` says that this is meant.
        DataError, NumericalError: Targets or outputs that the likelihood cannot use.
    """
    given = resolve_likelihood(likelihood)
    with isolated(), torch.no_grad():
        batches = _two_batches(split, model, memory // PIECE)
        looks = [look_at(model, batch, loss_fn, given) for batch in batches]
        if not all(look.own for look in looks):
            _check_range(given, looks)
            _warn_of_shift(given, looks)
            return given
        read, by_name = _read_off(loss_fn), isinstance(likelihood, str)
        nearest = [known for known in (read, given) if known is not None]
        for candidate in _candidates(nearest if by_name else nearest[::-1], looks[0]):
            if not agrees(candidate, looks):
                continue
            if by_name:
                _check_layout(candidate, looks)
            if by_name or candidate == given:
                return candidate
            raise _refusal(given, looks, loss_fn, f"Pass likelihood={named(candidate)!r}.")
        raise _unexplained([given, *LIKELIHOODS.values()], looks, loss_fn)


def trained_likelihood(model: nn.Module, split: Split, likelihood: Likelihood | str) -> Likelihood:
    """The likelihood where no `loss_fn` can be given: an instance is taken at its word, a name
    settled on a copy of the model.

    Raises:
        ConfigError, ModelError, DataError, NumericalError: As for `settled_likelihood`.
    """
    if isinstance(likelihood, Likelihood) or not len(split.retain):
        return resolve_likelihood(likelihood)
    return settled_likelihood(private_copy(model), split, likelihood)


def _two_batches(split: Split, model: nn.Module, memory: int) -> Iterator[Batch]:
    """Samples from all over the data, in two batches of different sizes where there are three."""
    count = min(SAMPLES, split.batch_size + max(1, split.batch_size // 2), len(split.retain))
    few = split.few("retain").on(model)
    outputs = P.first_call(model, few.args, few.kwargs)
    one = OUTPUTS * outputs.numel() * outputs.element_size() // len(few)
    count = min(count, max(3, memory // max(one, 1)))
    # sorted data have all of their classes in it
    spread = split.retain[np.unique(np.linspace(0, len(split.retain) - 1, count).astype(int))]
    third = np.arange(len(spread)) % 3 == 1
    lots = [spread[~third], spread[third] if third.any() else spread]
    return (batch.on(model) for batch in split.read(lots))


def _check_layout(likelihood: Likelihood, looks: Sequence[Look]) -> None:
    """Refuse to choose between classes first and last where the loss cannot tell, either."""
    if isinstance(likelihood, Categorical) and likelihood.class_dim is not None:
        other: Any = -likelihood.class_dim
        if agrees(replace(likelihood, class_dim=other), looks):
            replace(likelihood, class_dim=None).check(looks[0].outputs, looks[0].targets)


# ---- other likelihoods that may have been meant


def _candidates(nearest: Sequence[Likelihood], look: Look) -> Iterator[Likelihood]:
    """Likelihoods of common losses, the nearest first, and those with one number solved for."""
    yield from nearest
    yield from LIKELIHOODS.values()
    classes = [likelihood for likelihood in nearest if isinstance(likelihood, Categorical)]
    layouts = list(_layouts([*classes, Categorical()]))
    yield from layouts
    for likelihood in layouts:
        yield from _smoothed(likelihood, look)
    if ours := mean_loss(Gaussian(), look):
        for own in look.own:
            if 0 < own < math.inf:
                yield from (Gaussian(sigma) for sigma in _rounded(math.sqrt(ours / own)))


def _read_off(loss_fn: LossFn | None) -> Likelihood | None:
    """What the attributes of torch's loss objects say."""
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        smoothing = loss_fn.label_smoothing
        return Categorical(loss_fn.ignore_index, loss_fn.weight, smoothing)  # type: ignore[arg-type]
    if isinstance(loss_fn, nn.NLLLoss):
        return Categorical(loss_fn.ignore_index, loss_fn.weight)  # type: ignore[arg-type]
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) and loss_fn.weight is None:
        weight: Any = loss_fn.pos_weight
        return Bernoulli("mean", weight.flatten() if weight is not None else None)
    return None


def _layouts(likelihoods: Sequence[Categorical]) -> Iterator[Categorical]:
    """With the classes last or first, shifted or not."""
    for likelihood in likelihoods:
        plain = replace(likelihood, class_dim=None, shift=False)
        yield from (plain, replace(plain, shift=True))
        yield from (replace(plain, class_dim=-1), replace(plain, class_dim=1))


def _smoothed(likelihood: Categorical, look: Look) -> Iterator[Categorical]:
    """With the label smoothing that explains the loss of a batch, which is linear in it."""
    none = mean_loss(replace(likelihood, label_smoothing=0.0), look)
    full = mean_loss(replace(likelihood, label_smoothing=1.0), look)
    if none is None or full is None or full == none:
        return
    for own in look.own:
        smoothing = (own - none) / (full - none)
        if 0 < smoothing < 1:
            yield from (replace(likelihood, label_smoothing=e) for e in _rounded(smoothing))


def _rounded(value: float) -> list[float]:
    rounded = [float(f"{value:.{digits}g}") for digits in DIGITS]
    return [number for number in rounded if math.isclose(number, value, rel_tol=1e-2)]


# ---- what is wrong, if nothing agrees


def _check_range(given: Likelihood, looks: Sequence[Look]) -> None:
    """Refuse probabilities as logits of classes; warn of what may be probabilities of labels.

    Raises:
        ModelError: Every row of outputs is a distribution.
    """
    if isinstance(given, Categorical) and all(_is_softmax(given, look) for look in looks):
        raise ModelError(
            "outputs that are probabilities: a softmax within the model",
            "logits, of which the loss takes the softmax",
            "Return the logits, or the logarithm of the probabilities, from forward; if the "
            "cross-entropy took these outputs as logits in training, pass "
            "loss_fn=nn.CrossEntropyLoss().",
        )
    if isinstance(given, Bernoulli) and all(
        bool(((look.outputs >= 0) & (look.outputs <= 1)).all()) for look in looks
    ):
        warnings.warn(
            "All outputs lie in [0, 1]: if forward ends with a sigmoid, return the logits instead, "
            "of which the loss takes the sigmoid.",
            FisherForgetWarning,
            stacklevel=5,
        )


def _warn_of_shift(given: Likelihood, looks: Sequence[Look]) -> None:
    """Warn where guessing would be better than the outputs at t are for the targets at t, and the
    loss for those at t + 1 is less than half of guessing."""
    if not isinstance(given, Categorical) or given.shift or given.class_dim == 1:
        return
    shifted = replace(given, class_dim=None, shift=True)
    for look in looks:
        losses = mean_loss(given, look), mean_loss(shifted, look)
        if None in losses or not 2 * losses[1] < math.log(look.outputs.shape[-1]) < losses[0]:  # type: ignore[operator]
            return
    warnings.warn(
        f"The outputs at position t predict the targets at t + 1 ({losses[1]:.2g} nats) and not "
        f"those at t ({losses[0]:.2g} nats, worse than guessing): if the training shifted the "
        "targets, pass likelihood='next_token', else loss_fn=.",
        FisherForgetWarning,
        stacklevel=5,
    )


def _is_softmax(likelihood: Categorical, look: Look) -> bool:
    if look.outputs.dim() < 2 or (likelihood.shift and look.outputs.dim() != 3):
        return False
    rows = likelihood.rows(look.outputs)
    total = rows.sum(-1)
    return (
        rows.shape[-1] > 1
        and bool((rows >= 0).all())
        and torch.allclose(total, torch.ones_like(total), atol=1e-4)
    )


def _unexplained(
    likelihoods: Sequence[Likelihood], looks: Sequence[Look], loss_fn: LossFn | None
) -> ConfigError:
    """What to say where none of the likelihoods has the loss: of the first that makes the reason
    plain, else of the first that outputs and targets fit.

    Raises:
        DataError, NumericalError: They fit none.
    """
    fitting = [
        known for known in likelihoods if None not in [mean_loss(known, look) for look in looks]
    ]
    for look in [] if fitting else looks:
        likelihoods[0].check(look.outputs, look.targets)
    for known in fitting:
        if reason := _reason(known, looks, loss_fn):
            return _refusal(known, looks, loss_fn, reason)
    reason = (
        "Only the losses of Categorical, Bernoulli and Gaussian likelihoods are supported, without "
        "further terms; one of your own is a subclass of Likelihood."
    )
    if loss_fn is None:
        reason = (
            "The model's own loss may have further terms, or not be a function of these outputs. "
            "Pass loss_fn=, a function of outputs and targets that the model was trained with."
        )
    return _refusal(fitting[0], looks, loss_fn, reason)


def _refusal(
    given: Likelihood, looks: Sequence[Look], loss_fn: LossFn | None, fix: str
) -> ConfigError:
    look = looks[0]
    source = "loss_fn" if loss_fn is not None else "the model itself"
    ours = mean_loss(given, look)
    loss = "does not fit outputs and targets" if ours is None else f"has the loss {ours:.5g}"
    return ConfigError(
        f"likelihood={named(given)!r}, which {loss} on {len(look.targets)} samples",
        f"the loss that the model was trained with, {look.own[0]:.5g} by {source}",
        fix,
    )


def _reason(given: Likelihood, looks: Sequence[Look], loss_fn: LossFn | None) -> str:
    """What makes the losses differ and what to do, if that can be told; else empty."""
    if isinstance(given, Categorical) and all(_is_softmax(given, look) for look in looks):
        return (
            "The outputs are probabilities, a softmax within the model: return the logits, or the "
            "logarithm of the probabilities, from forward."
        )
    if isinstance(given, Bernoulli) and all(map(_is_loss_of_probabilities, looks)):
        return (
            "The outputs are probabilities, a sigmoid within the model: return the logits from "
            "forward, and pass the loss that takes them (nn.BCEWithLogitsLoss)."
        )
    pairs = [(ours, look.own[0]) for look in looks if (ours := mean_loss(given, look))]
    if len(pairs) == len(looks) and (reason := _reason_of_numbers(pairs, looks)):
        return reason
    if isinstance(given, Categorical) and loss_fn is not None:
        return _reason_of_classes(given, looks[0], loss_fn)
    return ""


def _is_loss_of_probabilities(look: Look) -> bool:
    """Whether the loss is the binary cross-entropy of outputs that are probabilities."""
    p, y = look.outputs.double(), look.targets.reshape(look.outputs.shape).double()
    if bool(((p < 0) | (p > 1)).any()):
        return False
    return math.isclose(float(F.binary_cross_entropy(p, y)), look.own[0], rel_tol=RELATIVE)


def _reason_of_numbers(pairs: Sequence[tuple[float, float]], looks: Sequence[Look]) -> str:
    """Whether the losses differ by the size of the batch, a factor or a term that stays.

    Args:
        pairs: (loss of the likelihood, the user's own) of each look.
        looks: What they are of.
    """
    ratios, terms = [own / ours for ours, own in pairs], [own - ours for ours, own in pairs]
    sizes = [len(look.targets) for look in looks]
    if not all(math.isfinite(own) for _, own in pairs):
        return "It is not finite: correct the function, or the targets that make it so."
    per_sample = [r / n for r, n in zip(ratios, sizes, strict=True)]
    if sizes[0] != sizes[1] and _alike(per_sample, 1.0):
        return (
            "It is a sum over the batch (reduction='sum'): pass the mean, and weight_decay "
            "divided by the batch size of the training."
        )
    if sizes[0] != sizes[1] and _alike(per_sample, per_sample[0]):
        return (
            f"It is {per_sample[0]:.4g} times a sum over the batch (reduction='sum'): pass the "
            "mean without the factor, and weight_decay divided by the factor and by the batch size "
            "of the training."
        )
    # batches whose losses are close have a factor and a term in common: the better one is meant
    error_of_factor = abs(ratios[1] / ratios[0] - 1)
    error_of_term = abs(terms[1] - terms[0]) / abs(pairs[0][1] or 1)
    if min(error_of_factor, error_of_term) > RELATIVE:
        return ""
    if error_of_term < error_of_factor:
        return (
            f"It is that of this likelihood and {terms[0]:.4g}, whatever the batch, as a penalty "
            "on the weights is: pass loss_fn= without it, and weight_decay=."
        )
    return (
        f"It is {ratios[0]:.4g} times the loss of this likelihood: pass the loss without the "
        "factor, and weight_decay divided by it."
    )


def _reason_of_classes(given: Categorical, look: Look, loss_fn: LossFn) -> str:
    """Whether single samples tell a focal loss or class weights."""
    ratios, doubts = [], []
    for i in range(min(16, len(look.targets))):
        f, y = look.outputs[i : i + 1], look.targets[i : i + 1]
        ours = mean_loss(given, Look(f, y, ()))
        own = values_of(loss_fn, f, y, given.ignore_index)[0]
        if ours and ours > 1e-3 and own > 0:
            ratios.append(own / ours)
            doubts.append(math.log(-math.expm1(-ours)))  # of 1 - p of the true class
    if len(ratios) < 3:
        return ""
    if _alike(ratios, 1.0):
        positions = (
            ""
            if look.targets.dim() < 2
            else (
                " A mean over samples of their own means is not supported: pass the mean over all "
                "scored positions."
            )
        )
        return (
            "It weights samples: class weights are likelihood=Categorical(weight=...), or read off "
            "loss_fn=nn.CrossEntropyLoss(weight=...)." + positions
        )
    # a focal loss is a (1 - p)^gamma times the cross-entropy
    gamma, factor = np.polyfit(doubts, np.log(ratios), 1)
    error = np.log(ratios) - (gamma * np.asarray(doubts) + factor)
    if np.abs(error).max() < 1e-2 < abs(gamma):
        return (
            f"It is a focal loss (gamma {gamma:.2g}), which is not supported: its curvature is not "
            "that of a likelihood."
        )
    return ""


def _alike(values: Sequence[float], value: float, tolerance: float = 1e-3) -> bool:
    return all(math.isclose(v, value, rel_tol=tolerance) for v in values)
