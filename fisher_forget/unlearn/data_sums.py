"""Sums over all the data at the original weights, and what is left of them without the forget set.

The retained part follows by taking the forget set's part away, at a cost that grows with the forget
set and not with the data (`prepare` keeps the sums for that).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisher_forget._util import files
from fisher_forget._util.progress import bar
from fisher_forget.data.split import Indices, Split, some
from fisher_forget.errors import StorageError
from fisher_forget.unlearn.batch_norm import foreign_statistics
from fisher_forget.unlearn.objective import Gradient, Objective

FORMAT = "7"


@dataclass(frozen=True)
class DataSums:
    """Sums at the original weights over samples, retained and forgotten: all, or some by chance.

    Attributes:
        total: Gradient, loss, count and targets of each class of these samples, without weight
            decay.
        samples: Their indices, sorted.
        spread: tr H_n of each, in that order: where the output curvature is.
        foreign: Norm layers whose running statistics these samples did not set.
    """

    total: Gradient
    samples: Indices
    spread: Tensor
    foreign: tuple[str, ...] = ()

    def spread_of(self, indices: Indices) -> Tensor:
        """tr H_n of some of the samples: [len(indices)]."""
        return self.spread[torch.from_numpy(np.searchsorted(self.samples, indices))]


def take_data_sums(
    objective: Objective,
    split: Split,
    most: int | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> DataSums:
    """One pass over the data, forward and backward, and a short one for running statistics.

    Args:
        objective: Losses at the original parameters.
        split: All of its samples count.
        most: Take this many of them, drawn at random, if each has as many scored positions, so
            that these tell how many all have; `None` takes all.
        seed: Of which these are.
        progress: Show a progress bar.

    Raises:
        NumericalError: If a loss or gradient is not finite.
    """
    every = split.indices("all")
    samples = every if most is None else some(every, most, seed)
    if len(samples) < len(every) and not _even(objective, split, samples):
        samples = every
    spread: list[Tensor] = []
    batches = bar(split.batches(samples), split.steps(samples), "gradient", progress)
    total = objective.gradient(batches, objective.start, spread)
    foreign = foreign_statistics(objective.model, split, private=True)
    return DataSums(total, samples, torch.cat(spread), foreign)


def _even(objective: Objective, split: Split, samples: Indices) -> bool:
    """Whether each of the samples has as many scored positions."""
    counts = [objective.likelihood.counts(batch.targets) for batch in split.batches(samples)]
    return len(torch.cat(counts).unique()) == 1


def save_data_sums(path: str | Path, sums: DataSums, fingerprint: str, split: Split) -> None:
    """Write sums of a split, with a fingerprint of the model and the data that they were taken of.

    Where all of its samples were, the file does not list them: that would tell which samples of
    the data set are missing.

    Raises:
        StorageError: If the file cannot be written.
    """
    tensors = {f"gradient/{name}": value for name, value in sums.total.sums.items()}
    tensors |= {
        "classes": sums.total.classes,
        "spread": sums.spread,
    }
    if len(sums.samples) < len(split.indices("all")):
        tensors["samples"] = torch.from_numpy(sums.samples)
    numbers = {"loss": sums.total.loss, "count": sums.total.count, "foreign": sums.foreign}
    notes = {"format": FORMAT, "fingerprint": fingerprint, "numbers": json.dumps(numbers)}
    files.save_tensors(path, tensors, notes)


def load_data_sums(
    path: str | Path, objective: Objective, fingerprint: str, split: Split
) -> DataSums | None:
    """Read sums of a split back; `None` where the file is of another format: take them anew.

    Raises:
        StorageError: If the file is missing or damaged, or made for another model or other data.
    """
    tensors, notes = files.load_tensors(path)
    if notes.get("fingerprint") != fingerprint:
        got = f"{path} with fingerprint {notes.get('fingerprint')}"
        raise StorageError(got, f"fingerprint {fingerprint}", "Name another folder.")
    if notes.get("format") != FORMAT:
        return None
    numbers = json.loads(notes["numbers"])
    gradient = {n: tensors[f"gradient/{n}"].to(p.device) for n, p in objective.start.items()}
    return DataSums(
        total=Gradient(gradient, numbers["loss"], numbers["count"], tensors["classes"]),
        samples=tensors["samples"].numpy() if "samples" in tensors else split.indices("all"),
        spread=tensors["spread"],
        foreign=tuple(numbers["foreign"]),
    )
