"""How far requests may add up."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from fisher_forget.errors import ConfigError, FisherForgetWarning


@dataclass(frozen=True)
class Limits:
    """How much may be forgotten before the model is trained anew, as shares of its training data.

    The correction is an estimate around one model. Of a network on digits it closes nine tenths of
    the gap to retrained models with a tenth of the samples gone, two thirds with two fifths, and a
    quarter with two thirds, where the retained samples are worse off than if nothing had been done.
    Of a linear model at its minimum it closes all of it, however many are gone
    (docs/how-to/deletion-requests.md).

    Attributes:
        warn: Share above which each request warns.
        refuse: Share above which a request is refused; 1 never refuses.
    """

    warn: float = 0.25
    refuse: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.warn <= self.refuse <= 1:
            got = f"limits of warn={self.warn!r}, refuse={self.refuse!r}"
            raise ConfigError(got, "0 <= warn <= refuse <= 1", "Correct them.")

    def check(self, gone: int, total: int, stacklevel: int) -> None:
        """Warn or refuse.

        Raises:
            ConfigError: If more are gone than may be.
        """
        share = gone / total
        told = f"{gone:,} of {total:,} training samples ({100 * share:.0f} %) forgotten"
        retrain = "Train a new model on the retained samples, and call prepare() with it"
        if share > self.refuse:
            fix = f"{retrain}; or pass other limits=."
            raise ConfigError(told, f"at most {100 * self.refuse:.0f} %", fix)
        if share > self.warn:
            warnings.warn(
                f"{told}, more than {100 * self.warn:.0f} %: the result may be far from "
                f"retraining. {retrain}.",
                FisherForgetWarning,
                stacklevel=stacklevel + 1,
            )
