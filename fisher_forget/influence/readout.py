r"""What the features of the other samples say of a sample's target.

A linear readout of features x_n (what the last linear layer sees) is fitted to targets t_n (of
classes, one-hot) by least squares with an intercept,

    W = (C + tau I)^-1 (1/N) sum_n (x_n - x)(t_n - t)^T,    C = (1/N) sum_n (x_n - x)(x_n - x)^T,

x and t the means, tau a tenth of the mean eigenvalue of C. Without sample n itself it says

    f_n = t_n - (t_n - t - W^T (x_n - x)) / (1 - h_n),
    h_n = 1/N + (x_n - x)^T (C + tau I)^-1 (x_n - x) / N,

exactly, at the same N tau (Allen 1974, PRESS). The readout is what a network would say that has
not learnt this sample's target: a wrong label that the network has fitted stands out, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget._util.progress import bar
from fisher_forget.data.split import Split
from fisher_forget.errors import DataError
from fisher_forget.influence.products import Readings
from fisher_forget.likelihood import Categorical
from fisher_forget.unlearn.objective import Objective

DAMPING = 0.1  # of the mean eigenvalue
ROOM = 8  # of the memory, one part in so many for the square matrix of features
TINY = 1e-30


@dataclass
class _Sums:
    """Of x, t, x x^T and x t^T."""

    count: int = 0
    x: Any = 0.0
    t: Any = 0.0
    xx: Any = 0.0
    xt: Any = 0.0

    def add(self, x: Tensor, t: Tensor) -> None:
        self.count += len(x)
        self.x, self.t = self.x + x.sum(0), self.t + t.sum(0)
        self.xx, self.xt = self.xx + x.T @ x, self.xt + x.T @ t


def misfits(
    objective: Objective, split: Split, *, progress: bool = False
) -> tuple[Readings, Tensor]:
    """By how much the readout of the others contradicts each sample's target, in two passes.

    Of classes it is the margin max_c f_n[c] - f_n[y_n] over other classes c: above 0 where it says
    another class. Of other targets it is the squared distance |t_n - f_n|^2.

    Args:
        objective: Whose losses; the features are those of its model.
        split: The training data.
        progress: Show progress bars.

    Returns:
        What the outputs say, and the scores [samples], float64; -inf where no target is scored.

    Raises:
        DataError: If a sample has more than one row of outputs.
    """
    sums = _Sums()
    for x, t, _, _ in _rows(objective, split, "features", progress):
        scored = t.isfinite().all(1)
        sums.add(x[scored], t[scored])
    n = max(sums.count, 1)
    x_mean, t_mean = sums.x / n, sums.t / n
    spread = sums.xx / n - torch.outer(x_mean, x_mean)
    tau = max(DAMPING * float(spread.trace()) / len(spread), TINY)
    inverse = torch.linalg.inv(spread + tau * torch.eye(len(spread)).to(spread))
    weights = inverse @ (sums.xt / n - torch.outer(x_mean, t_mean))
    read, done = Readings.blank(len(split.retain)), 0
    score = torch.full((len(split.retain),), -math.inf, dtype=torch.float64)
    for x, t, outputs, targets in _rows(objective, split, "readout", progress):
        rows = slice(done, done + len(x))
        read.note(rows, objective.likelihood, outputs, targets)
        x = x - x_mean
        lever = (1 + ((x @ inverse) * x).sum(1, keepdim=True)) / n
        f = t - (t - t_mean - x @ weights) / (1 - lever)
        score[rows] = _contradiction(f, t, read.labels[rows].to(f.device)).nan_to_num(-math.inf)
        done += len(x)
    return read, score


def _contradiction(f: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    if (labels == -1).all():
        return (t - f).square().sum(1)
    own = F.one_hot(labels.clamp(min=0), f.shape[1]).bool()
    return f.masked_fill(own, -math.inf).amax(1) - f[own]


def _rows(
    objective: Objective, split: Split, label: str, progress: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Features and targets in float64, NaN where none is scored; outputs and targets as they are;
    piece by piece."""
    lots = bar(split.batches(split.retain), split.steps(split.retain), label, progress)
    most = math.isqrt(objective.memory // (8 * ROOM))
    with _last_inputs(objective.model) as seen:
        for outputs, targets in objective.forward(lots, objective.start):
            if outputs.dim() > 2:
                got = f"outputs of shape {list(outputs.shape)}"
                fix = "Take another kind, such as 'memorised'."
                raise DataError(got, "one row of outputs a sample for 'mislabelled'", fix)
            f = outputs.reshape(len(outputs), -1)
            x = seen.get(f.shape[1], f)
            x = x if x.dim() == 2 and len(x) == len(f) and x.shape[1] <= most else f
            yield x.double(), _targets(objective, f, outputs, targets), outputs, targets
            seen.clear()


def _targets(objective: Objective, f: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """One-hot classes; of other targets, what the loss pulls outputs of 0 towards."""
    likelihood = objective.likelihood
    if isinstance(likelihood, Categorical) and targets.dim() == 1:
        t = F.one_hot(targets.clamp(min=0), f.shape[1]).double()
    else:
        t = -likelihood.residual(torch.zeros_like(outputs).double(), targets).reshape(f.shape)
    return t.masked_fill(likelihood.counts(targets)[:, None] == 0, math.nan)


@contextmanager
def _last_inputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """The input of the last call of a linear layer, by its number of outputs."""
    seen: dict[int, Tensor] = {}

    def note(layer: nn.Linear, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        seen[layer.out_features] = next(iter((*args, *kwargs.values()))).detach()

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
