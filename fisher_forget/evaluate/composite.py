r"""Published single numbers, from outputs, predictions and rates that are already there.

Unless said otherwise the target of each is its value for a retrained model, not its end of the
scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import Tensor

from fisher_forget.errors import DataError
from fisher_forget.evaluate.divergence import check_targets, jensen_shannon, total_variation


@dataclass(frozen=True)
class Rates:
    """What `tug_of_war` and `average_gap` compare: shares in [0, 1], not per cent.

    Attributes:
        forget: Accuracy on the forgotten samples (the "unlearning accuracy" UA is 1 - forget).
        retain: Accuracy on the retained samples (RA).
        test: Accuracy on test samples (TA).
        mia: Success of a membership attack on the forgotten samples; for `average_gap` as published
            the share of them that the attack calls non-members.

    Raises:
        DataError: If a rate is not within [0, 1].
    """

    forget: float
    retain: float
    test: float
    mia: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= 1:
                raise DataError(
                    f"{field.name}={value}", "a share in [0, 1]", "Divide per cent by 100."
                )


def zrf(model: Tensor, random_teacher: Tensor) -> float:
    """Zero-retrain forgetting 1 - mean_n JS(model || random teacher), JS in bits, so in [0, 1].

    1: the model answers on the forgotten samples as an untrained network does. Target: the
    retrained model's value against the same teacher; above it the model is too random. Chundawat et
    al. 2023, arXiv:2205.08096, whose public code averages over samples *and* classes, which is
    nearer to 1 the more classes there are.

    Args:
        model: Logits of the forgotten samples [N, C] or [M, N, C].
        random_teacher: Logits of a model with random weights.

    Raises:
        DataError: If shapes or classes differ.
        NumericalError: If logits are not finite.
    """
    return 1 - float(jensen_shannon(model, random_teacher).mean())


def activation_distance(model: Tensor, retrained: Tensor) -> float:
    """Mean over samples of sum_c |p_c - q_c|, p and q softmax outputs: 0 to 2, symmetric, twice the
    total variation.

    Target: its value between two retrained models (`floor`). Golatkar et al. 2021,
    arXiv:2012.13431.

    Args:
        model: Logits [N, C] or [M, N, C].
        retrained: Logits of the same samples and classes.

    Raises:
        DataError: If shapes or classes differ.
        NumericalError: If logits are not finite.
    """
    return 2 * float(total_variation(model, retrained).mean())


def tug_of_war(unlearned: Rates, retrained: Rates) -> float:
    """(1 - |forget - forget'|) (1 - |retain - retain'|) (1 - |test - test'|), the primed rates
    retrained: 0 to 1.

    Target: 1 (or what another retrained model scores). Zhao et al. 2024, arXiv:2406.01257.
    """
    return math.prod(1 - _gap(unlearned, retrained, name) for name in ("forget", "retain", "test"))


def tug_of_war_mia(unlearned: Rates, retrained: Rates) -> float:
    """As `tug_of_war`, with the attack's success `mia` instead of the accuracy on the forgotten
    samples: 0 to 1.

    Target: 1. Zhao et al. 2024, arXiv:2410.16516.

    Raises:
        DataError: If a `mia` is missing.
    """
    return math.prod(1 - _gap(unlearned, retrained, name) for name in ("mia", "retain", "test"))


def average_gap(unlearned: Rates, retrained: Rates) -> float:
    """Mean of |UA - UA'|, |RA - RA'|, |TA - TA'| and |MIA - MIA'| in percentage points: 0 to 100.

    Target: 0 (or what another retrained model scores). Fan et al. 2024 (SalUn), arXiv:2310.12508.

    Raises:
        DataError: If a `mia` is missing.
    """
    return 25 * math.fsum(
        _gap(unlearned, retrained, name) for name in ("forget", "retain", "test", "mia")
    )


def interclass_confusion(
    predictions: Tensor, targets: Tensor, i: int, j: int, *, rate: bool = False
) -> float:
    """C_ij + C_ji: samples of class i taken for j, and of j for i, once samples with swapped labels
    were forgotten.

    Target: the retrained model's value; a model that still believes the swapped labels exceeds it.
    Goel et al. 2022, arXiv:2201.06640.

    Args:
        predictions: Predicted classes [N].
        targets: True classes [N], before any swap.
        i: One of the two classes.
        j: The other.
        rate: Divide by the number of samples of both classes: 0 to 1.

    Raises:
        DataError: If shapes differ, i equals j, or a rate is asked for where neither class occurs.
    """
    check_targets(targets, len(targets) if targets.dim() else 0)
    check_targets(predictions, len(targets))
    if i == j:
        raise DataError(
            f"class {i} twice",
            "two different classes",
            "Name the two classes whose labels were swapped.",
        )
    confused = int(
        (((targets == i) & (predictions == j)) | ((targets == j) & (predictions == i))).sum()
    )
    if not rate:
        return float(confused)
    total = int(((targets == i) | (targets == j)).sum())
    if not total:
        raise DataError(
            f"no sample of the classes {i} and {j}",
            "at least one",
            "Pass true classes of these samples.",
        )
    return confused / total


def efficacy(trace: float) -> float:
    """1 / tr I(w; D_f) with the empirical Fisher information of the forgotten samples; infinite
    where it vanishes.

    Larger is less information about them. Target: the retrained model's value. Becker and Liebig
    2022, arXiv:2208.10836.

    Args:
        trace: Mean over the forgotten samples of the squared norm of the gradient of the
            log-likelihood.

    Raises:
        DataError: If it is negative or not finite.
    """
    _nonnegative(trace=trace)
    return 1 / trace if trace else math.inf


def anamnesis_index(relearn_unlearned: float, relearn_retrained: float) -> float:
    """Relearning time of the unlearned over that of the retrained model. Target: 1; below 1
    something was still known.

    Chundawat et al. 2023, arXiv:2201.05629.

    Args:
        relearn_unlearned: Steps until the accuracy on the forgotten samples is within 5 % of the
            original model's.
        relearn_retrained: The same for the retrained model; positive.

    Raises:
        DataError: If a time is negative or not finite, or the retrained model's is 0.
    """
    _nonnegative(relearn_unlearned=relearn_unlearned, relearn_retrained=relearn_retrained)
    if not relearn_retrained:
        raise DataError(
            "relearn_retrained=0",
            "a positive time",
            "The retrained model knows it already: count finer steps.",
        )
    return relearn_unlearned / relearn_retrained


def sape(a: float, b: float) -> float:
    """Symmetric absolute percentage error 100 |a - b| / (|a| + |b|): 0 to 100, 0 where both are 0.

    Target: 0 (or what two retrained models score). With test accuracies it is AccErr, with
    accuracies on the forgotten samples AccDis. Mahadevan and Mathioudakis 2021, arXiv:2106.15093.

    Raises:
        DataError: If a value is not finite.
    """
    _finite(a=a, b=b)
    return 100 * abs(a - b) / (abs(a) + abs(b)) if a or b else 0.0


def _gap(unlearned: Rates, retrained: Rates, name: str) -> float:
    ours, theirs = getattr(unlearned, name), getattr(retrained, name)
    if ours is None or theirs is None:
        raise DataError(
            f"rates without {name}",
            f"{name} of both models",
            "Run a membership attack on both models.",
        )
    return abs(float(ours) - float(theirs))


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise DataError(f"{name}={value}", "a finite number", "Check where it comes from.")


def _nonnegative(**values: float) -> None:
    _finite(**values)
    for name, value in values.items():
        if value < 0:
            raise DataError(
                f"{name}={value}", "a number of at least 0", "Check where it comes from."
            )
