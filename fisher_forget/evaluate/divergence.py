r"""How far apart two models' predictions are, sample by sample, from stored logits.

Logits of one model are [N, C], of an ensemble of M models [M, N, C]; N samples over C classes, p =
softmax(logits). Every divergence takes either on both sides and gives [N] or [M, N] in float64. Its
target against a retrained model is not 0: two retrained models differ, too, by the `floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError, NumericalError

Divergence = Callable[[Tensor, Tensor], Tensor]  # logits of p, logits of q -> [N] or [M, N]
CHUNK = 2**20  # logits that are held in float64 at once (8 MiB a copy): more is not faster


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) in nats, at least 0: [N] or [M, N].

    Args:
        p: Logits [N, C] or [M, N, C]; the retrained model's, for the direction that `closeness`
            reports.
        q: Logits of the same samples and classes.

    Raises:
        DataError: If shapes or classes differ, or there is nothing to compare.
        NumericalError: If logits are not finite.
    """
    return _per_sample(_kl, p, q)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """[KL(p || m) + KL(q || m)] / 2 with m = (p + q) / 2, in bits: [N] or [M, N], 0 (equal) to 1
    (disjoint).

    Symmetric. It is the divergence, not the distance, which is its square root (Lin 1991, IEEE
    Trans. Inf. Theory 37).

    Raises:
        DataError: As for `kl`.
        NumericalError: As for `kl`.
    """
    return _per_sample(_jensen_shannon, p, q)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """sum_c |p_c - q_c| / 2: [N] or [M, N], 0 (equal) to 1 (disjoint). Symmetric.

    Raises:
        DataError: As for `kl`.
        NumericalError: As for `kl`.
    """
    return _per_sample(lambda a, b: (a.softmax(-1) - b.softmax(-1)).abs().sum(-1) / 2, p, q)


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """1 where both predict the same class, 0 elsewhere; the first of tied classes counts: [N] or
    [M, N], float64.

    Raises:
        DataError: As for `kl`.
        NumericalError: As for `kl`.
    """
    return _per_sample(lambda a, b: (a.argmax(-1) == b.argmax(-1)).double(), p, q)


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


@dataclass(frozen=True, eq=False)
class Floor:
    """How far models of one ensemble are from each other.

    Attributes:
        mean: Over ordered pairs and samples.
        std: Over members, of a member's mean over its pairs; NaN where fewer than three members
            took part.
        values: Mean over ordered pairs for each sample [N], float64.
        members: M.
    """

    mean: float
    std: float
    values: Tensor
    members: int


def floor(ensemble: Tensor, fn: Divergence, seed: int = 0, halvings: int = 4) -> Floor:
    """What `fn` gives between two models that differ in nothing but their seeds: the target of an
    unlearned model.

    The ensemble is cut at random into two disjoint halves, whose members meet in pairs, in both
    orders; this is repeated and averaged. So no model is held against itself, and the expectation
    over halvings is the mean over all ordered pairs of different members.

    Args:
        ensemble: Logits [M, N, C] of models that were retrained alike.
        fn: A divergence of this module.
        seed: Of the halvings.
        halvings: How many; more cost little where M is small. With an odd M a random member sits
            out in each.

    Raises:
        ConfigError: If there is no halving.
        DataError: If there are fewer than two models, or as for `kl`.
        NumericalError: If logits are not finite.
    """
    check_halves(ensemble, 3, halvings)
    members, half = len(ensemble), len(ensemble) // 2
    rng = np.random.default_rng(seed)
    values = torch.zeros(ensemble.shape[1], dtype=torch.float64)
    totals, met = torch.zeros(2, members, dtype=torch.float64)
    for _ in range(halvings):
        first, second = torch.from_numpy(rng.permutation(members))[: 2 * half].view(2, half)
        a, b = ensemble[first], ensemble[second]
        both = (fn(a, b) + fn(b, a)).cpu() / 2
        values += both.mean(0) / halvings
        for side in (first, second):
            totals[side] += both.mean(1)
            met[side] += 1
    means = (totals / met)[met > 0]
    std = float(means.std()) if len(means) > 2 else math.nan
    return Floor(float(values.mean()), std, values, members)


def gaussian_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q), in nats, between Gaussians fitted to a scalar output (the margin) over two
    ensembles: [N], float64.

        [log(v_q / v_p) + (v_p + (m_p - m_q)^2) / v_q - 1] / 2

    with means m and unbiased variances v over models. It compares the distributions that the
    *training procedures* draw from, where `kl` compares the predictions of two given models. Unlike
    a histogram it does not saturate; it sees means and variances only. Its target for M and M'
    models of one procedure is `gaussian_floor(M, M')`, not 0.

    Args:
        p: Margins [M, N], the unlearned models' by the convention of `klom`.
        q: Margins [M', N], the retrained models'.

    Raises:
        DataError: If there are fewer than two models on a side, other samples, or models that do
            not differ at all.
        NumericalError: If margins are not finite.
    """
    check_ensembles(p, q)
    (v_p, m_p), (v_q, m_q) = (torch.var_mean(x.double(), 0) for x in (p, q))
    flat = int(((v_p <= 0) | (v_q <= 0)).sum())
    if flat:
        raise DataError(
            f"{flat} sample(s) on which all models of an ensemble agree exactly",
            "models whose margins vary",
            "Train the members from different seeds; identical or saturated models have no density.",
        )
    return ((v_q.log() - v_p.log() + (v_p + (m_p - m_q).square()) / v_q - 1) / 2).clamp_(min=0.0)


def gaussian_floor(p_models: int, q_models: int) -> float:
    """Expectation of `gaussian_kl` where both ensembles are draws of one Gaussian, nats; about 2 /
    M for M = M'.

        [psi((M'-1)/2) - psi((M-1)/2) + log((M-1)/(M'-1)) + (1 + 1/M + 1/M') (M'-1)/(M'-3) - 1] / 2

    Raises:
        DataError: If M < 2, or M' < 4, where the expectation does not exist.
    """
    if p_models < 2 or q_models < 4:
        raise DataError(
            f"{p_models} and {q_models} models",
            "at least 2 and 4",
            "Use more models: the expectation is infinite.",
        )
    a, b = p_models - 1, q_models - 1
    halves = torch.tensor([a / 2, b / 2], dtype=torch.float64)
    low, high = torch.special.digamma(halves).tolist()
    shift = (1 + 1 / p_models + 1 / q_models) * b / (b - 2)
    return float(high - low + math.log(a / b) + shift - 1) / 2


def check_logits(logits: Tensor) -> None:
    """Refuse what is not finite logits [N, C] or [M, N, C] of at least one sample and two classes.

    Raises:
        DataError: If the shape or type is another.
        NumericalError: If a logit is NaN or infinite.
    """
    if (
        logits.dim() not in (2, 3)
        or not logits.numel()
        or logits.shape[-1] < 2
        or not logits.is_floating_point()
    ):
        raise DataError(
            f"{logits.dtype} outputs of shape {tuple(logits.shape)}",
            "floating-point logits [N, C] or [M, N, C] of at least one sample and two classes",
            "Stack the models' outputs; a single logit z becomes the two logits (0, z).",
        )
    _check_finite(logits)


def check_targets(targets: Tensor, samples: int, classes: int | None = None) -> None:
    """Refuse what is not one class index a sample.

    Raises:
        DataError: If so.
    """
    if (
        targets.shape != (samples,)
        or not samples
        or targets.is_floating_point()
        or targets.dtype == torch.bool
    ):
        raise DataError(
            f"{targets.dtype} targets of shape {tuple(targets.shape)} for {samples} samples",
            "one class index a sample, for at least one sample",
            "Pass the targets of the samples that the outputs were computed on, in the same order.",
        )
    if int(targets.min()) < 0 or (classes is not None and int(targets.max()) >= classes):
        raise DataError(
            f"targets from {int(targets.min())} to {int(targets.max())}",
            "class indices from 0" + ("" if classes is None else f" to {classes - 1}"),
            "Map the labels to 0..C-1, as in training.",
        )


def check_ensembles(*margins: Tensor) -> None:
    """Refuse what is not finite margins [M, N] of the same samples with M at least 2.

    Raises:
        DataError: If shapes differ, or there are too few models.
        NumericalError: If a margin is NaN or infinite.
    """
    shapes = [tuple(m.shape) for m in margins]
    if any(
        m.dim() != 2 or len(m) < 2 or not m.numel() or not m.is_floating_point() for m in margins
    ) or (len({shape[1] for shape in shapes}) > 1):
        raise DataError(
            f"margins of shapes {shapes}",
            "floating-point margins [M, N] of the same samples, at least 2 models each",
            "Compute `margins` of stacked outputs [M, N, C] of all models on one data set.",
        )
    for m in margins:
        _check_finite(m)


def check_halves(ensemble: Tensor, dims: int, halvings: int, least: int = 2) -> None:
    """Refuse what is not an ensemble of so many dimensions and at least so many models.

    Raises:
        ConfigError: If there is no halving.
        DataError: If the shape is another.
    """
    if halvings < 1:
        raise ConfigError(f"halvings={halvings}", "at least 1", "Correct `halvings`.")
    if ensemble.dim() != dims or len(ensemble) < least:
        raise DataError(
            f"an ensemble of shape {tuple(ensemble.shape)}",
            f"{dims} dimensions with at least {least} models in the first",
            "Stack the outputs of several retrained models.",
        )


def sample_slices(samples: int, per_sample: int) -> list[slice]:
    """Cut N samples of so many numbers each into slices of at most `CHUNK` numbers."""
    rows = max(1, CHUNK // per_sample)
    return [slice(start, start + rows) for start in range(0, samples, rows)]


def _per_sample(fn: Divergence, p: Tensor, q: Tensor) -> Tensor:
    check_logits(p)
    check_logits(q)
    same = p.shape[-2:] == q.shape[-2:] and (p.dim() != q.dim() or p.shape == q.shape)
    if not same:
        raise DataError(
            f"outputs of shapes {tuple(p.shape)} and {tuple(q.shape)}",
            "outputs of the same samples over the same classes, and as many models where both are ensembles",
            "Predict both on one data set and keep every class; to compare all pairs of models, loop over one side.",
        )
    slices = sample_slices(p.shape[-2], max(p.numel(), q.numel()) // p.shape[-2])
    return torch.cat(
        [fn(p[..., rows, :].double(), q[..., rows, :].double()) for rows in slices], -1
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).clamp_(min=0.0)  # rounding alone makes it negative


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    middle = torch.logaddexp(logp, logq) - math.log(2)
    nats = (logp.exp() * (logp - middle) + logq.exp() * (logq - middle)).sum(-1) / 2
    return (nats / math.log(2)).clamp_(0.0, 1.0)


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            "outputs that are NaN or infinite", "finite outputs", "Check the model that made them."
        )
