"""Networks of a row, trained once and kept."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forgetting.data import Data
from benchmarks.forgetting.rows import Setup, Training
from fisher_forget._util.files import ensure_folder, fingerprint, load_model, save_model
from fisher_forget.errors import NumericalError
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import SCHEDULES

MOMENTUM = 0.9
CHECKED, LEARNT = 1000, 0.9  # samples; loss of a network that has learnt, over that of a guess
RETRAINED = 1000  # the first of the retrained networks' seeds: no original has it


def network(setup: Setup, data: Data, rows: Tensor, seed: int, folder: Path) -> nn.Module:
    """A network trained on some samples, from the folder where it has been trained before.

    Args:
        setup: Says what to train and how.
        data: Of the setup.
        rows: Samples to train on.
        seed: Of weights and order.
        folder: Holds a file for each network, named by all that decides it.

    Raises:
        NumericalError: If the network has learnt nothing, of which there is nothing to forget.
    """
    what = (setup.model, setup.options, setup.training, data.x, data.y, rows, seed)
    path = ensure_folder(folder) / f"{fingerprint(*what)}.safetensors"
    if path.exists():
        return load_model(path, _new(setup, data, seed))
    model = train(setup, data, rows, seed, setup.training.epochs)
    _check_learnt(model, data, rows)
    save_model(path, model, {"setup": setup.title, "seed": str(seed)})
    return model


def train(setup: Setup, data: Data, rows: Tensor, seed: int, epochs: int) -> nn.Module:
    """Train for some epochs of the setup's schedule, which is that of all of them."""
    model, training = _new(setup, data, seed).train(), setup.training
    optimizer = _optimizer(model, training)
    generator = torch.Generator().manual_seed(seed + 1)  # the weights have been drawn by the other
    steps = math.ceil(len(rows) / training.batch)
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for step, batch in enumerate(order.tensor_split(steps), epoch * steps):
            rate = SCHEDULES[training.schedule](step / (steps * training.epochs))
            for group in optimizer.param_groups:
                group["lr"] = training.lr * rate
            loss = F.cross_entropy(model(data.x[batch]), data.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def training_seconds(setup: Setup, data: Data, rows: Tensor) -> float:
    """Seconds of a processor that training takes: the epochs times those of one, after another that
    warms up."""
    train(setup, data, rows, 0, 1)
    begun = time.process_time()
    train(setup, data, rows, 0, 1)
    return (time.process_time() - begun) * setup.training.epochs


@torch.no_grad()
def _check_learnt(model: nn.Module, data: Data, rows: Tensor) -> None:
    some = rows[:CHECKED]
    loss = float(F.cross_entropy(model(data.x[some]), data.y[some]))
    if not loss < LEARNT * math.log(data.classes):
        got = f"a loss of {loss:.3g} nats after training on {data.classes} classes"
        expected = f"less than {LEARNT:g} of the logarithm of the classes"
        raise NumericalError(got, expected, "Lower the setup's lr.")


def _new(setup: Setup, data: Data, seed: int) -> nn.Module:
    shape = tuple(data.x.shape[1:])
    return build_model(setup.model, shape, data.classes, seed=seed, **setup.options)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    weights, lr, decay = model.parameters(), training.lr, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(weights, lr, weight_decay=decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr, weight_decay=decay)
    momentum = MOMENTUM if training.optimizer == "momentum" else 0.0
    return torch.optim.SGD(weights, lr, momentum=momentum, weight_decay=decay)
