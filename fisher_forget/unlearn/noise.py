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
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
import torch

from fisher_forget import params as P
from fisher_forget._util.checks import is_number
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split, some
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.newton.step import NewtonStep
from fisher_forget.unlearn.noise_target import EXPONENT, NoiseTarget
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.problem import Problem
from fisher_forget.unlearn.weight_decay import WeightDecay, decayed, least_of

SAMPLES = 1000  # retained samples, at most, that the loss is measured on while a scale is searched
DRAWS = 4  # common draws that it is averaged over
DECADES = 6.0  # how far from the quadratic guess the scale may lie, either way
STEP, RESOLUTION = 0.5, 0.01  # of log10 s: on the way to the target, and when it is close enough
CURVATURE_SHARE = 1e-3  # damping, as a share of the mean eigenvalue, where nothing else damps


@dataclass(frozen=True)
class Calibration:
    """The scale that reaches a target, and what else it does.

    Attributes:
        scale: s; 0 if even the smallest noise tried misses the target.
        rise: Mean rise of the retained loss over calibration draws, nats; NaN for a given scale.
        drop: By how much the retained score gets worse on them: accuracy as a share, squared error
            in its own unit; NaN where the scale was given.
        information: Local forgetting bound, nats; NaN where the error is not known.
        error: sigma_h, in units of the weights; NaN where it is not known.
        target: What was asked for, the default written out; `None` where the scale was given.
    """

    scale: float
    rise: float
    drop: float
    information: float
    error: float
    target: NoiseTarget | None


@dataclass(frozen=True, kw_only=True)
class NoiseDraw(Calibration):
    """The noise that was added, and the calibration of its scale.

    Attributes:
        params: The noise itself.
        exponent: p.
        damping: tau, nats per squared unit of weight; (B + (wd + tau) I) shapes the noise.
        norm: |noise|.
    """

    params: Params
    exponent: float
    damping: float
    norm: float


@isolated()
def draw_noise(
    curvature: Curvature,
    like: Params,
    scale: float,
    generator: torch.Generator,
    exponent: float = EXPONENT,
) -> Params:
    r"""One draw of s (B + tau I)^-p xi: Gaussian with covariance s^2 (B + tau I)^-2p.

    Args:
        curvature: Already damped: B + tau I.
        like: Names and shapes.
        scale: s >= 0.
        generator: The draw depends on its state alone.
        exponent: p.

    Raises:
        ConfigError: If the scale is negative.
        CurvatureError: If the curvature is singular.
    """
    if not is_number(scale):
        fix = "Pass scale=1e-3, say, or calibrate it."
        raise ConfigError(f"noise scale {scale!r}", "a non-negative number", fix)
    return P.scale(curvature.power(P.randn_like(like, generator), -exponent), scale)


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

    Rise and drop are measured, as means over `DRAWS` common draws on at most `SAMPLES` retained
    samples. A target of either is met from below by the largest s, to 2 %, searched around where
    the quadratic model puts it. Information and trade-off have a closed form (`NoiseTarget`).

    Args:
        objective: Losses and scores.
        split: Gives the retained samples.
        curvature: Already damped.
        at: Parameters that the noise is added to.
        target: By default a rise of max(0.0002 nats, 0.2 % of the loss).
        error: sigma_h where the target has none of its own.
        exponent: p.
        seed: Of the draws and the samples.

    Raises:
        ConfigError: If the likelihood has no accuracy, the error is needed and not known, or no
            noise gets as far.
        NumericalError: If a trade-off is asked for where the curvature is zero.
    """
    target = target or NoiseTarget()
    target.check(objective.likelihood)
    error = error if target.error is None else target.error
    if target.kind in ("information", "trade_off") and not 0 < error < math.inf:
        got = f"the noise target {target.kind} without a Newton step, whose error it needs"
        fix = "Pass NoiseTarget(..., error=...)."
        raise ConfigError(got, "sigma_h, the root-mean-square error of the step per weight", fix)
    generator = seeded(seed)
    directions = [draw_noise(curvature, at, 1.0, generator, exponent) for _ in range(DRAWS)]
    harm = _Harm(objective, list(split.batches(some(split.retain, SAMPLES, seed))), at, directions)
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
        scale = largest_scale(lambda s: harm(s)[which], allowed, guess, target)
    rise, drop = harm(scale)
    return Calibration(scale, rise, drop, information(scale, error, precision), error, target)


class _Harm:
    """What noise along common directions does to retained samples.

    Args:
        objective: Losses and scores.
        batches: Of the samples.
        at: Weights without noise.
        directions: Draws at scale 1.
    """

    def __init__(
        self, objective: Objective, batches: list[Batch], at: Params, directions: list[Params]
    ) -> None:
        self._objective, self._batches, self._at = objective, batches, at
        self._directions = directions
        self._known = {0.0: (0.0, 0.0)}
        self.loss, self._score = self._means(at)

    def __call__(self, scale: float) -> tuple[float, float]:
        """(rise of the mean loss, drop of the mean score), means over the directions."""
        if scale not in self._known:
            try:
                noisy = [self._means(P.add(self._at, d, scale)) for d in self._directions]
                loss, score = np.mean(noisy, axis=0).tolist()
                drop = self._objective.likelihood.score.loss(score, self._score)
                self._known[scale] = loss - self.loss, drop
            except NumericalError:  # weights that overflow
                self._known[scale] = math.inf, math.inf
        return self._known[scale]

    def _means(self, at: Params) -> tuple[float, float]:
        """Mean loss, nats a scored position, and mean score a sample."""
        likelihood = self._objective.likelihood
        pairs = list(self._objective.forward(self._batches, at))
        loss, positions = likelihood.loss_totals(pairs)
        scores = torch.cat([likelihood.scores(f, y) for f, y in pairs])
        return loss / positions, float(scores.mean())


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


def largest_scale(
    harm: Callable[[float], float], allowed: float, guess: float, target: NoiseTarget
) -> float:
    """The largest scale whose harm is allowed, to `RESOLUTION` in log10, searched around a guess; 0
    if none is.

    Harm that grows with s^2 says where to look next; every fourth look halves the bracket, whatever
    it says.
    """
    # log10 of the largest scale known to be allowed, of the smallest known not to be, and the next
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
            got = f"the noise target {target}, within which even noise of scale {10**low:.1g} stays"
            fix = "Lower the target, or pass noise a scale."
            raise ConfigError(got, "one that noise can reach", fix)
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
) -> NoiseDraw:
    """Calibrate (unless `noise` is a number) and draw, at the weights of a Newton step.

    Args:
        problem: Losses, curvature and weight decay.
        newton: The step; its damping and error are those of the noise.
        noise: The scale s, what it is to achieve, or "auto" for the default target.
        exponent: p.
        seed: Of draw and calibration, which use different streams.
    """
    damped, tau = noise_curvature(problem.curvature, newton, problem.weight_decay)
    if isinstance(noise, NoiseTarget) or noise == "auto":
        calibration = calibrate_noise(
            problem.objective,
            problem.split,
            damped,
            newton.params,
            target=noise if isinstance(noise, NoiseTarget) else None,
            error=newton.error,
            exponent=exponent,
            seed=seed + 1,
        )
    else:
        known = math.isfinite(newton.error)
        precision = damped.power_trace(2 * exponent, seed=seed + 1) if known else math.nan
        bound = information(float(noise), newton.error, precision)
        calibration = Calibration(float(noise), math.nan, math.nan, bound, newton.error, None)
    generator = seeded(seed)
    params = draw_noise(damped, newton.params, calibration.scale, generator, exponent)
    return NoiseDraw(
        **vars(calibration), params=params, exponent=exponent, damping=tau, norm=P.norm(params)
    )


def noise_curvature(
    curvature: Curvature, newton: NewtonStep, weight_decay: WeightDecay
) -> tuple[Curvature, float]:
    """(B + (wd + tau) I, tau of the Newton step); a share of the mean eigenvalue if both are 0."""
    tau = newton.noise_damping
    if tau + least_of(weight_decay) <= 0:
        tau = CURVATURE_SHARE * curvature.trace() / P.size(newton.params) or CURVATURE_SHARE
    return decayed(curvature, weight_decay, tau), tau
