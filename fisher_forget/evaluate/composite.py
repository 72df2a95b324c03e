"""Published single numbers, from outputs and rates that are already there.

The target of each is its value for a retrained model, not its end of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fisher_forget.errors import DataError
from fisher_forget.evaluate.divergence import jensen_shannon


def zrf(model: Tensor, random_teacher: Tensor) -> float:
    """Zero-retrain forgetting 1 - mean_n JS(model || random teacher), JS in bits, so in [0, 1].

    1: the model answers on the forgotten samples as an untrained network does; a value above the
    retrained model's is too random. Chundawat et al. 2023, arXiv:2205.08096, whose public code
    averages over samples *and* classes, which is nearer to 1 the more classes there are.

    Args:
        model: Logits of the forgotten samples [N, C] or [M, N, C].
        random_teacher: Logits of a model with random weights.

    Raises:
        DataError: If shapes or classes differ.
        NumericalError: If logits are not finite.
    """
    return 1 - float(jensen_shannon(model, random_teacher).mean())


def tug_of_war(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """prod_i (1 - |a_i - b_i|) over the accuracies on forgotten, retained and test samples: 0 to 1.

    Zhao et al. 2024, arXiv:2406.01257; with the success of a membership attack in place of the
    first accuracy it is ToW-MIA (arXiv:2410.16516).

    Args:
        unlearned: Rates of the unlearned model, shares in [0, 1].
        retrained: The same rates of a retrained model.

    Raises:
        DataError: If a rate is not within [0, 1], or the numbers of rates differ.
    """
    return math.prod(1 - gap for gap in _gaps(unlearned, retrained))


def average_gap(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """mean_i |a_i - b_i| in percentage points, 0 to 100, over the accuracies on forgotten, retained
    and test samples and the success of a membership attack on the forgotten ones.

    Fan et al. 2024 (SalUn), arXiv:2310.12508.

    Args:
        unlearned: Rates of the unlearned model, shares in [0, 1].
        retrained: The same rates of a retrained model.

    Raises:
        DataError: If a rate is not within [0, 1], or the numbers of rates differ.
    """
    gaps = _gaps(unlearned, retrained)
    return 100 * math.fsum(gaps) / len(gaps)


def _gaps(unlearned: Sequence[float], retrained: Sequence[float]) -> list[float]:
    if len(unlearned) != len(retrained) or not all(0 <= x <= 1 for x in (*unlearned, *retrained)):
        got, fix = f"the rates {list(unlearned)} and {list(retrained)}", "Divide per cent by 100."
        raise DataError(got, "as many of both models, each a share in [0, 1]", fix)
    return [abs(a - b) for a, b in zip(unlearned, retrained, strict=True)]
