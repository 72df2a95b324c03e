"""Kinds of curvature: which vectors are back-propagated from the outputs.

Every kind yields columns S of the outputs' shape with sum_k E[S_k S_k^T] = H_n per sample, or r_n
r_n^T for the empirical Fisher, which is *not* the Fisher (Kunstner et al. 2019, arXiv:1905.12558)
and vanishes at interpolation. The Hessian has a second part, sum_k r_nk d^2 f_nk / dw^2, that no
column can carry: it is known by products only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from fisher_forget.errors import CurvatureError
from fisher_forget.likelihood import Likelihood
from fisher_forget.likelihood.streams import Streams

Kind = Literal["auto", "exact", "sketch", "sampled", "empirical", "hessian"]
RANDOM = ("sketch", "sampled")
EXACT_UP_TO = 16  # "auto": exact where that needs no more columns than this, else one sketch


def choose(kind: Kind, columns: int) -> Kind:
    """Resolve "auto" by the number of exact columns.

    Raises:
        CurvatureError: If there is no such kind.
    """
    if kind not in get_args(Kind):
        raise CurvatureError(
            f"kind={kind!r}", f"one of {get_args(Kind)}", "Pass one of these names."
        )
    if kind != "auto":
        return kind
    return "exact" if columns <= EXACT_UP_TO else "sketch"


def columns(
    kind: Kind,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    draws: int,
    streams: Streams,
) -> Iterator[Tensor]:
    """The columns of one chunk.

    Args:
        kind: Resolved by `choose`.
        outputs: Detached outputs [N, ...].
        targets: Targets [N, ...]; labels for the empirical kind, for all others what is ignored.
        draws: Columns of the random kinds.
        streams: The samples' own, for the random kinds.
    """
    if kind == "exact":
        yield from likelihood.columns(outputs, targets)
    elif kind == "sketch":
        yield from likelihood.sketch(outputs, draws, streams, targets)
    elif kind == "sampled":
        yield from likelihood.sampled(outputs, draws, streams, targets)
    else:
        # p - 1 of a sample that is fitted well is rounded to 0 in single precision, the rest is not
        yield likelihood.residual(outputs.double(), targets).to(outputs.dtype)


def weight(
    kind: Kind,
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    draws: int,
    streams: Streams,
) -> Callable[[Tensor], Tensor]:
    """u_n -> H_n u_n on tensors like the outputs; sum_k S_nk <S_nk, u_n> for kinds with columns.

    Args:
        kind: Any but "hessian", which does not pass through the outputs alone.
        likelihood: Gives H_n or the columns.
        outputs: Detached outputs [N, ...].
        targets: Targets [N, ...].
        draws: Columns of the random kinds.
        streams: The samples' own, for the random kinds: gives the columns of `columns`.
    """
    if kind == "exact":
        return lambda u: likelihood.hessian_product(outputs, u, targets)
    drawn = list(columns(kind, likelihood, outputs, targets, draws, streams))

    def product(u: Tensor) -> Tensor:
        total = torch.zeros_like(u)
        for s in drawn:  # H_n u_n = sum_k S_nk <S_nk, u_n>
            inner = (s * u).reshape(len(u), -1).sum(1)
            total += s * inner.view(-1, *[1] * (u.dim() - 1))
        return total

    return product
