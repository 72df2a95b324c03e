"""Published single numbers against hand-computed values, scikit-learn and SciPy; their ends of the
scale; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cityblock, jensenshannon
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from torch import Tensor

from fisher_forget import DataError, NumericalError
from fisher_forget.evaluate.composite import (
    Rates,
    activation_distance,
    anamnesis_index,
    average_gap,
    efficacy,
    interclass_confusion,
    sape,
    tug_of_war,
    tug_of_war_mia,
    zrf,
)


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(x: Tensor) -> np.ndarray:
    return softmax(x.double().numpy(), axis=-1)


class TestOutputs:
    def test_zrf(self) -> None:
        a, b = logits(0, 40, 5), logits(1, 40, 5)
        distance = jensenshannon(probabilities(a), probabilities(b), base=2, axis=1)
        assert zrf(a, b) == pytest.approx(1 - np.mean(distance**2))
        assert zrf(a, a + 3) == pytest.approx(1.0)
        far = torch.tensor([[900.0, 0.0]]).expand(4, 2)
        assert zrf(far, -far) == 0

    def test_zrf_does_not_depend_on_unused_classes(self) -> None:
        """Averaging over classes, too, would bring 100 classes near 1."""
        a, b = logits(0, 40, 5), logits(1, 40, 5)
        never = torch.full((40, 95), -800.0)
        assert zrf(torch.cat([a, never], 1), torch.cat([b, never], 1)) == pytest.approx(zrf(a, b))

    def test_activation_distance(self) -> None:
        a, b = logits(0, 40, 5), logits(1, 40, 5)
        rows = [cityblock(p, q) for p, q in zip(probabilities(a), probabilities(b), strict=True)]
        assert activation_distance(a, b) == pytest.approx(np.mean(rows))
        assert activation_distance(a, a) == 0
        far = torch.tensor([[900.0, 0.0]])
        assert activation_distance(far, -far) == 2

    def test_ensembles_are_averaged(self) -> None:
        many, one = logits(0, 3, 20, 5), logits(1, 20, 5)
        for fn in (zrf, activation_distance):
            assert fn(many, one) == pytest.approx(np.mean([fn(m, one) for m in many]))

    def test_refusals(self) -> None:
        a = logits(0, 6, 4)
        for fn in (zrf, activation_distance):
            with pytest.raises(DataError, match="same classes"):
                fn(a, a[:, :3])
            with pytest.raises(NumericalError, match="NaN"):
                fn(a, a * math.nan)


class TestRates:
    unlearned = Rates(forget=0.9, retain=0.98, test=0.85, mia=0.3)
    retrained = Rates(forget=0.7, retain=1.0, test=0.95, mia=0.25)

    def test_by_hand(self) -> None:
        assert tug_of_war(self.unlearned, self.retrained) == pytest.approx(0.8 * 0.98 * 0.9)
        assert tug_of_war_mia(self.unlearned, self.retrained) == pytest.approx(0.95 * 0.98 * 0.9)
        assert average_gap(self.unlearned, self.retrained) == pytest.approx((20 + 2 + 10 + 5) / 4)

    def test_laws(self) -> None:
        zero, one = Rates(0, 0, 0, 0), Rates(1, 1, 1, 1)
        for fn, best, worst in ((tug_of_war, 1, 0), (tug_of_war_mia, 1, 0), (average_gap, 0, 100)):
            assert fn(self.unlearned, self.unlearned) == best
            assert fn(zero, one) == worst
            assert fn(self.unlearned, self.retrained) == fn(self.retrained, self.unlearned)
            assert fn(self.unlearned, self.retrained) != best

    def test_refusals(self) -> None:
        assert tug_of_war(Rates(1, 1, 1), Rates(1, 1, 1)) == 1
        for fn in (tug_of_war_mia, average_gap):
            with pytest.raises(DataError, match="mia"):
                fn(Rates(1, 1, 1), self.retrained)
            with pytest.raises(DataError, match="mia"):
                fn(self.retrained, Rates(1, 1, 1))
        for bad in (94.26, -0.1, math.nan):
            with pytest.raises(DataError, match=r"share in \[0, 1\]"):
                Rates(0.5, bad, 0.5)


class TestConfusion:
    def test_equals_scikit_learn(self) -> None:
        rng = np.random.default_rng(0)
        truth, guess = rng.integers(0, 4, 300), rng.integers(0, 4, 300)
        table = confusion_matrix(truth, guess)
        for i, j in ((0, 1), (3, 1)):
            expected = table[i, j] + table[j, i]
            args = torch.from_numpy(guess), torch.from_numpy(truth), i, j
            assert interclass_confusion(*args) == expected
            assert interclass_confusion(*args, rate=True) == pytest.approx(
                expected / table[[i, j]].sum()
            )

    def test_all_swapped_and_none(self) -> None:
        truth = torch.tensor([0, 0, 1, 2])
        assert interclass_confusion(torch.tensor([1, 1, 0, 2]), truth, 0, 1, rate=True) == 1
        assert interclass_confusion(truth, truth, 0, 1, rate=True) == 0
        assert interclass_confusion(truth, truth, 3, 4) == 0

    def test_refusals(self) -> None:
        truth = torch.tensor([0, 1, 2])
        with pytest.raises(DataError, match="twice"):
            interclass_confusion(truth, truth, 1, 1)
        with pytest.raises(DataError, match="no sample of the classes 3 and 4"):
            interclass_confusion(truth, truth, 3, 4, rate=True)
        for wrong in (truth[:2], torch.eye(3), truth.double()):
            with pytest.raises(DataError, match="one class index"):
                interclass_confusion(wrong, truth, 0, 1)
            with pytest.raises(DataError, match="one class index"):
                interclass_confusion(truth, wrong, 0, 1)


class TestScalars:
    def test_efficacy(self) -> None:
        assert efficacy(4.0) == 0.25
        assert efficacy(0.0) == math.inf
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(DataError, match="trace="):
                efficacy(bad)

    def test_anamnesis_index(self) -> None:
        assert anamnesis_index(3, 12) == 0.25
        assert anamnesis_index(0, 12) == 0
        with pytest.raises(DataError, match="positive time"):
            anamnesis_index(3, 0)
        for bad in ((-1, 2), (1, -2), (math.nan, 1), (1, math.inf)):
            with pytest.raises(DataError, match="relearn_"):
                anamnesis_index(*bad)

    def test_sape(self) -> None:
        assert sape(0.9, 0.6) == pytest.approx(20.0)
        assert sape(0.6, 0.9) == pytest.approx(20.0)
        assert sape(0.0, 0.0) == 0
        assert sape(0.0, 0.5) == 100
        assert sape(-0.5, 0.5) == 100
        assert sape(-0.9, -0.6) == pytest.approx(20.0)
        for bad in ((math.nan, 1.0), (1.0, math.inf)):
            with pytest.raises(DataError, match="finite"):
                sape(*bad)
