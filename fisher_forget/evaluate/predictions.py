"""What models make of data sets: outputs of all samples, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy
from fisher_forget._util.isolation import isolated
from fisher_forget.data import batches
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import DataError
from fisher_forget.likelihood import Likelihood, resolve_likelihood

IGNORED = -100  # what torch and Hugging Face's collate functions take for no target


def whole_splits(
    parts: Mapping[str, Dataset[Any]], unpack: batches.Unpack | None = None
) -> dict[str, Split]:
    """Data sets as splits that forget nothing, whose samples `predict` goes through."""
    options: dict[str, Any] = {"unpack": unpack, "allow_empty": True}
    return {name: resolve_split(part, [], **options) for name, part in parts.items()}


def settled_by(
    model: nn.Module, splits: Mapping[str, Split], likelihood: Likelihood | str
) -> Likelihood:
    """The likelihood that a model was trained with, told on the first part that has samples."""
    split = next((split for split in splits.values() if len(split.retain)), None)
    if split is None:
        return resolve_likelihood(likelihood)
    return trained_likelihood(model, split, likelihood)


@isolated()
def predict(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Outputs [N, ...] of the model in eval mode and targets [N, ...] of all samples of a split, on
    the CPU.

    Where batches are padded to lengths of their own, the shorter ones get further positions, with
    the target -100, which counts for nothing.

    Raises:
        DataError: If the split is empty, or shapes differ otherwise.
    """
    twin = private_copy(model)
    outputs, targets = [], []
    with torch.no_grad():
        for batch in split.batches("all"):
            placed = batch.on(twin)
            outputs.append(P.first_call(twin, placed.args, placed.kwargs).cpu())
            targets.append(batch.targets)
    if not outputs:
        raise DataError("a data set without samples", "at least one", "Leave that part out.")
    if len({x.shape[1:] for x in outputs}) > 1:
        outputs, targets = _padded(outputs, targets)
    return torch.cat(outputs), torch.cat(targets)


def _padded(outputs: list[Tensor], targets: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of sequences, all as long as the longest."""
    if targets[0].is_floating_point() or len({x.shape[1:] for x in targets}) == 1:
        shapes = sorted({tuple(x.shape[1:]) for x in outputs})
        fix = "Pad all samples to one length."
        raise DataError(f"outputs of the shapes {shapes}", "one shape in every batch", fix)

    def filled(batches: list[Tensor], value: int) -> list[Tensor]:
        longest = torch.tensor([x.shape[1:] for x in batches]).amax(0)
        whole = [x.new_full((len(x), *longest), value) for x in batches]
        for place, x in zip(whole, batches, strict=True):
            place[tuple(slice(size) for size in x.shape)] = x
        return whole

    return filled(outputs, 0), filled(targets, IGNORED)


def check_scored_parts(likelihood: Likelihood, targets: Mapping[str, Tensor]) -> None:
    """Refuse a part of the data of which no target counts in the loss.

    Args:
        likelihood: Knows which targets count.
        targets: Part -> targets [N, ...].

    Raises:
        DataError: For the first such part.
    """
    for part, y in targets.items():
        if not likelihood.scored(y):
            got = f"{len(y):,} samples of {part!r} without a scored target"
            fix = "Leave that part out, or check which targets the likelihood ignores."
            raise DataError(got, "at least one target that counts in the loss", fix)
