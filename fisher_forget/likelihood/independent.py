"""Likelihoods of independent outputs, whose output Hessian is diagonal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fisher_forget.errors import DataError
from fisher_forget.likelihood.base import Likelihood, check_finite, positions, signed


class IndependentOutputs(Likelihood):
    """A likelihood with diagonal H_n; targets have the shape of the outputs [B, ...]."""

    @abstractmethod
    def root(self, outputs: Tensor) -> Tensor:
        """Diagonal of H_n^{1/2}: the shape of the outputs."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape:
            got = f"targets of shape {tuple(targets.shape)} for outputs {tuple(outputs.shape)}"
            fix = "Reshape the targets (a single output usually needs [batch, 1]), or pass unpack=."
            raise DataError(got, f"the same shape for both with likelihood={self.name!r}", fix)
        self.check_targets(targets)
        check_finite(outputs)

    @abstractmethod
    def check_targets(self, targets: Tensor) -> None:
        """Refuse values that are no targets."""

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        # one coordinate of every sample at a time
        root = self.root(outputs)
        for at, zero in positions(root, root.dim()):
            zero[at] = root[at]
            yield zero

    def column_count(self, outputs: Tensor) -> int:
        return outputs[0].numel()

    def sketch(
        self, outputs: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None
    ) -> Tensor:
        return signed(self.root(outputs), draws, generator)
