"""Independent binary labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fisher_forget.errors import DataError
from fisher_forget.likelihood.base import LABEL_ACCURACY, Score, weights_of
from fisher_forget.likelihood.independent import IndependentOutputs
from fisher_forget.likelihood.streams import Streams


@dataclass(frozen=True, repr=False)
class Bernoulli(IndependentOutputs):
    """Independent binary labels. Outputs are logits [B, ...]; targets in [0, 1] of the same shape.

    With p = sigmoid(f), weights a_c of the positive labels (1 by default) and m = 1 + (a - 1) y:
    l = -sum_c a_c y_c log p_c + (1 - y_c) log(1 - p_c), r = m p - a y, H = diag(m p (1 - p)); each
    divided by the number of labels where reduction="mean". KL and accuracy are of the predictions
    alone, without weights.

    Args:
        reduction: "sum" over a sample's labels, or "mean" as in `torch.nn.BCEWithLogitsLoss`:
            likelihood="bce".
        pos_weight: a, one number a label in the last dimension [C] or one for all, as in
            `torch.nn.BCEWithLogitsLoss`; a tuple, a tensor or an array.

    Raises:
        ConfigError: If an argument is out of range.
    """

    reduction: Literal["sum", "mean"] = "sum"
    pos_weight: tuple[float, ...] | None = None
    name: ClassVar[str] = "bernoulli"
    score: ClassVar[Score] = LABEL_ACCURACY

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pos_weight", weights_of("pos_weight", self.pos_weight))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        super().check(outputs, targets)
        weight = self.pos_weight
        if weight is not None and len(weight) not in (1, outputs.shape[-1]):
            got = f"pos_weight of {len(weight)} labels for outputs {tuple(outputs.shape)}"
            fix = "Pass Bernoulli(pos_weight=...) as trained."
            raise DataError(got, "one weight a label in the last dimension", fix)

    def check_targets(self, targets: Tensor) -> None:
        if not bool(((targets >= 0) & (targets <= 1)).all()):  # NaN fails, too
            got = f"targets from {float(targets.min()):g} to {float(targets.max()):g}"
            fix = "Encode each label as 0 or 1; for regression pass likelihood='mse' or 'gaussian'."
            raise DataError(got, "labels in [0, 1]", fix)

    def _positive(self, outputs: Tensor) -> Tensor | None:
        """a, which broadcasts to the outputs."""
        if self.pos_weight is None:
            return None
        return torch.tensor(self.pos_weight, dtype=outputs.dtype, device=outputs.device)

    def _mass(self, outputs: Tensor, targets: Tensor | None) -> Tensor | float:
        """m: the shape of the outputs, or 1."""
        weight = self._positive(outputs)
        if weight is None or targets is None:
            return 1.0
        return 1 + (weight - 1) * self.fitted(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        per_label = F.binary_cross_entropy_with_logits(
            outputs,
            self.fitted(outputs, targets),
            reduction="none",
            pos_weight=self._positive(outputs),
        )
        return self.reduced(per_label)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        y, weight = self.fitted(outputs, targets), self._positive(outputs)
        positive = y if weight is None else weight * y
        return self.share(outputs) * (self._mass(outputs, targets) * outputs.sigmoid() - positive)

    def curvature(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        p = outputs.sigmoid()
        return self.share(outputs) * self._mass(outputs, targets) * p * (1 - p)

    def sampled(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        p, mass = outputs.sigmoid(), self._mass(outputs, targets)
        y = (streams.uniform(draws, *outputs.shape[1:]).to(outputs.device) < p.double()).to(p.dtype)
        root = mass.sqrt() if isinstance(mass, Tensor) else mass
        return root * (p - y) * math.sqrt(self.share(outputs) / draws)

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        p, q = p.double(), q.double()
        per_label = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (
            F.logsigmoid(-p) - F.logsigmoid(-q)
        )
        return self.reduced(per_label).clamp_(min=0.0)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        hit = (outputs > 0) == (self.fitted(outputs, targets) > 0.5)
        return hit.double().reshape(len(outputs), -1).mean(1)
