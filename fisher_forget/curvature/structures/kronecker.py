"""One layer's Kronecker-factored operator: a basis for its matrix's rows, one for its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fisher_forget._util.isolation import full_precision
from fisher_forget.curvature.checks import check_undamped
from fisher_forget.curvature.operator import Curvature, Spectral, Stored, not_sums, spectral_fields
from fisher_forget.curvature.rules import rule_for
from fisher_forget.curvature.rules.base import MatrixRule
from fisher_forget.errors import CurvatureError, StorageError
from fisher_forget.params import Params

KEY = "matrix"


@dataclass(frozen=True)
class Matrix:
    """How a layer's parameters are laid out as one matrix [O, I (+ 1)]."""

    rule: MatrixRule
    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def join(self, v: Mapping[str, Tensor]) -> Tensor:
        """[..., O, I (+ 1)] from parameters with any leading dimensions."""
        matrix = self.rule.to_matrix(v[self.weight])
        return matrix if self.bias is None else torch.cat([matrix, v[self.bias].unsqueeze(-1)], -1)

    def part(self, matrix: Tensor) -> Params:
        """Inverse of `join`."""
        if self.bias is None:
            return {self.weight: self.rule.from_matrix(matrix)}
        return {self.weight: self.rule.from_matrix(matrix[..., :-1]), self.bias: matrix[..., -1]}


@dataclass(frozen=True, kw_only=True)
class Kronecker(Spectral):
    """B = (Q_row (x) Q_col) diag(Lambda) (Q_row (x) Q_col)^T of one layer.

    Attributes:
        layout: The layer's matrix.
        row: Q_row [O, O]; `None` stands for the standard basis.
        col: Q_col [I, I].
    """

    layout: Matrix
    row: Tensor | None
    col: Tensor
    stored_as: ClassVar[str] = "kronecker"

    def rotate(self, v: Mapping[str, Tensor]) -> Params:
        return {KEY: turn(self.layout.join(v), self.row, self.col)}

    def unrotate(self, z: Mapping[str, Tensor]) -> Params:
        # (Q_row (x) Q_col) vec(Z) = vec(Q_row Z Q_col^T)
        m = z[KEY] if self.row is None else self.row @ z[KEY]
        return self.layout.part(m @ self.col.T)

    @full_precision()
    def diagonal(self) -> Params:
        # entry (o, i) is sum_kl Q_row[o,k]^2 Lambda_kl Q_col[i,l]^2
        m = self.spectrum()[KEY]
        m = m if self.row is None else self.row.square() @ m
        return self.layout.part(m @ self.col.square().T)

    def combined(self, other: Curvature, x: float, y: float) -> Curvature:
        check_undamped(self.tau, other.tau)
        if not isinstance(other, Kronecker):
            raise not_sums(self, other)
        if not (_equal(self.row, other.row) and _equal(self.col, other.col)):
            got = f"EKFAC blocks of {self.layout.names} in different bases"
            fix = "Estimate the second with estimate_curvature(..., basis=first)."
            raise CurvatureError(got, "one basis for both", fix)
        return self.mixed_eigenvalues(other, x, y)

    def nearest_prior(self, prior: Params) -> Curvature:
        # of diag(Q^T D Q) entry (k, l) is sum_oi Q_row[o,k]^2 D_oi Q_col[i,l]^2
        m = self.layout.join(prior) @ self.col.square()
        m = m if self.row is None else self.row.square().T @ m
        return replace(self, eigenvalues={KEY: self.eigenvalues[KEY] + m})

    def pack(self) -> Stored:
        plain = super().pack()
        bases = {"col": self.col} if self.row is None else {"row": self.row, "col": self.col}
        names = {"weight": self.layout.weight, "bias": self.layout.bias}
        return replace(plain, settings=plain.settings | names, tensors=plain.tensors | bases)

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        weight, bias = stored.settings["weight"], stored.settings["bias"]
        return cls(
            layout=Matrix(_rule_of(weight, model), weight, bias),
            row=stored.tensors.get("row"),
            col=stored.tensors["col"],
            **spectral_fields(stored),
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))


def _rule_of(weight: str, model: nn.Module) -> MatrixRule:
    """The rule of the layer that holds a weight, which says how that is a matrix."""
    wanted = dict(model.named_parameters())[weight]
    for module in model.modules():
        owns = any(p is wanted for p in module.parameters(recurse=False))
        rule = rule_for(module) if owns else None
        if isinstance(rule, MatrixRule):
            return rule
    got = f"a block of {weight}"
    raise StorageError(got, "a layer with a matrix of that name", "Estimate the curvature again.")


def turn(matrix: Tensor, row: Tensor | None, col: Tensor) -> Tensor:
    """Q_row^T M Q_col."""
    return (matrix if row is None else row.T @ matrix) @ col
