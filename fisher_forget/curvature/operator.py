"""The abstract curvature: a symmetric positive semi-definite operator on parameter space.

*Matrix power is the primitive*: Newton is B^-1, the paper's noise B^-1/4, a product B^1, whitening
B^-1/2. Traces of powers, sums, priors and storage have defaults.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.isolation import full_precision, seeded
from fisher_forget.curvature.checks import (
    check_definite,
    check_undamped,
    checked_damping,
    needs_definite,
)
from fisher_forget.curvature.solvers import rademacher
from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params


@dataclass(frozen=True)
class Info:
    """Where a curvature comes from.

    Attributes:
        count: Scored positions that the mean is over.
        kind: Resolved: never "auto".
        structure: Its name; "pattern: name, ..." for mixed blocks.
        draws: Columns a sample of a random kind; 0 of the others.
        seed: Of these.
    """

    count: float
    kind: str
    structure: str
    draws: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Stored:
    """An operator taken apart for a file.

    Attributes:
        type: `Curvature.stored_as` of its class.
        settings: What JSON can hold.
        tensors: By name.
        parts: (parameter names, operator) of an operator that is made of others.
    """

    type: str
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[tuple[tuple[str, ...], Stored], ...] = ()

    def with_params(self, prefix: str, params: Params, setting: str) -> Stored:
        """With named tensors; their names, in order, become a setting."""
        named = {f"{prefix}/{name}": value for name, value in params.items()}
        settings = self.settings | {setting: list(params)}
        return replace(self, settings=settings, tensors=self.tensors | named)

    def params(self, prefix: str, setting: str) -> Params:
        """Inverse of `with_params`."""
        return {name: self.tensors[f"{prefix}/{name}"] for name in self.settings[setting]}


@dataclass(frozen=True)
class Curvature(ABC):
    """B + tau I: the mean over samples of the output-weighted J_n^T H_n J_n, in nats, plus damping.

    Attributes:
        info: What it was estimated from; `None` for an operator that was put together by hand.
        stored_as: Name of the class in files; empty where it cannot be stored.
        whole: Whether it holds all of B: a Newton step inverts it, while others precondition.
    """

    info: Info | None = field(default=None, kw_only=True)
    stored_as: ClassVar[str] = ""
    whole: ClassVar[bool] = False

    @property
    @abstractmethod
    def tau(self) -> float:
        """Damping."""

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

    def zeros(self) -> Params:
        """The zero vector of its parameters."""
        return P.zeros_like(self.diagonal())

    def power_trace(
        self, p: float, *, times_curvature: bool = False, probes: int = 8, seed: int = 0
    ) -> float:
        r"""tr((B + tau I)^p), or tr(B (B + tau I)^p): what noise of exponent -p/2 needs.

        Exact where the eigenvalues are known. Else the mean of y^T y, or of y^T B y, over
        y = (B + tau I)^{p/2} z with random signs z (Hutchinson 1990): unbiased, and the estimate of
        tr A has a standard error of at most (2 tr(A^2) / probes)^1/2.

        Args:
            p: Exponent.
            times_curvature: Whether B, without damping, stands before the power.
            probes: Random vectors of the estimate.
            seed: Of these.

        Raises:
            CurvatureError: As for `power`.
        """
        if (known := self.known_eigenvalues()) is not None:
            powers = [(s.double(), (s.double() + self.tau).pow(p), times) for s, times in known]
            terms = ((s * x if times_curvature else x, times) for s, x, times in powers)
            return math.fsum(times * float(term.sum()) for term, times in terms)
        generator, zeros, values = seeded(seed), self.zeros(), []
        first = P.flatten(zeros)
        for _ in range(probes):
            y = self.power(P.unflatten(rademacher(len(first), first, generator), zeros), p / 2)
            squares = P.dot(y, y)
            if times_curvature:
                squares = P.dot(y, self.undamped_product(y))
            values.append(squares)
        return math.fsum(values) / probes

    def undamped_product(self, v: Mapping[str, Tensor]) -> Params:
        """B v = (B + tau I) v - tau v."""
        return P.add(self.power(v, 1.0), v, -self.tau)

    def known_eigenvalues(self) -> Sequence[tuple[Tensor, int]] | None:
        """Eigenvalues of B, and how often each occurs; `None` where only products are known."""
        return None

    def combined(self, other: Curvature, x: float, y: float) -> Curvature:
        """x A + y B of two undamped curvatures of the same parameters.

        Raises:
            CurvatureError: If either is damped, or the structure is not a sum over samples.
        """
        check_undamped(self.tau, other.tau)
        raise not_sums(self, other)

    def with_prior(
        self, precision: Mapping[str, Tensor | float], *, nearest: bool = False
    ) -> Curvature:
        """B + diag(precision) + tau I; parameters without a precision get 0.

        Args:
            precision: By name.
            nearest: Where the structure can't hold precisions that differ, add their diagonal in
                its basis, which is the nearest to them in Frobenius norm.

        Raises:
            CurvatureError: If the structure can't hold them, and the nearest was not asked for.
        """
        prior = P.expanded(precision, self.zeros())
        vector = P.flatten(prior)
        if bool((vector == vector[0]).all()):
            return self.damped(float(vector[0]))
        if nearest:
            return self.nearest_prior(prior)
        raise CurvatureError(
            f"precisions that differ within a {type(self).__name__}",
            "one number for all its parameters",
            "Use structure='diagonal' or 'dense', or blocks: "
            "structure={'*bias': 'diagonal', '*': 'ekfac'}.",
        )

    def nearest_prior(self, prior: Params) -> Curvature:
        """`with_prior` of precisions that the structure can't hold."""
        return self.damped(float(P.flatten(prior).mean()))

    def pack(self) -> Stored:
        """The operator's settings and tensors, for a file.

        Raises:
            CurvatureError: If it has no tensors of its own (matrix-free).
        """
        got = f"a {type(self).__name__}"
        fix = "A matrix-free curvature is its model and data: store these."
        raise CurvatureError(got, "a diagonal, EKFAC, dense, low-rank or mixed curvature", fix)

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        """Inverse of `pack`.

        Args:
            stored: What `pack` returned.
            parts: `stored.parts`, unpacked already.
            model: That the operator belongs to.
        """
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of the tensors that it holds."""
        return _nbytes(self)


@dataclass(frozen=True)
class Spectral(Curvature):
    """An operator known by an orthonormal basis and its eigenvalues: B = Q diag(eigenvalues) Q^T.

    Attributes:
        eigenvalues: One tensor per coordinate block, without damping.
        tau: Damping.
        signed: Whether negative eigenvalues are real, or rounding errors of a semi-definite B: 0.
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

    @full_precision()
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

    def known_eigenvalues(self) -> Sequence[tuple[Tensor, int]]:
        return [(values, 1) for values in replace(self, tau=0.0).spectrum().values()]

    def pack(self) -> Stored:
        plain = Stored(self.stored_as, {"tau": self.tau, "signed": self.signed})
        return plain.with_params("eigenvalues", self.eigenvalues, "keys")

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        return cls(**spectral_fields(stored))

    def mixed_eigenvalues(self, other: Spectral, x: float, y: float) -> Self:
        """x A + y B of operators with one basis."""
        mixed = {key: x * a + y * other.eigenvalues[key] for key, a in self.eigenvalues.items()}
        return replace(self, eigenvalues=mixed)


@dataclass(frozen=True)
class BlockDiagonal(Curvature):
    """Operators on disjoint sets of parameters, side by side.

    Attributes:
        parts: (names, operator) pairs.
        order: All names, in the model's order.
    """

    parts: tuple[tuple[tuple[str, ...], Curvature], ...]
    order: tuple[str, ...]
    stored_as: ClassVar[str] = "blocks"

    @property
    def tau(self) -> float:
        """The damping that all blocks have at least."""
        return min((part.tau for _, part in self.parts), default=0.0)

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        out: Params = {}
        for names, part in self.parts:
            out.update(part.power({name: v[name] for name in names}, p))
        return {name: out[name] for name in v}

    def damped(self, tau: float) -> Self:
        return replace(self, parts=tuple((names, part.damped(tau)) for names, part in self.parts))

    def diagonal(self) -> Params:
        return self._ordered(part.diagonal() for _, part in self.parts)

    def zeros(self) -> Params:
        return self._ordered(part.zeros() for _, part in self.parts)

    def _ordered(self, pieces: Iterable[Params]) -> Params:
        merged = {name: value for piece in pieces for name, value in piece.items()}
        return {name: merged[name] for name in self.order}

    def trace(self) -> float:
        return math.fsum(part.trace() for _, part in self.parts)

    def logdet(self) -> float:
        return math.fsum(part.logdet() for _, part in self.parts)

    def power_trace(
        self, p: float, *, times_curvature: bool = False, probes: int = 8, seed: int = 0
    ) -> float:
        options: Any = {"times_curvature": times_curvature, "probes": probes, "seed": seed}
        return math.fsum(part.power_trace(p, **options) for _, part in self.parts)

    def combined(self, other: Curvature, x: float, y: float) -> Curvature:
        if not isinstance(other, BlockDiagonal) or len(self.parts) != len(other.parts):
            raise not_sums(self, other)
        pairs = zip(self.parts, other.parts, strict=True)
        parts = tuple((names, a.combined(b, x, y)) for (names, a), (_, b) in pairs)
        return replace(self, parts=parts)

    def with_prior(
        self, precision: Mapping[str, Tensor | float], *, nearest: bool = False
    ) -> Curvature:
        pairs = ((names, part.with_prior(precision, nearest=nearest)) for names, part in self.parts)
        return replace(self, parts=tuple(pairs))

    def pack(self) -> Stored:
        parts = tuple((names, part.pack()) for names, part in self.parts)
        return Stored(self.stored_as, {"order": list(self.order)}, parts=parts)

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        names = (names for names, _ in stored.parts)
        return cls(tuple(zip(names, parts, strict=True)), tuple(stored.settings["order"]))


def spectral_fields(stored: Stored) -> dict[str, Any]:
    """The fields of a stored `Spectral`."""
    settings: dict[str, Any] = {key: stored.settings[key] for key in ("tau", "signed")}
    return settings | {"eigenvalues": stored.params("eigenvalues", "keys")}


def not_sums(a: Curvature, b: Curvature) -> CurvatureError:
    """The error for two curvatures that do not add up."""
    expected = "two diagonal, EKFAC or dense curvatures of the same parameters"
    fix = "The other structures are no sums over samples: estimate them anew."
    return CurvatureError(f"{type(a).__name__} and {type(b).__name__}", expected, fix)


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
    size = getattr(value, "nbytes", 0)  # a product that keeps graphs
    return size if isinstance(size, int) else 0
