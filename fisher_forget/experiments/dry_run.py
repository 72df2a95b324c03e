"""`--dry-run`: what a command would train, how long that takes and what memory it needs; nothing is
written.

Times are extrapolated from a few training steps of the model itself, and from
`estimate_curvature(dry_run=True)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from fisher_forget.baselines import METHODS
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.data.batches import make_batch
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.evaluate.ensemble import stored_seeds
from fisher_forget.experiments import forget_sets
from fisher_forget.experiments import run as recipe
from fisher_forget.experiments.config import (
    CompareConfig,
    ForgetSet,
    RunConfig,
    SweepConfig,
    to_plain,
)
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.run import Task
from fisher_forget.experiments.training import train
from fisher_forget.params import call

STEPS = 6  # of training, that are timed
GRADIENTS = {"sgd": 2, "adam": 3}  # tensors of the weights' size that training holds beside them


@dataclass(frozen=True)
class Cost:
    """Of one model on this machine.

    Attributes:
        epoch: Seconds of a pass over all training samples.
        training: Bytes that a training holds: weights, gradients, state of the optimizer,
            activations of a batch.
        weights: Bytes of the weights.
        curvature: What `estimate_curvature` predicts for the first forget set.
    """

    epoch: float
    training: int
    weights: int
    curvature: CostEstimate


@dataclass(frozen=True)
class Need:
    """Models of one task.

    Attributes:
        title: Of the models.
        task: Whose seeds are all models.
        stored: Seeds of those that an earlier call has stored.
        samples: That each is trained on.
        guessed: The forget set is not known yet, and so not whether the models are stored.
    """

    title: str
    task: Task
    stored: list[int]
    samples: int
    guessed: bool

    @property
    def missing(self) -> int:
        """Models to train."""
        return len(self.task.seeds) - len(self.stored)


def describe(config: RunConfig, command: str) -> str:
    """The plan of a command as text.

    Args:
        config: Of the command's own type.
        command: "run", "sweep", "compare" or "evaluate".

    Raises:
        ConfigError, DataError, ModelError, StorageError: What the command itself would raise before
            it trains.
    """
    folder = Path(config.out) / config.name
    data = config.data.load()
    chosen = {s.name: _choice(s, data) for s in config.forget_sets}
    model = recipe.untrained(config, data, 0)
    needs = list(_needs(config, data, chosen, folder))
    cost = _cost(config, data, model, next(iter(chosen.values())))
    lines = [
        f"Dry run of `fisher-forget {command}`: nothing is trained, nothing is written.",
        "",
        *_rows("results", [str(folder)]),
        *_rows("data", [_data(config, data)]),
        *_rows(
            "model",
            [f"{config.model.name}, {sum(p.numel() for p in model.parameters()):,} parameters"],
        ),
        *_rows("forget", [_set(s, data, chosen[s.name]) for s in config.forget_sets]),
        *_rows("models", [_models(need) for need in needs]),
        *_rows("time", list(_times(config, command, data, needs, cost))),
        *_rows("memory", [_memory(config, data, needs, cost)]),
        "",
        "Configuration, with all defaults:",
        yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None, width=100),
    ]
    return "\n".join(lines)


def _choice(settings: ForgetSet, data: DataBundle) -> Indices:
    """The forget set; of the memorised kind, which models must tell, as many samples."""
    if settings.kind != "memorised":
        return forget_sets.choose(settings, data, lambda: np.zeros(0))
    return forget_sets.check(settings, data)[: settings.count]


def _needs(
    config: RunConfig, data: DataBundle, chosen: dict[str, Indices], folder: Path
) -> Iterator[Need]:
    """Every task once: forget sets share their originals."""
    seen = set()
    for settings in config.forget_sets:
        unknown = settings.kind == "memorised"
        originals, retrained = recipe.case_tasks(
            config, data, settings, chosen[settings.name], folder
        )
        own = "" if originals.data is data else f" with {settings.name}"
        tasks = [(f"original{own}", originals), (f"without {settings.name}", retrained)]
        if unknown:
            tasks.insert(1, ("on subsets", recipe.subsets_task(config, data, folder)))
        for title, task in tasks:
            if task.folder in seen:
                continue
            seen.add(task.folder)
            guessed = unknown and task is retrained
            stored = (
                [] if guessed else stored_seeds(task.folder, task.seeds, task.fingerprint(config))
            )
            yield Need(title, task, stored, _samples(task), guessed)


def _samples(task: Task) -> int:
    """Number of samples that each model is trained on."""
    total = len(task.data.train)
    if task.rows is None:
        return total
    return round(forget_sets.SHARE * total) if isinstance(task.rows, str) else len(task.rows)


def _cost(config: RunConfig, data: DataBundle, model: nn.Module, forget: Indices) -> Cost:
    size = config.training.batch_size
    rows = np.arange(min(len(data.train), STEPS * size))
    with _threads(1 if config.jobs > 1 else torch.get_num_threads()):
        few = replace(config.training, epochs=1)
        options: dict[str, Any] = {"seed": 0, "likelihood": config.likelihood, "progress": False}
        train(model, data.train, few, indices=rows[:size], **options)  # pays for what is done once
        begun = time.perf_counter()
        train(model, data.train, few, indices=rows, **options)
        epoch = (time.perf_counter() - begun) * len(data.train) / len(rows)
    split = resolve_split(data.train, forget)
    chosen = config.forget_options(config.seeds[0])
    part, kind = chosen.curvature_plan(split)
    curvature = estimate_curvature(
        model.eval(),
        split,
        config.likelihood,
        structure=chosen.structure,
        kind=kind,
        draws=chosen.draws,
        part=part,
        subset=chosen.subset,
        seed=chosen.seed,
        dry_run=True,
    )
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    held = weights * (1 + GRADIENTS[config.training.optimizer]) + _activations(
        model, data, rows[:size]
    )
    return Cost(epoch, held, weights, curvature)


def _activations(model: nn.Module, data: DataBundle, rows: Indices) -> int:
    """Bytes that autograd keeps from the forward pass of a batch."""
    kept: dict[int, int] = {}

    def seen(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch = make_batch(data.train[rows][:2]).on(model)
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        outputs = call(model, {}, batch.args, batch.kwargs)
    del outputs
    return sum(kept.values())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _times(
    config: RunConfig, command: str, data: DataBundle, needs: list[Need], cost: Cost
) -> Iterator[str]:
    whole = config.training.epochs * cost.epoch
    jobs = f", {config.jobs} at a time" if config.jobs > 1 else ""
    missing = sum(need.missing for need in needs)
    seconds = sum(
        math.ceil(need.missing / config.jobs) * whole * need.samples / len(data.train)
        for need in needs
    )
    each = f"{config.training.epochs} epochs of {_seconds(cost.epoch)}"
    yield f"training: {missing} models of {each}{jobs}: {_seconds(seconds)}"
    scrubbed = len(config.seeds) * len(config.forget_sets)
    if isinstance(config, CompareConfig):
        methods = len(config.methods or METHODS)
        trainings = config.tuning + len(
            config.seeds
        )  # what its settings may cost, and one for every original
        most = _seconds(methods * len(config.forget_sets) * trainings * whole / config.jobs)
        yield f"methods: {methods} x {len(config.forget_sets)} forget sets, about {most} at most; mostly much less"
    elif command != "evaluate":
        yield (
            f"forgetting: {scrubbed} times, each {_seconds(cost.curvature.seconds)} for the curvature, and mostly up "
            "to twice as long again for the Newton steps and the noise"
        )
    if isinstance(config, SweepConfig) and command == "sweep":
        cells = math.prod(len(values) for values in config.axes.values())
        yield f"sweep: {cells} cells for each of {len(config.forget_sets)} forget sets"


def _memory(config: RunConfig, data: DataBundle, needs: list[Need], cost: Cost) -> str:
    held = sum(
        x.numel() * x.element_size() for part in (data.train, data.test) for x in part.tensors
    )
    models = sum(len(need.task.seeds) for need in needs) * cost.weights
    peak = held + models + max(cost.training, cost.curvature.bytes_peak)
    text = f"{_bytes(peak)}: data {_bytes(held)}, models {_bytes(models)}, curvature {_bytes(cost.curvature.bytes_peak)}"
    if config.jobs > 1:
        text += f"; {config.jobs} training processes of {_bytes(held + cost.training)}"
    return text + "; beside Python and its libraries"


def _data(config: RunConfig, data: DataBundle) -> str:
    what = f"{len(data.classes)} classes" if data.classes else "no classes"
    return f"{config.data.name}, {len(data.train):,} training and {len(data.test):,} test samples, {what}"


def _set(settings: ForgetSet, data: DataBundle, chosen: Indices) -> str:
    how = ", chosen by models trained on subsets" if settings.kind == "memorised" else ""
    return (
        f"{settings.name}: {len(chosen):,} samples, {len(data.train) - len(chosen):,} retained{how}"
    )


def _models(need: Need) -> str:
    at_most = "at most " if need.guessed else ""
    return f"{need.title}: {at_most}{need.missing} to train, {len(need.stored)} stored"


def _rows(title: str, texts: list[str]) -> list[str]:
    return [f"  {title if i == 0 else '':9}{text}" for i, text in enumerate(texts)]


def _seconds(value: float) -> str:
    if value < 90:
        return f"{value:.2g} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"
