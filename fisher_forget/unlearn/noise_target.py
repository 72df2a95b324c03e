"""What the noise is to achieve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood

EXPONENT = 0.25  # p of the noise (B + tau I)^-p: of Golatkar et al. 2020, Prop. 4
KINDS = ("loss", "accuracy", "information", "trade_off")


@dataclass(frozen=True)
class NoiseTarget:
    r"""What the noise scale s is to achieve: at most one of the first four.

    Without any, a default rise of the loss.

    Attributes:
        loss: Allowed rise of the mean retained loss, nats; by default max(0.0002, 0.2 % of it).
        accuracy: Allowed drop of the retained accuracy, as a share: 0.01 is one point of a hundred.
        information: Local forgetting bound (see `noise`), nats;
            s^2 = sigma_h^2 tr((B + tau I)^2p) / 2 information.
        trade_off: lambda of the Forgetting Lagrangian rise + lambda information, nats of loss per
            nat of information, whose quadratic model is least at
            s^4 = lambda sigma_h^2 tr((B + tau I)^2p) / tr(B (B + tau I)^-2p): at p = 1/4 and
            tau = 0 the paper's s = (lambda sigma_h^2)^1/4 (Golatkar et al. 2020, Prop. 4).
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
            got = f"the noise targets {given}"
            fix = "Keep one: each fixes the scale."
            raise ConfigError(got, f"at most one of {', '.join(KINDS)}", fix)
        for name, value in (given | {"error": 1.0 if self.error is None else self.error}).items():
            most = 1.0 if name == "accuracy" else math.inf
            real = isinstance(value, Real) and not isinstance(value, bool)
            if not real or not 0 < float(value) < most:
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
        if self.accuracy is not None and likelihood.score.unit != "%":
            got = f"the noise target accuracy={self.accuracy}"
            got = f"{got} of models scored by {likelihood.score.name}"
            fix = "Pass NoiseTarget(loss=...), in nats: of a Gaussian squared error / 2 sigma^2."
            raise ConfigError(got, "a likelihood whose score is an accuracy", fix)
