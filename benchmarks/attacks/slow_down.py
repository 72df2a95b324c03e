"""Slow-down poisoning of certified removal, MNIST 3 against 8, and what each defence restores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.attacks.classical import Report
from fisher_forget import load_dataset
from fisher_forget.attack import SlowDownPoisoning
from fisher_forget.attack.slow_down import interval
from fisher_forget.certify import CertifiedLogistic

OWNED, TRIED = 500, 60  # the attacker's samples, and removals that are tried
RADII = (7.84, 39.25)  # L1; the second is the paper's
BATCH = "bounds added, 10 at once"
EACH = 5  # removals that one requester may ask for
LIMITED = f"bounds added, {EACH} of each requester"


def slow_down() -> Report:
    """Removals before a retraining, by radius and accounting."""
    data = load_dataset("mnist")
    (x, y), test = (_threes_and_eights(part.tensors) for part in (data.train, data.test))
    makes: dict[str, Callable[[], CertifiedLogistic]] = {
        "bounds added, as in the paper": lambda: _model("added"),
        BATCH: lambda: _model("added"),
        "bound of the last step": lambda: _model("corrected"),
        "residual measured": lambda: _model("measured"),
    }
    found: Report = {}
    for radius in RADII:
        attack = SlowDownPoisoning(radius=radius)
        result = attack.run(x, y, range(OWNED), makes, removals=TRIED, batch={BATCH: 10}, test=test)
        told = result.to_dict()
        for side, count in limited(attack, x, y).items():
            told[side][LIMITED] = count
        found[f"{radius:g}"] = told
    return found


def limited(attack: SlowDownPoisoning, x: Tensor, y: Tensor) -> dict[str, int]:
    """Removals before a retraining where the attacker is one requester, whose requests beyond a few
    are refused, and the others are honest ones."""
    poisoned = x.clone()
    poisoned[:OWNED] = attack.poison(x, y, range(OWNED), lambda: _model("added"))
    order = [*range(EACH), *range(OWNED, OWNED + TRIED - EACH)]
    return {
        side: interval(_model("added").fit(attack.features(inputs), y), order)
        for side, inputs in (("clean", x), ("attacked", poisoned))
    }


def _model(accounting: Any) -> CertifiedLogistic:
    generator = torch.Generator().manual_seed(0)
    return CertifiedLogistic(1e-3, 1.0, accounting=accounting, generator=generator)


def _threes_and_eights(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    x, y = tensors
    mine = (y == 3) | (y == 8)
    return x[mine].flatten(1).double(), y[mine]
