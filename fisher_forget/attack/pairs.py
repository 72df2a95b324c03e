"""A pair of models, before and after a deletion, and what is asked about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget._util.copies import unwrapped
from fisher_forget.attack.release import Model
from fisher_forget.data.samples import read_samples
from fisher_forget.errors import DataError, ModelError


@dataclass(frozen=True)
class Pair:
    """Two releases of a model, between which samples were deleted.

    How the second was made does not matter: by this package, by another method, by SISA, by
    retraining.

    Attributes:
        before: A module, or a function from inputs [N, ...] to probabilities [N, C] or numbers [N].
        after: The same, after the deletion.
        deleted: Deleted samples: a data set of (inputs, target), or a tuple (inputs, targets).
        others: Samples that were not deleted. Which ones, the attack says.
        retrained: What `after` would be after exact deletion: models that are trained without the
            deleted samples. The yardstick: exact deletion can be seen, too.

    Raises:
        ModelError: If two of the models are the same, or differ in their architecture.
        DataError: If a sample is among the deleted and the others, or there is none.
    """

    before: Model
    after: Model
    deleted: Any
    others: Any = None
    retrained: Sequence[Model] = ()

    def __post_init__(self) -> None:
        if callable(self.retrained):
            got = "a model as `retrained`"
            raise ModelError(got, "several of them, or none", "Pass retrained=[model].")
        for model in (self.after, *self.retrained):
            check_models(self.before, model)
        check_different([self.after, *self.retrained])
        object.__setattr__(self, "deleted", read_samples(self.deleted))
        if self.others is not None:
            object.__setattr__(self, "others", read_samples(self.others))
            check_apart([self.deleted], [self.others], "deleted", "not deleted")


def as_pairs(pairs: Pair | Iterable[Pair]) -> list[Pair]:
    """One pair or several as a list.

    Raises:
        DataError: If there is none, or something else among them.
    """
    listed = [pairs] if isinstance(pairs, Pair) else list(pairs)
    wrong = next((x for x in listed if not isinstance(x, Pair)), None)
    if wrong is not None or not listed:
        got = "no pair" if wrong is None else f"a {type(wrong).__name__}"
        raise DataError(got, "a Pair of models, or several", "Pass Pair(before, after, deleted).")
    if len({id(pair) for pair in listed}) < len(listed):
        got, fix = "a pair twice", "Pass each pair once: it counts once."
        raise DataError(got, "different pairs", fix)
    if len({len(pair.retrained) > 0 for pair in listed}) > 1:
        got = "pairs with retrained models, and pairs without"
        raise DataError(got, "a yardstick for all of them or for none", "Pass `retrained` to all.")
    return listed


def check_models(before: Model, after: Model) -> None:
    """Refuse the same model twice, and modules of different architecture.

    Functions are told apart by what they are only; their answers must have the same classes.
    """
    fix = "Pass the model before the deletion and the one after it."
    for model in (before, after):
        if not callable(model):
            got = f"a model of type {type(model).__name__}, which cannot be called"
            expected = "a module, or a function from inputs to predictions"
            raise ModelError(
                got, expected, "Pass its predict_proba (classes) or predict (numbers)."
            )
    if before is after:
        raise ModelError("the same model twice", "the releases before and after", fix)
    if not (isinstance(before, nn.Module) and isinstance(after, nn.Module)):
        return
    kinds, others = ([type(m).__name__ for m in unwrapped(x).modules()] for x in (before, after))
    if kinds != others:
        one, two = next(x for x in zip_longest(kinds, others) if x[0] != x[1])
        got, expected = f"a model with a {one}, and one with a {two} there", "one architecture"
        raise ModelError(got, expected, fix)
    ours, theirs = (unwrapped(m).state_dict() for m in (before, after))
    shapes, sizes = ({k: tuple(x.shape) for k, x in s.items()} for s in (ours, theirs))
    if shapes != sizes:
        name = next(k for k in (*shapes, *sizes) if shapes.get(k) != sizes.get(k))
        both = (s.get(name, "missing") for s in (shapes, sizes))
        got = f"models that differ in {name!r}: {' and '.join(map(str, both))}"
        expected = "two models of one architecture, with the same classes"
        raise ModelError(got, expected, fix)
    if all(torch.equal(x.cpu(), theirs[k].cpu()) for k, x in ours.items()):
        got = "two models with the same weights: nothing was changed between them"
        raise ModelError(got, "the releases before and after", fix)


def check_different(models: Sequence[Model]) -> None:
    """Refuse a second release among the retrained models, and a retrained model twice.

    Raises:
        ModelError: If two are the same object, or have the same weights.
    """
    for i, model in enumerate(models):
        for other in models[:i]:
            same = model is other
            if isinstance(model, nn.Module) and isinstance(other, nn.Module):
                ours, theirs = (unwrapped(m).state_dict() for m in (model, other))
                same = same or (
                    ours.keys() == theirs.keys()
                    and all(torch.equal(x.cpu(), theirs[k].cpu()) for k, x in ours.items())
                )
            if same:
                got = "the same model twice, among the second release and the retrained ones"
                fix = "Pass models that were trained by themselves, each from a seed of its own."
                raise ModelError(got, "different models", fix)


def check_apart(
    first: Iterable[TensorDataset], second: Iterable[TensorDataset], name: str, other: str
) -> None:
    """Refuse samples, inputs and target, that are on both sides.

    Raises:
        DataError: With how many there are.
    """
    known = {row for samples in second for row in _rows(samples)}
    shared = {row for samples in first for row in _rows(samples)} & known
    if shared:
        got = f"{len(shared)} samples that are {name} as well as {other}"
        expected = "samples that can be told apart"
        raise DataError(got, expected, "Leave them, or duplicates of them, out of one side.")


def _rows(samples: TensorDataset) -> list[bytes]:
    """The bytes of each sample."""

    def content(x: Tensor) -> bytes:
        return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return [b"|".join(content(x[i]) for x in samples.tensors) for i in range(len(samples))]
