"""One forget set of an experiment: the models trained with and without it, and their evaluation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util import files
from fisher_forget._util.code import code_fingerprint
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import StorageError
from fisher_forget.evaluate.closeness import Reference
from fisher_forget.evaluate.ensemble import Members, RetrainedEnsemble, train_members
from fisher_forget.evaluate.evaluation import Evaluation, evaluate
from fisher_forget.experiments import forget_sets
from fisher_forget.experiments.config import ForgetSet, RunConfig
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.models import MODELS, build_model
from fisher_forget.experiments.training import train
from fisher_forget.unlearn.result import versions

# Which samples to train on: some; of every seed its own subset; or all.
Rows = Indices | Literal["subset"] | None

RETRAINED_SEEDS = 1000  # seeds of the retrained models start here: none is an original's


@dataclass(frozen=True)
class Case:
    """One forget set of an experiment: the models with and without it.

    Attributes:
        settings: Which samples.
        data: As the originals were trained on.
        forget: Indices of the samples, sorted.
        folder: Of its results.
        references: One a seed: the original of that seed, held against the shared retrained models.
        originals: One a seed.
        retrained: Trained without the forget set.
        fingerprint: Of these: of all but the seed that their weights depend on.
    """

    settings: ForgetSet
    data: DataBundle
    forget: Indices
    folder: Path
    references: tuple[Reference, ...]
    originals: Members
    retrained: Members
    fingerprint: str

    @property
    def split(self) -> Split:
        """Who is retained and forgotten."""
        return resolve_split(self.data.train, self.forget)


@dataclass(frozen=True)
class TrainingTask:
    """Models to train that differ by their seed alone.

    Attributes:
        data: To train on.
        rows: Which samples of it.
        seeds: One a model.
        folder: Where they are stored.
        title: Of the progress bar.
    """

    data: DataBundle
    rows: Rows
    seeds: list[int]
    folder: Path
    title: str

    def fingerprint(self, config: RunConfig) -> str:
        """Of everything but the seed that the weights depend on."""
        return files.fingerprint(*basis(config, self.data), self.rows)


def prepare_case(config: RunConfig, clean: DataBundle, settings: ForgetSet, folder: Path) -> Case:
    """Originals and retrained models of a forget set, trained or loaded.

    Args:
        config: Of the experiment.
        clean: The data; a forget set of mislabelled samples changes labels in a copy.
        settings: The forget set.
        folder: Of the experiment.
    """
    template = untrained(config, clean, 0)

    def members_of(task: TrainingTask) -> Members:
        return train_members(
            partial(train_one, config, task.data, task.rows),
            task.seeds,
            template=template,
            folder=task.folder,
            fingerprint=task.fingerprint(config),
            jobs=config.jobs,
            progress=config.progress,
            description=task.title,
        )

    def memorised() -> forget_sets.Scores:
        members = members_of(subsets_task(clean, folder))
        return forget_sets.memorisation(members.models, members.seeds, clean)

    forget = forget_sets.choose(settings, clean, memorised)
    place = files.ensure_folder(folder / settings.slug)
    tasks = case_tasks(config, clean, settings, forget, folder)
    originals, retrained = (members_of(task) for task in tasks)
    data = tasks[0].data
    named = parts(data, forget)
    first = Reference(originals.models[0], retrained.models, named, config.likelihood)
    references = first, *(first.of(model) for model in originals.models[1:])
    mark = tasks[1].fingerprint(config)
    return Case(settings, data, forget, place, references, originals, retrained, mark)


def case_tasks(
    config: RunConfig, clean: DataBundle, settings: ForgetSet, forget: Indices, folder: Path
) -> tuple[TrainingTask, TrainingTask]:
    """The originals and the retrained models of a forget set."""
    data = forget_sets.corrupted(clean, settings, forget)
    place = folder / settings.slug
    free = (seed for seed in itertools.count(RETRAINED_SEEDS) if seed not in config.seeds)
    seeds = list(itertools.islice(free, settings.retrained or config.retrained))
    # all forget sets share their originals, unless labels are changed
    shared = folder if data is clean else place
    retain, title = retained(data, forget), f"retrain without {settings.name}"
    return (
        TrainingTask(data, None, config.seeds, shared / "original", "train"),
        TrainingTask(data, retain, seeds, place / "retrained", title),
    )


def subsets_task(clean: DataBundle, folder: Path) -> TrainingTask:
    """The models that tell which samples are memorised."""
    seeds = list(range(forget_sets.SUBSETS))
    return TrainingTask(clean, "subset", seeds, folder / "subsets", "train on subsets")


def train_one(config: RunConfig, data: DataBundle, rows: Rows, seed: int) -> nn.Module:
    """The model of one seed, trained on all or some of the data."""
    indices = forget_sets.subset(len(data.train), seed) if isinstance(rows, str) else rows
    return trained(config, data, untrained(config, data, seed), indices, seed)


def trained(
    config: RunConfig, data: DataBundle, model: nn.Module, rows: Indices | None, seed: int
) -> nn.Module:
    """A copy of the model, trained as the experiment trains; `None` stands for all samples."""
    kind, settings = config.likelihood, config.training
    return train(
        model, data.train, settings, seed=seed, indices=rows, likelihood=kind, progress=False
    )


def untrained(config: RunConfig, data: DataBundle, seed: int) -> nn.Module:
    """The model of one seed before training."""
    first, targets = data.train.tensors[0], data.train.tensors[-1]
    outputs = len(data.classes) or targets.shape[-1]
    shape = tuple(first.shape[1:])
    return build_model(config.model.name, shape, outputs, seed=seed, **config.model.options)


def basis(config: RunConfig, data: DataBundle) -> tuple[object, ...]:
    """What the weights of an experiment's models depend on, wherever the data came from, beside
    seed and samples."""
    template: list[object] = []
    if config.model.name not in MODELS:
        model = untrained(config, data, 0)
        template = [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)), model.state_dict()]
        # where its code cannot be told, its layers and first weights stand for it
        with suppress(StorageError):
            template.append(code_fingerprint(model))
    ours = versions()["fisher_forget"]
    return ours, config.model, config.training, config.likelihood, data.train.tensors, *template


def retained(data: DataBundle, forget: Indices) -> Indices:
    """The training samples beside the forgotten ones."""
    return np.setdiff1d(np.arange(len(data.train)), forget)


def parts(data: DataBundle, forget: Indices) -> dict[str, TensorDataset]:
    """Forget, retain and test data; test data of the classes that are left, where a whole class is
    forgotten; test data that the fault concerns, where there is one."""
    retain = retained(data, forget)
    named = {"forget": take(data.train, forget), "retain": take(data.train, retain)}
    named["test"] = data.test
    if data.classes:
        left = torch.isin(data.test.tensors[-1], data.train.tensors[-1][retain])
        if not bool(left.all()):
            named["test, retained classes"] = take(data.test, left)
    if data.injected is not None:
        named["test, faulty"] = data.injected.affected(data.test)
    return named


def evaluate_case(
    config: RunConfig, case: Case, methods: Mapping[str, Sequence[nn.Module]]
) -> Evaluation:
    """Every metric of what methods made of the originals of a case, beside its retrained models."""
    mark = files.fingerprint(*basis(config, case.data), case.forget)
    ensemble = RetrainedEnsemble(case.originals, case.retrained, case.forget, case.folder, mark)
    teacher = untrained(config, case.data, seed=case.retrained.seeds[-1] + 1)
    data, kind = parts(case.data, case.forget), config.likelihood
    return evaluate(methods, ensemble, data, likelihood=kind, split=case.split, teacher=teacher)
