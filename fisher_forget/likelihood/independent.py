"""Likelihoods of independent outputs, whose output Hessian is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from fisher_forget.errors import ConfigError, DataError
from fisher_forget.likelihood.base import Likelihood, check_finite, positions, signed
from fisher_forget.likelihood.streams import Streams


class IndependentOutputs(Likelihood):
    """A likelihood with diagonal H_n.

    Targets have the shape of the outputs [B, ...]; a single output [B, 1] takes [B] as well.

    Attributes:
        reduction: Whether a sample's loss is the sum over its outputs, or their mean, as in torch's
            loss functions; KL and score of a sample follow it.
    """

    reduction: Literal["sum", "mean"]

    def __post_init__(self) -> None:
        if self.reduction not in ("sum", "mean"):
            fix = "Say how the loss of a sample is made of its outputs' losses."
            raise ConfigError(f"reduction={self.reduction!r}", "'sum' or 'mean'", fix)

    def reduced(self, values: Tensor) -> Tensor:
        """The sum or mean over a sample's outputs: [B]."""
        flat = values.reshape(len(values), -1)
        return flat.mean(1) if self.reduction == "mean" else flat.sum(1)

    def share(self, outputs: Tensor) -> float:
        """What one output counts: 1, or one over their number."""
        return 1 / outputs[0].numel() if self.reduction == "mean" else 1.0

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets in the shape and type of the outputs."""
        return targets.reshape(outputs.shape).to(outputs.dtype)

    @abstractmethod
    def curvature(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Diagonal of H_n: the shape of the outputs."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        # a single output a sample, or a single channel, may lack its dimension
        shapes = [[len(x), *(n for n in x.shape[1:] if n > 1)] for x in (outputs, targets)]
        if shapes[0] != shapes[1]:
            got = f"targets of shape {tuple(targets.shape)} for outputs {tuple(outputs.shape)}"
            fix = "Reshape the targets (a single output usually needs [batch, 1]), or pass unpack=."
            raise DataError(got, f"the same shape for both with likelihood={self.name!r}", fix)
        self.check_targets(targets)
        check_finite(outputs)

    @abstractmethod
    def check_targets(self, targets: Tensor) -> None:
        """Refuse values that are no targets."""

    def hessian_product(
        self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        return self.curvature(outputs, targets) * vector

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        # one coordinate of every sample at a time
        root = self.curvature(outputs, targets).sqrt()
        for at, zero in positions(root, root.dim()):
            zero[at] = root[at]
            yield zero

    def column_count(self, outputs: Tensor) -> int:
        return outputs[0].numel()

    def sketch(
        self, outputs: Tensor, draws: int, streams: Streams, targets: Tensor | None
    ) -> Tensor:
        return signed(self.curvature(outputs, targets).sqrt(), draws, streams)

    def output_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.curvature(outputs, targets).reshape(len(outputs), -1).sum(1)
