"""Deletion requests that are chosen to do harm, on MNIST: what they do to the correction and to
exact retraining, and what a guard makes of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.attacks.classical import Report
from fisher_forget import build_model, forget, load_dataset, train
from fisher_forget.attack.chosen_requests import Aim, ChosenRequests, Damage
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices, Split
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.unlearn.result import ForgetResult

TRAINED, OWNED, RARE = 10_000, 0.2, 150  # samples; the attacker's share; samples of the rare class
SETTINGS = TrainSettings(epochs=10, batch_size=64, lr=0.05, momentum=0.9, weight_decay=5e-4)
SEEDS, TARGET, LIMIT = (0, 1, 2), 8, 0.02
ALL, RARELY = "a fifth of all", "two thirds of a rare class"
AIMS: tuple[Aim, ...] = ("harm", "step", "random")
CASES = {ALL: (50, 500), RARELY: (30, 100)}  # how many are asked for


def chosen() -> Report:
    """By case, number of samples and aim: means over the seeds."""
    mnist = load_dataset("mnist")
    found: Report = {}
    for case, counts in CASES.items():
        told: dict[str, list[Damage]] = {}
        for seed in SEEDS:
            data = _drawn(mnist.train, seed, rare=case == RARELY)
            model = _trained(data, None, seed)
            target = take(mnist.test, np.flatnonzero(mnist.test.tensors[1] == TARGET)[::2])
            shown = take(mnist.test, _others(mnist.test))
            owned = _owned(data, seed, rare=case == RARELY)
            for count in counts:
                for aim in AIMS:
                    damage = ChosenRequests(aim, count, seed).run(
                        model,
                        data,
                        owned,
                        shown,
                        target=target,
                        limit=LIMIT,
                        forget_fn=_forget,
                        retrain_fn=lambda rows, data=data, seed=seed: _trained(
                            data, rows, 1000 + seed
                        ),
                    )
                    told.setdefault(f"{case}; {count}; {aim}", []).append(damage)
                    print(case, seed, count, aim, damage, flush=True)
        found |= {name: _means(damages) for name, damages in told.items()}
    return found


def _forget(model: nn.Module, split: Split) -> ForgetResult:
    return forget(model, split, split.forget, weight_decay=SETTINGS.weight_decay, progress=False)


def _drawn(data: TensorDataset, seed: int, *, rare: bool) -> TensorDataset:
    """Training samples; of the target class a few only where it is rare."""
    rows = np.random.default_rng([seed, 1]).permutation(len(data))[:TRAINED]
    if rare:
        of_class = (data.tensors[1][torch.from_numpy(rows)] == TARGET).numpy()
        rows = np.sort(np.concatenate([rows[~of_class], rows[of_class][:RARE]]))
    return take(data, np.sort(rows))


def _owned(data: TensorDataset, seed: int, *, rare: bool) -> Indices:
    """The attacker's samples: a share of all; of the rare class two thirds."""
    rows = np.random.default_rng([seed, 2]).permutation(len(data))
    if rare:
        rows = rows[(data.tensors[1][torch.from_numpy(rows)] == TARGET).numpy()]
        return np.sort(rows[: 2 * RARE // 3])
    return np.sort(rows[: round(OWNED * len(data))])


def _others(test: TensorDataset) -> Indices:
    """Test samples, without those of the target class that the attacker chose by."""
    rows = np.arange(len(test))
    return np.setdiff1d(rows, np.flatnonzero(test.tensors[1] == TARGET)[::2])


def _trained(data: TensorDataset, rows: Indices | None, seed: int) -> nn.Module:
    model = build_model("mlp", data.tensors[0].shape[1:], 10, seed=seed, hidden=[64])
    return train(model, data, SETTINGS, seed=seed, indices=rows, progress=False)


def _means(damages: list[Damage]) -> Report:
    def fall(damage: Damage, which: str, name: str) -> float:
        harm = getattr(damage, which)
        return float(next(g.drop.value for g in harm.groups if g.name == name))

    target = str(TARGET)
    return {
        "target": [fall(d, "harm", target) for d in damages],
        "target, retrained": [fall(d, "retrained", target) for d in damages],
        "worst of the others": [_worst(d, "harm") for d in damages],
        "worst of the others, retrained": [_worst(d, "retrained") for d in damages],
        "seconds": [d.seconds for d in damages],
        "steps": [d.steps for d in damages],
        "rejected": [d.rejected for d in damages],
        "refused": [bool(d.refused) for d in damages],
        "warned": [bool(d.warned) for d in damages],
    }


def _worst(damage: Damage, which: str) -> float:
    groups = getattr(damage, which).groups
    return float(max(g.drop.value for g in groups if g.name != str(TARGET)))
