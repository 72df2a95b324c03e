"""One original of a row: its networks, the call, and how close it came."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.forgetting.data import Data, forget_idx, load
from benchmarks.forgetting.networks import RETRAINED, network, training_seconds
from benchmarks.forgetting.rows import Row
from fisher_forget import forget
from fisher_forget._util.files import fingerprint
from fisher_forget.errors import FisherForgetError, FisherForgetWarning
from fisher_forget.evaluate.closeness import Reference

MODELS = 5  # retrained ones
# Of each part, what is stored: KLs of each retrained model, and shares of right answers.
KEPT = (
    "original_each",
    "scrubbed_each",
    "to_each",
    "from_each",
    "score_original",
    "score_retrained",
    "score_scrubbed",
)

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Networks:
    """What a cell holds beside each other.

    Attributes:
        data: Of the row.
        forget: Samples to forget.
        keep: The others.
        original: Trained on all of them.
        retrained: Trained on `keep`; the same for every original.
    """

    data: Data
    forget: Tensor
    keep: Tensor
    original: nn.Module
    retrained: tuple[nn.Module, ...]

    @classmethod
    def of(cls, row: Row, seed: int, folder: Path) -> Networks:
        """Read them, and train those that are not there yet."""
        data = load(row.setup)
        idx = forget_idx(row, data)
        every = torch.arange(len(data.y))
        keep = every[~torch.isin(every, idx)]
        original = network(row.setup, data, every, seed, folder)
        retrained = tuple(
            network(row.setup, data, keep, RETRAINED + i, folder) for i in range(MODELS)
        )
        return cls(data, idx, keep, original, retrained)

    def reference(self) -> Reference:
        """The retrained models' outputs on forgotten, retained and test samples."""
        x, y = self.data.x, self.data.y
        parts = {
            "forget": TensorDataset(x[self.forget], y[self.forget]),
            "retain": TensorDataset(x[self.keep], y[self.keep]),
            "test": TensorDataset(self.data.x_test, self.data.y_test),
        }
        return Reference(self.original, self.retrained, parts)


def key(row: Row, seed: int) -> str:
    """What a stored cell is of."""
    return fingerprint(row.setup, row.forget, row.of, row.count, seed)


def cell(row: Row, seed: int, folder: Path) -> Cell:
    """Forget, with nothing passed but model, data and samples, and score.

    Args:
        row: See `Row`.
        seed: Of the original.
        folder: Of the networks.

    Returns:
        "noised" and "plain", the closeness of the model as it is returned and of that without
        noise; "seconds" of the call and of a "retraining", of one processor; "warnings" of the
        call, or its "error".
    """
    networks = Networks.of(row, seed, folder)
    data = networks.data
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=row.setup.training.batch)
    retraining = training_seconds(row.setup, data, networks.keep)
    found: dict[str, Any] = {"key": key(row, seed), "retraining": retraining, "error": None}
    begun = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FisherForgetWarning)
        try:
            result = forget(networks.original, loader, networks.forget.tolist(), progress=False)
        except FisherForgetError as error:
            return found | {"error": str(error)}
    found["seconds"] = time.process_time() - begun
    found["warnings"] = [
        str(w.message) for w in caught if issubclass(w.category, FisherForgetWarning)
    ]
    reference = networks.reference()
    found["noised"] = kept(reference.closeness(result.model).to_dict())
    found["plain"] = kept(reference.closeness(result.with_noise(0.0)).to_dict())
    return found


def kept(closeness: Mapping[str, Any]) -> dict[str, Any]:
    """What the table reads of a closeness, to six digits."""

    def rounded(value: Any) -> Any:
        return [rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")

    parts = closeness["parts"].items()
    return {"parts": {part: {k: rounded(s[k]) for k in KEPT} for part, s in parts}}
