r"""What a Gaussian mechanism promises, exactly.

Two normal laws with one covariance, whose means differ by mu of its standard deviations, cannot be
told apart better than

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)

allows, in either direction: they are (eps, delta(eps))-indistinguishable, and for no smaller delta.
Independent releases of one secret compose in quadrature: mu^2 is the sum of theirs.

Source: Balle and Wang 2018 (arXiv:1805.06530), theorem 8; Dong, Roth and Su 2019
(arXiv:1905.02383), corollary 2.13.
"""

from __future__ import annotations

import math

from scipy import optimize, special

from fisher_forget.errors import ConfigError

LARGEST = 1e6  # mu beyond which everything is told


def delta_of(mu: float, epsilon: float) -> float:
    """The least delta for an epsilon of at least 0.

    Raises:
        ConfigError: If mu or epsilon is negative, or none of them is a number.
    """
    if not (mu >= 0 and epsilon >= 0):
        got = f"mu={mu!r}, epsilon={epsilon!r}"
        raise ConfigError(got, "numbers of at least 0", "Correct them.")
    if mu == 0 or epsilon == math.inf:
        return 0.0
    first = special.ndtr(mu / 2 - epsilon / mu)
    second = math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, float(first - second))


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose delta(epsilon) is at most `delta`.

    Raises:
        ConfigError: If epsilon is negative, or delta is not between 0 and 1.
    """
    check_privacy(epsilon, delta)
    return float(
        optimize.brentq(lambda mu: delta_of(mu, epsilon) - delta, 0.0, LARGEST, xtol=1e-12)
    )


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon whose delta is at most `delta`; infinite where none is below 1e6.

    Raises:
        ConfigError: If mu is negative, or delta is not between 0 and 1.
    """
    check_privacy(0.0, delta)
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    if delta_of(mu, high := mu * (mu + 40)) > delta:
        return math.inf
    return float(optimize.brentq(lambda eps: delta_of(mu, eps) - delta, 0.0, high, xtol=1e-12))


def check_privacy(epsilon: float, delta: float) -> None:
    """Refuse an epsilon below 0 and a delta that is not between 0 and 1."""
    if not (epsilon >= 0 and 0 < delta < 1):
        got = f"epsilon={epsilon!r}, delta={delta!r}"
        raise ConfigError(got, "epsilon of at least 0, delta between 0 and 1", "Correct them.")
