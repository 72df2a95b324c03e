r"""Ascent on the forgotten samples: alone (NegGrad), or against descent on the retained ones
(NegGrad+).

    NegGrad:   w <- w + lr grad L_f(w)                              L_f, L_r: mean loss of a batch of D_f, D_r, nats
    NegGrad+:  w <- w - lr grad [alpha L_r(w) - (1 - alpha) L_f(w)]

NegGrad is the baseline of Golatkar et al. 2020 (arXiv:1911.04933), here with the settings of Jia et
al. 2023 (arXiv:2304.04934); NegGrad+ that of Kurmanji et al. 2023 (arXiv:2302.09880). The loss has
no upper bound, so the distance travelled is a matter of learning rate and epochs alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.baselines.training_loop import (
    Descent,
    Loss,
    descend,
    each,
    mean_loss,
    require,
    shuffled,
)
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Split
from fisher_forget.likelihood import Likelihood, resolve_likelihood


@dataclass(frozen=True)
class NegGrad:
    """Gradient ascent on D_f.

    Attributes:
        epochs: Passes over D_f.
        lr: Learning rate.
        batch_size: Samples per step.
        momentum: Of SGD.
        weight_decay: L2 coefficient; it still pulls towards zero.
        likelihood: Name or instance.
        seed: Of the order of the samples.
    """

    name: ClassVar[str] = "neggrad"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (1e-5, 1e-4, 1e-3, 1e-2), "epochs": (1, 5)}

    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        found = descend(
            model,
            Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
            lambda _, rng: each(
                shuffled(split, split.forget, self.batch_size, rng),
                lambda m, b: -mean_loss(m, likelihood, b),
            ),
            seed=self.seed,
        )
        passes = self.epochs * len(split.forget) / len(split.retain)
        return Unlearned(found, time.perf_counter() - begun, passes)


@dataclass(frozen=True)
class NegGradPlus:
    """Descent on D_r and ascent on D_f in every step.

    Attributes:
        epochs: Passes over D_r; D_f is gone through again and again meanwhile.
        alpha: Weight of the retained loss, in [0, 1].
        lr: Learning rate.
        batch_size: Samples per step of D_r, and of D_f as far as it has them.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        likelihood: Name or instance.
        seed: Of the order of the samples.

    Raises:
        ConfigError: If alpha is out of range.
    """

    name: ClassVar[str] = "neggrad+"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "lr": (0.001, 0.01),
        "alpha": (0.9, 0.95, 0.99, 0.999),
    }

    epochs: int = 10
    alpha: float = 0.95
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 <= self.alpha <= 1, "a weight in [0, 1]")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        likelihood = resolve_likelihood(self.likelihood)
        samples = 0

        def difference(retained: Batch, forgotten: Batch | None) -> Loss:
            def loss(model: nn.Module) -> Tensor:
                kept = self.alpha * mean_loss(model, likelihood, retained)
                return (
                    kept
                    if forgotten is None
                    else kept - (1 - self.alpha) * mean_loss(model, likelihood, forgotten)
                )

            return loss

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            nonlocal samples
            forgetting = _endless(split, self.batch_size, rng)
            for retained in shuffled(split, split.retain, self.batch_size, rng):
                forgotten = next(forgetting, None)
                samples += len(retained) + (0 if forgotten is None else len(forgotten))
                yield difference(retained, forgotten)

        found = descend(
            model,
            Descent(self.epochs, self.lr, self.momentum, self.weight_decay),
            epoch,
            seed=self.seed,
        )
        return Unlearned(found, time.perf_counter() - begun, samples / len(split.retain))


def _endless(split: Split, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Batches of D_f over and over, in a new order each time; none if it is empty."""
    while len(split.forget):
        yield from shuffled(split, split.forget, batch_size, rng)
