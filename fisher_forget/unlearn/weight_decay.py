"""Weight decay: one number, or one for each parameter by shell patterns of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from fisher_forget._util import patterns
from fisher_forget._util.checks import is_number
from fisher_forget._util.copies import unwrapped
from fisher_forget.curvature.operator import Curvature
from fisher_forget.errors import ConfigError
from fisher_forget.params import Params

WeightDecay = float | Mapping[str, float]
"""wd of the objective, mean loss + (1/2) sum_i wd_i w_i^2: of all weights, or by patterns."""


def is_weight_decay(value: Any) -> bool:
    """Whether it is a number of at least 0, or such numbers by patterns, one at least."""
    if not isinstance(value, Mapping):
        return is_number(value)
    return bool(value) and all(isinstance(k, str) and is_number(v) for k, v in value.items())


def by_name(weight_decay: WeightDecay, model: nn.Module, names: Sequence[str]) -> WeightDecay:
    """The weight decay of parameters by name; one number where it is the same for all.

    A parameter has that of the first pattern that matches its name, and 0 where none does.

    Args:
        weight_decay: A number, or numbers by pattern: {"*.weight": 5e-4}.
        model: Whose parameters the patterns are for.
        names: Of those that move.

    Raises:
        ConfigError: If a pattern takes no parameter of the model.
    """
    if not isinstance(weight_decay, Mapping):
        return weight_decay
    known = [name for name, _ in unwrapped(model).named_parameters()]
    taken = patterns.assign(weight_decay, known, "weight_decay", ConfigError)
    found = {name: weight_decay[key] for key, members in taken.items() for name in members}
    rates = {name: float(found.get(name, 0.0)) for name in names}
    return rates if len({*rates.values()}) > 1 else next(iter(rates.values()))


def decayed(curvature: Curvature, weight_decay: WeightDecay, tau: float) -> Curvature:
    """B + diag(wd) + tau I, or the nearest to it that the structure of B can hold (`Decayed`).

    Args:
        curvature: B, without damping.
        weight_decay: What `by_name` gives.
        tau: Damping.
    """
    if not isinstance(weight_decay, Mapping):
        return curvature.damped(tau + weight_decay)
    least = least_of(weight_decay)
    more = {name: rate - least for name, rate in weight_decay.items()}
    held = curvature.with_prior(more, nearest=True).damped(tau + least)
    return Decayed(held, curvature, info=curvature.info)


def least_of(weight_decay: WeightDecay) -> float:
    """The decay that all parameters have at least."""
    return min(weight_decay.values()) if isinstance(weight_decay, Mapping) else weight_decay


def total_damping(weight_decay: WeightDecay, tau: float) -> WeightDecay:
    """wd + tau, by name where wd is."""
    if isinstance(weight_decay, Mapping):
        return {name: rate + tau for name, rate in weight_decay.items()}
    return weight_decay + tau


@dataclass(frozen=True)
class Decayed(Curvature):
    """A curvature B with weight decay that differs between parameters, and damping.

    Exact where the structure of B holds any diagonal matrix or products: diagonal, dense,
    matrix_free, blocks of parameters with one decay. In the joint basis of a layer's weight and
    bias (EKFAC), and of low_rank, it is the best diagonal: the entries of Q^T diag(wd) Q are added
    to the eigenvalues.

    Attributes:
        held: B + diag(wd) + tau I as its structure can hold it; all powers are of this.
        undamped: B.
    """

    held: Curvature
    undamped: Curvature

    @property
    def tau(self) -> float:
        """The damping that all parameters have at least."""
        return self.held.tau

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        return self.held.power(v, p)

    def undamped_product(self, v: Mapping[str, Tensor]) -> Params:
        return self.undamped.power(v, 1.0)

    def damped(self, tau: float) -> Self:
        return type(self)(self.held.damped(tau), self.undamped, info=self.info)

    def diagonal(self) -> Params:
        return self.held.diagonal()

    def trace(self) -> float:
        return self.held.trace()

    def logdet(self) -> float:
        return self.held.logdet()

    def zeros(self) -> Params:
        return self.held.zeros()

    def power_trace(
        self, p: float, *, times_curvature: bool = False, probes: int = 8, seed: int = 0
    ) -> float:
        if times_curvature:  # the eigenvalues that are held are not those of B
            return super().power_trace(p, times_curvature=True, probes=probes, seed=seed)
        return self.held.power_trace(p, probes=probes, seed=seed)
