r"""Choosing the hyper-parameters of a method as its user must: without any retrained model.

A setting is judged by two numbers in percentage points, whose sum is to be small:

    damage     accuracy on unseen samples of what is retained, lost against the original
    memory     a class that is forgotten as a whole: unseen samples of it that are still recognised
               other samples: |2 AUC - 1| of the loss, forgotten samples against unseen samples like
               them (of the same classes; with labels made wrong where they are mislabelled)

since to a model that never saw the forgotten samples they are like unseen ones. Every method may
try equally many settings, its defaults first.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget.baselines.protocol import Unlearner
from fisher_forget.data.samples import samples, take
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.errors import DataError
from fisher_forget.evaluate.predictions import predict
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.forget_sets import other_labels


@dataclass(frozen=True)
class Judgement:
    """What validation data say about a setting; see the module.

    Attributes:
        damage: Percentage points, at least 0.
        memory: Percentage points, at least 0.
    """

    damage: float
    memory: float

    @property
    def total(self) -> float:
        """What is to be small."""
        return self.damage + self.memory


@dataclass(frozen=True)
class Judge:
    """Samples to judge by.

    Attributes:
        forget: The forgotten samples.
        unseen: Validation samples like them.
        kept: Validation samples of the classes that are retained.
        whole: Whether the classes of the forgotten samples are forgotten as a whole.
        accuracy: Of the original model on `kept`.
    """

    forget: TensorDataset
    unseen: TensorDataset
    kept: TensorDataset
    whole: bool
    accuracy: float

    @classmethod
    def of(
        cls,
        original: nn.Module,
        data: DataBundle,
        forget: Indices,
        settings: ForgetSet,
        validation: TensorDataset,
    ) -> Judge:
        """The judge of one forget set.

        Args:
            original: Before forgetting.
            data: Training data.
            forget: Indices of the forget set.
            settings: What kind it is.
            validation: Samples that no model was trained on, and that nothing is reported on.

        Raises:
            DataError: If the validation data have no sample of a kind that is needed.
        """
        targets, labels = data.train.tensors[-1], validation.tensors[-1]
        # a validation sample is like what is forgotten, or like what is retained, by its class
        gone = torch.zeros(len(targets), dtype=torch.bool)
        gone[torch.from_numpy(forget)] = True
        kept, like = torch.isin(labels, targets[~gone]), torch.isin(labels, targets[gone])
        whole = not bool(torch.isin(targets[gone], targets[~gone]).any())
        if settings.kind == "mislabelled":
            wrong = other_labels(labels, len(data.classes), settings.seed)
            unseen = samples(validation[:][0], wrong)
        elif bool(like.any()):
            unseen = take(validation, like)
        else:
            raise _none("what is forgotten")
        if not bool(kept.any()):
            raise _none("what is retained")
        remaining = take(validation, kept)
        return cls(take(data.train, gone), unseen, remaining, whole, _accuracy(original, remaining))

    def __call__(self, model: nn.Module) -> Judgement:
        """Judge a scrubbed model."""
        # a gain of accuracy makes up for no memory
        damage = 100 * max(0.0, self.accuracy - _accuracy(model, self.kept))
        if self.whole:
            return Judgement(damage, 100 * _accuracy(model, self.unseen))
        losses = [_losses(model, part) for part in (self.forget, self.unseen)]
        # 0.5 where losses of forgotten and unseen samples are alike; above and below tell as much
        auc = roc_auc_score(np.repeat([1, 0], [len(x) for x in losses]), np.concatenate(losses))
        return Judgement(damage, 100 * abs(2 * float(auc) - 1))


def settings(
    method: type[Unlearner], trials: int, fixed: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Settings to try: the defaults, then others of the grid in an order drawn once for all by the
    method's name.

    Fields in `fixed` are left alone.
    """
    grid = {name: values for name, values in method.grid.items() if name not in fixed}
    defaults = {name: getattr(method(), name) for name in grid}
    others = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    others = [other for other in others if other != defaults]
    order = np.random.default_rng(zlib.crc32(method.name.encode())).permutation(len(others))
    yield from ([{}] + [others[i] for i in order])[:trials]


def _none(what: str) -> DataError:
    fix = "Raise `validation`, or the test data."
    return DataError(f"no validation sample like {what}", "at least one", fix)


def _predicted(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    return predict(model, resolve_split(data, [], allow_empty=True))


def _accuracy(model: nn.Module, data: TensorDataset) -> float:
    outputs, targets = _predicted(model, data)
    return float((outputs.argmax(-1) == targets).double().mean())


def _losses(model: nn.Module, data: TensorDataset) -> Any:
    outputs, targets = _predicted(model, data)
    losses = torch.nn.functional.cross_entropy(outputs.double(), targets, reduction="none")
    # a ruined model's losses are ranked, too
    return losses.nan_to_num(nan=math.inf, posinf=1e300).clamp(max=1e300).numpy()
