"""The rule of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_forget.curvature.rules.base import MatrixRule, add_gram


class EmbeddingRule(MatrixRule):
    """nn.Embedding: weight [V, D]; its rows' side is one-hot and keeps the standard basis."""

    sparse = True

    def has_row_basis(self) -> bool:
        return False

    def add_column_moment(self, total: Tensor, a: Tensor, g: Tensor) -> None:
        add_gram(total, g.reshape(-1, g.shape[-1]))

    def per_sample(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        return self.added({"weight": g.new_zeros(len(a), *self.module.weight.shape)}, a, g)

    def added(self, before: dict[str, Tensor], a: Tensor, g: Tensor) -> dict[str, Tensor]:
        if "weight" not in before:
            return self.per_sample(a, g)
        n, (vocabulary, width) = len(a), self.module.weight.shape
        # the row of sample n's token t in the matrices of all samples, one below the other
        index = a.reshape(n, -1) + torch.arange(n, device=a.device)[:, None] * vocabulary
        g = g.reshape(-1, width)
        if self.module.padding_idx is not None:
            g = g * (a.reshape(-1, 1) != self.module.padding_idx)
        # a tied output layer has formed the whole matrix already: only the rows of the tokens seen
        # change
        rows = before["weight"].view(-1, width).index_add_(0, index.reshape(-1), g)
        return {"weight": rows.view(n, vocabulary, width)}
