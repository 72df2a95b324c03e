r"""KLoM: KL divergence of margins between unlearned and retrained ensembles, sample by sample.

For each sample, the margins of M unlearned and M' retrained ("oracle") models become two histograms
p and q over their joint range, and KLoM = KL(p || q) in nats (Georgiev et al. 2024,
arXiv:2410.23232; EasyDUB, arXiv:2602.16400):

- It is never 0 for finite ensembles, and depends on their size: compare only values of equal M and
  M', such as that of M retrained models against M' others.
- It saturates at -log(floor) = 11.51 nats, where no oracle margin shares a bin with an unlearned
  one.
- It is not symmetric; the direction is part of the number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.evaluate.divergence import (
    check_ensembles,
    check_logits,
    check_targets,
    sample_slices,
)


@dataclass(frozen=True)
class KlomSettings:
    """How the histograms are made and compared.

    Attributes:
        bins: Equal bins over the joint range of a sample's margins.
        clip: Margins are cut to +-clip first.
        floor: Smallest probability of the second distribution, applied where the first is positive.
        published: Drop margins equal to the largest of both ensembles, as the published programs
            do, whose last bin is half open. Where all margins of the first ensemble are equal to it
            (both at +clip, say), KLoM is then 0, a perfect score, whatever the other ensemble is
            (NaN with `renormalise`); so the default keeps them.
        renormalise: Let the floored distribution sum to 1 again, as data-unlearning-bench does and
            EasyDUB does not.
        direction: "unlearned||oracle", as published, or "oracle||unlearned".

    Raises:
        ConfigError: If a value is out of range.
    """

    bins: int = 20
    clip: float = 100.0
    floor: float = 1e-5
    published: bool = False
    renormalise: bool = False
    direction: Literal["unlearned||oracle", "oracle||unlearned"] = "unlearned||oracle"

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("bins", self.bins >= 2, "at least 2"),
            ("clip", 0 < self.clip < math.inf, "a positive number"),
            ("floor", 0 < self.floor < 1, "a probability between 0 and 1"),
            (
                "direction",
                self.direction in ("unlearned||oracle", "oracle||unlearned"),
                "'unlearned||oracle' or back",
            ),
        ):
            if not good:
                got = f"{name}={getattr(self, name)!r}"
                raise ConfigError(got, expected, "Correct the settings of KLoM.")


DEFAULT = KlomSettings()


@dataclass(frozen=True)
class KlomSummary:
    """KLoM over samples, nats.

    Attributes:
        mean: Over samples.
        p95: Over samples, the 95th percentile; the published headline.
        samples: N.
    """

    mean: float
    p95: float
    samples: int


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """z_y - log sum_{j != y} exp z_j = log(p_y / (1 - p_y)): [N] or [M, N], float64.

    Args:
        logits: [N, C] or [M, N, C].
        targets: Classes [N].

    Raises:
        DataError: If shapes do not match, or a target is no class.
        NumericalError: If logits are not finite.
    """
    check_logits(logits)
    samples, classes = logits.shape[-2:]
    check_targets(targets, samples, classes)
    pieces = []
    for rows in sample_slices(samples, logits.numel() // samples):
        z = logits[..., rows, :].double()
        y = targets[rows].long()[:, None].expand(*z.shape[:-1], 1)
        others = z.scatter(-1, y, -math.inf).logsumexp(-1)
        pieces.append(z.gather(-1, y).squeeze(-1) - others)
    return torch.cat(pieces, -1)


def klom(unlearned: Tensor, oracle: Tensor, settings: KlomSettings = DEFAULT) -> Tensor:
    """KLoM of each sample: [N], float64, nats, at most -log(floor).

    Target: what M retrained models score against M' others; values below it are not better.

    Args:
        unlearned: Margins [M, N], one row for each unlearned model.
        oracle: Margins [M', N], one row for each model that was retrained without the forgotten
            data.
        settings: Histograms and direction.

    Raises:
        DataError: If samples differ, or there are fewer than two models on a side.
        NumericalError: If margins are not finite.
    """
    check_ensembles(unlearned, oracle)
    first, second = (
        (unlearned, oracle) if settings.direction == "unlearned||oracle" else (oracle, unlearned)
    )
    slices = sample_slices(first.shape[1], len(first) + len(second))
    return torch.cat([_klom(first[:, rows], second[:, rows], settings) for rows in slices])


def summarise_klom(values: Tensor) -> KlomSummary:
    """Mean and 95th percentile over samples.

    Raises:
        DataError: If values are not [N] of at least one sample.
    """
    if values.dim() != 1 or not len(values):
        got = f"values of shape {tuple(values.shape)}"
        raise DataError(got, "one value a sample", "Pass what `klom` returned.")
    array = values.double().cpu().numpy()
    return KlomSummary(float(array.mean()), float(np.percentile(array, 95)), len(array))


def _klom(first: Tensor, second: Tensor, settings: KlomSettings) -> Tensor:
    """KL between the histograms of margins [M, n] and [M', n]: [n]."""
    a, b = (x.T.double().clamp(-settings.clip, settings.clip).contiguous() for x in (first, second))
    # bins span both ensembles; where all margins are equal any width does
    low = torch.minimum(a.amin(1), b.amin(1))
    high = torch.maximum(a.amax(1), b.amax(1))
    high = torch.where(high > low, high, low + 1)
    steps = torch.arange(settings.bins + 1, dtype=torch.float64, device=a.device)
    edges = low[:, None] + ((high - low) / settings.bins)[:, None] * steps
    edges[:, -1] = high  # rounding must not push the largest margin past the last edge
    p, q = _histogram(a, edges, settings.published), _histogram(b, edges, settings.published)
    # a bin that the second ensemble never reached would make the KL infinite
    q = torch.where(p > 0, q.clamp(min=settings.floor), q)
    if settings.renormalise:
        p, q = (x / x.sum(1, keepdim=True) for x in (p, q))
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)


def _histogram(values: Tensor, edges: Tensor, drop_maximum: bool) -> Tensor:
    """Shares [n, bins] of values [n, M] in half-open bins; the last edge counts to the last bin or
    is dropped."""
    bins = edges.shape[1] - 1
    at = torch.searchsorted(edges, values, right=True) - 1  # `bins` for a value on the last edge
    counts = torch.zeros(len(values), bins + 1, dtype=torch.float64, device=values.device)
    counts.scatter_add_(1, at if drop_maximum else at.clamp(max=bins - 1), torch.ones_like(values))
    counts = counts[:, :bins]
    return counts / counts.sum(1, keepdim=True).clamp(min=1)
