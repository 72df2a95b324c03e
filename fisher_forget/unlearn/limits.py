"""How far requests may add up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fisher_forget._util.checks import is_number
from fisher_forget.errors import ConfigError, FisherForgetWarning, NumericalError
from fisher_forget.unlearn.self_check import SelfCheck

RETRAIN = "Train a new model on the retained samples, and call prepare() with it"


@dataclass(frozen=True)
class Limits:
    """How much may be forgotten, and at what cost, before the model is trained anew.

    The correction is an estimate around one model. Of a network on digits it closes nine tenths of
    the gap to retrained models with a tenth of the samples gone, two thirds with two fifths, and a
    quarter with two thirds, where the retained samples are worse off than if nothing had been done.
    Of a linear model at its minimum it closes all of it, however many are gone
    (docs/how-to/deletion-requests.md).

    Attributes:
        warn: Share above which each request warns.
        refuse: Share above which a request is refused; 1 never refuses.
        rise: By how many nats the mean loss of retained samples may rise, from the prepared model
            to a result, before that is refused.
        failed: What becomes of a result whose self-check says that it is wrong: a "warning", or it
            is "refused".
        each: Share of the training samples that one requester (`who`) may ask for in all, beyond
            which a request is refused before it is recorded, so that somebody looks at it. It needs
            a folder; 1 refuses nothing.
    """

    warn: float = 0.25
    refuse: float = 0.5
    rise: float = 0.5
    failed: Literal["warning", "refused"] = "warning"
    each: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warn <= self.refuse <= 1:
            got = f"limits of warn={self.warn!r}, refuse={self.refuse!r}"
            raise ConfigError(got, "0 <= warn <= refuse <= 1", "Correct them.")
        if not is_number(self.each) or not 0 < self.each <= 1:
            raise ConfigError(f"each={self.each!r}", "a share above 0, 1 at most", "Correct it.")
        if not self.rise > 0:
            raise ConfigError(f"rise={self.rise!r}", "nats above 0", "Correct it.")
        if self.failed not in ("warning", "refused"):
            got = f"failed={self.failed!r}"
            raise ConfigError(got, "'warning' or 'refused'", "Correct it.")

    def judge(self, losses: Mapping[str, float], check: SelfCheck) -> None:
        """Refuse a result.

        Args:
            losses: Of the result.
            check: What it says of itself.

        Raises:
            NumericalError: If retained samples lost more than they may, or the check is to be
                heeded and says that it is wrong.
        """
        before, after = losses["retain_before"], losses["retain_after"]
        if after - before > self.rise:
            got = f"a result whose retained loss rose from {before:.3g} to {after:.3g} nats"
            fix = f"{RETRAIN}; or pass other limits=."
            raise NumericalError(got, f"a rise of at most {self.rise:g}", fix)
        if self.failed == "refused" and check.wrong:
            says = " ".join(finding.says for finding in check.wrong)
            raise NumericalError(
                f"a self-check that says: {says}", "one that passes", f"{RETRAIN}."
            )

    def check(self, gone: int, total: int, stacklevel: int) -> None:
        """Warn or refuse.

        Raises:
            ConfigError: If more are gone than may be.
        """
        share = gone / total
        told = f"{gone:,} of {total:,} training samples ({100 * share:.0f} %) forgotten"
        if share > self.refuse:
            fix = f"{RETRAIN}; or pass other limits=."
            raise ConfigError(told, f"at most {100 * self.refuse:.0f} %", fix)
        if share > self.warn:
            warnings.warn(
                f"{told}, more than {100 * self.warn:.0f} %: the result may be far from "
                f"retraining. {RETRAIN}.",
                FisherForgetWarning,
                stacklevel=stacklevel + 1,
            )
