"""What one pass over all the data tells at the original weights, and what is left of it without the
forget set.

Everything here is a sum over samples: the retained part follows by taking the forget set's part
away, at a cost that grows with the forget set and not with the data (`prepare` keeps the sums for
that).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util import files
from fisher_forget._util.progress import bar
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import StorageError
from fisher_forget.unlearn.objective import Gradient, Objective

FORMAT = "3"


@dataclass(frozen=True)
class Snapshot:
    """Sums at the original weights over all samples, retained and forgotten.

    Attributes:
        total: Gradient, loss, count and targets of each class of all samples, without weight decay.
        samples: Their indices, sorted.
        spread: tr H_n of each, in that order: where the output curvature is.
    """

    total: Gradient
    samples: Indices
    spread: Tensor

    def retained(self, split: Split, forgotten: Gradient) -> Gradient:
        """The sums of the retained samples.

        Raises:
            StorageError: If the snapshot was taken of other samples than the split has.
        """
        if not np.array_equal(self.samples, split.indices("all")):
            raise StorageError(
                f"a snapshot of {len(self.samples):,} samples for {split}",
                "the same samples",
                "Take a new snapshot.",
            )
        return self.total - forgotten

    def spread_of(self, indices: Indices) -> Tensor:
        """tr H_n of some of the samples: [len(indices)]."""
        return self.spread[torch.from_numpy(np.searchsorted(self.samples, indices))]


def take_snapshot(objective: Objective, split: Split, *, progress: bool = False) -> Snapshot:
    """One pass over the data, forward and backward.

    Args:
        objective: Losses at the original parameters.
        split: All of its samples count.
        progress: Show a progress bar.

    Raises:
        NumericalError: If a loss or gradient is not finite.
    """
    every = split.indices("all")
    spread: list[Tensor] = []
    batches = bar(split.batches(every), split.steps(every), "gradient", progress)
    total = objective.gradient(batches, objective.start, spread)
    return Snapshot(total, every, torch.cat(spread))


def save_snapshot(path: str | Path, snapshot: Snapshot, fingerprint: str) -> None:
    """Write a snapshot, with a fingerprint of the model and the data that it was taken of.

    Raises:
        StorageError: If the file cannot be written.
    """
    tensors = {f"gradient/{name}": value for name, value in snapshot.total.sums.items()}
    tensors |= {"samples": torch.from_numpy(snapshot.samples), "spread": snapshot.spread}
    tensors["classes"] = snapshot.total.classes
    numbers = {"loss": snapshot.total.loss, "count": snapshot.total.count}
    files.save_tensors(
        path,
        tensors,
        {"format": FORMAT, "fingerprint": fingerprint, "numbers": json.dumps(numbers)},
    )


def load_snapshot(path: str | Path, objective: Objective, fingerprint: str) -> Snapshot:
    """Read a snapshot back.

    Raises:
        StorageError: If the file is missing or damaged, of another format, or made for another
            model or other data.
    """
    tensors, metadata = files.load_tensors(path)
    for key, expected in (("format", FORMAT), ("fingerprint", fingerprint)):
        if metadata.get(key) != expected:
            raise StorageError(
                f"{path} with {key} {metadata.get(key)}",
                f"{key} {expected}",
                "Name another folder.",
            )
    numbers = json.loads(metadata["numbers"])
    sums: P.Params = {
        name: tensors[f"gradient/{name}"].to(p.device) for name, p in objective.start.items()
    }
    total = Gradient(sums, numbers["loss"], numbers["count"], tensors["classes"])
    return Snapshot(total, tensors["samples"].numpy(), tensors["spread"])
