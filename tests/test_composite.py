"""Published single numbers against hand-computed values and SciPy; their ends of the scale;
refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from outputs import logits, probabilities
from scipy.spatial.distance import jensenshannon

from fisher_forget import DataError, NumericalError
from fisher_forget.evaluate.composite import average_gap, tug_of_war, zrf


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

    def test_ensembles_are_averaged(self) -> None:
        many, one = logits(0, 3, 20, 5), logits(1, 20, 5)
        assert zrf(many, one) == pytest.approx(np.mean([zrf(m, one) for m in many]))

    def test_refusals(self) -> None:
        a = logits(0, 6, 4)
        with pytest.raises(DataError, match="same classes"):
            zrf(a, a[:, :3])
        with pytest.raises(NumericalError, match="NaN"):
            zrf(a, a * math.nan)


class TestRates:
    unlearned = (0.9, 0.98, 0.85, 0.3)  # forget, retain, test, membership attack
    retrained = (0.7, 1.0, 0.95, 0.25)

    def test_by_hand(self) -> None:
        assert tug_of_war(self.unlearned[:3], self.retrained[:3]) == pytest.approx(0.8 * 0.98 * 0.9)
        assert average_gap(self.unlearned, self.retrained) == pytest.approx((20 + 2 + 10 + 5) / 4)

    def test_laws(self) -> None:
        zero, one = (0.0,) * 4, (1.0,) * 4
        for fn, best, worst in ((tug_of_war, 1, 0), (average_gap, 0, 100)):
            assert fn(self.unlearned, self.unlearned) == best
            assert fn(zero, one) == worst
            assert fn(self.unlearned, self.retrained) == fn(self.retrained, self.unlearned)
            assert fn(self.unlearned, self.retrained) != best

    def test_refusals(self) -> None:
        for fn in (tug_of_war, average_gap):
            with pytest.raises(DataError, match="as many of both models"):
                fn(self.unlearned[:3], self.retrained)
            for bad in (94.26, -0.1, math.nan):
                with pytest.raises(DataError, match=r"share in \[0, 1\]"):
                    fn((0.5, bad), (0.5, 0.5))
