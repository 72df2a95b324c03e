r"""Calibrated Gaussian noise shaped by curvature.

w <- w + s (B + tau I)^-p xi with xi ~ N(0, I), so that its covariance is Sigma = s^2 (B + tau
I)^-2p. Two numbers say what it costs and what it hides. Where the Newton step's error is isotropic,
h - h' ~ (0, sigma_h^2 I),

    rise        = E[L_r(h + noise)] - L_r(h)        ~ s^2/2 tr(B (B + tau I)^-2p)                      [nats]
    information = E KL(N(h, Sigma) || N(h', Sigma)) = sigma_h^2 / (2 s^2) tr((B + tau I)^2p)           [nats]

the second being the local forgetting bound of Golatkar et al. 2020 (arXiv:1911.04933, Prop. 2). Of
all covariances, Sigma* = (lambda sigma_h^2)^(1/2) B^(-1/2), p = 1/4, minimises rise + lambda
information (their Prop. 4). The public code of that paper draws p = 1/2 instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from numbers import Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.curvature.solvers import rademacher
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective

EXPONENT = 0.25
DRAWS = 4  # common draws that the loss is averaged over while the scale is searched
DECADES = 6.0  # how far from the quadratic guess the scale may lie, either way
STEP, RESOLUTION = 0.5, 0.01  # of log10 s: on the way to the target, and when it is close enough
PROBES = 8  # random signs for the traces of an operator whose eigenvalues are not known
CURVATURE_SHARE = 1e-3  # damping, as a share of the mean eigenvalue, where nothing else damps
KINDS = ("loss", "accuracy", "information", "trade_off")


@dataclass(frozen=True)
class NoiseTarget:
    r"""What the noise scale s is to achieve: at most one of the first four; without any, a default
    rise of the loss.

    Attributes:
        loss: Allowed rise of the mean retained loss, nats; by default max(0.0002, 0.2 % of it).
        accuracy: Allowed drop of the retained accuracy, as a share: 0.01 is one point of a hundred.
        information: Local forgetting bound (see the module), nats; s^2 = sigma_h^2 tr((B + tau
            I)^2p) / 2 information.
        trade_off: lambda of the Forgetting Lagrangian rise + lambda information, whose quadratic
            model is least at s^4 = lambda sigma_h^2 tr((B + tau I)^2p) / tr(B (B + tau I)^-2p): at
            p = 1/4 and tau = 0 the paper's s = (lambda sigma_h^2)^1/4 (Golatkar et al. 2020, Prop. 4). Nats of loss per nat of information.
        error: sigma_h, root-mean-square error of the Newton step per weight, in units of the
            weights; `None` for an estimate. It scales `information` and `trade_off`, and no more
            than a report of the other two.
    """

    loss: float | None = None
    accuracy: float | None = None
    information: float | None = None
    trade_off: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in KINDS if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ConfigError(
                f"the noise targets {given}",
                f"at most one of {', '.join(KINDS)}",
                "Keep one: each fixes the scale.",
            )
        for name, value in (given | {"error": 1.0 if self.error is None else self.error}).items():
            most = 1.0 if name == "accuracy" else math.inf
            if (
                isinstance(value, bool)
                or not isinstance(value, Real)
                or not 0 < float(value) < most
            ):
                raise ConfigError(
                    f"the noise target {name}={value!r}",
                    "a share between 0 and 1" if name == "accuracy" else "a finite number above 0",
                    f"Correct {name}; noise=None adds no noise.",
                )

    def __str__(self) -> str:
        value = getattr(self, self.kind)
        return self.kind if value is None else f"{self.kind} {value:.2g}"

    @property
    def kind(self) -> str:
        """Which of the four."""
        return next((name for name in KINDS if getattr(self, name) is not None), "loss")

    def check(self, likelihood: Likelihood) -> None:
        """Refuse an accuracy where there is none.

        Raises:
            ConfigError: If the likelihood scores by something else.
        """
        if self.accuracy is not None and not likelihood.score.higher_is_better:
            raise ConfigError(
                f"the noise target accuracy={self.accuracy} of models scored by {likelihood.score.name}",
                "a likelihood whose score is an accuracy",
                "Pass NoiseTarget(loss=...), in nats: for a Gaussian the squared error over 2 sigma^2.",
            )


@dataclass(frozen=True)
class Calibration:
    """The scale that reaches a target, and what else it does.

    Attributes:
        scale: s; 0 if even the smallest noise tried misses the target.
        rise: Mean rise of the retained loss over the calibration draws, nats; NaN where the scale
            was given.
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


@dataclass(frozen=True)
class NoiseDraw:
    """The noise that was added.

    Attributes:
        params: The noise itself.
        scale: s.
        exponent: p.
        damping: tau, weight decay included.
        norm: |noise|.
        rise, drop, information, error, target: As in `Calibration`.
    """

    params: Params
    scale: float
    exponent: float
    damping: float
    norm: float
    rise: float = math.nan
    drop: float = math.nan
    information: float = math.nan
    error: float = math.nan
    target: NoiseTarget | None = None


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
    if not scale >= 0:
        raise ConfigError(
            f"noise scale {scale}",
            "a non-negative number",
            "Pass scale=1e-3, say, or calibrate it.",
        )
    return P.scale(curvature.power(P.randn_like(like, generator), -exponent), scale)


def power_trace(
    curvature: Curvature, like: Params, p: float, *, times_curvature: bool = False, seed: int = 0
) -> float:
    r"""tr((B + tau I)^p), or tr(B (B + tau I)^p): what noise of exponent -p/2 needs.

    Exact where the eigenvalues are known. Of an operator that only has products it is the mean of
    y^T y, or of y^T B y, over y = (B + tau I)^{p/2} z with `PROBES` vectors z of random signs
    (Hutchinson 1990): unbiased, and the estimate of tr A has a standard error of at most (2 tr(A^2)
    / PROBES)^1/2.

    Args:
        curvature: Already damped: B + tau I.
        like: Names and shapes.
        p: Exponent.
        times_curvature: Whether B, without damping, stands before the power.
        seed: Of the probes.
    """
    if isinstance(curvature, BlockDiagonal):
        return math.fsum(
            power_trace(
                part,
                {name: like[name] for name in names},
                p,
                times_curvature=times_curvature,
                seed=seed,
            )
            for names, part in curvature.parts
        )
    tau: float = getattr(curvature, "tau", 0.0)
    known: list[tuple[Tensor, int]]  # eigenvalues of B and their multiplicity
    if isinstance(curvature, Spectral):
        known = [(x, 1) for x in replace(curvature, tau=0.0).spectrum().values()]
    elif isinstance(curvature, LowRank):
        rest = len(curvature.basis) - len(curvature.eigenvalues)
        others = torch.full((min(rest, 1),), curvature.delta, dtype=torch.float64)
        known = [(curvature.eigenvalues, 1), (others, rest)]
    else:
        generator, first, found = torch.Generator().manual_seed(seed), P.flatten(like), []
        for _ in range(PROBES):
            y = curvature.power(P.unflatten(rademacher(len(first), first, generator), like), p / 2)
            found.append(
                P.dot(y, curvature.power(y, 1.0)) - tau * P.dot(y, y)
                if times_curvature
                else P.dot(y, y)
            )
        return float(np.mean(found))
    powers = [(x.double(), (x.double() + tau).pow(p), count) for x, count in known]
    return math.fsum(
        count * float((x * y if times_curvature else y).sum()) for x, y, count in powers
    )


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
    samples: int = 1000,
) -> Calibration:
    r"""The scale s that reaches a target.

    Rise and drop are measured, as means over `DRAWS` common draws on at most `samples` retained
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
        samples: Most retained samples used.

    Raises:
        ConfigError: If the likelihood has no accuracy, the error is needed and not known, or no
            noise gets as far.
        NumericalError: If a trade-off is asked for where the curvature is zero.
    """
    target = target or NoiseTarget()
    target.check(objective.likelihood)
    error = error if target.error is None else target.error
    if target.kind in ("information", "trade_off") and not 0 < error < math.inf:
        raise ConfigError(
            f"the noise target {target.kind} without an error of the Newton step, as no step was taken",
            "sigma_h, its root-mean-square error per weight",
            "Pass NoiseTarget(..., error=...).",
        )
    rng = np.random.default_rng(seed)
    few = min(samples, len(split.retain))
    chosen = np.sort(rng.choice(split.retain, few, replace=False))
    generator = torch.Generator().manual_seed(seed)
    directions = [draw_noise(curvature, at, 1.0, generator, exponent) for _ in range(DRAWS)]
    loss, score = _means(objective, split.batches(chosen), at)
    sign = 1 if objective.likelihood.score.higher_is_better else -1

    @cache
    def harm(scale: float) -> tuple[float, float]:
        """(rise, drop)."""
        if scale == 0:
            return 0.0, 0.0
        try:
            noisy = [
                _means(objective, split.batches(chosen), P.add(at, d, scale)) for d in directions
            ]
        except NumericalError:
            return math.inf, math.inf
        losses, scores = np.mean(noisy, axis=0).tolist()
        return losses - loss, sign * (score - scores)

    precision = power_trace(curvature, at, 2 * exponent, seed=seed)
    if target.information is not None:
        scale = error * math.sqrt(precision / (2 * target.information))
        while information(scale, error, precision) > target.information:  # by a rounding error
            scale = math.nextafter(scale, math.inf)
    elif target.trade_off is not None:
        steepness = power_trace(curvature, at, -2 * exponent, times_curvature=True, seed=seed)
        if not steepness > 0:
            raise NumericalError(
                "a curvature of zero", "a loss that noise can raise", "Pass noise a scale, or None."
            )
        scale = (target.trade_off * error * error * precision / steepness) ** 0.25
    else:
        budget = target.loss if target.loss is not None else max(0.0002, 0.002 * loss)
        steepness = float(np.mean([P.dot(d, curvature.power(d, 1.0)) for d in directions]))
        guess = math.sqrt(2 * budget / max(steepness, 1e-30))
        if target.accuracy is None:
            target, allowed, which = replace(target, loss=budget), budget, 0
        else:
            allowed, which = target.accuracy, 1
        scale = _largest(lambda s: harm(s)[which], allowed, guess, target)
    rise, drop = harm(scale)
    return Calibration(scale, rise, drop, information(scale, error, precision), error, target)


def information(scale: float, error: float, precision: float) -> float:
    r"""Local forgetting bound sigma_h^2 / (2 s^2) tr((B + tau I)^2p), nats.

    Args:
        scale: s; infinitely much at 0.
        error: sigma_h.
        precision: tr((B + tau I)^2p).
    """
    return (error / scale) * (error / scale) * precision / 2 if scale else math.inf


def _means(objective: Objective, batches: Iterable[Batch], at: Params) -> tuple[float, float]:
    """Mean loss, nats a scored position, and mean score a sample."""
    loss = positions = score = samples = 0.0
    for outputs, targets in objective.forward(batches, at):
        loss += float(objective.likelihood.losses(outputs, targets).double().sum())
        positions += float(objective.likelihood.counts(targets).double().sum())
        score += float(objective.likelihood.scores(outputs, targets).sum())
        samples += len(outputs)
    return loss / positions, score / samples


def _largest(
    harm: Callable[[float], float], allowed: float, guess: float, target: NoiseTarget
) -> float:
    """The largest scale whose harm is allowed, to `RESOLUTION` in log10, searched around a guess; 0
    if none is.

    Harm that grows with s^2 says where to look next; every fourth look halves the bracket, whatever
    it says.
    """
    low, high, at = -math.inf, math.inf, math.log10(guess)
    start, near = at, 0.999 * RESOLUTION
    for turn in count(1):
        found = harm(10**at)
        low, high = (at, high) if found <= allowed else (low, at)
        if high - low <= RESOLUTION:
            break
        if high < start - DECADES:
            return 0.0
        if low > start + DECADES:
            raise ConfigError(
                f"the noise target {target.kind}={getattr(target, target.kind):g}, within which even noise of "
                f"scale {10**low:.1g} stays",
                "one that noise can reach",
                "Lower the target, or pass noise a scale.",
            )
        least = low + near if low > -math.inf else high - STEP
        most = high - near if high < math.inf else low + STEP
        if 0 < found < math.inf and turn % 4:
            at += math.log10(allowed / found) / 2
        elif high - low < math.inf:
            at = (low + high) / 2
        else:
            at = most if found <= allowed else least
        at = min(max(at, least), most)
    return 10**low


def noise_step(
    objective: Objective | None,
    split: Split,
    curvature: Curvature,
    at: Params,
    *,
    noise: float | Literal["auto"] | NoiseTarget = "auto",
    damping: float,
    error: float = math.nan,
    exponent: float = EXPONENT,
    seed: int = 0,
) -> NoiseDraw:
    """Calibrate (unless `noise` is a number) and draw.

    Args:
        objective: Losses; needed only to calibrate.
        split: Gives the retained samples.
        curvature: Not yet damped.
        at: Parameters that the noise is added to.
        noise: The scale s, what it is to achieve, or "auto" for the default target.
        damping: tau, weight decay included; a share of the mean eigenvalue where it is 0.
        error: Estimate of sigma_h; NaN if there is none.
        exponent: p.
        seed: Of draw and calibration, which use different streams.
    """
    damped, tau = noise_curvature(curvature, at, damping)
    if isinstance(noise, NoiseTarget) or noise == "auto":
        assert objective is not None
        target = noise if isinstance(noise, NoiseTarget) else None
        found = calibrate_noise(
            objective,
            split,
            damped,
            at,
            target=target,
            error=error,
            exponent=exponent,
            seed=seed + 1,
        )
    else:  # a scale of no known error, as in sweeps, needs no trace
        precision = (
            power_trace(damped, at, 2 * exponent, seed=seed + 1)
            if math.isfinite(error)
            else math.nan
        )
        found = Calibration(
            float(noise),
            math.nan,
            math.nan,
            information(float(noise), error, precision),
            error,
            None,
        )
    params = draw_noise(damped, at, found.scale, torch.Generator().manual_seed(seed), exponent)
    return NoiseDraw(params, exponent=exponent, damping=tau, norm=P.norm(params), **vars(found))


def noise_curvature(curvature: Curvature, at: Params, damping: float) -> tuple[Curvature, float]:
    """(B + tau I, tau): tau is the damping, or a share of the mean eigenvalue where that is 0."""
    if damping <= 0:
        damping = CURVATURE_SHARE * curvature.trace() / P.size(at) or CURVATURE_SHARE
    return curvature.damped(damping), damping
