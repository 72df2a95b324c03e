"""Regression with known noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.likelihood.base import SQUARED_ERROR, Score
from fisher_forget.likelihood.independent import IndependentOutputs
from fisher_forget.likelihood.streams import Streams


@dataclass(frozen=True, repr=False)
class Gaussian(IndependentOutputs):
    """Regression with known noise. Outputs are means [B, ...]; targets of the same shape.

    l = |y - f|^2 / (2 sigma^2), the constant log(2 pi sigma^2)/2 left out; r = (f - y)/sigma^2; H =
    I/sigma^2; each divided by the number of outputs where reduction="mean".

    Args:
        sigma: Standard deviation of the targets around the mean, in the targets' units.
            `torch.nn.MSELoss` has sigma = sqrt(1/2) and the mean over outputs: likelihood="mse".
        reduction: "sum" over a sample's outputs, or "mean".
    """

    sigma: float = 1.0
    reduction: Literal["sum", "mean"] = "sum"
    name: ClassVar[str] = "gaussian"
    score: ClassVar[Score] = SQUARED_ERROR

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ConfigError(
                f"sigma={self.sigma}", "a positive standard deviation", "Pass Gaussian(sigma=...)."
            )

    @property
    def variance(self) -> float:
        """sigma^2."""
        return self.sigma * self.sigma

    def check_targets(self, targets: Tensor) -> None:
        if not bool(torch.isfinite(targets).all()):
            raise DataError(
                "NaN or infinite targets", "finite targets", "Drop or impute these samples."
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.reduced((outputs - self.fitted(outputs, targets)).square()) / (
            2 * self.variance
        )

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self.share(outputs) / self.variance
        return scale * (outputs - self.fitted(outputs, targets))

    def curvature(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        return torch.full_like(outputs, self.share(outputs) / self.variance)

    def sampled(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        u = streams.uniform(draws, *outputs.shape[1:]).to(outputs.device)
        # quantiles of the normal distribution; the clamp keeps them finite
        z: Tensor = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        scale = math.sqrt(self.share(outputs) / draws) / self.sigma
        return -z.to(outputs.dtype) * scale

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.reduced((p.double() - q.double()).square()) / (2 * self.variance)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.reduced((outputs - self.fitted(outputs, targets)).double().square())
