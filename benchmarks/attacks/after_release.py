"""What comes back when a released model is changed: relearning, quantisation, fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.attacks.classical import Report
from benchmarks.attacks.networks import Digits, Mnist
from fisher_forget import resolve_split
from fisher_forget._util.copies import copy_model
from fisher_forget.attack import AfterRelease, FineTuning, Pair, Quantisation, Relearning, quantised
from fisher_forget.baselines import METHODS
from fisher_forget.data.samples import take

CLASS, BITS = 3, 3
OWN, HIDDEN, HELD = "fisher-forget", "control: only hidden", "control: hidden below half a step"
RETRAINED = "control: retrained"


def hidden(model: nn.Module, label: int = CLASS, by: float = 8.0) -> nn.Module:
    """A model that never says a class, and knows it as before: its bias is lowered."""
    twin = copy_model(model)
    with torch.no_grad():
        _last(twin).bias[label] -= by
    return twin


def hidden_below_a_step(model: nn.Module, label: int = CLASS, bits: int = BITS) -> nn.Module:
    """The same by changes of the weights that rounding undoes: .45 steps from rounded ones, down
    for the class and up for the others. What goes into the last layer is at least 0."""
    twin = quantised(model, bits)
    with torch.no_grad():
        for number, row in enumerate(_last(twin).weight):
            step = row.abs().max() / (2 ** (bits - 1) - 1)
            moves = row.abs() < row.abs().max()  # the largest sets the step
            row[moves] += (-0.45 if number == label else 0.45) * step
    return twin


def after_release() -> Report:
    """Fifty samples, and a class, of digits; a class of MNIST."""
    own, found = Digits(), Report()
    everyone = np.random.default_rng(0).permutation(700)
    found |= _case("digits, 50 samples", own, everyone[:50], 8)
    for name, data, models in (("digits", own, 8), ("MNIST", Mnist(), 5)):
        gone = np.flatnonzero(data.data.tensors[1].numpy() == CLASS)
        found |= _case(f"{name}, a class", data, gone, models)
    return found


def _case(name: str, own: Digits, gone: Any, models: int) -> Report:
    split, whole = resolve_split(own.data, gone), range(len(own.data))
    before = own.fit(np.asarray(whole), 0)
    exact = [own.fit(split.retain, 1000 + k) for k in range(models)]
    scrubbed = METHODS["scrub"]().unlearn(before, split).model
    after: dict[str, Callable[[], nn.Module]] = {
        OWN: lambda: own.forget(before, gone, steps="auto"),
        "SCRUB": lambda: scrubbed,
        RETRAINED: lambda: own.fit(split.retain, 2000),
    }
    deleted, kept = take(own.data, gone), take(own.data, split.retain[:200])
    other = own.public
    if "class" in name:
        after |= {HIDDEN: lambda: hidden(before), HELD: lambda: hidden_below_a_step(before)}
        other = _without(other, CLASS)
    found = {}
    for released, make in after.items():
        pair = Pair(before, make(), deleted, kept, exact)
        told = {attack.name: attack.run(pair).to_dict() for attack in _changes(other)}
        found[f"{name}; {released}"] = told
    return found


def _changes(other: TensorDataset) -> list[AfterRelease]:
    return [
        Relearning(samples=5, epochs=10),
        Quantisation(bits=8),
        Quantisation(bits=4),
        Quantisation(bits=BITS),
        FineTuning(data=other, epochs=3),
    ]


def _without(data: TensorDataset, label: int) -> TensorDataset:
    return take(data, torch.nonzero(data.tensors[1] != label).flatten())


def _last(model: nn.Module) -> nn.Linear:
    """The last linear layer."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
