r"""Slow-down poisoning of a model with certified removal.

Threat model: the attacker owns some training samples, may change their inputs a little before the
training and keeps their labels, and later asks for their removal, one by one. Each removal is to
spend as much of the budget as it can, so that the model must be trained anew as often as possible:
denial of the service that removal was to give. The attacker knows data and settings, and not b.

The length of the removal's step stands for what it spends,

    maximise sum_i |H^-1 g_i|,    g_i = -(1 - s_i) y_i u_i,    s_i = sigmoid(y_i w^T u_i),

over the changed inputs x_i within a box and an L_p ball around the clean ones; u = x' / |x'| is the
feature, x' = x - centre. w is held at the clean model's, H is that of the poisoned data. With q =
H^-1 g and r = H^-1 q / |q|,

    grad_u = -(1 - s) y r + s (1 - s) (r^T u) w,    grad_x = (I - u u^T) grad_u / |x'|.

Projected gradient ascent with a unit step for each sample, halved until the sum rises enough
(Armijo), and Dykstra's projection.

Source: Marchant, Rubinstein and Alfeld 2022 (arXiv:2109.08266), sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisher_forget.certify import CertifiedLogistic
from fisher_forget.certify.logistic import hessian_factor, pulls
from fisher_forget.errors import ConfigError, DataError

BACKTRACKS, ARMIJO, ROUNDS = 12, 0.5, 30
Make = Callable[[], CertifiedLogistic]


@dataclass(frozen=True)
class SlowDown:
    """What slow-down poisoning did.

    Attributes:
        clean: Removals before the first retraining, without the attack: by name of the defence,
            "none" for the model as it is. As many as were tried where none came.
        attacked: The same with the attacker's samples.
        tried: Removals that were tried.
        accuracy: Of the clean and the poisoned model, on `test`; NaN without.
        refused: Share of the attacker's samples that `screen` refuses, and of the same samples
            when they are clean: what an honest user would lose.
    """

    clean: Mapping[str, int]
    attacked: Mapping[str, int]
    tried: int
    accuracy: tuple[float, float] = (math.nan, math.nan)
    refused: tuple[float, float] = (math.nan, math.nan)

    @property
    def factor(self) -> dict[str, float]:
        """By which the attack shortens the interval, by defence; at least that where the clean one
        was not reached."""
        return {name: self.clean[name] / max(1, self.attacked[name]) for name in self.clean}

    def __str__(self) -> str:
        lines = [f"Removals before a retraining, of {self.tried} tried:"]
        for name, clean in self.clean.items():
            more = " or more" if clean == self.tried else ""
            lines.append(
                f"  {name:24} clean {clean}{more}, attacked {self.attacked[name]}: "
                f"{self.factor[name]:.1f} times as often"
            )
        if not math.isnan(self.accuracy[0]):
            lines.append(
                f"Accuracy: clean {self.accuracy[0]:.1%}, poisoned {self.accuracy[1]:.1%}."
            )
        if not math.isnan(self.refused[0]):
            lines.append(
                f"Screening refuses {self.refused[0]:.1%} of the attacker's requests and "
                f"{self.refused[1]:.1%} of honest ones for the same samples."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What JSON takes."""
        return asdict(self) | {"factor": self.factor}


@dataclass(frozen=True)
class SlowDownPoisoning:
    """The attack; see the module.

    Args:
        radius: Of the ball around a clean input, in the units of the inputs.
        norm: 1, 2 or infinity: which ball.
        box: Least and largest value of an input; `None` for none.
        centre: What is subtracted from inputs before they are scaled to length one.
        iterations: Of the ascent.

    Raises:
        ConfigError: If one is out of range.
    """

    radius: float = 39.25
    norm: float = 1
    box: tuple[float, float] | None = (0.0, 1.0)
    centre: float = 0.5
    iterations: int = 10

    def __post_init__(self) -> None:
        if not (self.radius > 0 and self.norm in (1, 2, math.inf) and self.iterations >= 1):
            got = f"radius={self.radius!r}, norm={self.norm!r}, iterations={self.iterations!r}"
            expected = "a radius above 0, norm 1, 2 or infinity, and iterations of at least 1"
            raise ConfigError(got, expected, "Correct them.")

    def features(self, inputs: Tensor) -> Tensor:
        """u = (x - centre) / |x - centre| [N, d], float64."""
        moved = inputs.flatten(1).double() - self.centre
        lengths: Tensor = moved.norm(dim=1, keepdim=True)
        if bool((lengths == 0).any()):
            raise DataError("an input equal to `centre`", "one with a direction", "Remove it.")
        return moved / lengths

    def poison(self, inputs: Tensor, targets: Tensor, rows: Sequence[int], make: Make) -> Tensor:
        """The attacker's inputs [len(rows), d], within box and ball.

        Args:
            inputs: Of all training samples [N, ...].
            targets: Their classes [N], of which there are two.
            rows: Indices of the attacker's samples.
            make: Makes an untrained model with the victim's settings; its b is another.
        """
        clean = inputs.flatten(1).double()
        own = torch.tensor(rows, dtype=torch.long)
        model = make().fit(self.features(clean), targets)
        if len(model.weights) != 1:
            raise DataError(f"{len(model.classes)} classes", "two", "Pass two classes.")
        w, signs = model.weights[0], model.signs[0]
        start = clean[own]
        x = start.clone()
        for _ in range(self.iterations):
            everyone = clean.clone()
            everyone[own] = x
            factor = hessian_factor(self.features(everyone), w, model.regularisation)
            value, gradient = self._pull(x, signs[own], w, factor)
            unit = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
            step, taken = self.radius, x
            for _ in range(BACKTRACKS):
                tried = self._projected(x + step * unit, start)
                rise = self._value(tried, signs[own], w, factor) - value
                if rise >= ARMIJO * 1e-3 * float(((tried - x) * gradient).sum()) and rise > 0:
                    taken = tried
                    break
                step /= 2
            if taken is x:
                break
            x = taken
        return x

    def run(
        self,
        inputs: Tensor,
        targets: Tensor,
        rows: Sequence[int],
        make: Mapping[str, Make] | Make,
        *,
        removals: int | None = None,
        batch: Mapping[str, int] | None = None,
        test: tuple[Tensor, Tensor] | None = None,
        screen: float = 0.99,
    ) -> SlowDown:
        """Poison, train and remove, with and without the attack.

        Args:
            inputs: Of all training samples [N, ...].
            targets: Their classes [N], of which there are two.
            rows: Indices of the attacker's samples, in the order in which they are removed.
            make: Makes an untrained model; or several by name, each with a defence. The first is
                the one that the attacker knows.
            removals: How many to try; by default all of `rows`.
            batch: Requests that are carried out together, by the name of the model; 1 by default.
            test: Inputs and targets that tell the accuracy.
            screen: Quantile of |H^-1 g| over the other samples, beyond which a request is an
                outlier and would be refused.

        Raises:
            ConfigError, DataError: If rows, names or data do not fit.
        """
        makes = dict(make) if isinstance(make, Mapping) else {"none": make}
        tried = len(rows) if removals is None else removals
        if not 1 <= tried <= len(rows) < len(inputs):
            got = f"{len(rows)} samples of the attacker's, {tried} removals, {len(inputs)} samples"
            raise ConfigError(got, "1 <= removals <= samples < all", "Correct them.")
        clean = inputs.flatten(1).double()
        poisoned = clean.clone()
        poisoned[list(rows)] = self.poison(inputs, targets, rows, next(iter(makes.values())))
        order, sizes = list(rows)[:tried], dict(batch or {})
        counts: list[dict[str, int]] = []
        fitted: list[CertifiedLogistic] = []
        for x in (clean, poisoned):
            features = self.features(x)
            fitted.append(next(iter(makes.values()))().fit(features, targets))
            counts.append(
                {
                    name: interval(one().fit(features, targets), order, sizes.get(name, 1))
                    for name, one in makes.items()
                }
            )
        accuracy = (math.nan, math.nan)
        if test is not None:
            seen = self.features(test[0])
            first, second = (float((m.predict(seen) == test[1]).double().mean()) for m in fitted)
            accuracy = first, second
        refused = refusals(fitted[1], order, screen), refusals(fitted[0], order, screen)
        return SlowDown(counts[0], counts[1], tried, accuracy, refused)

    def _pull(self, x: Tensor, y: Tensor, w: Tensor, factor: Tensor) -> tuple[float, Tensor]:
        """sum |H^-1 g| and its gradient [m, d]."""
        u = self.features(x)
        q = self._steps(u, y, w, factor)
        norms = q.norm(dim=1, keepdim=True)
        r = torch.cholesky_solve((q / norms.clamp(min=1e-30)).T, factor).T
        s = torch.sigmoid(y * (u @ w))[:, None]
        pull = -(1 - s) * y[:, None] * r + s * (1 - s) * (r * u).sum(1, keepdim=True) * w
        across = pull - (pull * u).sum(1, keepdim=True) * u
        return float(norms.sum()), across / (x - self.centre).norm(dim=1, keepdim=True)

    def _value(self, x: Tensor, y: Tensor, w: Tensor, factor: Tensor) -> float:
        """sum |H^-1 g|."""
        return float(self._steps(self.features(x), y, w, factor).norm(dim=1).sum())

    def _steps(self, u: Tensor, y: Tensor, w: Tensor, factor: Tensor) -> Tensor:
        """H^-1 g of each row [m, d]."""
        pull = pulls(w[None], u, y[None])[0]
        return torch.cholesky_solve((pull[:, None] * u).T, factor).T

    def _projected(self, x: Tensor, clean: Tensor) -> Tensor:
        """The nearest inputs in both the box and the ball (Dykstra)."""
        if self.box is None:
            return clean + _ball(x - clean, self.radius, self.norm)
        low, high = self.box
        p = torch.zeros_like(x)
        q = torch.zeros_like(x)
        for _ in range(ROUNDS):
            y = clean + _ball(x + p - clean, self.radius, self.norm)
            p = x + p - y
            x = (y + q).clamp(low, high)
            q = y + q - x
        return x


def interval(model: CertifiedLogistic, order: Sequence[int], batch: int = 1) -> int:
    """How many of these samples a trained model removes before it is trained anew.

    Args:
        model: Trained; it is changed.
        order: Which samples, one after the other.
        batch: How many at a time.
    """
    for at in range(0, len(order), batch):
        if model.remove(order[at : at + batch]).retrained:
            return at
    return len(order)


def refusals(model: CertifiedLogistic, rows: Sequence[int], quantile: float) -> float:
    """Share of requests for these rows whose step |H^-1 g| is beyond a quantile of the steps of all
    other rows: what a screen for outliers refuses.

    Args:
        model: Trained.
        rows: Indices.
        quantile: Between 0 and 1.
    """
    lengths = step_lengths(model)
    others = np.setdiff1d(np.arange(len(lengths)), np.asarray(rows))
    limit = float(np.quantile(lengths[others].numpy(), quantile))
    return float((lengths[list(rows)] > limit).double().mean())


def step_lengths(model: CertifiedLogistic) -> Tensor:
    """|H^-1 g_i| of every sample [N], over all classes."""
    total: Tensor = torch.zeros(len(model.x), dtype=torch.float64)
    for w, signs in zip(model.weights, model.signs, strict=True):
        factor = hessian_factor(model.x[model.kept], w, model.regularisation)
        pull = pulls(w[None], model.x, signs[None])[0]
        total += (torch.cholesky_solve((pull[:, None] * model.x).T, factor) ** 2).sum(0)
    lengths: Tensor = total.sqrt()
    return lengths


def _ball(x: Tensor, radius: float, norm: float) -> Tensor:
    """The nearest point of each row in a ball around 0."""
    if norm == math.inf:
        return x.clamp(-radius, radius)
    if norm == 2:
        lengths: Tensor = x.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return x * (radius / lengths).clamp(max=1)
    # Duchi et al. 2008: soft thresholding at the level that leaves the radius
    inside = x.abs().sum(1, keepdim=True) <= radius
    ordered = x.abs().sort(dim=1, descending=True).values
    sums = ordered.cumsum(1) - radius
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    last = (ordered * counts > sums).sum(1, keepdim=True).clamp(min=1)
    level = sums.gather(1, last - 1) / last
    return torch.where(inside, x, x.sign() * (x.abs() - level).clamp(min=0))
