"""Four tasks with an attribute each, and all that is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget._util.copies import copy_model
from fisher_forget.experiments.attributes import (
    LENGTH,
    LETTERS,
    AttributeBundle,
    load_attribute_data,
)
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.overlearn import Decensoring, Probe, Repurposing, forget_attribute, leace

Report = dict[str, Any]
BEFORE, OURS, REPAIRED = "as trained", "forget_attribute", "forget_attribute, 5 epochs of repair"
ONE, LEACE_ONE = "forget_attribute, one layer", "LEACE, one layer"
LEACE, REVERSED = "LEACE", "gradient reversal"
REPAIR, ADVERSARY_STEPS = 5, 5
EMBEDDED = 8  # numbers of a letter


@dataclass(frozen=True)
class Case:
    """A network, and its layers.

    Attributes:
        net: Before training.
        settings: Of the training.
        linear: All its linear layers, in order; all forget, in turn.
        probed: Layers that are shown.
        asked: The layer that is re-purposed, de-censored, and read by the adversary.
        limits: Training and test samples.
    """

    net: nn.Module
    settings: TrainSettings
    linear: tuple[str, ...]
    probed: tuple[str, ...]
    asked: str
    limits: tuple[int | None, int | None] = (None, None)


def _network(*widths: int, letters: bool = False) -> nn.Sequential:
    """Linear layers with ReLUs between them, named "1", "3" and "5"; weights depend on nothing
    else."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start: nn.Module = nn.Flatten()
        if letters:
            start = nn.Sequential(nn.Embedding(LETTERS, EMBEDDED), start)
        layers: list[nn.Module] = [start]
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b), *([nn.ReLU()] if i < len(widths) - 2 else [])]
        return nn.Sequential(*layers)


LINEAR, SHOWN = ("1", "3", "5"), ("1", "2", "3", "4", "5")
DIGITS = TrainSettings(epochs=60, lr=0.05, weight_decay=1e-3)
MNIST = TrainSettings(epochs=20, lr=0.05, weight_decay=5e-4)
CASES: dict[str, Case] = {
    "digits-tint": Case(_network(128, 64, 32, 10), DIGITS, LINEAR, SHOWN, "3"),
    "mnist-tint": Case(_network(1568, 64, 32, 10), MNIST, LINEAR, SHOWN, "3", (6000, 6000)),
    "mnist-parity": Case(_network(784, 64, 32, 2), MNIST, LINEAR, SHOWN, "3", (6000, 6000)),
    "names": Case(
        _network(EMBEDDED * LENGTH, 64, 32, 2, letters=True),
        replace(MNIST, epochs=10), LINEAR, SHOWN, "3",
    ),
}  # fmt: skip


def measured(name: str) -> Report:
    """All numbers of a case."""
    case, data = CASES[name], load(name)
    model = _fit(case, data.train)
    told = data.train.tensors[1].numpy()
    arguments = (model, data.train, data.train_attribute, case.linear)
    options: dict[str, Any] = {"given": told, "progress": False}
    repaired = forget_attribute(*arguments, repair=REPAIR, **options).model
    after = {
        BEFORE: model,
        LEACE_ONE: leace(*arguments[:3], case.asked, given=told).model,
        LEACE: leace(*arguments, given=told).model,
        ONE: forget_attribute(*arguments[:3], case.asked, **options).model,
        OURS: forget_attribute(*arguments, **options).model,
        REPAIRED: repaired,
        REVERSED: reversed_gradient(model, data, case.asked),
    }
    others = {"after": repaired, "never trained": case.net.eval()}
    if data.without is not None:
        others["trained without tint"] = _fit(case, data.without)
    probe, (task, guess) = Probe(layers=case.probed), (data.test, data.test.tensors[1].numpy())
    layers = {
        "before": probe.run(model, task, data.test_attribute, guess).to_dict(),
        **{k: probe.run(m, task, data.test_attribute, guess).to_dict() for k, m in others.items()},
        "control: random attribute": _control(case, model, data),
        "control: the task's label": probe.run(model, task, guess).to_dict(),
    }
    return {
        "samples": [len(data.train), len(data.test)],
        "layers": layers,
        "price": {k: _priced(case, m, data) for k, m in after.items()},
        "attacks": {
            k: _attacked(case, m, model, data)
            for k, m in {BEFORE: model, REPAIRED: repaired, REVERSED: after[REVERSED]}.items()
        },
    }


def load(name: str) -> AttributeBundle:
    """The data of a case."""
    most, asked = CASES[name].limits
    return load_attribute_data(name, max_train=most, max_test=asked)


def reversed_gradient(
    model: nn.Module, data: AttributeBundle, layer: str, *, strength: float = 0.1, epochs: int = 15
) -> nn.Module:
    """Fine-tuning on the task minus `strength` times the loss of an adversary, a network that reads
    the attribute from a layer and is trained along, five steps for each of the model's (Ganin &
    Lempitsky 2015). Of the strengths .1, .3 and 1 the first left least to a probe."""
    twin = copy_model(model).train()
    seen: list[Tensor] = []
    handle = twin.get_submodule(layer).register_forward_hook(lambda _m, _x, z: seen.append(z))
    x, y = data.train.tensors
    s = torch.from_numpy(data.train_attribute)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.no_grad():
            twin(x[:2])
        head = nn.Sequential(
            nn.Linear(seen.pop().shape[1], 64), nn.ReLU(), nn.Linear(64, len(data.values))
        )
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (twin, head)]
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(x)), len(x) // 64):
            task = F.cross_entropy(twin(x[rows]), y[rows])
            z = seen.pop()
            for _ in range(ADVERSARY_STEPS):
                optimizers[1].zero_grad()
                F.cross_entropy(head(z.detach()), s[rows]).backward()
                optimizers[1].step()
            optimizers[0].zero_grad()
            (task - strength * F.cross_entropy(head(z), s[rows])).backward()
            optimizers[0].step()
    handle.remove()
    twin.zero_grad(set_to_none=True)
    return twin.eval()


def _control(case: Case, model: nn.Module, data: AttributeBundle) -> Report:
    """Of each layer an attribute of its own, the true one in random order."""
    found = []
    for seed, layer in enumerate(case.probed):
        random = np.random.default_rng(seed).permutation(data.test_attribute)
        told = Probe(layers=[layer]).run(model, data.test, random, data.test.tensors[1].numpy())
        found += told.to_dict()["layers"]
    return {"layers": found}


def _fit(case: Case, samples: Any) -> nn.Module:
    return train(case.net, samples, case.settings, seed=0, progress=False)


def _priced(case: Case, model: nn.Module, data: AttributeBundle) -> Report:
    """Accuracy and loss of the task on test samples, and what two probes read from the asked layer
    and from the one after it."""
    x, y = data.test.tensors
    with torch.no_grad():
        outputs = model(x)
    accuracy = float((outputs.argmax(1) == y).double().mean())
    loss = float(F.cross_entropy(outputs, y))
    layers = (case.asked, str(int(case.asked) + 1))
    probes = {
        "linear": Probe(layers=layers),
        "nonlinear": Probe(layers=layers, kind="nonlinear", strengths=(0.1,)),
    }
    found = {
        kind: probe.run(model, data.test, data.test_attribute, y).to_dict()["layers"]
        for kind, probe in probes.items()
    }
    return {"accuracy": accuracy, "loss": loss, **found}


def _attacked(case: Case, model: nn.Module, before: nn.Module, data: AttributeBundle) -> Report:
    """Re-purposing, and de-censoring where something was censored."""
    start = Repurposing(layer=case.asked, labels=100)
    found = {"repurposed": start.run(model, data.test, data.test_attribute).to_dict()}
    if model is not before:
        probe = Probe(kind="nonlinear", strengths=(0.1,))
        attack = Decensoring(layer=case.asked, probe=probe)
        given = data.test.tensors[1]
        run = attack.run(model, before, data.test, data.test_attribute, given)
        found["decensored"] = run.to_dict()
    return found
