"""Shadow models: pairs of releases of an attacker's own, from data of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from fisher_forget._util import files
from fisher_forget._util.checks import check_names, is_whole
from fisher_forget._util.isolation import isolated
from fisher_forget.attack.pairs import Pair
from fisher_forget.data.samples import read_samples, take
from fisher_forget.data.split import Indices
from fisher_forget.errors import ConfigError, DataError
from fisher_forget.evaluate.ensemble import TrainOptions, train_members

TrainFn = Callable[[Indices, int], nn.Module]
# from the first release, the indices that it was trained on, and the one of them that is deleted
ForgetFn = Callable[[nn.Module, Indices, int], nn.Module]


@dataclass(frozen=True)
class _Deletion:
    """One sample that is deleted from one of the models.

    Attributes:
        original: Number of the model.
        trained: Indices that this one is trained on.
        deleted: One of them.
        unseen: An index that is not among them.
    """

    original: int
    trained: Indices
    deleted: int
    unseen: int

    @property
    def retained(self) -> Indices:
        """Without the deleted one."""
        return np.setdiff1d(self.trained, [self.deleted])


@isolated()
def shadow_pairs(
    train_fn: TrainFn,
    data: Any,
    *,
    template: nn.Module,
    originals: int = 8,
    deletions: int = 20,
    forget_fn: ForgetFn | None = None,
    seed: int = 0,
    **options: Unpack[TrainOptions],
) -> tuple[Pair, ...]:
    """Train shadow models, or load those that an earlier call has stored.

    Each original is trained on half of the data, drawn at random; then samples are deleted from it,
    each of them by itself.

    Args:
        train_fn: Takes indices into `data` and a seed, and returns a trained model of the
            template's architecture.
        data: Samples of the attacker's own: a data set, or a tuple (inputs, targets).
        template: Gives the architecture; untouched.
        originals: Models that samples are deleted from.
        deletions: Samples that are deleted from each.
        forget_fn: Makes the second release from (the first one, indices it was trained on, the one
            that is deleted), as the owner under attack does. By default the model is trained again.
        seed: Of the choice of samples; trainings have the seeds from here on.
        **options: `folder` to store models in, `fingerprint`, `jobs`, `backend`, `progress` as for
            `train_members`: a killed call goes on where it was.

    Returns:
        A pair for each deletion, with a deleted sample and another one that neither model was
        trained on.

    Raises:
        ConfigError: If a number is out of range, or as for `train_members`.
        DataError: If half of the data is less than the deletions.
        StorageError: As for `train_members`.
    """
    check_names(options, TrainOptions.__annotations__)
    samples = read_samples(data)
    plan = _plan(len(samples), originals, deletions, seed)
    if name := options.get("fingerprint"):  # which stands for the functions, not for the plan
        shape = originals, deletions, seed
        options["fingerprint"] = files.fingerprint(name, *shape, *samples.tensors)
    trainings = [(d.trained, seed + k) for k, d in enumerate(plan[::deletions])]
    if forget_fn is None:
        trainings += [(d.retained, seed + originals + k) for k, d in enumerate(plan)]
    models = _made(
        partial(_trained, train_fn, trainings), len(trainings), "shadow", template, options
    )
    first, second = models[:originals], models[originals:]
    if forget_fn is not None:
        make = partial(_forgotten, forget_fn, first, plan)
        second = _made(make, len(plan), "forgetting", template, options)
    return tuple(
        Pair(first[d.original], after, take(samples, [d.deleted]), take(samples, [d.unseen]))
        for d, after in zip(plan, second, strict=True)
    )


def _plan(samples: int, originals: int, deletions: int, seed: int) -> list[_Deletion]:
    """All deletions, model by model."""
    for name, value, least in (
        ("originals", originals, 1),
        ("deletions", deletions, 1),
        ("seed", seed, 0),
    ):
        if not is_whole(value, least):
            got = f"{name}={value!r}"
            raise ConfigError(got, f"a whole number of at least {least}", f"Correct {name}.")
    half = samples // 2
    if deletions > half:
        got = f"{deletions} deletions from models that are trained on {half} samples"
        raise DataError(got, "fewer than half of the samples", "Pass more data, or delete fewer.")
    rng, plan = np.random.default_rng(seed), []
    for original in range(originals):
        order = rng.permutation(samples)
        trained, unseen = np.sort(order[:half]), order[half:]
        chosen = zip(order[:deletions].tolist(), unseen.tolist(), strict=False)
        plan += [_Deletion(original, trained, *pair) for pair in chosen]
    return plan


def _made(
    make: Callable[[int], nn.Module],
    count: int,
    name: str,
    template: nn.Module,
    options: TrainOptions,
) -> Sequence[nn.Module]:
    folder = options.get("folder")
    place: TrainOptions = {"folder": None if folder is None else Path(folder) / name}
    return train_members(
        make, range(count), template=template, description=name, **(options | place)
    ).models


def _trained(train_fn: TrainFn, trainings: Sequence[tuple[Indices, int]], k: int) -> nn.Module:
    return train_fn(*trainings[k])


def _forgotten(
    forget_fn: ForgetFn, models: Sequence[nn.Module], plan: Sequence[_Deletion], k: int
) -> nn.Module:
    deletion = plan[k]
    return forget_fn(models[deletion.original], deletion.trained, deletion.deleted)
