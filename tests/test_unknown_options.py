"""A misspelt option is refused before any work, with the nearest right name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    ConfigError,
    ForgetOptions,
    RetrainedEnsemble,
    estimate_curvature,
    evaluate,
    forget,
    newton_step,
    prepare,
)
from fisher_forget.data.split import resolve_split
from fisher_forget.evaluate.ensemble import train_members
from fisher_forget.evaluate.relearn import relearn_steps, relearn_time

DATA = TensorDataset(torch.zeros(9, 2), torch.zeros(9).long())
NET = nn.Linear(2, 2).eval()


def never(*args: object) -> nn.Module:
    raise AssertionError("work before the options were looked at")


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: forget(NET, DATA, [0], stepz=1), "steps"),
        (lambda: prepare(NET, DATA, weight_decy=0.1), "weight_decay"),
        (lambda: estimate_curvature(NET, DATA, rnk=3), "rank"),
        (lambda: RetrainedEnsemble.fit(never, DATA, [0], template=NET, job=1), "jobs"),
        (lambda: train_members(never, [0], template=NET, foldr="x"), "folder"),
        (lambda: evaluate([NET], None, {}, heldout=2), "held_out"),
        (lambda: relearn_time(NET, resolve_split(DATA, [0]), NET, batchsize=3), "batch_size"),
        (lambda: relearn_steps(NET, resolve_split(DATA, [0]), NET, batchsize=3), "batch_size"),
    ],
)
def test_refused(call: Callable[[], object], near: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        call()


@pytest.mark.parametrize("options", [{"steps": 1}, "ekfac", ForgetOptions])
def test_options_of_another_type(options: object) -> None:
    with pytest.raises(ConfigError, match="expected a ForgetOptions"):
        forget(NET, DATA, [0], options)  # type: ignore[arg-type]


def test_the_newton_step_of_version_0_1_is_told_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r"Problem\.of\("):
        newton_step(NET, DATA, None, weight_decay=0.1)  # type: ignore[arg-type]
