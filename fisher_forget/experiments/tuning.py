r"""Choosing the hyper-parameters of a method as its user must: without any retrained model.

A setting is judged by two numbers in percentage points:

    damage     accuracy on unseen samples of what is retained, lost against the original
    memory     a class that is forgotten as a whole: unseen samples of it that are still recognised
               what is known of a fault: share of it that is still given its wrong label
               other samples: |2 AUC - 1| of the loss, forgotten samples against unseen samples like
               them (of the same classes; with labels made wrong where they are mislabelled)

since to a model that never saw the forgotten samples they are like unseen ones.

Of the settings whose damage is at most 2 points (`ALLOWED_DAMAGE`) the one of least memory is
chosen; where there is none, the one of least damage. Ties go to the other number, then to the
setting that was tried first. Their sum would prefer a model that predicts one class whatever it
sees to one that is intact and remembers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget.data.samples import samples, take
from fisher_forget.data.split import Indices, resolve_split
from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.evaluate.predictions import predict
from fisher_forget.experiments.config import ForgetSet
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.forget_sets import other_labels


def held_out(data: DataBundle, share: float) -> tuple[DataBundle, TensorDataset]:
    """The data with fewer test samples, and the validation samples that were taken from them.

    Raises:
        ConfigError: If one of them would have none.
    """
    order = np.random.default_rng(0).permutation(len(data.test))
    cut = round(share * len(order))
    if not 0 < cut < len(order):
        got = f"validation: {share}, which is {cut} of {len(order)} test samples"
        expected = "a share that leaves samples on both sides"
        raise ConfigError(got, expected, "Set validation: 0.5, or load more test samples.")
    test, validation = np.sort(order[cut:]), np.sort(order[:cut])
    return replace(data, test=take(data.test, test)), take(data.test, validation)


@dataclass(frozen=True)
class Judgement:
    """What validation data say about a setting; see the module.

    Attributes:
        damage: Percentage points, at least 0.
        memory: Percentage points, at least 0.
    """

    damage: float
    memory: float


@dataclass(frozen=True)
class Judge:
    """Samples to judge by.

    Attributes:
        forget: The forgotten samples.
        unseen: Validation samples like them; these themselves, where their labels are wrong by a
            fault: no unseen sample is known that has it.
        kept: Validation samples of the classes that are retained.
        whole: Whether no answer to them is to be left: their classes are forgotten as a whole, or
            their labels are those of a fault.
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
        if settings.kind == "fault":
            whole, unseen = True, take(data.train, gone)
        elif settings.kind == "mislabelled":
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
        """Judge a scrubbed model.

        Raises:
            NumericalError: If its outputs are NaN or infinite.
        """
        # a gain of accuracy makes up for no memory; rounded, that 2 points are not 2 + 1e-15
        damage = round(100 * max(0.0, self.accuracy - _accuracy(model, self.kept)), 9)
        if self.whole:
            return Judgement(damage, 100 * _accuracy(model, self.unseen))
        losses = [_losses(model, part) for part in (self.forget, self.unseen)]
        # 0.5 where losses of forgotten and unseen samples are alike; above and below tell as much
        auc = roc_auc_score(np.repeat([1, 0], [len(x) for x in losses]), np.concatenate(losses))
        return Judgement(damage, 100 * abs(2 * float(auc) - 1))


def _none(what: str) -> DataError:
    fix = "Raise `validation`, or the test data."
    return DataError(f"no validation sample like {what}", "at least one", fix)


def _predicted(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    outputs, targets = predict(model, resolve_split(data, [], allow_empty=True))
    if not bool((outputs < math.inf).all()):  # -inf masks a class out
        raise NumericalError("outputs that are NaN or infinite", "finite outputs", "Check it.")
    return outputs, targets


def _accuracy(model: nn.Module, data: TensorDataset) -> float:
    outputs, targets = _predicted(model, data)
    return float((outputs.argmax(-1) == targets).double().mean())


def _losses(model: nn.Module, data: TensorDataset) -> Any:
    outputs, targets = _predicted(model, data)
    losses = torch.nn.functional.cross_entropy(outputs.double(), targets, reduction="none")
    # infinite where the target's class is masked out, and ranked all the same
    return losses.nan_to_num(nan=math.inf, posinf=1e300).clamp(max=1e300).numpy()
