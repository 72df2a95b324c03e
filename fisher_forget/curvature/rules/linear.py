"""Rules of linear layers."""

from __future__ import annotations

from torch import Tensor

from fisher_forget.curvature.rules.base import MatrixRule, add_gram, add_squared_products


class LinearRule(MatrixRule):
    """nn.Linear on inputs [N, ..., I]."""

    rank_one = True

    def positions(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return a.reshape(len(a), -1, a.shape[-1]), g.reshape(len(g), -1, g.shape[-1])

    def add_row_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.reshape(-1, g.shape[-1]))

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, a.reshape(-1, a.shape[-1]))

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, y = self.positions(a, g)
        out = {"weight": y.transpose(1, 2) @ x}
        if self.module.bias is not None:
            out["bias"] = y.sum(1)
        return out

    def add_squares(
        self, totals: dict[str, Tensor], a: Tensor, g: Tensor, shared: Tensor | None = None
    ) -> None:
        x, y = self.positions(a, g)
        if "weight" in totals:
            add_squared_products(self.to_matrix(totals["weight"]), y.transpose(1, 2), x)
        if "bias" in totals:
            totals["bias"] += y.sum(1).square().sum(0)


class TransposedLinearRule(LinearRule):
    """transformers' Conv1D: a Linear layer that stores its weight as [I, O]."""

    rank_one = False  # the gradient is a g^T

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        x, y = self.positions(a, g)
        return {"weight": x.transpose(1, 2) @ y, "bias": y.sum(1)}

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.transpose(-1, -2)
