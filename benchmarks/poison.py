"""What is left of a poison of which only a part is known: five methods, three faults, three data
sets.

    python -m benchmarks.poison [digits] [mnist] [cifar10]

Every cell is stored in benchmarks/poison.json as soon as it is finished, so that a killed run goes
on where it was; the tables go to docs/how-to/poison.md. MNIST and CIFAR-10 are subsets, and the
networks small. Settings are chosen on a network of its own for each data set and fault, half of
whose fault is known, by what `fisher_forget.experiments.tuning` looks at: clean validation samples
and the known samples themselves.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.parts import asked_for, write_tables
from fisher_forget import (
    METHODS,
    FisherForgetError,
    TrainSettings,
    build_model,
    forget,
    load_dataset,
    resolve_split,
    suggest,
    train,
)
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.split import Indices
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.faults import Fault
from fisher_forget.experiments.outcomes import Trial
from fisher_forget.experiments.search import search
from fisher_forget.experiments.tuning import Judge, held_out
from fisher_forget.unlearn.result import versions

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER / "poison.json", FOLDER.parent / "docs" / "how-to" / "poison.md"
SEEDS, TUNED_ON = (3, 4, 5), 100
GAMMAS = (0.1, 0.2, 0.5, 0.8, 1.0)
TRIALS = 4
TUNED = ("ssd", "scrub", "finetune")  # the others need none
FOUND = " + found"
WHOLE = "retrained without all of it"
ORDER = (
    "other-label" + FOUND,
    "other-label",
    "fisher-forget" + FOUND,
    "fisher-forget",
    "ssd" + FOUND,
    "ssd",
    "scrub",
    "finetune",
    "retrain" + FOUND,
    "retrain",
)
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Data and network.

    Attributes:
        data: Name of the data set.
        train: Training samples, at most.
        test: Test samples, at most; half of them choose settings.
        width: Of the network.
        settings: Of its training.
        share: Of the data, that gets the trigger.
    """

    data: str
    train: int | None
    test: int | None
    width: int
    settings: TrainSettings
    share: float


def sgd(epochs: int) -> TrainSettings:
    """The training of all networks."""
    return TrainSettings(epochs=epochs, lr=0.05, batch_size=64, momentum=0.9, weight_decay=5e-4)


SETUPS = {
    "digits": Setup("digits", None, None, 16, sgd(20), 0.05),
    "mnist": Setup("mnist", 2000, 2000, 8, sgd(10), 0.02),
    "cifar10": Setup("cifar10", 2000, 2000, 8, sgd(12), 0.03),
}


def faults(setup: Setup, seed: int) -> dict[str, Fault]:
    """By name."""
    return {
        "trigger": Fault("trigger", setup.share, seed=seed),
        "swap": Fault("swap", 0.3, seed=seed),
        "labels": Fault("labels", 0.1, seed=seed),
    }


class World:
    """Data with a fault, and the network that was trained on them.

    Args:
        setup: Data and network.
        fault: Name of the fault.
        seed: Of fault, weights and training.
    """

    def __init__(self, setup: Setup, fault: str, seed: int) -> None:
        clean = load_dataset(setup.data, max_train=setup.train, max_test=setup.test)
        data, self.validation = held_out(clean, 0.5)
        self.setup, self.seed = setup, seed
        self.data: DataBundle = data.with_fault(faults(setup, seed)[fault])
        assert self.data.injected is not None
        self.injected = self.data.injected
        self.affected = self.injected.affected(self.data.test)

    def trained(self, without: Indices | None = None) -> nn.Module:
        """On all samples but some."""
        shape = tuple(self.data.train.tensors[0].shape[1:])
        fresh = build_model("cnn", shape, 10, seed=self.seed, width=self.setup.width)
        every = np.arange(len(self.data.train))
        rows = every if without is None else np.setdiff1d(every, without)
        settings, seed = self.setup.settings, self.seed
        return train(fresh, self.data.train, settings, seed=seed, indices=rows, progress=False)

    @cached_property
    def model(self) -> nn.Module:
        """With the fault."""
        return self.trained()

    def scores(self, model: nn.Module, seconds: float) -> Numbers:
        """By true labels, %."""
        parts = (("corrected", self.affected), ("clean", self.data.test))
        return {name: accuracy(model, part) for name, part in parts} | {"seconds": seconds}


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """%."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in data.tensors[0].split(500)])
    return 100 * float((found == data.tensors[1]).double().mean())


def applied(world: World, name: str, samples: Indices, settings: Mapping[str, Any]) -> nn.Module:
    """What a method makes of the model and the samples."""
    if name == "retrain":
        return world.trained(without=samples)
    if name == "fisher-forget":
        result = forget(world.model, world.data.train, samples, noise=None, progress=False)
        return result.model
    fields = {"weight_decay": 5e-4, "seed": world.seed} if name != "ssd" else {}
    method = METHODS[name](**fields | dict(settings))
    return method.unlearn(world.model, resolve_split(world.data.train, samples)).model


def chosen(setup: Setup, fault: str) -> Numbers:
    """Settings of each method with something to choose."""
    world = World(setup, fault, TUNED_ON)
    settings = ForgetSet("half", "fault", gamma=0.5)
    known = world.injected.known(0.5)
    judge = Judge.of(world.model, world.data, known, settings, world.validation)
    best: Numbers = {}
    for name in TUNED:

        def attempt(tried: dict[str, Any], name: str = name) -> Trial:
            try:
                judgement = judge(applied(world, name, known, tried))
            except (FisherForgetError, ArithmeticError, RuntimeError, ValueError) as error:
                return Trial(tried, error=str(error))
            return Trial(tried, judgement.damage, judgement.memory)

        trials = search(METHODS[name], TRIALS, attempt, fixed=("seed",))
        best[name] = min(trials, key=lambda trial: trial.rank).settings
    return best


def cell(world: World, gamma: float, settings: Numbers) -> Numbers:
    """Every method, where that share is known."""
    known = world.injected.known(gamma, world.seed)
    rows: Numbers = {}
    sets = {"": known}
    if gamma < 1:
        clock = time.perf_counter()
        found = suggest(world.model, world.data.train, kind="poisoned", known=known, progress=False)
        more = found.indices(max(found.likely or 1, 1))
        rest = np.setdiff1d(world.injected.samples, known)
        hits = float(np.isin(more, rest).sum())
        rows["found"] = {
            "precision": hits / len(more),
            "recall": hits / len(rest),
            "seconds": time.perf_counter() - clock,
        }
        sets[FOUND] = np.union1d(known, more)
    for suffix, samples in sets.items():
        for name in ("other-label", "fisher-forget", "ssd", "scrub", "finetune", "retrain"):
            if name + suffix not in ORDER:
                continue
            clock = time.perf_counter()
            model = applied(world, name, samples, settings.get(name, {}))
            rows[name + suffix] = world.scores(model, time.perf_counter() - clock)
    return rows


def work(names: list[str]) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that what a killed run has is balanced."""
    for seed in SEEDS:
        for name in names:
            for fault in ("trigger", "swap", "labels"):
                yield name, fault, seed


def measure(names: list[str]) -> None:
    """All cells that are not stored yet."""
    for name, fault, seed in work(names):
        setup = SETUPS[name]
        keys = [f"{name}, {fault}, {seed}, {gamma:g}" for gamma in (0.0, *GAMMAS)]
        if all(key in stored()["cells"] for key in keys):
            continue
        choice = f"{name}, {fault}"
        if choice not in stored()["settings"]:
            keep("settings", choice, chosen(setup, fault))
        world = World(setup, fault, seed)
        for key, gamma in zip(keys, (0.0, *GAMMAS), strict=True):
            if key in stored()["cells"]:
                continue
            clock = time.perf_counter()
            if gamma:
                rows = cell(world, gamma, stored()["settings"][choice])
            else:
                without = world.trained(world.injected.samples)
                rows = {
                    "as trained": world.scores(world.model, 0.0),
                    WHOLE: world.scores(without, time.perf_counter() - clock),
                }
            keep("cells", key, rows)
            print(f"{key}: {time.perf_counter() - clock:.0f} s", flush=True)


def stored() -> Numbers:
    """What is finished."""
    if STORED.exists():
        found: Numbers = read_json(STORED)
        return found
    return {"command": "python -m benchmarks.poison", "environment": versions()} | {
        "settings": {},
        "cells": {},
    }


def keep(part: str, key: str, value: Numbers) -> None:
    """Store one more."""
    content = stored()
    write_json(STORED, content | {part: content[part] | {key: value}})


def tables(content: Numbers) -> dict[str, str]:
    """Each by the name of its data set: corrected accuracy, and that on clean samples."""
    made = {}
    for name in SETUPS:
        for score in ("corrected", "clean"):
            made[f"{name} {score}"] = table(content["cells"], name, score)
    made["found"] = found_table(content["cells"])
    return {title: text for title, text in made.items() if text}


def values(
    cells: Numbers, name: str, fault: str, gamma: float, row: str, score: str
) -> list[float]:
    """Of all seeds."""
    keys = [f"{name}, {fault}, {seed}, {gamma:g}" for seed in SEEDS]
    return [cells[key][row][score] for key in keys if row in cells.get(key, {})]


def shown(numbers: list[float], digits: int = 0) -> str:
    """Mean, least and most; of some of the networks, how many."""
    if not numbers:
        return ""
    notes = [f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}"] * (len(numbers) > 1)
    notes += [f"{len(numbers)} of {len(SEEDS)}"] * (len(numbers) < len(SEEDS))
    return f"{np.mean(numbers):.{digits}f} ({', '.join(notes)})"


def known_shares(cells: Numbers, name: str = "") -> list[float]:
    """What was measured of a data set, or of any."""
    found = {float(key.rsplit(", ", 1)[1]) for key in cells if key.startswith(name)}
    return sorted(found - {0.0})


def table(cells: Numbers, name: str, score: str) -> str:
    """Methods by gamma, fault after fault; empty where nothing is measured."""
    rows, gammas = [], known_shares(cells, name)
    for fault in ("trigger", "swap", "labels"):
        for row in ("as trained", WHOLE):
            if numbers := values(cells, name, fault, 0.0, row, score):
                rows.append([f"{fault}: {row}", *[shown(numbers)] * len(gammas)])
        for row in ORDER:
            # where all is known there is nothing to find
            names = [row.removesuffix(FOUND) if gamma == 1 else row for gamma in gammas]
            numbers_of = partial(values, cells, name, fault, score=score)
            each = [shown(numbers_of(g, one)) for g, one in zip(gammas, names, strict=True)]
            if any(each):
                rows.append([f"{fault}: {row}", *each])
    header = [f"{score} accuracy, %", *(f"{gamma:g} known" for gamma in gammas)]
    return markdown_table(header, rows) if rows else ""


def found_table(cells: Numbers) -> str:
    """Precision and recall of what was found."""
    rows, gammas = [], [gamma for gamma in known_shares(cells) if gamma < 1]
    for name in SETUPS:
        for fault in ("trigger", "swap", "labels"):
            for score in ("precision", "recall"):
                each = [shown(values(cells, name, fault, g, "found", score), 2) for g in gammas]
                if any(each):
                    rows.append([f"{name}, {fault}: {score}", *each])
    return markdown_table(["", *(f"{gamma:g} known" for gamma in gammas)], rows)


def main() -> None:
    """The command line."""
    warnings.simplefilter("ignore")
    if asked := asked_for(__doc__, SETUPS, "DATA"):
        measure(asked)
    write_tables(PAGE, tables(read_json(STORED)))


if __name__ == "__main__":
    main()
