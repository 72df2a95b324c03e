"""Independent binary labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget.errors import DataError
from fisher_forget.likelihood.base import LABEL_ACCURACY, Score, uniform
from fisher_forget.likelihood.independent import IndependentOutputs


@dataclass(frozen=True)
class Bernoulli(IndependentOutputs):
    """Independent binary labels. Outputs are logits [B, ...]; targets in [0, 1] of the same shape.

    With p = sigmoid(f): l = -sum_c y_c log p_c + (1 - y_c) log(1 - p_c), r = p - y, H = diag(p (1 -
    p)).
    """

    name: ClassVar[str] = "bernoulli"
    score: ClassVar[Score] = LABEL_ACCURACY

    def check_targets(self, targets: Tensor) -> None:
        if not bool(((targets >= 0) & (targets <= 1)).all()):  # NaN fails, too
            got = f"targets from {float(targets.min()):g} to {float(targets.max()):g}"
            fix = "Encode each label as 0 or 1; for regression pass likelihood='gaussian'."
            raise DataError(got, "labels in [0, 1]", fix)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        per_label = F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="none"
        )
        return per_label.reshape(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets.to(outputs.dtype)

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        p = outputs.sigmoid()
        return p * (1 - p) * vector

    def root(self, outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt()

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        p = outputs.sigmoid()
        y = (uniform(outputs, draws, generator, outputs.shape) < p.double()).to(p.dtype)
        return (p - y) / math.sqrt(draws)

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        p, q = p.double(), q.double()
        per_label = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (
            F.logsigmoid(-p) - F.logsigmoid(-q)
        )
        return per_label.reshape(len(p), -1).sum(1).clamp_(min=0.0)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).reshape(len(outputs), -1).sum(1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) == (targets > 0.5)).double().reshape(len(outputs), -1).mean(1)
