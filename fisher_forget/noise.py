r"""Calibrated Gaussian noise shaped by curvature.

w <- w + s (B + tau I)^-p xi with xi ~ N(0, I). The exponent p = 1/4 is optimal for the Forgetting Lagrangian where the
error of the Newton step is isotropic: Sigma* = (lambda sigma_h^2)^(1/2) B^(-1/2) (Golatkar et al. 2020,
arXiv:1911.04933, Prop. 4), so that s = (lambda sigma_h^2)^(1/4). The public code of that paper draws p = 1/2 instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq

from fisher_forget import params as P
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.objective import Objective
from fisher_forget.params import Params

EXPONENT = 0.25
DRAWS = 4  # common draws that the loss is averaged over while the scale is searched
DECADES = 6.0  # how far from the quadratic guess the scale may lie, either way
CURVATURE_SHARE = 1e-3  # damping, as a share of the mean eigenvalue, where nothing else damps


@dataclass(frozen=True)
class NoiseDraw:
    """The noise that was added.

    Attributes:
        params: The noise itself.
        scale: s.
        exponent: p.
        damping: tau, weight decay included.
        norm: |noise|.
        rise: Mean rise of the retained loss over the calibration draws, nats (NaN where the scale was given).
        budget: The rise that was allowed, nats (NaN where the scale was given).
    """

    params: Params
    scale: float
    exponent: float
    damping: float
    norm: float
    rise: float = math.nan
    budget: float = math.nan


def draw_noise(
    curvature: Curvature, like: Params, scale: float, generator: torch.Generator, exponent: float = EXPONENT
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
        raise ConfigError(f"noise scale {scale}", "a non-negative number", "Pass scale=1e-3, say, or calibrate it.")
    return P.scale(curvature.power(P.randn_like(like, generator), -exponent), scale)


def calibrate_noise(
    objective: Objective,
    split: Split,
    curvature: Curvature,
    at: Params,
    *,
    budget: float | None = None,
    exponent: float = EXPONENT,
    seed: int = 0,
    samples: int = 1000,
) -> tuple[float, float, float]:
    r"""The scale s at which noise makes the retained loss rise by the budget.

    The rise is measured, as a mean over four common draws on at most `samples` retained samples, and solved for log s
    by Brent's method, starting where the quadratic model E[rise] = s^2/2 tr(B (B + tau I)^-2p) puts it.

    Args:
        objective: Losses.
        split: Gives the retained samples.
        curvature: Already damped.
        at: Parameters that the noise is added to.
        budget: Allowed rise of the mean loss in nats; default max(0.001, 2 % of the loss).
        exponent: p.
        seed: Of the draws and the samples.
        samples: Most retained samples used.

    Returns:
        (scale, rise, budget). The scale is 0 if even the smallest noise tried leaves the budget.
    """
    rng = np.random.default_rng(seed)
    few = min(samples, len(split.retain))
    chosen = np.sort(rng.choice(split.retain, few, replace=False))
    generator = torch.Generator().manual_seed(seed)
    directions = [draw_noise(curvature, at, 1.0, generator, exponent) for _ in range(DRAWS)]
    before = objective.mean_loss(split.batches(chosen), at)
    allowed = budget if budget is not None else max(0.001, 0.02 * before)
    if not allowed > 0:
        raise ConfigError(f"noise budget {allowed}", "a positive number of nats", "Pass noise=None for no noise.")

    def rise(scale: float) -> float:
        try:
            losses = [objective.mean_loss(split.batches(chosen), P.add(at, d, scale)) for d in directions]
        except NumericalError:
            return math.inf
        return float(np.mean(losses)) - before

    guess = math.sqrt(2 * allowed / max(_quadratic(curvature, directions), 1e-30))
    low, high = math.log10(guess), math.log10(guess)
    while rise(10**low) > allowed:
        low -= 0.5
        if low < math.log10(guess) - DECADES:
            return 0.0, 0.0, allowed
    while rise(10**high) < allowed:
        high += 0.5
        if high > math.log10(guess) + DECADES:
            break
    if high > low:
        log = brentq(lambda t: math.atan(rise(10**t) / allowed - 1), low, high, xtol=0.01)
        while rise(10**log) > allowed:  # end on the side that keeps the promise
            log -= 0.01
    else:
        log = low
    return 10**log, rise(10**log), allowed


def _quadratic(curvature: Curvature, directions: list[Params]) -> float:
    """Mean of d^T (B + tau I) d over unit-scale draws."""
    return float(np.mean([P.dot(d, curvature.power(d, 1.0)) for d in directions]))


def noise_step(
    objective: Objective | None,
    split: Split,
    curvature: Curvature,
    at: Params,
    *,
    noise: float | Literal["auto"] = "auto",
    damping: float,
    budget: float | None = None,
    exponent: float = EXPONENT,
    seed: int = 0,
) -> NoiseDraw:
    """Calibrate (where `noise="auto"`) and draw.

    Args:
        objective: Losses; needed only to calibrate.
        split: Gives the retained samples.
        curvature: Not yet damped.
        at: Parameters that the noise is added to.
        noise: The scale s, or "auto" for the one that the budget allows.
        damping: tau, weight decay included; a share of the mean eigenvalue where it is 0.
        budget: See `calibrate_noise`.
        exponent: p.
        seed: Of draw and calibration, which use different streams.
    """
    if damping <= 0:
        damping = CURVATURE_SHARE * curvature.trace() / P.size(at) or CURVATURE_SHARE
    damped = curvature.damped(damping)
    rise = allowed = math.nan
    if noise == "auto":
        assert objective is not None
        scale, rise, allowed = calibrate_noise(
            objective, split, damped, at, budget=budget, exponent=exponent, seed=seed + 1
        )
    else:
        scale = float(noise)
    params = draw_noise(damped, at, scale, torch.Generator().manual_seed(seed), exponent)
    return NoiseDraw(params, scale, exponent, damping, P.norm(params), rise, allowed)
