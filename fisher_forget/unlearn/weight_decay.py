"""Weight decay: one number, or one for each parameter by shell patterns of names; and what a
trained model says of its own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util import patterns
from fisher_forget._util.checks import is_number
from fisher_forget._util.copies import unwrapped
from fisher_forget.curvature.operator import Curvature
from fisher_forget.errors import ConfigError
from fisher_forget.params import Params

WeightDecay = float | Mapping[str, float]
"""wd of the objective, mean loss + (1/2) sum_i wd_i w_i^2: of all weights, or by patterns."""
FACTOR = 1.5  # between two weight decays that contradict each other


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
class ReadOff:
    r"""Which weight decay a trained model acts like, and how long it was trained.

    Training that follows dw/dt = -(grad L + wd w) changes the length of the weights as

        d ln|w| / dt = wd_hat - wd,    wd_hat = -<grad L, w> / <w, w>,

    so that at a minimum wd_hat is the weight decay of the training; before, it is what grows the
    weights as well, about 0.1 over the training's time: finite training regularises like a decay.
    Of all wd it is the one that leaves the least force |grad L + wd w|.

    Attributes:
        value: wd_hat, nats per squared weight; 0 where the weights shrink without any decay.
        layers: The same of each module alone, of either sign; 0 where normalisation makes the loss
            blind to the length of its weights, and nothing can be read off.
        left: |grad L + wd_hat w|^2: of the gradient, what no such decay balances.
        time: L / left, squared weight per nat: the training's own time where the
            loss falls as 1/t, infinite at a minimum.
        squares: |w|^2 of each parameter.
    """

    value: float
    layers: dict[str, float]
    left: float
    time: float
    squares: dict[str, float]

    @property
    def beside(self) -> float:
        """rho^2: the share of |grad L|^2 that no decay of any layer balances; 0 at a minimum."""
        whole = self.left + self.value**2 * math.fsum(self.squares.values())
        of_layers = dict.fromkeys(self.layers, 0.0)
        for name, square in self.squares.items():
            of_layers[name.rpartition(".")[0]] += square
        held = math.fsum(max(self.layers[m], 0.0) ** 2 * square for m, square in of_layers.items())
        return max(1 - held / whole, 0.0) if whole else 0.0

    @property
    def typical(self) -> float:
        """Median of `layers`: what half of the layers act like at least, however large the weights
        are that training hardly moved (an embedding's that were drawn at random); 0 at least."""
        return max(statistics.median(self.layers.values()), 0.0) if self.layers else 0.0

    def mean_of(self, weight_decay: WeightDecay) -> float:
        """The one decay under which |w| shrinks as under decays by parameter name."""
        if not isinstance(weight_decay, Mapping):
            return weight_decay
        shrunk = math.fsum(weight_decay.get(n, 0.0) * s for n, s in self.squares.items())
        return shrunk / (math.fsum(self.squares.values()) or 1.0)


def read_off(gradient: Mapping[str, Tensor], at: Mapping[str, Tensor], loss: float) -> ReadOff:
    """The weight decay and the time of a training, from where it ended.

    Args:
        gradient: grad L, of the mean loss of the training data without decay.
        at: w, the trained weights, by the same names.
        loss: L there, nats.
    """
    pulls = {n: -P.dot({n: gradient[n]}, {n: w}) for n, w in at.items()}
    squares = {n: P.dot({n: w}, {n: w}) for n, w in at.items()}
    value = max(_ratio(pulls.values(), squares.values()), 0.0)
    modules: dict[str, list[str]] = {}
    for name in at:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    layers = {
        module: _ratio((pulls[n] for n in names), (squares[n] for n in names))
        for module, names in modules.items()
    }
    left = P.norm(P.add(gradient, at, value)) ** 2
    return ReadOff(value, layers, left, loss / left if left else math.inf, squares)


def _ratio(pulls: Iterable[float], squares: Iterable[float]) -> float:
    return math.fsum(pulls) / (math.fsum(squares) or 1.0)


def contradiction(given: WeightDecay, found: ReadOff, training_time: float | None = None) -> str:
    """By how much a given weight decay contradicts the model, in words; empty where it does not.

    With the decay wd the length of the weights would be changing at the rate wd_hat - wd. That
    cannot be where it makes a factor e within the time of the training: in networks trained by
    SGD, Adam and AdamW rate times time was below 0.5. What differs by less than half is no
    contradiction: gradients of batches leave that much.

    Args:
        given: A number, or numbers by parameter name (`by_name`).
        found: Of the model.
        training_time: T, where it is known.
    """
    wd = found.mean_of(given)
    low, high = sorted((found.value, wd))
    time = min(found.time, math.inf if training_time is None else training_time)
    if high <= FACTOR * low or not (high - low) * time > 1:
        return ""
    less, turn = ("less", "shrinking") if wd == high else ("more", "growing")
    times = f"{high / low:.2g} times {less}" if low else less
    lasted = f"its training lasted some {time:.1g}" if math.isfinite(time) else "it is at rest"
    return (
        f"the model acts like a weight decay of {found.value:.2g}, {times} than the given "
        f"{wd:.2g}, with which its weights would be {turn} by a factor e in a time of "
        f"{1 / (high - low):.3g}, where {lasted}"
    )


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
