"""Softmax classification."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget.errors import DataError
from fisher_forget.likelihood.base import (
    ACCURACY,
    Likelihood,
    Score,
    check_finite,
    masked,
    positions,
    signed,
    uniform,
)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax of logits [B, ..., C]; targets are classes [B, ...] or probabilities [B, ..., C].

    With p = softmax(f): l = -sum_c y_c log p_c, r = p - y, H = diag(p) - p p^T.

    Args:
        ignore_index: Target of positions that are not scored (padding), as in `F.cross_entropy`.
    """

    ignore_index: int = -100
    name: ClassVar[str] = "categorical"
    score: ClassVar[Score] = ACCURACY

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.dim() < 2:
            got = f"logits of shape {tuple(outputs.shape)}"
            raise DataError(got, "[batch, ..., classes]", "Return one row a sample.")
        if targets.is_floating_point():
            self._check_probabilities(outputs, targets)
        else:
            self._check_classes(outputs, targets)
        check_finite(outputs)

    def _check_probabilities(self, outputs: Tensor, targets: Tensor) -> None:
        fix = "For regression pass likelihood='gaussian', for several labels a sample 'bernoulli'."
        if targets.shape != outputs.shape:
            got = f"floating-point targets {tuple(targets.shape)} for logits {tuple(outputs.shape)}"
            raise DataError(got, "class indices, or probabilities of the shape of the logits", fix)
        total = targets.sum(-1)
        one = torch.allclose(total, torch.ones_like(total), atol=1e-4)
        if not one or bool((targets < 0).any()):
            got = "probability targets that are negative or do not sum to 1"
            raise DataError(got, "a distribution over the classes for each sample", fix)

    def _check_classes(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape[:-1]:
            got = f"targets of shape {tuple(targets.shape)} for logits {tuple(outputs.shape)}"
            fix = "Classes are the last dimension of the logits; unpack= can reshape the targets."
            raise DataError(got, f"class indices of shape {tuple(outputs.shape[:-1])}", fix)
        classes, scored = outputs.shape[-1], targets[targets != self.ignore_index]
        if len(scored) and (int(scored.min()) < 0 or int(scored.max()) >= classes):
            raise DataError(
                f"targets from {int(scored.min())} to {int(scored.max())}",
                f"class indices from 0 to {classes - 1} (or ignore_index={self.ignore_index})",
                "Map the labels to 0..C-1, or give the model an output for each class.",
            )

    def mask(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        if targets is None or targets.is_floating_point():
            return None
        kept = targets != self.ignore_index
        return None if bool(kept.all()) else kept.to(outputs.dtype).unsqueeze(-1)

    def counts(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():  # probabilities carry the class dimension last
            return torch.full(
                (len(targets),), float(targets[0, ..., 0].numel()), device=targets.device
            )
        scored = (targets != self.ignore_index).reshape(len(targets), -1)
        return scored.sum(1).to(torch.get_default_dtype())

    def class_mass(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
        scored = targets[targets != self.ignore_index]
        return scored.bincount(minlength=outputs.shape[-1]).double().cpu()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        flat = outputs.reshape(-1, outputs.shape[-1])
        if targets.is_floating_point():
            per_position = F.cross_entropy(flat, targets.reshape(flat.shape), reduction="none")
        else:
            per_position = F.cross_entropy(
                flat, targets.reshape(-1), reduction="none", ignore_index=self.ignore_index
            )
        return per_position.reshape(len(outputs), -1).sum(1)

    def _one_hot(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.to(outputs.dtype)
        safe = targets.masked_fill(targets == self.ignore_index, 0)
        return F.one_hot(safe, outputs.shape[-1]).to(outputs.dtype)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return masked(
            outputs.softmax(-1) - self._one_hot(outputs, targets), self.mask(outputs, targets)
        )

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        p = outputs.softmax(-1)
        return masked(
            p * (vector - (p * vector).sum(-1, keepdim=True)), self.mask(outputs, targets)
        )

    def _factor(self, outputs: Tensor, k: int) -> Tensor:
        """Column k of the closed-form Cholesky factor of diag(p) - p p^T: C - 1 columns, not C.

        With tails r_k = sum_{j >= k} p_j: s_k = sqrt(p_k r_{k+1} / r_k) (e_k - sum_{j > k} (p_j /
        r_{k+1}) e_j).
        """
        # in logarithms: tails of confident predictions underflow
        logp = outputs.log_softmax(-1)
        tail = logp.flip(-1).logcumsumexp(-1).flip(-1)
        column = torch.zeros_like(outputs)
        weight = ((logp[..., k] + tail[..., k + 1] - tail[..., k]) / 2).exp()
        column[..., k] = weight
        below = (logp[..., k + 1 :] - tail[..., k + 1, None]).exp()
        column[..., k + 1 :] = -below * weight[..., None]
        return column

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        mask = self.mask(outputs, targets)
        for k in range(outputs.shape[-1] - 1):
            column = masked(self._factor(outputs, k), mask)
            if outputs.dim() == 2:
                yield column
                continue
            for at, zero in positions(outputs, -1):
                zero[at] = column[at]
                yield zero

    def column_count(self, outputs: Tensor) -> int:
        return (outputs.shape[-1] - 1) * math.prod(outputs.shape[1:-1])

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        # sum_y sqrt(p_y) xi_y (e_y - p): one backward pass, no variance on diagonal terms of a
        # single class
        p = outputs.softmax(-1)
        weighted = signed(p.sqrt(), draws, generator)
        centred = weighted.addcmul_(p, weighted.sum(-1, keepdim=True), value=-1)
        return masked(centred, self.mask(outputs, targets))

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        p = outputs.softmax(-1)
        # inverse of the cumulative distribution; rounding may leave its end below 1, so the last
        # class takes what is beyond
        u = uniform(outputs, draws, generator, outputs.shape[:-1])
        y = (p.double().cumsum(-1) < u.unsqueeze(-1)).sum(-1).clamp_(max=outputs.shape[-1] - 1)
        score = p - F.one_hot(y, outputs.shape[-1]).to(outputs.dtype)
        return masked(score, self.mask(outputs, targets)) / math.sqrt(draws)

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
        per_position = (logp.exp() * (logp - logq)).sum(-1, keepdim=True)
        mask = self.mask(per_position, targets)
        per_position = masked(per_position, mask).reshape(len(p), -1).sum(1)
        count = per_position.new_tensor(p[0, ..., 0].numel())
        if targets is not None:
            count = self.counts(targets).double()
        return (per_position / count.clamp(min=1)).clamp_(min=0.0)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        p = outputs.softmax(-1)
        return masked(p * (1 - p), self.mask(outputs, targets)).reshape(len(outputs), -1).sum(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        truth = targets.argmax(-1) if targets.is_floating_point() else targets
        hit = (outputs.argmax(-1) == truth).double().reshape(len(outputs), -1).sum(1)
        return hit / self.counts(targets).double().clamp(min=1)
