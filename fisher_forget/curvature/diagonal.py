"""Diagonal structure: sum over samples and columns of squared per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_forget.curvature.operator import Spectral
from fisher_forget.curvature.tape import Record, Tape
from fisher_forget.params import Params


@dataclass(frozen=True)
class Diagonal(Spectral):
    """diag(B): eigenvalues are the diagonal, keyed and shaped like the parameters."""

    def rotate(self, v: Mapping[str, Tensor]) -> Params:
        return {name: v[name] for name in self.eigenvalues}

    def unrotate(self, z: Mapping[str, Tensor]) -> Params:
        return dict(z)

    def diagonal(self) -> Params:
        return self.spectrum()


class DiagonalSum:
    """Accumulates diag(sum_n J_n^T H_n J_n).

    A Linear layer at one position needs no per-sample gradient: the squared output gradients of all columns are added
    first, then one product (sum_k G_k*G_k)^T (A*A) serves the chunk.
    """

    passes = 1

    def __init__(self, tape: Tape) -> None:
        self.sums: Params = {name: torch.zeros_like(p) for name, p in tape.params.items()}
        self._pending: dict[int, tuple[Tensor, Tensor, dict[str, str]]] = {}

    def add(self, record: Record, column: Tensor, grads: Sequence[Tensor | None], last: bool) -> None:
        for group in record.groups():
            thin = group.rank_one(grads)
            if thin is not None:
                a, g = thin
                key = group.calls[0]
                if key in self._pending:
                    self._pending[key][1].addcmul_(g, g)
                else:
                    self._pending[key] = (a, g * g, group.uses[0].block.names)
                continue
            group.add_squares(self.sums, grads)
        if record.tape.stray:
            for name, value in record.tape.functional(record.batch, column).items():
                self.sums[name] += value.square().sum(0)
        if last:
            for a, squares, names in self._pending.values():
                if "weight" in names:
                    self.sums[names["weight"]].addmm_(squares.T, a * a)
                if "bias" in names:
                    self.sums[names["bias"]] += squares.sum(0)
            self._pending.clear()

    def end_pass(self) -> None:
        """One pass is all a diagonal needs."""

    def result(self, count: float) -> Diagonal:
        """The mean over `count` scored positions."""
        return Diagonal({name: total / count for name, total in self.sums.items()})
