"""Several classifiers as one module: the mean of their predictions, or their majority vote.

Source: Bourtoule et al. 2021 (arXiv:1912.03817), section 4, where votes are the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget import params as P
from fisher_forget.errors import ConfigError

Aggregation = Literal["mean", "vote"]


class Aggregate(nn.Module):
    r"""Several classifiers as one, whose logits are log-probabilities.

    With member s of count k_s (1, or its number of samples), K = sum_s k_s and p_s = softmax(f_s):

        mean:  log p,  p = sum_s k_s p_s / K
        vote:  log of (sum_s k_s [argmax f_s = c] + p_c) / (K + 1)

    A vote share alone would be zero for most classes; one more vote, divided as the mean p is,
    makes the logarithm finite. Since votes are whole numbers it never overturns a majority, and it
    decides ties.

    Args:
        members: Models whose forward gives logits [N, ..., C].
        counts: k_s, whole numbers of at least 1.
        aggregation: "mean" or "vote".

    Raises:
        ConfigError: If there is no member, or counts or aggregation are others than these.
    """

    counts: Tensor

    def __init__(
        self, members: Sequence[nn.Module], counts: Sequence[int], aggregation: Aggregation = "mean"
    ) -> None:
        super().__init__()
        if aggregation not in ("mean", "vote"):
            raise ConfigError(
                f"aggregation={aggregation!r}", "'mean' or 'vote'", "Correct `aggregation`."
            )
        if (
            not len(members)
            or len(members) != len(counts)
            or any(k < 1 or k != int(k) for k in counts)
        ):
            got = f"{len(members)} members with the counts {list(counts)}"
            expected = "at least one member, and a whole number of at least 1 for each"
            raise ConfigError(got, expected, "Leave out members that count nothing.")
        self.members = nn.ModuleList(members)
        self.aggregation = aggregation
        device = next((p.device for p in members[0].parameters()), None)
        self.register_buffer("counts", torch.tensor([float(k) for k in counts], device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log-probabilities [N, ..., C]; inputs go to every member."""
        log_p = torch.stack(
            [F.log_softmax(P.logits(member(*args, **kwargs)), -1) for member in self.members]
        )
        counts = self.counts.to(log_p).reshape(-1, *[1] * (log_p.dim() - 1))
        # log (sum_s k_s p_s / K)
        mean = torch.logsumexp(log_p + counts.log(), 0) - counts.sum().log()
        if self.aggregation == "mean":
            return mean
        # log ((votes + p) / (K + 1)): p is one more vote, divided among the classes
        votes = (counts * F.one_hot(log_p.argmax(-1), log_p.shape[-1])).sum(0)
        return torch.logaddexp(votes.log(), mean) - (counts.sum() + 1).log()
