"""A run: train, forget, retrain, compare, report. What is finished is stored, so a killed run goes
on where it was."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from fisher_forget._util import files
from fisher_forget._util.isolation import seeded
from fisher_forget.errors import StorageError
from fisher_forget.evaluate.closeness import Closeness, summarise
from fisher_forget.experiments import forget_sets, requests
from fisher_forget.experiments.cases import Case, prepare_case
from fisher_forget.experiments.config import RunConfig, SweepConfig, to_plain
from fisher_forget.experiments.config_file import write_config
from fisher_forget.experiments.run_folder import inside, opened, run_folder
from fisher_forget.ledger.evidence import model_fingerprint
from fisher_forget.report import plots, tables
from fisher_forget.report.pages import html
from fisher_forget.sweep import SweepTable, sweep
from fisher_forget.unlearn.forget import forget
from fisher_forget.unlearn.result import ForgetResult, versions

SWEEP = "sweep.parquet"  # in the folder of a forget set
SCRUBBED = "scrubbed"  # file of a model in the folder of a seed
AUDIT = "audit.json"  # in the folder of a run that was audited
Figures = dict[str, Path]  # title -> picture


def run(config: RunConfig) -> Path:
    """Carry out a run, and a sweep where the configuration is a `SweepConfig`.

    Returns:
        The report's path; beside it lie config.yaml, metrics.json, the plots, the weights, and for
        a sweep its table.

    Raises:
        ConfigError, DataError, StorageError: Before anything is trained.
    """
    with opened(config) as folder:
        return _run(config, folder)


def _run(config: RunConfig, folder: Path) -> Path:
    data = config.data.load()
    chosen = {s.name: forget_sets.check(s, data) for s in config.forget_sets}  # before any work
    write_config(folder / "config.yaml", config)
    asked = {s.name: requests.ask(folder, s, chosen[s.name]) for s in config.forget_sets}
    figures: Figures = {}
    entries = []
    generator = None if config.noise_seed is None else seeded(config.noise_seed)
    for settings in config.forget_sets:
        case = prepare_case(config, data, settings, folder)
        scrubbed = [_scrub(config, case, i, generator) for i in range(len(config.seeds))]
        if name := asked[settings.name]:
            requests.done(folder, name, case, scrubbed)
        entries.append(_entry(config, case, scrubbed))
        table = _sweep(config, case) if isinstance(config, SweepConfig) else None
        figures |= _draw(entries[-1], case.folder, table)
    command = "sweep" if isinstance(config, SweepConfig) else "run"
    metrics = {
        "schema": 2,
        "name": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"fisher-forget {command} {folder / 'config.yaml'}",
        "config": to_plain(config),
        "environment": versions() | {"threads": torch.get_num_threads(), "processor": processor()},
        "cases": entries,
    }
    files.write_json(folder / "metrics.json", metrics)
    print(tables.console(metrics))
    return html.write_report(metrics, figures, folder, _audits(folder, metrics))


def write_again(config: RunConfig) -> Path:
    """Write the report of a finished run again, from its stored numbers.

    Raises:
        StorageError: If the run has not finished.
    """
    folder, figures = run_folder(config, trains=False), _redrawn(config)
    metrics = files.read_json(folder / "metrics.json")
    return html.write_report(metrics, figures, folder, _audits(folder, metrics))


def _audits(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """What audits of a run found, by forget set, of the models that it has now."""
    if not (folder / AUDIT).exists():
        return {}
    stored = files.read_json(folder / AUDIT)
    now = {c["name"]: [run["weights"] for run in c["runs"]] for c in metrics["cases"]}
    return {name: found for name, found in stored.items() if now.get(name) == found["models"]}


def redraw(config: RunConfig) -> list[Path]:
    """Draw the plots of a finished run again, from its stored numbers.

    Raises:
        StorageError: If the run has not finished.
    """
    return list(_redrawn(config).values())


def _redrawn(config: RunConfig) -> Figures:
    folder = run_folder(config, trains=False)
    drawn: Figures = {}
    try:
        entries = files.read_json(folder / "metrics.json")["cases"]
        places = [inside(folder, folder / entry["runs"][0]["folder"]).parent for entry in entries]
    except (KeyError, IndexError, TypeError) as error:
        got = f"{folder / 'metrics.json'} without cases, runs and their folders"
        raise StorageError(got, "what a finished run wrote", "Run it again.") from error
    for entry, place in zip(entries, places, strict=True):
        table = SweepTable.load(place / SWEEP) if (place / SWEEP).exists() else None
        drawn |= _draw(entry, place, table)
    return drawn


def _scrub(
    config: RunConfig, case: Case, index: int, generator: torch.Generator | None
) -> tuple[ForgetResult, Closeness]:
    """Forget by one original model; the scrubbed one is stored."""
    seed, original = config.seeds[index], case.originals.models[index]
    options = config.forget_options(seed)
    call: Any = {"generator": generator, "held_out": case.data.test, "progress": config.progress}
    result = forget(original, case.data.train, case.forget, options, **call)
    closeness = case.references[index].closeness(result.model)
    place = files.ensure_folder(case.folder / f"seed-{seed}")
    about = {"seed": str(seed), "case": case.settings.name}
    files.save_model(place / f"{SCRUBBED}.safetensors", result.model, about)
    files.write_text(place / "result.txt", f"{result}\n")
    return result, closeness


def _sweep(config: SweepConfig, case: Case) -> SweepTable:
    """A sweep from the first original model; its table is written as sweep.parquet and, to be read,
    as sweep.csv."""
    options = config.forget_options(config.seeds[0])
    # of other methods, which read nothing off the model
    fixed: Any = {"weight_decay": config.training.weight_decay}
    table = sweep(
        case.originals.models[0],
        case.data.train,
        case.forget,
        config.axes,
        options,
        reference=case.references[0],
        seed=options.seed,
        **fixed,
        ruin=config.ruin,
        file=case.folder / SWEEP,
        jobs=config.jobs,
        progress=config.progress,
    )
    readable = table.to_pandas().to_csv(index=False)
    files.write_text((case.folder / SWEEP).with_suffix(".csv"), readable)
    return table


def _entry(
    config: RunConfig, case: Case, scrubbed: list[tuple[ForgetResult, Closeness]]
) -> dict[str, Any]:
    """The numbers of a forget set, as metrics.json has them."""
    results, closenesses = zip(*scrubbed, strict=True)
    runs = []
    for seed, result, closeness in zip(config.seeds, results, closenesses, strict=True):
        about = {"seed": seed, "folder": f"{case.folder.name}/seed-{seed}"}
        about["weights"] = model_fingerprint(result.model)
        numbers = {"forget": result.summary(), "evaluation": closeness.to_dict()}
        runs.append(about | numbers)
    seconds = {
        "train_original": case.originals.seconds,
        "retrain_one": case.retrained.seconds,
        "forget": [sum(result.seconds.values()) for result in results],
    }
    return {
        "name": case.settings.name,
        "forgotten": len(case.forget),
        "retained": len(results[0].split.retain),
        "fingerprint": case.fingerprint,
        "members": len(case.retrained.models),
        **closenesses[0].score.stored(),
        "seconds": {name: float(np.mean(times)) for name, times in seconds.items()},
        "runs": runs,
        "summary": summarise(closenesses),
    }


def _draw(entry: dict[str, Any], place: Path, table: SweepTable | None) -> Figures:
    """Draw the figures of a forget set into its folder, and those of its sweep if there is one."""
    figures = {"KL": ("kl", partial(plots.plot_parts, entry))}
    figures["scores"] = ("scores", partial(plots.plot_scores, entry))
    if table is not None:
        figures["trade-off"] = ("tradeoff", partial(plots.plot_tradeoff, table))
        figures["noise"] = ("noise", partial(plots.plot_noise, table))
    drawn = {}
    for title, (stem, plot) in figures.items():
        _, drawn[f"{entry['name']}: {title}"] = plots.save_figure(plot().figure, place / stem)
        plt.close("all")
    return drawn


def processor() -> str:
    """The machine, in a few words."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"
