"""`fisher-forget compare`: methods x seeds x forget sets on one recipe, each tuned by the same
budget, in one table."""

from __future__ import annotations

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fisher_forget._util import files
from fisher_forget._util.progress import bar
from fisher_forget.baselines import METHODS
from fisher_forget.baselines.base import Method
from fisher_forget.baselines.protocol import Unlearned, Unlearner, settings_of
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices, Split, resolve_split
from fisher_forget.errors import ConfigError, FisherForgetError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.experiments import forget_sets, tuning
from fisher_forget.experiments import run as recipe
from fisher_forget.experiments.config import CompareConfig, to_plain
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.import_path import find, is_own
from fisher_forget.experiments.run import Case
from fisher_forget.experiments.training import train
from fisher_forget.report.pages import comparison
from fisher_forget.unlearn.result import versions

K = TypeVar("K")
T = TypeVar("T")
FRESH = 50_000  # added to seeds of fresh weights: none is an original's or a retrained model's


@dataclass(frozen=True)
class Trial:
    """One setting, judged on validation data.

    Attributes:
        settings: Other than the defaults.
        damage: See `tuning`.
        memory: See `tuning`.
        error: Why it gave no model; empty where it did.
    """

    settings: dict[str, Any]
    damage: float = math.nan
    memory: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a method made of every original model of one forget set.

    Attributes:
        method: Its name.
        settings: Those chosen, other than the defaults.
        trials: All that were tried, on the first original.
        seconds: Wall time of each original's scrubbing, at one thread where several methods run at
            once.
        passes: Sample gradients over retained samples; NaN where a method does not know.
        refused: Why there is no model; empty where there are.
    """

    method: str
    settings: dict[str, Any]
    trials: tuple[Trial, ...]
    seconds: tuple[float, ...] = ()
    passes: tuple[float, ...] = ()
    refused: str = ""


def compare(config: CompareConfig) -> Path:
    """Carry out a comparison; what is finished is stored, so a killed one goes on where it was.

    Returns:
        The page's path; beside it lie config.yaml, comparison.json, comparison.md, and for every
        forget set a table as Markdown, all scores and the scrubbed models.

    Raises:
        ConfigError, DataError, StorageError: Before anything is trained.
    """
    chosen = [_method(name) for name in config.methods or METHODS]
    methods = {method.name: method for method in chosen}
    _check_options(config.options, METHODS | methods)
    folder = files.ensure_folder(Path(config.out) / config.name)
    data, validation = _held_out(config.data.load(), config.validation)
    for settings in config.forget_sets:
        forget_sets.check(settings, data)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    cases = [recipe.prepare_case(config, data, settings, folder) for settings in config.forget_sets]
    work = [(index, name) for name in methods for index in range(len(cases))]
    units = (partial(_unit, config, cases[i], methods[name], validation) for i, name in work)
    done: dict[tuple[int, str], Outcome] = {}
    for key, outcome in bar(_all(work, units, config.jobs), len(work), "compare", config.progress):
        done[key] = outcome
    outcomes = [[done[index, name] for name in methods] for index in range(len(cases))]
    scored = (partial(_summary, config, case, methods, outcomes[i]) for i, case in enumerate(cases))
    summaries = dict(
        bar(_all(range(len(cases)), scored, config.jobs), len(cases), "evaluate", config.progress)
    )
    found = {case.settings.name: summaries[i] for i, case in enumerate(cases)}
    report = {
        "schema": 1,
        "name": config.name,
        "command": f"fisher-forget compare {folder / 'config.yaml'}",
        "config": to_plain(config),
        "environment": versions() | {"processor": recipe.processor()},
        "cases": found,
    }
    files.write_json(folder / "comparison.json", report)
    (folder / "comparison.md").write_text(comparison.overview_markdown(report) + "\n")
    return comparison.write_page(report, folder)


def _method(name: str) -> type[Unlearner]:
    if name not in METHODS and not is_own(name):
        near = difflib.get_close_matches(name, METHODS, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else "Correct the name."
        raise ConfigError(
            f"the method {name!r}", f"one of {sorted(METHODS)}, or package.module:Class", fix
        )
    found: type[Unlearner] = METHODS[name] if name in METHODS else find(name, "a method")
    return found


def _check_options(
    options: Mapping[str, Mapping[str, Any]], methods: Mapping[str, type[Unlearner]]
) -> None:
    """Refuse options that a method does not have or take, before anything is trained."""
    for name, values in options.items():
        if name not in methods:
            raise ConfigError(
                f"options of {name!r}", f"one of {sorted(methods)}", "Correct the name."
            )
        known = list(settings_of(methods[name]))
        if unknown := sorted(values.keys() - set(known)):
            raise ConfigError(
                f"the options {unknown} of {name!r}", f"some of {known}", "Correct `options`."
            )
        try:
            methods[name](**values)
        except TypeError as error:
            expected, fix = "values of the documented types", "Correct `options`."
            raise ConfigError(f"options of {name!r}: {error}", expected, fix) from error


def _held_out(data: DataBundle, share: float) -> tuple[DataBundle, TensorDataset]:
    """The data with fewer test samples, and the validation samples that were taken from them."""
    order = np.random.default_rng(0).permutation(len(data.test))
    cut = round(share * len(order))
    return replace(data, test=take(data.test, np.sort(order[cut:]))), take(
        data.test, np.sort(order[:cut])
    )


def _all(keys: Sequence[K], units: Iterable[Callable[[], T]], jobs: int) -> Iterator[tuple[K, T]]:
    """What the units return, in the order in which they are finished."""
    if jobs == 1:
        yield from ((key, unit()) for key, unit in zip(keys, units, strict=True))
        return
    workers = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    yield from workers(
        joblib.delayed(_alone)(key, unit) for key, unit in zip(keys, units, strict=True)
    )


def _alone(key: K, unit: Callable[[], T]) -> tuple[K, T]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FisherForgetWarning
        )  # what a method has to say of a model is in its scores
        return key, unit()


def _unit(
    config: CompareConfig, case: Case, method: type[Unlearner], validation: TensorDataset
) -> Outcome:
    """One method on one forget set: choose its settings on the first original, scrub them all."""
    place = files.ensure_folder(_place(case, method))
    mark = _fingerprint(config, case, method, validation)
    if (stored := _stored(place, mark, config)) is not None:
        return stored
    split = resolve_split(case.data.train, case.forget)
    judge = tuning.Judge.of(
        case.originals.models[0], case.data, case.forget, case.settings, validation
    )
    trials: list[Trial] = []
    prepared: dict[int, tuple[Method, nn.Module]] = {}
    best: tuple[float, dict[str, Any], Unlearned] | None = None
    spent = 0.0
    for settings in tuning.settings(method, config.trials, config.options.get(method.name, {})):
        if spent > config.tuning * config.training.epochs:
            break
        try:
            made = _made(config, case, method, settings, 0, split, prepared)
            judged = judge(made.model)
        except FisherForgetError as error:
            trials.append(Trial(settings, error=str(error)))
            continue
        spent += made.passes if math.isfinite(made.passes) else 0.0
        trials.append(Trial(settings, judged.damage, judged.memory))
        if best is None or judged.total < best[0]:
            best = judged.total, settings, made
    if best is None:
        return _store(place, mark, Outcome(method.name, {}, tuple(trials), refused=trials[0].error))
    _, settings, first = best
    try:
        others = [
            _made(config, case, method, settings, i, split, prepared)
            for i in range(1, len(config.seeds))
        ]
    except FisherForgetError as error:
        return _store(
            place, mark, Outcome(method.name, settings, tuple(trials), refused=str(error))
        )
    every = [first, *others]
    for seed, one in zip(config.seeds, every, strict=True):
        files.save_model(place / f"seed-{seed}.safetensors", one.model, {"fingerprint": mark})
    seconds, passes = tuple(one.seconds for one in every), tuple(one.passes for one in every)
    return _store(place, mark, Outcome(method.name, settings, tuple(trials), seconds, passes))


def _made(
    config: CompareConfig,
    case: Case,
    method: type[Unlearner],
    settings: Mapping[str, Any],
    index: int,
    split: Split,
    prepared: dict[int, tuple[Method, nn.Module]],
) -> Unlearned:
    """What a method makes of one original; `prepared` keeps what it does once for all settings."""
    original = copy.deepcopy(case.originals.models[index])  # a method of the user's may forget to
    chosen = configured(config, case, method, settings, config.seeds[index])
    if isinstance(chosen, Method):
        if index not in prepared:
            prepared[index] = chosen.prepare(original, split)
        ready, start = prepared[index]
        tried = {name: getattr(chosen, name) for name in chosen.grid}
        chosen, original = replace(ready, **tried), copy.deepcopy(start)
    return chosen.unlearn(original, split)


def configured(
    config: CompareConfig,
    case: Case,
    method: type[Unlearner],
    settings: Mapping[str, Any],
    seed: int,
) -> Unlearner:
    """A method as the recipe would set it up.

    A field of one of these names gets what the recipe knows, unless it is in the method's grid:
    `likelihood`, `weight_decay` and `seed`; `train` and `init`, which train and build as the recipe
    does; `initial`, the original before its training; `training`, how it is trained.
    """
    data, training = case.data, config.training

    def untrained() -> nn.Module:
        return recipe.untrained(config, data, FRESH + torch.initial_seed() % FRESH)

    def fitted(model: nn.Module, _data: Dataset[Any], rows: Indices, seed: int) -> nn.Module:
        return train(
            model,
            data.train,
            training,
            seed=seed,
            indices=rows,
            likelihood=config.likelihood,
            progress=False,
        )

    known: dict[str, Callable[[], Any]] = {
        "likelihood": lambda: config.likelihood,
        "weight_decay": lambda: training.weight_decay,
        "seed": lambda: seed,
        "train": lambda: fitted,
        "init": lambda: untrained,
        "initial": lambda: recipe.untrained(config, data, seed),
        "training": lambda: training,
    }
    given = {
        name: known[name]()
        for name in settings_of(method)
        if name in known and name not in method.grid
    }
    return method(**given | config.options.get(method.name, {}) | dict(settings))


def _evaluated(
    config: CompareConfig,
    case: Case,
    methods: Mapping[str, type[Unlearner]],
    outcomes: list[Outcome],
) -> Evaluation:
    made: dict[str, list[nn.Module]] = {}
    for (name, method), outcome in zip(methods.items(), outcomes, strict=True):
        if outcome.refused:
            continue
        paths = [_place(case, method) / f"seed-{seed}.safetensors" for seed in config.seeds]
        shapes = case.originals.models[0]
        chosen = configured(config, case, method, outcome.settings, config.seeds[0])
        if isinstance(chosen, Method):  # it may return another architecture
            shapes = chosen.template(shapes)
        made[name] = [files.load_model(path, shapes) for path in paths]
    return recipe.evaluate_case(config, case, made)


def _summary(
    config: CompareConfig,
    case: Case,
    methods: Mapping[str, type[Unlearner]],
    outcomes: list[Outcome],
) -> dict[str, Any]:
    table = _evaluated(config, case, methods, outcomes)
    rows = comparison.rows(
        table, {o.method: o.seconds for o in outcomes}, float(np.mean(case.retrained.seconds))
    )
    (case.folder / "comparison.md").write_text(comparison.to_markdown(rows) + "\n")
    (case.folder / "evaluation.md").write_text(table.to_markdown() + "\n")
    return {
        "forgotten": len(case.forget),
        "retrain_seconds": float(np.mean(case.retrained.seconds)),
        "rows": rows,
        "outcomes": [asdict(o) for o in outcomes],
        "evaluation": table.to_dict(),
    }


def _place(case: Case, method: type[Unlearner]) -> Path:
    return case.folder / "methods" / method.name.replace("/", "-")


def _fingerprint(
    config: CompareConfig, case: Case, method: type[Unlearner], validation: TensorDataset
) -> str:
    where = f"{method.__module__}.{method.__qualname__}"
    defaults = {name: repr(default) for name, default in settings_of(method).items()}
    return files.fingerprint(
        versions(),
        *recipe.basis(config, case.data),
        case.forget,
        where,
        defaults,
        repr(method.grid),
        config.options.get(method.name, {}),
        config.trials,
        config.tuning,
        config.seeds,
        validation.tensors,
    )


def _store(place: Path, mark: str, outcome: Outcome) -> Outcome:
    files.write_json(place / "outcome.json", {"fingerprint": mark, "outcome": asdict(outcome)})
    return outcome


def _stored(place: Path, mark: str, config: CompareConfig) -> Outcome | None:
    """What an earlier run has finished with the same settings."""
    try:
        content = files.read_json(place / "outcome.json")
    except StorageError:
        return None
    kept = content["outcome"]
    complete = kept["refused"] or all(
        (place / f"seed-{seed}.safetensors").exists() for seed in config.seeds
    )
    if content["fingerprint"] != mark or not complete:
        return None
    trials = tuple(
        Trial(t["settings"], _number(t["damage"]), _number(t["memory"]), t["error"])
        for t in kept["trials"]
    )
    seconds, passes = (tuple(map(_number, kept[name])) for name in ("seconds", "passes"))
    return Outcome(kept["method"], kept["settings"], trials, seconds, passes, kept["refused"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value
