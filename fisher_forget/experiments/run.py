"""A run: train, forget, retrain, compare, report. What is finished is stored, so a killed run goes
on where it was."""

from __future__ import annotations

import itertools
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util import files
from fisher_forget.baselines.golatkar import reference_code_forget
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.errors import NumericalError
from fisher_forget.evaluate.closeness import Closeness, Reference, summarise
from fisher_forget.evaluate.ensemble import Members, RetrainedEnsemble, train_members
from fisher_forget.evaluate.evaluation import Evaluation, evaluate
from fisher_forget.experiments import forget_sets
from fisher_forget.experiments.config import ForgetSet, RunConfig, SweepConfig, to_plain
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.import_path import is_own
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import train
from fisher_forget.report import plots, tables
from fisher_forget.report.pages import html
from fisher_forget.sweep import SweepTable, sweep
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.result import ForgetResult, versions

Rows = Indices | Literal["subset"] | None  # to train on; of every seed its own subset; all

RETRAINED_SEEDS = 1000  # seeds of the retrained models start here: none is an original's
# of the reference code, whose default is 3e-6: from noise that does nothing to noise that destroys
# the model
ALPHAS = tuple(np.logspace(-9, -4, 12).tolist())
SWEEP = "sweep.parquet"  # in the folder of a forget set
SCRUBBED, REFERENCE = "scrubbed", "reference-code"  # files of models in the folder of a seed
SCORE_LOSS = 0.01  # of retained training accuracy, that the reference code may cost


@dataclass(frozen=True)
class Case:
    """One forget set of a run: the models with and without it.

    Attributes:
        settings: Which samples.
        data: As the originals were trained on.
        forget: Indices of the samples, sorted.
        folder: Of its results.
        references: One a seed: the original of that seed, held against the shared retrained models.
        originals: One a seed.
        retrained: Trained without the forget set.
    """

    settings: ForgetSet
    data: DataBundle
    forget: Indices
    folder: Path
    references: tuple[Reference, ...]
    originals: Members
    retrained: Members


def run(config: RunConfig) -> Path:
    """Carry out a run, and a sweep where the configuration is a `SweepConfig`.

    Returns:
        The report's path; beside it lie config.yaml, metrics.json, the plots, the weights, and for
        a sweep its table.

    Raises:
        ConfigError, DataError, StorageError: Before anything is trained.
    """
    folder = files.ensure_folder(Path(config.out) / config.name)
    data = config.data.load()
    for settings in config.forget_sets:  # all are checked before any work
        forget_sets.check(settings, data)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    figures: dict[str, Path] = {}
    cases = []
    for settings in config.forget_sets:
        case = prepare_case(config, data, settings, folder)
        results, evaluations = zip(
            *(_forget(config, case, i) for i in range(len(config.seeds))), strict=True
        )
        compared = range(len(config.seeds)) if config.reference_variant else ()
        rivals = [_reference_code(config, case, i) for i in compared]
        described = _describe(config, case, results, evaluations, rivals)
        cases.append(described)
        figures[f"{settings.name}: KL"] = _save(plots.plot_parts(described), case.folder / "kl")
        figures[f"{settings.name}: scores"] = _save(
            plots.plot_scores(described), case.folder / "scores"
        )
        if isinstance(config, SweepConfig):
            table = _sweep(config, case)
            figures[f"{settings.name}: trade-off"] = _save(
                plots.plot_tradeoff(table), case.folder / "tradeoff"
            )
            figures[f"{settings.name}: noise"] = _save(
                plots.plot_noise(table), case.folder / "noise"
            )
    metrics = {
        "schema": 1,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"fisher-forget {'sweep' if isinstance(config, SweepConfig) else 'run'} {folder / 'config.yaml'}",
        "config": to_plain(config),
        "environment": versions() | {"threads": torch.get_num_threads(), "processor": processor()},
        "cases": cases,
    }
    files.write_json(folder / "metrics.json", metrics)
    print(tables.console(metrics))
    return html.write_report(metrics, figures, folder)


def train_one(config: RunConfig, data: DataBundle, rows: Rows, seed: int) -> nn.Module:
    """The model of one seed, trained on all or some of the data."""
    indices = forget_sets.subset(len(data.train), seed) if isinstance(rows, str) else rows
    return train(
        untrained(config, data, seed),
        data.train,
        config.training,
        seed=seed,
        indices=indices,
        likelihood=config.likelihood,
        progress=False,
    )


@dataclass(frozen=True)
class Task:
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


def basis(config: RunConfig, data: DataBundle) -> tuple[object, ...]:
    """What the weights of a run's models depend on, wherever the data came from, beside seed and
    samples."""
    own: list[object] = []
    if is_own(
        config.model.name
    ):  # its code is not ours to know: at least its layers and first weights
        template = untrained(config, data, 0)
        own = [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(template)), template.state_dict()]
    return config.model, config.training, config.likelihood, data.train.tensors, *own


def subsets_task(config: RunConfig, clean: DataBundle, folder: Path) -> Task:
    """The models that tell which samples are memorised."""
    return Task(
        clean, "subset", list(range(forget_sets.SUBSETS)), folder / "subsets", "train on subsets"
    )


def case_tasks(
    config: RunConfig, clean: DataBundle, settings: ForgetSet, chosen: Indices, folder: Path
) -> tuple[Task, Task]:
    """The originals and the retrained models of a forget set."""
    data = forget_sets.corrupted(clean, settings, chosen)
    retain = np.setdiff1d(np.arange(len(data.train)), chosen)
    place = folder / settings.slug
    free = (seed for seed in itertools.count(RETRAINED_SEEDS) if seed not in config.seeds)
    members = list(itertools.islice(free, settings.retrained or config.retrained))
    shared = folder if data is clean else place
    originals = Task(data, None, config.seeds, shared / "original", "train")
    return originals, Task(
        data, retain, members, place / "retrained", f"retrain without {settings.name}"
    )


def prepare_case(config: RunConfig, clean: DataBundle, settings: ForgetSet, folder: Path) -> Case:
    """Originals and retrained models of a forget set, trained or loaded."""
    template = untrained(config, clean, 0)

    def trained(task: Task) -> Members:
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
        members = trained(subsets_task(config, clean, folder))
        return forget_sets.memorisation(members.models, members.seeds, clean)

    chosen = forget_sets.choose(settings, clean, memorised)
    place = files.ensure_folder(folder / settings.slug)
    tasks = case_tasks(config, clean, settings, chosen, folder)
    originals, retrained = (trained(task) for task in tasks)
    data = tasks[0].data
    named = parts(data, chosen, np.setdiff1d(np.arange(len(data.train)), chosen))
    first = Reference(originals.models[0], retrained.models, named, config.likelihood)
    references = first, *(first.of(model) for model in originals.models[1:])
    return Case(settings, data, chosen, place, references, originals, retrained)


def untrained(config: RunConfig, data: DataBundle, seed: int) -> nn.Module:
    """The model of one seed before training."""
    first, targets = data.train.tensors[0], data.train.tensors[-1]
    outputs = len(data.classes) or targets.shape[-1]
    return build_model(
        config.model.name, tuple(first.shape[1:]), outputs, seed=seed, **config.model.options
    )


def parts(data: DataBundle, chosen: Indices, retain: Indices) -> dict[str, TensorDataset]:
    """Forget, retain and test data; test data of the classes that are left, where a whole class is
    forgotten."""
    named = {
        "forget": take(data.train, chosen),
        "retain": take(data.train, retain),
        "test": data.test,
    }
    if data.classes:
        left = torch.isin(data.test.tensors[-1], data.train.tensors[-1][retain])
        if not bool(left.all()):
            named["test, retained classes"] = take(data.test, left)
    return named


def evaluate_case(
    config: RunConfig, case: Case, methods: Mapping[str, Sequence[nn.Module]]
) -> Evaluation:
    """Every metric of what methods made of the originals of a case, beside its retrained models."""
    mark = files.fingerprint(*basis(config, case.data), case.forget)
    retain = np.setdiff1d(np.arange(len(case.data.train)), case.forget)
    return evaluate(
        methods,
        RetrainedEnsemble(case.originals, case.retrained, case.forget, case.folder, mark),
        parts(case.data, case.forget, retain),
        likelihood=config.likelihood,
        split=resolve_split(case.data.train, case.forget),
        teacher=untrained(config, case.data, seed=case.retrained.seeds[-1] + 1),
    )


def _sweep(config: SweepConfig, case: Case) -> SweepTable:
    """A sweep from the first original model; its table is written as sweep.parquet and, to be read,
    as sweep.csv."""
    table = sweep(
        case.originals.models[0],
        case.data.train,
        case.forget,
        config.axes,
        reference=case.references[0],
        ruin=config.ruin,
        file=case.folder / SWEEP,
        jobs=config.jobs,
        progress=config.progress,
        **{
            name: value
            for name, value in vars(config.forget_options(config.seeds[0])).items()
            if name != "likelihood"
        },
    )
    table.to_pandas().to_csv((case.folder / SWEEP).with_suffix(".csv"), index=False)
    return table


def _forget(config: RunConfig, case: Case, index: int) -> tuple[ForgetResult, Closeness]:
    seed = config.seeds[index]
    result = forget(
        case.originals.models[index],
        case.data.train,
        case.forget,
        config.forget_options(seed),
        progress=config.progress,
    )
    evaluation = case.references[index].closeness(result.model)
    place = files.ensure_folder(case.folder / f"seed-{seed}")
    files.save_model(
        place / f"{SCRUBBED}.safetensors",
        result.model,
        {"seed": str(seed), "case": case.settings.name},
    )
    (place / "result.txt").write_text(f"{result}\n")
    return result, evaluation


def _reference_code(config: RunConfig, case: Case, index: int) -> tuple[float, Closeness]:
    """The public code of Golatkar et al. 2020 on one original model: (alpha, scores) at its
    `best_scale` of twelve."""
    variant = reference_code_forget(
        case.originals.models[index],
        case.data.train,
        case.forget,
        likelihood=config.likelihood,
        seed=config.seeds[index],
        progress=config.progress,
    )
    scored = []
    for alpha in ALPHAS:
        try:
            scored.append((alpha, case.references[index].closeness(variant.model(alpha))))
        except NumericalError:  # so destroyed that its outputs overflow
            continue
    alpha, found = best_scale(scored)
    place = files.ensure_folder(case.folder / f"seed-{config.seeds[index]}")
    files.save_model(
        place / f"{REFERENCE}.safetensors", variant.model(alpha), {"alpha": repr(alpha)}
    )
    return alpha, found


def best_scale(scored: Sequence[tuple[float, Closeness]]) -> tuple[float, Closeness]:
    """The scale with the smallest KL on the forget set among those that cost at most a point of
    retained accuracy.

    Where all of them cost more, the one that costs least. The choice looks at the retrained models,
    which no method
    may: it is made in favour of the method that is compared with, whose scale nothing else
    determines.

    Args:
        scored: (scale, scores) pairs, with the parts "forget" and "retain".
    """

    def loss(pair: tuple[float, Closeness]) -> float:
        retain = pair[1].parts["retain"]
        return retain.score_original - retain.score_scrubbed

    kept = [pair for pair in scored if loss(pair) <= SCORE_LOSS + 1e-9]  # 1 - 0.99 rounds up
    if not kept:
        return min(scored, key=loss)
    return min(kept, key=lambda pair: pair[1].parts["forget"].kl_scrubbed)


def _describe(
    config: RunConfig,
    case: Case,
    results: tuple[ForgetResult, ...],
    evaluations: tuple[Closeness, ...],
    rivals: Sequence[tuple[float, Closeness]],
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": case.settings.name,
        "forgotten": len(case.forget),
        "retained": len(results[0].split.retain),
        "members": len(case.retrained.models),
        **evaluations[0].score.stored(),
        "seconds": {
            "train_original": float(np.mean(case.originals.seconds)),
            "retrain_one": float(np.mean(case.retrained.seconds)),
            "forget": float(np.mean([sum(r.seconds.values()) for r in results])),
        },
        "runs": [
            {
                "seed": seed,
                "folder": f"{case.folder.name}/seed-{seed}",
                "forget": result.summary(),
                "evaluation": evaluation.to_dict(),
            }
            for seed, result, evaluation in zip(config.seeds, results, evaluations, strict=True)
        ],
        "summary": summarise(evaluations),
    }
    if rivals:
        described["reference_code"] = summarise([evaluation for _, evaluation in rivals])
        for run, (alpha, evaluation) in zip(described["runs"], rivals, strict=True):
            run["reference_code"] = {"alpha": alpha, "evaluation": evaluation.to_dict()}
    return described


def redraw(config: RunConfig) -> list[Path]:
    """Draw the plots of a finished run again, from its stored numbers.

    Raises:
        StorageError: If the run has not finished.
    """
    folder = Path(config.out) / config.name
    metrics = files.read_json(folder / "metrics.json")
    drawn = []
    for case in metrics["cases"]:
        place = folder / Path(case["runs"][0]["folder"]).parent
        drawn += [
            _save(plots.plot_parts(case), place / "kl"),
            _save(plots.plot_scores(case), place / "scores"),
        ]
        if (place / SWEEP).exists():
            table = SweepTable.load(place / SWEEP)
            drawn += [
                _save(plots.plot_tradeoff(table), place / "tradeoff"),
                _save(plots.plot_noise(table), place / "noise"),
            ]
    return drawn


def _save(ax: Axes, stem: Path) -> Path:
    _, svg = plots.save_figure(ax.figure, stem)
    plt.close("all")
    return svg


def processor() -> str:
    """The machine, in a few words."""
    return f"{platform.machine()}, {os.cpu_count()} cores" + (
        f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    )
