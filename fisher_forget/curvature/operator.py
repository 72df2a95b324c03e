"""The abstract curvature: a symmetric positive semi-definite operator on parameter space, and its
five methods.

*Matrix power is the primitive*: Newton is B^-1, the paper's noise B^-1/4, a product B^1, whitening
B^-1/2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params


@dataclass(frozen=True)
class Info:
    """Where a curvature comes from.

    Attributes:
        count: Scored positions that the mean is over.
        kind: Resolved: never "auto".
        structure: Its name; "pattern: name, ..." for mixed blocks.
    """

    count: float
    kind: str
    structure: str


@dataclass(frozen=True)
class Curvature(ABC):
    """B + tau I: the mean over samples of the output-weighted J_n^T H_n J_n, in nats, plus damping.

    Attributes:
        info: What it was estimated from; `None` for an operator that was put together by hand.
    """

    info: Info | None = field(default=None, kw_only=True)

    @abstractmethod
    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        """(B + tau I)^p v.

        Args:
            v: One tensor per parameter of this operator.
            p: Exponent: 1 product, -1 Newton, -1/4 noise of Golatkar et al. 2020, Prop. 4.

        Raises:
            CurvatureError: If p < 0 and the operator is singular, or p is negative or fractional
                and it is indefinite (only a Hessian can be); the message then says which damping is
                enough.
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
        """ln det(B + tau I); -inf where singular.

        Raises:
            CurvatureError: If the operator is indefinite.
        """

    def nbytes(self) -> int:
        """Bytes of the tensors that it holds."""
        return _nbytes(self)


@dataclass(frozen=True)
class Spectral(Curvature):
    """An operator known by an orthonormal basis and its eigenvalues: B = Q diag(eigenvalues) Q^T.

    Attributes:
        eigenvalues: One tensor per coordinate block, without damping.
        tau: Damping.
        signed: Whether negative eigenvalues are real. If not, B is semi-definite and they are
            rounding errors: 0.
    """

    eigenvalues: Params
    tau: float = 0.0
    signed: bool = field(default=False, kw_only=True)

    @abstractmethod
    def rotate(self, v: Mapping[str, Tensor]) -> Params:
        """Q^T v, keyed like `eigenvalues`."""

    @abstractmethod
    def unrotate(self, z: Mapping[str, Tensor]) -> Params:
        """Q z, keyed by parameter."""

    def spectrum(self) -> Params:
        """Eigenvalues of B + tau I."""
        floor = -math.inf if self.signed else 0.0
        return {key: value.clamp(min=floor) + self.tau for key, value in self.eigenvalues.items()}

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        spectrum = self.spectrum()
        if needs_definite(p):
            check_definite(_smallest(spectrum), f"power {p:g}", singular=p < 0)
        return self.unrotate({key: z * spectrum[key].pow(p) for key, z in self.rotate(v).items()})

    def damped(self, tau: float) -> Self:
        return replace(self, tau=self.tau + checked_damping(tau))

    def trace(self) -> float:
        return math.fsum(float(s.double().sum()) for s in self.spectrum().values())

    def logdet(self) -> float:
        spectrum = self.spectrum()
        check_definite(_smallest(spectrum), "logdet")
        return math.fsum(float(s.double().log().sum()) for s in spectrum.values())


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


_REHEARSAL: ContextVar[list[int] | None] = ContextVar("rehearsal", default=None)


@contextmanager
def rehearsal() -> Iterator[list[int]]:
    """Inside, `symmetric_basis` returns its argument at once and notes the side: for timing all the
    rest."""
    sides: list[int] = []
    token = _REHEARSAL.set(sides)
    try:
        yield sides
    finally:
        _REHEARSAL.reset(token)


def symmetric_basis(covariance: Tensor) -> Tensor:
    """Orthonormal eigenvectors [k, k] of a matrix given by its upper triangle, in float64 where
    that is cheap."""
    if (sides := _REHEARSAL.get()) is not None:
        sides.append(len(covariance))
        return covariance
    exact = covariance.double() if len(covariance) <= 512 else covariance
    try:
        basis: Tensor = torch.linalg.eigh(exact, UPLO="U")[1]
    except (
        RuntimeError
    ):  # LinAlgError: single precision may not converge where the rank is low (dead pixels)
        basis = torch.linalg.eigh(covariance.double(), UPLO="U")[1]
    return basis.to(covariance.dtype)


def checked_damping(tau: float) -> float:
    """The damping itself.

    Raises:
        CurvatureError: If it is negative or not a number.
    """
    if not tau >= 0:
        raise CurvatureError(f"damping {tau}", "tau >= 0", "Pass a non-negative damping.")
    return tau


def needs_definite(p: float) -> bool:
    """Whether x^p makes trouble for some x <= 0."""
    return p < 0 or p != int(p)


def check_definite(smallest: float, what: str, *, singular: bool = False) -> None:
    """Refuse an operation on an operator whose smallest eigenvalue is too small for it.

    Args:
        smallest: Smallest eigenvalue, damping included.
        what: The operation, for the message.
        singular: Refuse 0, too.

    Raises:
        CurvatureError: With a damping that is enough.
    """
    if smallest < 0:
        raise CurvatureError(
            f"{what} of an indefinite curvature, smallest eigenvalue {smallest:.4g}",
            "a positive definite one: away from a minimum a Hessian also curves downwards",
            f"Damp it first: curvature.damped(tau) with tau >= {-1.01 * smallest:.4g}; or use kind='exact'.",
        )
    if singular and smallest == 0:
        raise CurvatureError(
            f"{what} of a singular curvature",
            "strictly positive eigenvalues",
            "Damp it first: curvature.damped(tau) with tau > 0.",
        )


def _smallest(spectrum: Params) -> float:
    return min((float(s.min()) for s in spectrum.values() if s.numel()), default=math.inf)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_nbytes(v) for v in value.values())
    if isinstance(value, tuple):
        return sum(_nbytes(v) for v in value)
    if is_dataclass(value):
        return sum(_nbytes(getattr(value, f.name)) for f in fields(value))
    own = getattr(value, "nbytes", 0)  # a product that keeps graphs
    return own if isinstance(own, int) else 0
