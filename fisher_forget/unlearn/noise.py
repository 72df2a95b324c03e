r"""Calibrated Gaussian noise shaped by curvature.

w <- w + s (B + tau I)^-p xi with xi ~ N(0, I), so that its covariance is
Sigma = s^2 (B + tau I)^-2p; tau includes the weight decay here. Two numbers, in nats, say what it
costs and what it hides. Where the Newton step's error is isotropic, h - h' ~ (0, sigma_h^2 I),

    rise        = E[L_r(h + noise)] - L_r(h)        ~ s^2/2 tr(B (B + tau I)^-2p)
    information = E KL(N(h, Sigma) || N(h', Sigma)) = sigma_h^2 / (2 s^2) tr((B + tau I)^2p)

the second being the local forgetting bound of Golatkar et al. 2020 (arXiv:1911.04933, Prop. 2). Of
all covariances, Sigma* = (lambda sigma_h^2)^(1/2) B^(-1/2), p = 1/4, minimises rise + lambda
information (their Prop. 4). The public code of that paper draws p = 1/2 instead.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
import torch

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Split, some
from fisher_forget.errors import ConfigError, FisherForgetWarning, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.step import NewtonStep
from fisher_forget.unlearn.noise_draw import check_generator, draw_noise
from fisher_forget.unlearn.noise_target import EXPONENT, NoiseTarget
from fisher_forget.unlearn.objective import Batches, Objective
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.weight_decay import WeightDecay, decayed, least_of

SAMPLES = 500  # retained samples, at most, that the loss is measured on while a scale is searched
PAIRS, MOST_PAIRS = 4, 64  # common draws, each with its negative, that it is averaged over
DEGREES = 400  # weights times pairs, at least (see `pairs`)
SIMULATED = 100_000  # draws of a rise that its quantiles are read off
DECADES = 6.0  # how far from the quadratic guess the scale may lie, either way
STEP, RESOLUTION = 0.5, 0.01  # of log10 s: on the way to the target, and when it is close enough
CURVATURE_SHARE = 1e-3  # damping, as a share of the mean eigenvalue, where nothing else damps


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The scale that reaches a target, and what else it does.

    Attributes:
        scale: s; 0 if even the smallest noise tried misses the target, or the default target is
            out of reach.
        rise: Expected rise of the retained loss, nats; NaN for a given scale.
        rise_range: From which to which rise nine draws in ten lie, 5 and 95 % quantiles, nats (see
            `rise_quantiles`); one draw may well lower the loss.
        drop: By how much the retained score is expected to get worse: accuracy as a share, squared
            error in its own unit; NaN for a given scale.
        information: Local forgetting bound, nats; NaN where the error is not known.
        error: sigma_h, in units of the weights; NaN where it is not known.
        target: What was asked for, the default written out; `None` where the scale was given.
    """

    scale: float
    rise: float = math.nan
    rise_range: tuple[float, float] = (math.nan, math.nan)
    drop: float = math.nan
    information: float
    error: float
    target: NoiseTarget | None = None

    @property
    def asked(self) -> float:
        """Rise of the retained loss that a target asks for, nats: 19 draws in 20 cost less."""
        asks = self.target is not None and self.target.kind in ("loss", "accuracy")
        return self.rise_range[1] if asks else 0.0


@dataclass(frozen=True, kw_only=True)
class NoiseDraw(Calibration):
    """What may be said of the noise that was added: nothing of it gives the draw away.

    Attributes:
        exponent: p.
        damping: tau, nats per squared unit of weight; (B + (wd + tau) I) shapes the noise.
        norm: Root-mean-square length of such noise, s tr((B + (wd + tau) I)^-2p)^1/2.
        secret: Whether it came from the operating system; else from a generator that was given, and
            whoever knows its state can take the noise away again.
    """

    exponent: float
    damping: float
    norm: float
    secret: bool


@isolated()
def calibrate_noise(
    objective: Objective,
    split: Split,
    curvature: Curvature,
    at: Params,
    *,
    target: NoiseTarget | None = None,
    error: float = math.nan,
    exponent: float = EXPONENT,
    seed: int = 0,
) -> Calibration:
    r"""The scale s that reaches a target.

    Rise and drop are measured, as means over a few common `pairs` of draws d and -d on at most
    `SAMPLES` retained samples: the linear part of the loss, which most of one draw's rise is, has
    the expectation 0, and cancels in a pair. A target of either is met from below by the largest s,
    to 2 %, searched around where the quadratic model puts it. Information and trade-off have a
    closed form (`NoiseTarget`).

    Args:
        objective: Losses and scores.
        split: Gives the retained samples.
        curvature: Already damped.
        at: Parameters that the noise is added to.
        target: By default a rise of max(0.0002 nats, 0.2 % of the loss). Where no scale has this
            rise, as no weights change the loss, or all noise changes it by more, nobody asked for
            it: the scale is 0, and a warning says so.
        error: sigma_h where the target has none of its own.
        exponent: p.
        seed: Of the draws and the samples; these are public, and only fix the scale.

    Raises:
        ConfigError: If the likelihood has no accuracy, the error is needed and not known, or no
            noise gets as far as a given target.
        NumericalError: If a trade-off is asked for where the curvature is zero.
    """
    given, target = target, target or NoiseTarget()
    target.check(objective.likelihood)
    error = error if target.error is None else target.error
    if target.kind in ("information", "trade_off") and not 0 < error < math.inf:
        got = f"the noise target {target.kind}, and a Newton step whose error is not known"
        fix = "Pass NoiseTarget(..., error=...)."
        raise ConfigError(got, "sigma_h, the root-mean-square error of the step per weight", fix)
    generator = seeded(seed)
    count = pairs(P.size(at))
    directions = [draw_noise(curvature, at, 1.0, generator, exponent) for _ in range(count)]
    read = objective.reader(split, some(split.retain, SAMPLES, seed))
    harm = _Harm(objective, read, at, directions)
    precision = curvature.power_trace(2 * exponent, seed=seed)
    if target.information is not None:
        scale = _scale_of_information(target.information, error, precision)
    elif target.trade_off is not None:
        steepness = curvature.power_trace(-2 * exponent, times_curvature=True, seed=seed)
        if not steepness > 0:
            fix = "Pass noise a scale, or None."
            raise NumericalError("a curvature of zero", "a loss that noise can raise", fix)
        scale = (target.trade_off * error * error * precision / steepness) ** 0.25
    else:
        # rise ~ s^2/2 of the directions' mean curvature: where the search begins
        budget = target.loss if target.loss is not None else max(0.0002, 0.002 * harm.loss)
        steepness = float(np.mean([P.dot(d, curvature.power(d, 1.0)) for d in directions]))
        guess = math.sqrt(2 * budget / max(steepness, 1e-30))
        if target.accuracy is None:
            target = replace(target, loss=budget)
        allowed, which = (budget, 0) if target.accuracy is None else (target.accuracy, 1)
        scale = largest_scale(lambda s: harm(s)[which], allowed, guess)
        if scale == math.inf and given is not None:
            got = f"the noise target {target}, within which noise of any scale stays"
            fix = "Lower the target, or pass noise a scale, or None."
            raise ConfigError(got, "one that noise can reach", fix)
        if scale in (0, math.inf) and given is None:
            scale = 0.0
            warnings.warn(
                f"No noise was added: no scale of it raises the retained loss by {budget:.1g} "
                "nats. Pass noise a scale, or None.",
                FisherForgetWarning,
                stacklevel=2,
            )
    rise, drop = harm(scale)
    # the rise of one draw s d is to second order s g.d + s^2/2 d.B d
    slope = curvature.power(objective.gradient(read(), at).mean(), -exponent)
    degrees = degrees_of_freedom(curvature, directions, exponent)
    return Calibration(
        scale=scale,
        rise=rise,
        rise_range=rise_quantiles(rise, scale * P.norm(slope), degrees),
        drop=drop,
        information=information(scale, error, precision),
        error=error,
        target=target,
    )


def pairs(weights: int) -> int:
    """Pairs of draws that a rise is averaged over.

    The mean over n pairs varies by (2 / (n k))^1/2 of itself, with at most as many degrees of
    freedom k as there are weights: a model of few takes more pairs.
    """
    return max(PAIRS, min(MOST_PAIRS, math.ceil(DEGREES / max(weights, 1))))


def degrees_of_freedom(curvature: Curvature, directions: list[Params], exponent: float) -> float:
    r"""tr(A)^2 / tr(A^2) with A = (B + tau I)^-p B (B + tau I)^-p: of how many equal eigenvalues A
    could be.

    Args:
        curvature: B + tau I.
        directions: Draws d = (B + tau I)^-p xi, so that E d.B d = tr(A), and that of
            |(B + tau I)^-p B d|^2 = |A xi|^2 is tr(A^2).
        exponent: p.
    """
    curved = [curvature.undamped_product(d) for d in directions]
    trace = math.fsum(P.dot(d, bd) for d, bd in zip(directions, curved, strict=True))
    squares = math.fsum(P.norm(curvature.power(bd, -exponent)) ** 2 for bd in curved)
    return max(1.0, trace * trace / (len(directions) * squares)) if squares > 0 else math.inf


def rise_quantiles(rise: float, slope: float, degrees: float) -> tuple[float, float]:
    r"""5 and 95 % quantiles of the rise of the retained loss by one draw s d, to second order.

    s g.d is N(0, s^2 |(B + tau I)^-p g|^2), with g the gradient of the retained loss where noise is
    added, which weight decay alone keeps from being 0 at a minimum. s^2/2 d.B d is a weighted sum
    of chi-squares, and is taken as one with its mean and variance (Satterthwaite 1946). Both are
    uncorrelated, an odd and an even function of d, and are taken as independent.

    Args:
        rise: Expected rise, nats: the mean of the quadratic part.
        slope: Standard deviation of the linear part, s |(B + tau I)^-p g|, nats.
        degrees: Degrees of freedom of the quadratic part.

    Returns:
        NaN where weights overflow.
    """
    if not math.isfinite(rise + slope):
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    quadratic = np.full(SIMULATED, rise)
    if math.isfinite(degrees):
        quadratic *= rng.chisquare(degrees, SIMULATED) / degrees
    low, high = np.quantile(quadratic + slope * rng.standard_normal(SIMULATED), (0.05, 0.95))
    return float(low), float(high)


class _Harm:
    """What noise along common directions, and against them, does to retained samples.

    Args:
        objective: Losses and scores.
        read: Gives their batches.
        at: Weights without noise.
        directions: Draws at scale 1.
    """

    def __init__(
        self, objective: Objective, read: Batches, at: Params, directions: list[Params]
    ) -> None:
        self._objective, self._read, self._at = objective, read, at
        self._directions = directions
        self._known = {0.0: (0.0, 0.0)}
        self.loss, self._score = self._means(at)

    def __call__(self, scale: float) -> tuple[float, float]:
        """(rise of the mean loss, drop of the mean score), means over all directions, both ways."""
        if scale not in self._known:
            try:
                signed = [(d, s) for d in self._directions for s in (scale, -scale)]
                noisy = [self._means(P.add(self._at, d, s)) for d, s in signed]
                loss, score = np.mean(noisy, axis=0).tolist()
                drop = self._objective.likelihood.score.loss(score, self._score)
                self._known[scale] = loss - self.loss, drop
            except NumericalError:  # weights that overflow
                self._known[scale] = math.inf, math.inf
        return self._known[scale]

    def _means(self, at: Params) -> tuple[float, float]:
        """Mean loss, nats a scored position, and mean score a sample."""
        likelihood, totals, scores = self._objective.likelihood, [], []
        for pair in self._objective.forward(self._read(), at):
            totals.append(likelihood.loss_totals([pair]))
            scores.append(likelihood.scores(*pair))
        loss, positions = map(math.fsum, zip(*totals, strict=True))
        return loss / positions, float(torch.cat(scores).mean())


def information(scale: float, error: float, precision: float) -> float:
    r"""Local forgetting bound sigma_h^2 / (2 s^2) tr((B + tau I)^2p), nats.

    Args:
        scale: s; infinitely much at 0.
        error: sigma_h.
        precision: tr((B + tau I)^2p).
    """
    return (error / scale) * (error / scale) * precision / 2 if scale else math.inf


def _scale_of_information(bound: float, error: float, precision: float) -> float:
    """The smallest s whose local forgetting bound is not above the given one."""
    scale = error * math.sqrt(precision / (2 * bound))
    while information(scale, error, precision) > bound:  # by a rounding error
        scale = math.nextafter(scale, math.inf)
    return scale


def largest_scale(harm: Callable[[float], float], allowed: float, guess: float) -> float:
    """The largest scale whose harm is allowed, to `RESOLUTION` in log10, searched around a guess; 0
    if none is, infinity if all are.

    Harm that grows with s^2 says where to look next; every fourth look halves the bracket, whatever
    it says.
    """
    # log10 of the largest scale known to be allowed, of the smallest known not to be, and the next
    if not 0 < guess < math.inf:
        fix = "Check the model for weights and outputs that are not finite."
        raise NumericalError(f"a curvature of which noise has the scale {guess}", "finite", fix)
    low, high, at = -math.inf, math.inf, math.log10(guess)
    start, near = at, 0.999 * RESOLUTION
    for turn in count(1):
        harmed = harm(10**at)
        low, high = (at, high) if harmed <= allowed else (low, at)
        if high - low <= RESOLUTION:
            break
        if high < start - DECADES:
            return 0.0
        if low > start + DECADES:
            return math.inf
        # the next look lies inside the bracket, or at most a step outside of what is known
        least = low + near if low > -math.inf else high - STEP
        most = high - near if high < math.inf else low + STEP
        if 0 < harmed < math.inf and turn % 4:
            at += math.log10(allowed / harmed) / 2  # where harm ~ s^2 puts the target
        elif high - low < math.inf:
            at = (low + high) / 2
        else:
            at = most if harmed <= allowed else least
        at = min(max(at, least), most)
    return 10**low


@isolated()
def noise_step(
    problem: Problem,
    newton: NewtonStep,
    *,
    noise: float | Literal["auto"] | NoiseTarget = "auto",
    exponent: float = EXPONENT,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Params, NoiseDraw]:
    """Calibrate (unless `noise` is a number) and draw, at the weights of a Newton step.

    Args:
        problem: Losses, curvature and weight decay.
        newton: The step; its damping and error are those of the noise.
        noise: The scale s, what it is to achieve, or "auto" for the default target.
        exponent: p.
        seed: Of the calibration, which is public; no noise depends on it.
        generator: As for `draw_noise`.

    Returns:
        The noise, and what may be said of it.
    """
    check_generator(generator)
    damped, tau = noise_curvature(problem.curvature, newton, problem.decay)
    found = scale_of_noise(problem, newton, damped, noise=noise, exponent=exponent, seed=seed)
    drawn = draw_noise(damped, newton.params, found.scale, generator, exponent)
    spread = damped.power_trace(-2 * exponent, seed=seed)
    return drawn, NoiseDraw(
        **vars(found),
        exponent=exponent,
        damping=tau,
        norm=found.scale * math.sqrt(spread),
        secret=generator is None,
    )


@isolated()
def scale_of_noise(
    problem: Problem,
    newton: NewtonStep,
    damped: Curvature,
    *,
    noise: float | Literal["auto"] | NoiseTarget = "auto",
    exponent: float = EXPONENT,
    seed: int = 0,
) -> Calibration:
    """The scale of the noise, searched unless it is given; nothing is drawn that is released.

    Args:
        problem: Losses.
        newton: The step whose weights get the noise.
        damped: What `noise_curvature` returned.
        noise: As for `noise_step`.
        exponent: p.
        seed: Of the calibration.
    """
    if isinstance(noise, NoiseTarget) or noise == "auto":
        return calibrate_noise(
            problem.objective,
            problem.split,
            damped,
            newton.params,
            target=noise if isinstance(noise, NoiseTarget) else None,
            error=newton.error,
            exponent=exponent,
            seed=seed,
        )
    precision = damped.power_trace(2 * exponent, seed=seed)
    bound = information(float(noise), newton.error, precision)
    return Calibration(scale=float(noise), information=bound, error=newton.error)


def noise_curvature(
    curvature: Curvature, newton: NewtonStep, weight_decay: WeightDecay
) -> tuple[Curvature, float]:
    """(B + (wd + tau) I, tau of the Newton step); a share of the mean eigenvalue if both are 0."""
    tau = newton.noise_damping
    if tau + least_of(weight_decay) <= 0:
        tau = CURVATURE_SHARE * curvature.trace() / P.size(newton.params) or CURVATURE_SHARE
    return decayed(curvature, weight_decay, tau), tau
