"""One draw of the noise: where its randomness comes from, and the shape that curvature gives it.

Noise hides something from those only who cannot draw it again. By default it comes straight from
the operating system's generator for cryptography, so that no seed and no state exists that could be
guessed, stored or recovered from released weights.
"""

from __future__ import annotations

import os
from math import prod

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.checks import is_number
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature.operator import Curvature
from fisher_forget.errors import ConfigError
from fisher_forget.params import Params
from fisher_forget.unlearn.noise_target import EXPONENT

CHUNK = 2**20  # normals that are made at a time


@isolated()
def draw_noise(
    curvature: Curvature,
    like: Params,
    scale: float,
    generator: torch.Generator | None = None,
    exponent: float = EXPONENT,
) -> Params:
    r"""One draw of s (B + tau I)^-p xi: Gaussian with covariance s^2 (B + tau I)^-2p.

    Args:
        curvature: Already damped: B + tau I.
        like: Names, shapes and dtypes; xi is drawn in float64 and rounded to the dtype.
        scale: s >= 0.
        generator: For experiments: the draw depends on its state alone, and whoever knows that
            knows the noise. By default the operating system gives xi (`secret_normals`).
        exponent: p.

    Raises:
        ConfigError: If the scale is negative, or the generator is none of torch's.
        CurvatureError: If the curvature is singular.
    """
    if not is_number(scale):
        fix = "Pass scale=1e-3, say, or calibrate it."
        raise ConfigError(f"noise scale {scale!r}", "a non-negative number", fix)
    check_generator(generator)
    xi = P.map_params(lambda x: _normals(x, generator), like)
    return P.scale(curvature.power(xi, -exponent), scale)


def secret_normals(count: int) -> Tensor:
    r"""Independent standard normals [count], float64, from the operating system's random bytes.

    xi = Phi^-1((2k + 1) 2^-53) with k the upper 52 bits of 8 bytes of `os.urandom`. The argument is
    an odd multiple of 2^-53, which float64 holds exactly: never 0 or 1, and as often u as 1 - u.
    |xi| stays below 8.3, beyond which a normal comes once in 10^16 draws.

    Args:
        count: How many.
    """
    drawn = np.empty(count)
    for piece in np.split(drawn, range(CHUNK, count, CHUNK)):  # views
        k = np.frombuffer(os.urandom(8 * len(piece)), np.uint64) >> np.uint64(12)
        ndtri((2 * k + 1) * 2.0**-53, out=piece)
    return torch.from_numpy(drawn)


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse what no noise can be drawn from.

    Raises:
        ConfigError: If it is none of torch's, or torch's global one, whose state no call changes.
    """
    expected = "a torch.Generator of your own, or None for the operating system's randomness"
    fix = "Pass torch.Generator().manual_seed(0), say, for an experiment; nothing for a release."
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator={generator!r}", expected, fix)
    if generator is torch.default_generator:
        got = "torch's global generator, which every call leaves as it was: one noise for all calls"
        raise ConfigError(got, expected, fix)


def _normals(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals as `like`, drawn in float64 in a way that no device changes."""
    if generator is None:
        return secret_normals(prod(like.shape)).reshape(like.shape).to(like)
    place = generator.device
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=place).to(like)
