"""`fisher-forget compare`: methods x seeds x forget sets on one data set and model, each tuned by
the same budget, in one table."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util import files
from fisher_forget._util.code import code_fingerprint
from fisher_forget._util.progress import bar
from fisher_forget._util.threads import torch_threads
from fisher_forget._util.workers import Tied
from fisher_forget.baselines.base import Method
from fisher_forget.baselines.protocol import Unlearned, Unlearner, settings_of
from fisher_forget.errors import FisherForgetError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.experiments import forget_sets, outcomes, tuning
from fisher_forget.experiments.cases import Case, basis, evaluate_case, prepare_case
from fisher_forget.experiments.config import CompareConfig, folder_name, to_plain
from fisher_forget.experiments.config_file import write_config
from fisher_forget.experiments.method_setup import Scrubber, chosen_methods, configured
from fisher_forget.experiments.outcomes import Outcome, Trial, model_path
from fisher_forget.experiments.run import processor
from fisher_forget.experiments.run_folder import opened
from fisher_forget.experiments.search import search
from fisher_forget.report import ranking
from fisher_forget.report.pages import comparison
from fisher_forget.unlearn.result import versions

K = TypeVar("K")
T = TypeVar("T")
MethodClass = type[Unlearner]
# what a method may raise with settings or data that do not suit it; anything else is a mistake
FAILURES = (FisherForgetError, ArithmeticError, RuntimeError, ValueError)


def compare(config: CompareConfig) -> Path:
    """Carry out a comparison; what is finished is stored, so a killed one goes on where it was.

    Returns:
        The page's path; beside it lie config.yaml, comparison.json, comparison.md, and for every
        forget set a table as Markdown, all scores and the scrubbed models.

    Raises:
        ConfigError, DataError, StorageError: Before anything is trained.
    """
    with opened(config) as folder:
        return _compare(config, folder)


def _compare(config: CompareConfig, folder: Path) -> Path:
    methods = chosen_methods(config)
    code = {name: _code(method) for name, method in methods.items()}
    data, validation = tuning.held_out(config.data.load(), config.validation)
    for settings in config.forget_sets:
        forget_sets.check(settings, data)
    write_config(folder / "config.yaml", config)
    cases = [prepare_case(config, data, settings, folder) for settings in config.forget_sets]
    # a method at a time over all forget sets: the costly ones come at their place in the table
    work = [(index, name) for name in methods for index in range(len(cases))]
    units = (
        partial(_outcome, config, cases[i], methods[name], code[name], validation)
        for i, name in work
    )
    done = dict(bar(_all(work, units, config.jobs), len(work), "compare", config.progress))
    made = [[done[index, name] for name in methods] for index in range(len(cases))]
    scored = (partial(_summary, config, case, methods, made[i]) for i, case in enumerate(cases))
    evaluated = _all(range(len(cases)), scored, config.jobs)
    summaries = dict(bar(evaluated, len(cases), "evaluate", config.progress))
    report = {
        "schema": 1,
        "name": config.name,
        "command": f"fisher-forget compare {folder / 'config.yaml'}",
        "config": to_plain(config),
        "environment": versions() | {"processor": processor()},
        "cases": {case.settings.name: summaries[i] for i, case in enumerate(cases)},
    }
    files.write_json(folder / "comparison.json", report)
    files.write_text(folder / "comparison.md", comparison.overview_markdown(report) + "\n")
    return comparison.write_page(report, folder)


def _all(keys: Sequence[K], units: Iterable[Callable[[], T]], jobs: int) -> Iterator[tuple[K, T]]:
    """What the units return, in the order in which they are finished."""
    tasks = zip(keys, units, strict=True)
    if jobs == 1:
        yield from ((key, unit()) for key, unit in tasks)
        return
    workers = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    yield from workers(joblib.delayed(Tied(_alone))(key, unit) for key, unit in tasks)


def _alone(key: K, unit: Callable[[], T]) -> tuple[K, T]:
    """A unit in a worker process."""
    with torch_threads(1), warnings.catch_warnings():
        # what a method has to say of a model is in its scores
        warnings.simplefilter("ignore", FisherForgetWarning)
        return key, unit()


def _outcome(
    config: CompareConfig, case: Case, method: MethodClass, does: str, validation: TensorDataset
) -> Outcome:
    """One method on one forget set: choose its settings on the first original, scrub them all.

    Settings that fail on another original give way to the next best.
    """
    place = files.ensure_folder(_place(case, method))
    mark = _fingerprint(config, case, method, does, validation)
    if (finished := outcomes.stored(place, mark, config.seeds)) is not None:
        return finished
    scrub, store = Scrubber(config, case, method), partial(outcomes.store, place, mark)
    judge = tuning.Judge.of(
        case.originals.models[0], case.data, case.forget, case.settings, validation
    )
    trials, made = _tuned(scrub, judge)
    for trial, first in made:
        scrubbed = [first]
        try:
            for index in range(1, len(config.seeds)):
                scrubbed.append(scrub(trial.settings, index))
                judge(scrubbed[-1].model)  # refuses outputs that are not finite
        except FAILURES as error:
            failed = replace(trial, error=f"original {len(scrubbed)}: {_why(error)}")
            trials = [failed if one is trial else one for one in trials]
            continue
        for seed, unlearned in zip(config.seeds, scrubbed, strict=True):
            files.save_model(model_path(place, seed), unlearned.model, {"fingerprint": mark})
        seconds = tuple(unlearned.seconds for unlearned in scrubbed)
        passes = tuple(unlearned.passes for unlearned in scrubbed)
        return store(Outcome(method.name, trial.settings, tuple(trials), seconds, passes))
    return store(Outcome(method.name, {}, tuple(trials), refused=trials[0].error))


def _tuned(
    scrub: Scrubber, judge: tuning.Judge
) -> tuple[list[Trial], list[tuple[Trial, Unlearned]]]:
    """Trials on the first original, and what those that worked made of it, the best first."""
    made: list[tuple[Trial, Unlearned]] = []

    def attempt(settings: dict[str, Any]) -> Trial:
        try:
            unlearned = scrub(settings, 0)
            judgement = judge(unlearned.model)
        except FAILURES as error:
            return Trial(settings, error=_why(error))
        made.append((Trial(settings, judgement.damage, judgement.memory), unlearned))
        return made[-1][0]

    config, method = scrub.config, scrub.method
    trials = search(method, config.trials, attempt, config.options.get(method.name, {}))
    return trials, sorted(made, key=lambda entry: entry[0].rank)  # equal ones in their order


def _why(error: Exception) -> str:
    return str(error) or repr(error)


def _summary(
    config: CompareConfig, case: Case, methods: Mapping[str, MethodClass], made: list[Outcome]
) -> dict[str, Any]:
    """The entry of a forget set in comparison.json; its tables are written."""
    table = _evaluated(config, case, methods, made)
    seconds = {outcome.method: outcome.seconds for outcome in made}
    retraining = float(np.mean(case.retrained.seconds))
    rows = ranking.rows(table, seconds, retraining)
    files.write_text(case.folder / "comparison.md", comparison.to_markdown(rows) + "\n")
    files.write_text(case.folder / "evaluation.md", table.to_markdown() + "\n")
    return {
        "forgotten": len(case.forget),
        "retrain_seconds": retraining,
        "rows": rows,
        "outcomes": [asdict(outcome) for outcome in made],
        "evaluation": table.to_dict(),
    }


def _evaluated(
    config: CompareConfig, case: Case, methods: Mapping[str, MethodClass], made: list[Outcome]
) -> Evaluation:
    """Every metric of the stored models of all methods that gave some."""
    models: dict[str, list[nn.Module]] = {}
    for (name, method), outcome in zip(methods.items(), made, strict=True):
        if outcome.refused:
            continue
        shapes = case.originals.models[0]
        unlearner = configured(config, case, method, outcome.settings, config.seeds[0])
        if isinstance(unlearner, Method):  # it may return another architecture
            shapes = unlearner.template(shapes)
        paths = [model_path(_place(case, method), seed) for seed in config.seeds]
        models[name] = [files.load_model(path, shapes) for path in paths]
    return evaluate_case(config, case, models)


def _place(case: Case, method: MethodClass) -> Path:
    return case.folder / "methods" / folder_name(method.name, keep="_.")


def _code(method: MethodClass) -> str:
    """What a method does, before anything that it counts or collects has changed."""
    try:
        return code_fingerprint(method)
    except StorageError:
        return secrets.token_hex()  # never the same: its outcomes are not used again


def _fingerprint(
    config: CompareConfig, case: Case, method: MethodClass, does: str, validation: TensorDataset
) -> str:
    """Of everything that an outcome depends on; `does` is what `_code` says of the method."""
    experiment = (versions(), *basis(config, case.data), case.forget)
    defaults = {name: repr(default) for name, default in settings_of(method).items()}
    code = (f"{method.__module__}.{method.__qualname__}", does, defaults, repr(method.grid))
    options = (config.options.get(method.name, {}), config.trials, config.seeds)
    return files.fingerprint(*experiment, *code, *options, validation.tensors)
