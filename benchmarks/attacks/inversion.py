"""What a step between two releases tells of the deleted sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.attacks.classical import Report
from benchmarks.attacks.networks import Digits, Mnist
from fisher_forget._util.copies import copy_model
from fisher_forget.attack import NewtonInversion, Pair, Reconstruction
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices
from fisher_forget.report.plots import plot_reconstructions

PICTURE = Path(__file__).parents[2] / "docs" / "attacks.png"
STEP, OURS = "the step, no noise", "fisher-forget, its own noise"
FRESH = "retrained, another seed"


def noisy(model: nn.Module, share: float, before: nn.Module) -> nn.Module:
    """With normal noise on all weights, of `share` times the length of the step."""
    twin, generator = copy_model(model), torch.Generator().manual_seed(0)
    start = [p.detach() for p in before.parameters()]
    step = torch.cat([(p - s).flatten() for p, s in zip(twin.parameters(), start, strict=True)])
    scale = share * float(step.norm()) / len(step) ** 0.5
    with torch.no_grad():
        for p in twin.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return twin


def inverted(own: Digits, count: int, batches: Sequence[int] = ()) -> dict[str, Reconstruction]:
    """What is recovered of `count` deletions, by who made the second release."""
    attack, everyone = NewtonInversion(own.public), np.arange(len(own.data))
    before, order = own.fit(everyone, 0), np.random.default_rng(0).permutation(everyone)

    def pairs(make: Callable[[Indices], nn.Module], batch: int = 1) -> list[Pair]:
        cuts = [order[k * batch : (k + 1) * batch] for k in range(max(count // batch, 3))]
        return [Pair(before, make(gone), take(own.data, gone)) for gone in cuts]

    def step(gone: Indices) -> nn.Module:
        return own.forget(before, gone, noise=None)

    def retrained(gone: Indices, seed: int = 0) -> nn.Module:
        return own.fit(np.setdiff1d(everyone, gone), seed)

    ours = [replace(pair, retrained=[retrained(order[[k]])]) for k, pair in enumerate(pairs(step))]
    found = {STEP: attack.run(ours)}
    for share in (0.1, 1.0, 10.0):
        moved = [replace(p, after=noisy(p.after, share, before), retrained=()) for p in ours]
        found[f"the step, noise of {share:g} times its length"] = attack.run(moved)
    others: dict[str, Callable[[Indices], nn.Module]] = {
        OURS: lambda gone: own.forget(before, gone),
        FRESH: lambda gone: retrained(gone, 100 + int(gone[0])),
        "control: nothing deleted": lambda gone: own.fit(everyone, 100 + int(gone[0])),
    }
    found |= {name: attack.run(pairs(make)) for name, make in others.items()}
    return found | {f"the step, of {n} at once": attack.run(pairs(step, n)) for n in batches}


def inversion(count: int = 16) -> Report:
    """Digits: a network, and a softmax regression."""
    own, linear = Digits(), Digits(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    found = inverted(own, count, (4, 16))
    found[f"softmax regression: {STEP}"] = inverted(linear, count)[STEP]
    return stored(found)


def mnist(count: int = 8) -> Report:
    """MNIST, with the picture."""
    own = Mnist()
    found = inverted(own, count, (4,))
    others = {name: found[name].recovered for name in (OURS, FRESH)}
    figure = plot_reconstructions(found[STEP], (28, 28), others).figure
    figure.savefig(PICTURE, dpi=110)
    return stored(found)


def stored(found: Mapping[str, Reconstruction]) -> Report:
    """Findings as they are stored."""
    return {name: finding.to_dict() for name, finding in found.items()}
