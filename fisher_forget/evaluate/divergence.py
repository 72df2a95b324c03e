r"""How far apart two models' predictions are, sample by sample, from stored logits.

Logits of one model are [N, C], of an ensemble of M models [M, N, C]; N samples over C classes, p =
softmax(logits). Every divergence takes either on both sides and gives [N] or [M, N] in float64. Its
target against a retrained model is not 0: two retrained models differ, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fisher_forget.errors import DataError, NumericalError

Divergence = Callable[[Tensor, Tensor], Tensor]  # logits of p, logits of q -> [N] or [M, N]
CHUNK = 2**20  # logits that are held in float64 at once (8 MiB a copy): more is not faster


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """[KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2, in bits: [N] or [M, N], 0 (equal) to 1
    (disjoint).

    Symmetric. It is the divergence, not the distance, which is its square root (Lin 1991, IEEE
    Trans. Inf. Theory 37).

    Raises:
        DataError, NumericalError: As for `per_sample`.
    """
    return per_sample(_jensen_shannon, p, q)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """sum_c |p_c - q_c| / 2: [N] or [M, N], 0 (equal) to 1 (disjoint). Symmetric.

    Raises:
        DataError, NumericalError: As for `per_sample`.
    """
    return per_sample(lambda a, b: (a.softmax(-1) - b.softmax(-1)).abs().sum(-1) / 2, p, q)


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """1 where both predict the same class, 0 elsewhere; the first of tied classes counts: [N] or
    [M, N], float64.

    Raises:
        DataError, NumericalError: As for `per_sample`.
    """
    return per_sample(lambda a, b: (a.argmax(-1) == b.argmax(-1)).double(), p, q)


def per_class(values: Tensor, targets: Tensor) -> dict[int, float]:
    """Mean of the values over the samples of each class that occurs (and over models, for [M, N]).

    Args:
        values: One value a sample: [N] or [M, N].
        targets: Classes [N].

    Raises:
        DataError: If there is not one class a value.
    """
    check_targets(targets, values.shape[-1] if values.dim() else 0)
    return {int(c): float(values[..., targets == c].double().mean()) for c in targets.unique()}


def check_logits(logits: Tensor) -> None:
    """Refuse what is not finite logits [N, C] or [M, N, C] of at least one sample and two classes.

    Raises:
        DataError: If the shape or type is another.
        NumericalError: If a logit is NaN or infinite.
    """
    shaped = logits.dim() in (2, 3) and logits.numel() and logits.shape[-1] >= 2
    if not shaped or not logits.is_floating_point():
        got = f"{logits.dtype} outputs of shape {tuple(logits.shape)}"
        expected = (
            "floating-point logits [N, C] or [M, N, C] of at least one sample and two classes"
        )
        fix = "Stack the models' outputs; a single logit z becomes the two logits (0, z)."
        raise DataError(got, expected, fix)
    _check_finite(logits)


def check_targets(targets: Tensor, samples: int, classes: int | None = None) -> None:
    """Refuse what is not one class index a sample.

    Raises:
        DataError: If so.
    """
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    if targets.shape != (samples,) or not samples or not whole:
        got = f"{targets.dtype} targets of shape {tuple(targets.shape)} for {samples} samples"
        expected = "one class index a sample, for at least one sample"
        fix = (
            "Pass the targets of the samples that the outputs were computed on, in the same order."
        )
        raise DataError(got, expected, fix)
    if int(targets.min()) < 0 or (classes is not None and int(targets.max()) >= classes):
        got = f"targets from {int(targets.min())} to {int(targets.max())}"
        expected = "class indices from 0" + ("" if classes is None else f" to {classes - 1}")
        raise DataError(got, expected, "Map the labels to 0..C-1, as in training.")


def check_ensembles(*margins: Tensor) -> None:
    """Refuse what is not finite margins [M, N] of the same samples with M at least 2.

    Raises:
        DataError: If shapes differ, or there are too few models.
        NumericalError: If a margin is NaN or infinite.
    """
    shapes = [tuple(m.shape) for m in margins]
    stacked = all(m.dim() == 2 and len(m) >= 2 and m.numel() for m in margins)
    floating = all(m.is_floating_point() for m in margins)
    if not (stacked and floating) or len({shape[1] for shape in shapes}) > 1:
        expected = "floating-point margins [M, N] of the same samples, at least 2 models each"
        fix = "Compute `margins` of stacked outputs [M, N, C] of all models on one data set."
        raise DataError(f"margins of shapes {shapes}", expected, fix)
    for m in margins:
        _check_finite(m)


def sample_slices(samples: int, per_sample: int) -> list[slice]:
    """Cut N samples of so many numbers each into slices of at most `CHUNK` numbers."""
    rows = max(1, CHUNK // per_sample)
    return [slice(start, start + rows) for start in range(0, samples, rows)]


def per_sample(fn: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """fn(p, q) in float64, of at most `CHUNK` numbers at once: [N] or [M, N].

    Args:
        fn: Takes logits [..., n, C] of both sides and returns [..., n].
        p: Logits [N, C] or [M, N, C].
        q: Logits of the same samples and classes.

    Raises:
        DataError: If shapes or classes differ, or there is nothing to compare.
        NumericalError: If logits are not finite.
    """
    check_logits(p)
    check_logits(q)
    same = p.shape[-2:] == q.shape[-2:] and (p.dim() != q.dim() or p.shape == q.shape)
    if not same:
        got = f"outputs of shapes {tuple(p.shape)} and {tuple(q.shape)}"
        expected = "the same samples over the same classes, as many models where both are ensembles"
        fix = "Predict both on one data set and keep every class; for all pairs of models, loop."
        raise DataError(got, expected, fix)
    slices = sample_slices(p.shape[-2], max(p.numel(), q.numel()) // p.shape[-2])
    pieces = [fn(p[..., rows, :].double(), q[..., rows, :].double()) for rows in slices]
    return torch.cat(pieces, -1)


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    # log m = log((p + q) / 2) without leaving the logarithm, so that no probability underflows
    middle = torch.logaddexp(logp, logq) - math.log(2)
    nats = (logp.exp() * (logp - middle) + logq.exp() * (logq - middle)).sum(-1) / 2
    return (nats / math.log(2)).clamp_(0.0, 1.0)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        got = "outputs that are NaN or infinite"
        raise NumericalError(got, "finite outputs", "Check the model that made them.")
