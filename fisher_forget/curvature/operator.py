"""The abstract curvature: a symmetric positive semi-definite operator on parameter space, and its five methods.

*Matrix power is the primitive*: Newton is B^-1, the paper's noise B^-1/4, a product B^1, whitening B^-1/2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params


class Curvature(ABC):
    """B + tau I: the mean over samples of the output-weighted J_n^T H_n J_n, in nats, plus damping."""

    @abstractmethod
    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        """(B + tau I)^p v.

        Args:
            v: One tensor per parameter of this operator.
            p: Exponent: 1 product, -1 Newton, -1/4 noise of Golatkar et al. 2020, Prop. 4.

        Raises:
            CurvatureError: If p < 0 and the operator is singular.
        """

    @abstractmethod
    def damped(self, tau: float) -> Self:
        """B + (tau_0 + tau) I: weight decay and damping add up."""

    @abstractmethod
    def diagonal(self) -> Params:
        """Diagonal of B + tau I."""

    @abstractmethod
    def trace(self) -> float:
        """tr(B + tau I)."""

    @abstractmethod
    def logdet(self) -> float:
        """ln det(B + tau I); -inf where singular."""


@dataclass(frozen=True)
class Spectral(Curvature):
    """An operator known by an orthonormal basis and its eigenvalues: B = Q diag(eigenvalues) Q^T.

    Attributes:
        eigenvalues: One tensor per coordinate block, >= 0, without damping.
        tau: Damping.
    """

    eigenvalues: Params
    tau: float = 0.0

    @abstractmethod
    def rotate(self, v: Mapping[str, Tensor]) -> Params:
        """Q^T v, keyed like `eigenvalues`."""

    @abstractmethod
    def unrotate(self, z: Mapping[str, Tensor]) -> Params:
        """Q z, keyed by parameter."""

    def spectrum(self) -> Params:
        """Eigenvalues of B + tau I."""
        return {key: value.clamp(min=0) + self.tau for key, value in self.eigenvalues.items()}

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        spectrum = self.spectrum()
        if p < 0 and any(float(s.min()) <= 0 for s in spectrum.values() if s.numel()):
            raise CurvatureError(
                f"power {p} of a singular curvature",
                "strictly positive eigenvalues",
                "Damp it first: curvature.damped(tau) with tau > 0.",
            )
        return self.unrotate({key: z * spectrum[key].pow(p) for key, z in self.rotate(v).items()})

    def damped(self, tau: float) -> Self:
        if tau < 0:
            raise CurvatureError(f"damping {tau}", "tau >= 0", "Pass a non-negative damping.")
        return replace(self, tau=self.tau + tau)

    def trace(self) -> float:
        return math.fsum(float(s.double().sum()) for s in self.spectrum().values())

    def logdet(self) -> float:
        return math.fsum(float(s.double().log().sum()) for s in self.spectrum().values())


@dataclass(frozen=True)
class BlockDiagonal(Curvature):
    """Operators on disjoint sets of parameters, side by side.

    Attributes:
        parts: (names, operator) pairs.
        order: All names, in the model's order.
    """

    parts: tuple[tuple[tuple[str, ...], Curvature], ...]
    order: tuple[str, ...]

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        out: Params = {}
        for names, part in self.parts:
            out.update(part.power({name: v[name] for name in names}, p))
        return {name: out[name] for name in v}

    def damped(self, tau: float) -> Self:
        return replace(self, parts=tuple((names, part.damped(tau)) for names, part in self.parts))

    def diagonal(self) -> Params:
        found = {name: value for _, part in self.parts for name, value in part.diagonal().items()}
        return {name: found[name] for name in self.order}

    def trace(self) -> float:
        return math.fsum(part.trace() for _, part in self.parts)

    def logdet(self) -> float:
        return math.fsum(part.logdet() for _, part in self.parts)


def symmetric_basis(covariance: Tensor) -> Tensor:
    """Orthonormal eigenvectors [k, k] of a symmetric matrix, computed in float64 where that is cheap."""
    exact = covariance.double() if len(covariance) <= 512 else covariance
    basis: Tensor = torch.linalg.eigh((exact + exact.T) / 2)[1]
    return basis.to(covariance.dtype)
