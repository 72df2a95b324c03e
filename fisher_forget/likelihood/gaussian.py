"""Regression with known noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.likelihood.base import (
    SQUARED_ERROR,
    Likelihood,
    Score,
    check_finite,
    check_same_shape,
    coordinates,
    signed,
    uniform,
)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression with known noise. Outputs are means [B, ...]; targets of the same shape.

    l = |y - f|^2 / (2 sigma^2), the constant log(2 pi sigma^2)/2 left out; r = (f - y)/sigma^2; H =
    I/sigma^2.

    Args:
        sigma: Standard deviation of the targets around the mean, in the targets' units.
    """

    sigma: float = 1.0
    name: ClassVar[str] = "gaussian"
    score: ClassVar[Score] = SQUARED_ERROR

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ConfigError(
                f"sigma={self.sigma}", "a positive standard deviation", "Pass Gaussian(sigma=...)."
            )

    @property
    def variance(self) -> float:
        """sigma^2."""
        return self.sigma * self.sigma

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_same_shape(outputs, targets, "gaussian")
        if not bool(torch.isfinite(targets).all()):
            raise DataError(
                "NaN or infinite targets", "finite targets", "Drop or impute these samples."
            )
        check_finite(outputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() / (2 * self.variance)).reshape(len(outputs), -1).sum(1)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.variance

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        return vector / self.variance

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        yield from coordinates(torch.full_like(outputs, 1 / self.sigma))

    def column_count(self, outputs: Tensor) -> int:
        return outputs[0].numel()

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        return signed(torch.full_like(outputs, 1 / self.sigma), draws, generator)

    def sampled(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        u = uniform(outputs, draws, generator, outputs.shape)
        # quantiles of the normal distribution; the clamp keeps them finite
        z: Tensor = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12))
        return -z.to(outputs.dtype) / (self.sigma * math.sqrt(draws))

    def kl(self, p: Tensor, q: Tensor, targets: Tensor | None = None) -> Tensor:
        return ((p.double() - q.double()).square() / (2 * self.variance)).reshape(len(p), -1).sum(1)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return torch.full(
            (len(outputs),), outputs[0].numel() / self.variance, device=outputs.device
        )

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).double().square().reshape(len(outputs), -1).sum(1)
