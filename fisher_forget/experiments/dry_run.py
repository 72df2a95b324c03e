"""`--dry-run`: what a command would train, how long that takes and what memory it needs; nothing is
written.

Times are extrapolated from a few training steps of the model itself, and from
`estimate_curvature(dry_run=True)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget._util.threads import torch_threads
from fisher_forget.baselines import METHODS
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.data.batches import make_batch
from fisher_forget.data.pieces import PIECE
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.evaluate.ensemble import stored_seeds
from fisher_forget.experiments import forget_sets
from fisher_forget.experiments.cases import TrainingTask, case_tasks, subsets_task, untrained
from fisher_forget.experiments.config import (
    CompareConfig,
    ForgetSet,
    RunConfig,
    SweepConfig,
)
from fisher_forget.experiments.config_file import as_yaml
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.method_setup import chosen_methods
from fisher_forget.experiments.run_folder import run_folder
from fisher_forget.experiments.training import train
from fisher_forget.experiments.tuning import held_out
from fisher_forget.likelihood import resolve_likelihood
from fisher_forget.params import first_call
from fisher_forget.unlearn.newton.flow import MOST
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.problem import with_solver

STEPS = 6  # of training, that are timed
GRADIENTS = {"sgd": 2, "adam": 3}  # tensors of the weights' size that training holds beside them
COPIES = 30  # tensors of the weights' size that `forget` holds: gradients, steps, solver, draws


@dataclass(frozen=True)
class Cost:
    """Of one model on this machine.

    Attributes:
        epoch: Seconds of a pass over all training samples.
        training: Bytes that a training holds: weights, gradients, state of the optimizer,
            activations of a batch.
        weights: Bytes of the weights.
        curvature: Predicted for the first forget set.
        forgetting: Bytes that `forget` holds, `forget_bytes`.
    """

    epoch: float
    training: int
    weights: int
    curvature: CostEstimate
    forgetting: int


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
    task: TrainingTask
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
    folder = run_folder(config)
    data = config.data.load()
    if isinstance(config, CompareConfig):
        chosen_methods(config)
        data, _ = held_out(data, config.validation)
    elif command == "evaluate":
        config.check_evaluable()
    forget = {s.name: _forget_indices(s, data) for s in config.forget_sets}
    model = untrained(config, data, 0)
    needs = list(_needs(config, data, forget, folder))
    cost = predicted_cost(config, data, model, next(iter(forget.values())))
    size = sum(p.numel() for p in model.parameters())
    plain = as_yaml(config, default_flow_style=None, width=100)
    table = {
        "results": [str(folder)],
        "data": [_data(config, data)],
        "model": [f"{config.model.name}, {size:,} parameters"],
        "forget": [_forget_set(s, data, forget[s.name]) for s in config.forget_sets],
        "models": [_models(need) for need in needs],
        "time": _times(config, command, needs, cost),
        "memory": [_memory(config, data, needs, cost)],
    }
    lines = [f"Dry run of `fisher-forget {command}`: nothing is trained, nothing is written.", ""]
    for title, texts in table.items():
        lines += [f"  {'' if i else title:9}{text}" for i, text in enumerate(texts)]
    return "\n".join([*lines, "", "Configuration, with all defaults:", plain])


def _forget_indices(settings: ForgetSet, data: DataBundle) -> Indices:
    """The forget set; of the memorised kind, which models must tell, as many samples."""
    if settings.kind != "memorised":
        return forget_sets.choose(settings, data, lambda: np.zeros(0))
    return forget_sets.check(settings, data)[: settings.count]


def _needs(
    config: RunConfig, data: DataBundle, forget: dict[str, Indices], folder: Path
) -> Iterator[Need]:
    """Every task once: forget sets share their originals."""
    seen = set()
    for settings in config.forget_sets:
        unknown = settings.kind == "memorised"
        originals, retrained = case_tasks(config, data, settings, forget[settings.name], folder)
        changed = "" if originals.data is data else f" with {settings.name}"
        tasks = [(f"original{changed}", originals), (f"without {settings.name}", retrained)]
        if unknown:
            tasks.insert(1, ("on subsets", subsets_task(data, folder)))
        for title, task in tasks:
            if task.folder in seen:
                continue
            seen.add(task.folder)
            stored: list[int] = []
            guessed = unknown and task is retrained
            if not guessed:
                stored = stored_seeds(task.folder, task.seeds, task.fingerprint(config))
            yield Need(title, task, stored, _samples(task), guessed)


def _samples(task: TrainingTask) -> int:
    """Number of samples that each model is trained on."""
    total = len(task.data.train)
    if task.rows is None:
        return total
    return round(forget_sets.SHARE * total) if isinstance(task.rows, str) else len(task.rows)


def predicted_cost(config: RunConfig, data: DataBundle, model: nn.Module, forget: Indices) -> Cost:
    """Time and memory of a training, and of the curvature that `forget` would estimate.

    Args:
        config: Of the experiment.
        data: To train on.
        model: As before training; untouched.
        forget: Indices of the forget set.
    """
    size = config.training.batch_size
    rows = np.arange(min(len(data.train), STEPS * size))
    few = replace(config.training, epochs=1)
    options: dict[str, Any] = {"seed": 0, "likelihood": config.likelihood, "progress": False}
    with torch_threads(1 if config.jobs > 1 else None):
        train(model, data.train, few, indices=rows[:size], **options)  # pays for what is done once
        begun = time.perf_counter()
        train(model, data.train, few, indices=rows, **options)
        epoch = (time.perf_counter() - begun) * len(data.train) / len(rows)
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    kept = activation_bytes(model, data, rows[:size])
    held = weights * (1 + GRADIENTS[config.training.optimizer]) + kept
    split = resolve_split(data.train, forget)
    asked = config.forget_options(config.seeds[0])
    likelihood = resolve_likelihood(config.likelihood)
    objective = Objective(model.eval(), likelihood, asked.subset, memory=asked.memory)
    asked = with_solver(asked, objective, split)
    curvature = _curvature_cost(objective, split, asked)
    forgetting = forget_bytes(objective, split, curvature, direct=asked.inverts)
    return Cost(epoch, held, weights, curvature, forgetting)


def _curvature_cost(objective: Objective, split: Split, options: ForgetOptions) -> CostEstimate:
    keywords = options.curvature_keywords(*options.curvature_plan(split))
    likelihood = objective.likelihood
    return estimate_curvature(objective.tape, split, likelihood, dry_run=True, **keywords)


def forget_bytes(
    objective: Objective, split: Split, curvature: CostEstimate, *, direct: bool
) -> int:
    """Bytes that `forget` holds at its worst moment: copies of the weights, the curvature, and
    graphs and outputs as far as its memory allows.

    Args:
        objective: Of the model.
        split: The data.
        curvature: Predicted.
        direct: No products are made.
    """
    samples, memory = split.retain, objective.memory
    batch = min(split.batch_size, len(samples))
    one = objective.sample_bytes(split.few("retain"))
    held = min(batch * one, max(memory // PIECE, one))
    if not direct:
        graph = objective.ggn(split, samples[:1], objective.start).needed
        working = min(MOST, len(samples))
        held += min(working * graph, max(memory // 2, graph))
    weights = sum(x.numel() * x.element_size() for x in objective.start.values())
    return max(curvature.bytes_peak, COPIES * weights + curvature.bytes_result + held)


def activation_bytes(model: nn.Module, data: DataBundle, rows: Indices) -> int:
    """Bytes that autograd keeps from the forward pass of a batch."""
    kept: dict[int, int] = {}

    def record(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # views share their memory
        return x

    batch = make_batch(data.train[rows][:2]).on(model)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        outputs = first_call(model, batch.args, batch.kwargs)
    del outputs
    return sum(kept.values())


def _times(config: RunConfig, command: str, needs: list[Need], cost: Cost) -> Iterator[str]:
    whole = config.training.epochs * cost.epoch
    jobs = f", {config.jobs} at a time" if config.jobs > 1 else ""
    missing = sum(need.missing for need in needs)
    seconds = 0.0
    for need in needs:
        share = need.samples / len(need.task.data.train)
        seconds += math.ceil(need.missing / config.jobs) * whole * share
    a_model = f"{config.training.epochs} epochs of {_seconds(cost.epoch)}"
    yield f"training: {missing} models of {a_model}{jobs}: {_seconds(seconds)}"
    sets = len(config.forget_sets)
    if isinstance(config, CompareConfig):
        methods = len(config.methods or METHODS)
        # each scrubbing takes about a training at most; the first original's is among the trials
        calls = config.trials + len(config.seeds) - 1
        most = _seconds(methods * sets * calls * whole / config.jobs)
        yield (
            f"methods: {methods} x {sets} forget sets, {config.trials} trials and "
            f"{len(config.seeds)} originals each, about {most} at most; mostly much less"
        )
    elif command != "evaluate":
        calls = len(config.seeds) * sets
        yield (
            f"forgetting: {calls} call{'s' * (calls > 1)}, each "
            f"{_seconds(cost.curvature.seconds)} for the curvature, and mostly up to twice as long "
            "again for the Newton steps and the noise"
        )
    if isinstance(config, SweepConfig) and command == "sweep":
        cells = math.prod(len(values) for values in config.axes.values())
        yield f"sweep: {cells} cells for each of {sets} forget sets"


def _memory(config: RunConfig, data: DataBundle, needs: list[Need], cost: Cost) -> str:
    tensors = (*data.train.tensors, *data.test.tensors)
    held = sum(x.numel() * x.element_size() for x in tensors)
    models = sum(len(need.task.seeds) for need in needs) * cost.weights
    peak = held + models + max(cost.training, cost.forgetting)
    text = f"{_bytes(peak)}: data {_bytes(held)}, models {_bytes(models)}, "
    text += f"forgetting {_bytes(cost.forgetting)}"
    if config.jobs > 1:
        text += f"; {config.jobs} training processes of {_bytes(held + cost.training)}"
    return text + "; beside Python and its libraries"


def _data(config: RunConfig, data: DataBundle) -> str:
    classes = f"{len(data.classes)} classes" if data.classes else "no classes"
    samples = f"{len(data.train):,} training and {len(data.test):,} test samples"
    return f"{config.data.name}, {samples}, {classes}"


def _forget_set(settings: ForgetSet, data: DataBundle, forget: Indices) -> str:
    how = ", chosen by models trained on subsets" if settings.kind == "memorised" else ""
    retained = len(data.train) - len(forget)
    return f"{settings.name}: {len(forget):,} samples, {retained:,} retained{how}"


def _models(need: Need) -> str:
    at_most = "at most " if need.guessed else ""
    return f"{need.title}: {at_most}{need.missing} to train, {len(need.stored)} stored"


def _seconds(value: float) -> str:
    if value < 90:
        return f"{value:.2g} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"
