"""How often `suggest` is right, where the faults are known.

    python -m benchmarks.suggest [lds] [labels] [poison] [mnist]

Each table is stored in benchmarks/suggest.json and written to docs/how-to/suggest.md. The ones of
digits take one to three minutes each on one thread, that of MNIST some minutes. No score was
chosen on the seeds that are reported here.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.levels import networks
from benchmarks.parts import asked_for, write_tables
from fisher_forget import (
    Influence,
    TrainSettings,
    build_model,
    load_dataset,
    suggest,
    train,
)
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.experiments.faults import Fault
from fisher_forget.influence.influence import cosines
from fisher_forget.influence.products import Readings, mean_gradient

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER / "suggest.json", FOLDER.parent / "docs" / "how-to" / "suggest.md"
SEEDS = (3, 4, 5)
SHARE, SHARES = 0.1, (0.1, 0.3, 0.5)
SUBSETS, REPEATS, TARGETS = 60, 4, 60
NEIGHBOURS, CROWD = 10, 2000
Scores = dict[str, Tensor]
Rows = list[list[str]]


class World:
    """A network that was trained on data with known faults.

    Args:
        x: Images.
        y: Labels as they were trained on.
        bad: Indices of the faulty samples, sorted.
        arch: Name of the model.
        epochs: Of the training.
        seed: Of it.
    """

    def __init__(
        self, x: Tensor, y: Tensor, bad: Indices, arch: str, epochs: int, seed: int
    ) -> None:
        self.data, self.bad, self.seed, self.arch = TensorDataset(x, y), bad, seed, arch
        self.settings = TrainSettings(epochs=epochs, lr=0.1, batch_size=60, weight_decay=5e-4)
        self.model = self.trained(np.arange(len(x)))

    def trained(self, samples: Indices) -> nn.Module:
        """The network of this seed trained on some of the samples."""
        x = self.data.tensors[0]
        hidden = 32 if x[0].numel() < 100 else 64  # of digits, of MNIST
        options = {"hidden": [hidden]} if self.arch == "mlp" else {}
        fresh = build_model(self.arch, tuple(x.shape[1:]), 10, seed=self.seed, **options)
        settings, seed = self.settings, self.seed
        return train(fresh, self.data, settings, seed=seed, indices=samples, progress=False)

    @cached_property
    def features(self) -> Tensor:
        """What the last layer sees."""
        assert isinstance(self.model, nn.Sequential)
        with torch.no_grad():
            return cast(Tensor, self.model[:-1](self.data.tensors[0]))

    @cached_property
    def influence(self) -> Influence:
        """By the package's own curvature."""
        return Influence.of(self.model, self.data)

    @cached_property
    def plain(self) -> Influence:
        """With H a multiple of I."""
        return Influence.of(self.model, self.data, weight_decay=0.0, damping=1e9)

    def precision(self, score: Any, without: Indices | None = None) -> float:
        """Share of faulty samples among as many of the highest scores as there are."""
        values = torch.as_tensor(score).double().clone()
        hidden = np.zeros(0, dtype=np.int64) if without is None else without
        values[hidden] = -torch.inf
        bad = np.setdiff1d(self.bad, hidden)
        return float(np.isin(values.argsort(descending=True)[: len(bad)], bad).mean())

    def scores(self, **options: Any) -> Tensor:
        """Of `suggest`, by sample; known ones at the end."""
        found = suggest(self.model, self.data, progress=False, **options)
        values = torch.full((len(self.data),), -torch.inf, dtype=torch.float64)
        values[found.table["sample"].tolist()] = torch.tensor(
            found.table["score"].tolist()
        ).double()
        return values


def faulty(x: Tensor, y: Tensor, fault: Fault) -> tuple[Tensor, Tensor, Indices]:
    """Images and labels with a fault, and which samples have it."""
    data, injected = fault.put(TensorDataset(x, y), 10)
    return (*data.tensors, injected.samples)


def wrong_labels(y: Tensor, seed: int, share: float = SHARE) -> tuple[Tensor, Indices]:
    """Labels of which a share is replaced by other classes at random."""
    return faulty(y, y, Fault("labels", share, seed=seed))[1:]


def confused(y: Tensor, seed: int) -> tuple[Tensor, Indices]:
    """One in five labels of each class is replaced by that of one other class."""
    rng = np.random.default_rng(seed)
    bad = np.sort(rng.choice(len(y), len(y) // 5, replace=False))
    cycle = torch.tensor(rng.permutation(10))
    other = torch.empty(10, dtype=torch.long)
    other[cycle] = cycle.roll(1)
    y = y.clone()
    y[bad] = other[y[bad]]
    return y, bad


LABELS: dict[str, Callable[[Tensor, int], tuple[Tensor, Indices]]] = {
    "10 % wrong": wrong_labels,
    "40 % wrong": lambda y, seed: wrong_labels(y, seed, 0.4),
    "20 % confused": confused,
}


def turned(title: str, rows: Mapping[str, list[Scores]]) -> str:
    """The mean over seeds of each method, row by row."""
    methods = list(next(iter(rows.values()))[0])
    cells = [
        [name, *(f"{np.mean([float(run[m]) for run in runs]):.2f}" for m in methods)]
        for name, runs in rows.items()
    ]
    return markdown_table([title, *methods], cells)


def lds() -> str:
    """Predicted against actual losses of test samples, over networks trained on random halves."""
    data = load_dataset("digits")
    (x, y), (x_test, y_test) = data.train.tensors, data.test.tensors
    rng = np.random.default_rng(11)
    half = len(x) // 2
    subsets = [torch.tensor(rng.choice(len(x), half, replace=False)) for _ in range(SUBSETS)]
    every = torch.cat([x, x_test[:TARGETS]]).flatten(1)
    test = {"test": torch.arange(len(x), len(every))}
    outputs = networks(every, y, [s for s in subsets for _ in range(REPEATS)], test)["test"]
    losses = F.cross_entropy(
        outputs.flatten(0, 1), y_test[:TARGETS].repeat(len(outputs)), reduction="none"
    ).view(SUBSETS, REPEATS, TARGETS)
    actual, member = losses.mean(1), torch.zeros(SUBSETS, len(x), dtype=torch.float64)
    for row, subset in zip(member, subsets, strict=True):
        row[subset] = 1
    rows: dict[str, list[float]] = {}
    for seed in SEEDS:
        world = World(x, y, np.zeros(0, dtype=np.int64), "mlp", 40, seed)
        target = resolve_split(TensorDataset(x_test, y_test), [], allow_empty=True)
        own, plain = world.influence, world.plain
        shuffled = member[torch.randperm(SUBSETS, generator=torch.Generator().manual_seed(seed))]
        for name, influence, who in (
            ("influence, EKFAC", own, member),
            ("inner product of gradients", plain, member),
            ("influence, subsets shuffled", own, shuffled),
        ):
            each = [
                mean_gradient(influence.objective, target, np.array([i])) for i in range(TARGETS)
            ]
            predicted = -(who @ influence.read(each).products)
            found = [spearmanr(predicted[:, i], actual[:, i])[0] for i in range(TARGETS)]
            rows.setdefault(name, []).append(float(np.mean(found)))
    header = ["linear data-modelling score", "mean", "over three networks"]
    cells = [
        [name, f"{np.mean(v):.2f}", f"{min(v):.2f} to {max(v):.2f}"] for name, v in rows.items()
    ]
    return markdown_table(header, cells)


def of_labels(world: World) -> Scores:
    """Precision of each way to find wrong labels."""
    influence, y = world.influence, world.data.tensors[1]
    crowd = influence.read([influence.crowd(CROWD, world.seed)])
    features = F.normalize(world.features, dim=1)
    alike = features @ features.T
    alike.fill_diagonal_(-1)
    near = alike.topk(NEIGHBOURS, dim=1).indices
    found = {
        "**suggest**, mislabelled": world.scores(kind="mislabelled"),
        "suggest, memorised": world.scores(kind="memorised"),
        "loss": crowd.losses,
        "length of the gradient": world.plain.read().squares,
        "against the mean unit gradient": -cosines(crowd)[:, 0],
        "labels of the ten nearest by features": (y[near] != y[:, None]).double().mean(1)
        + 1e-6 * crowd.losses.clamp(max=100),
    }
    return {name: torch.tensor(world.precision(score)) for name, score in found.items()}


def labels() -> str:
    """Wrong labels on digits."""
    x, y = load_dataset("digits").train.tensors
    rows: dict[str, list[Scores]] = {}
    for arch, epochs in (("mlp", 40), ("cnn", 10), ("cnn", 30)):
        for name, spoilt in LABELS.items():
            for seed in SEEDS:
                world = World(x, *spoilt(y, seed), arch, epochs, seed)
                rows.setdefault(f"{arch}, {epochs} epochs: {name}", []).append(of_labels(world))
    for seed in SEEDS:  # samples drawn at random, whose labels are right
        world = World(x, y, wrong_labels(y, seed)[1], "mlp", 40, seed)
        rows.setdefault("nothing wrong", []).append(of_labels(world))
    return turned("precision", rows)


def of_poison(world: World, known: Indices) -> Scores:
    """Precision of each way to find the rest of the poison."""
    y, features = world.data.tensors[1], world.features
    rest = np.setdiff1d(np.arange(len(y)), known)
    same = rest[np.isin(y[rest], y[known].unique())]
    influence, plain = world.influence, world.plain

    def read(of: Influence) -> Readings:
        return of.read([mean_gradient(of.objective, of.split, known)])

    raw, straight = read(influence), read(plain)
    middle, unit = features[known].mean(0), F.normalize(features, dim=1)
    found = {
        "**suggest**, poisoned": world.scores(kind="poisoned", known=known),
        "influence on the loss of the known": raw.products[:, 0],
        "cosine with their gradient, by H^-1": cosines(raw)[:, 0],
        "cosine with their gradient": cosines(straight)[:, 0],
        "cosine with their features": unit @ unit[known].mean(0),
        "features, along known less others of the label": features
        @ (middle - features[same].mean(0)),
        "loss": raw.losses,
    }
    return {name: torch.tensor(world.precision(s, known)) for name, s in found.items()}


def some_of(bad: Indices, share: float, seed: int) -> Indices:
    """The part of the poison that is known."""
    rng = np.random.default_rng(1000 + seed)
    return np.sort(rng.choice(bad, max(1, int(share * len(bad))), replace=False))


def poison() -> str:
    """The rest of the poison on digits."""
    x, y = load_dataset("digits").train.tensors
    columns: dict[str, list[Scores]] = {}
    faults = {"trigger": Fault("trigger", SHARE), "swap": Fault("swap", 0.4)}
    for name, fault in faults.items():
        for arch, epochs in (("mlp", 40), ("cnn", 20)):
            for seed in SEEDS:
                world = World(*faulty(x, y, replace(fault, seed=seed)), arch, epochs, seed)
                for share in SHARES:
                    column = columns.setdefault(f"{name}, {arch}, {share:g} known", [])
                    column.append(of_poison(world, some_of(world.bad, share, seed)))
    for seed in SEEDS:  # half of some clean samples is to find the other half
        bad = np.sort(np.random.default_rng(seed).choice(len(y), len(y) // 10, replace=False))
        world = World(x, y, bad, "mlp", 40, seed)
        columns.setdefault("clean", []).append(of_poison(world, some_of(bad, 0.5, seed)))
    return turned("precision", columns)


def mnist() -> str:
    """60,000 images: precision, time, memory."""
    x, y = load_dataset("mnist").train.tensors
    rows: Rows = []
    for name, arch, epochs in (("cnn, 1 epoch", "cnn", 1), ("784-64-10, 5 epochs", "mlp", 5)):
        for fault, spoilt in LABELS.items():
            world = World(x, *spoilt(y, SEEDS[0]), arch, epochs, SEEDS[0])
            title = f"mislabelled: {name}, {fault}"
            rows.append(timed(world, title, kind="mislabelled"))
    world = World(*faulty(x, y, Fault("trigger", 0.01, seed=SEEDS[0])), "cnn", 1, SEEDS[0])
    known = some_of(world.bad, SHARES[0], SEEDS[0])
    title = f"poisoned: cnn, 1 epoch, 1 % with the trigger, {SHARES[0]:g} known"
    rows.append(timed(world, title, kind="poisoned", known=known))
    header = [
        "MNIST, 60,000 images",
        "precision",
        "by loss",
        "seconds",
        "passes",
        "peak memory (MiB)",
    ]
    return markdown_table(header, rows)


def timed(world: World, title: str, **options: Any) -> list[str]:
    """A row of the table of MNIST."""
    counted = Counted(*world.data.tensors)
    clock = time.perf_counter()
    found = suggest(world.model, counted, progress=False, **options)
    seconds = time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the whole process
    bad = np.setdiff1d(world.bad, options.get("known", []))
    by_loss = found.table.sort_values("loss", ascending=False)["sample"][: len(bad)]
    hits = np.isin(found.indices(len(bad)), bad).mean()
    passes = counted.read / len(counted)
    return [
        title,
        f"{hits:.3f}",
        f"{np.isin(by_loss, bad).mean():.3f}",
        f"{seconds:.0f}",
        f"{passes:.2f}",
        f"{peak:.0f}",
    ]


class Counted(TensorDataset):
    """Counts the samples that are read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)


TABLES: dict[str, Callable[[], str]] = {
    "lds": lds,
    "labels": labels,
    "poison": poison,
    "mnist": mnist,
}


def main() -> None:
    """The command line."""
    for name in asked_for(__doc__, TABLES, "TABLE"):
        begun = time.perf_counter()
        table = TABLES[name]()
        print(f"{table}\n{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        stored = read_json(STORED) if STORED.exists() else {}
        write_json(STORED, stored | {name: table})
    write_tables(PAGE, read_json(STORED))


if __name__ == "__main__":
    main()
