"""Scales on which scores of models are roughly normal, so that no interval leaves what is possible.

    linear   z = x
    log      z = ln max(x, 1e-12)                            what is positive: KL, losses, distances
    count    z = ln(x + 1/2)                                 epochs and steps, which may be 0
    cosine   z = artanh x                                    cosines (Fisher 1915)
    logit    z = ln((x + h) / (100 - x + h)), h = 50 / N     shares in % of N samples

The logit is the empirical one, with half a sample at either end (Cox & Snell 1989, Analysis of
Binary Data, sec. 2.1.6), so that 0 and 100 % have a place. An interval is made of z and taken back:
a KL cannot come out negative, nor a share above 100 %. On the logarithmic scale all numbers up to
1e-12 are rounding, and come back as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.intervals import Array

LEAST = 1e-12  # below which a positive number is rounding


@dataclass(frozen=True)
class Scale:
    """A monotone scale.

    Attributes:
        forward: Scores to the scale.
        back: The scale to scores.
    """

    forward: Callable[[Array], Array]
    back: Callable[[Array], Array]

    def score(self, z: float) -> float:
        """One number taken back; infinite where it is too large."""
        with np.errstate(over="ignore"):
            return float(self.back(np.array(z)))

    def up_to(self, most: float) -> Scale:
        """The same for scores from 0 to `most`."""
        return Scale(self.forward, lambda z: np.clip(self.back(z), 0.0, most))


LINEAR = Scale(np.asarray, np.asarray)
LOG = Scale(
    lambda x: np.log(np.maximum(x, LEAST)),
    lambda z: np.where(z > np.log(LEAST) + 1e-9, np.exp(z), 0.0),
)
COUNT = Scale(lambda x: np.log(np.add(x, 0.5)), lambda z: np.maximum(np.exp(z) - 0.5, 0.0))
COSINE = Scale(lambda x: np.arctanh(np.clip(x, LEAST - 1, 1 - LEAST)), np.tanh)


def logit(samples: int) -> Scale:
    """The scale of shares in % of so many samples.

    Raises:
        ConfigError: If there is no sample.
    """
    if samples < 1:
        got = f"a share of {samples} samples"
        raise ConfigError(got, "at least one sample", "Pass the number that the share is of.")
    half = 50 / samples

    def forward(x: Array) -> Array:
        return np.log(np.add(x, half)) - np.log(100 + half - np.asarray(x))

    def back(z: Array) -> Array:
        return np.clip((100 + 2 * half) * special.expit(z) - half, 0.0, 100.0)

    return Scale(forward, back)
