"""Divergences against SciPy and hand-computed values; laws; refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from outputs import logits, probabilities
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from fisher_forget import Categorical, DataError, NumericalError
from fisher_forget.evaluate import divergence
from fisher_forget.evaluate.divergence import (
    agreement,
    jensen_shannon,
    per_class,
    per_sample,
    total_variation,
)

ALL = [jensen_shannon, total_variation, agreement]


class TestPerSample:
    def test_equals_scipy(self) -> None:
        p, q = logits(0, 50, 4), logits(1, 50, 4)
        a, b = probabilities(p), probabilities(q)
        np.testing.assert_allclose(
            jensen_shannon(p, q), jensenshannon(a, b, base=2, axis=1) ** 2, rtol=1e-9
        )
        np.testing.assert_allclose(total_variation(p, q), np.maximum(a - b, 0).sum(1), rtol=1e-10)
        np.testing.assert_array_equal(agreement(p, q), a.argmax(1) == b.argmax(1))
        assert 0 < float(agreement(p, q).mean()) < 1

    def test_by_hand(self) -> None:
        """p = (1/2, 1/2) and q = (3/4, 1/4)."""
        p, q = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        assert float(total_variation(p, q)) == pytest.approx(0.25)
        bits = [x * math.log2(x) for x in (0.625, 0.375, 0.75, 0.25)]
        assert float(jensen_shannon(p, q)) == pytest.approx(
            -bits[0] - bits[1] - (1 - bits[2] - bits[3]) / 2
        )
        assert float(agreement(p, q)) == 1  # the first of tied classes counts
        assert float(agreement(p, -q)) == 0

    def test_bounds_and_symmetry(self) -> None:
        p, q = logits(0, 200, 5, scale=30.0), logits(1, 200, 5, scale=30.0)
        for fn in (jensen_shannon, total_variation):
            values = fn(p, q)
            assert float(values.min()) >= 0
            assert float(values.max()) <= 1
            torch.testing.assert_close(values, fn(q, p), rtol=0, atol=1e-14)
        far = torch.tensor([[800.0, 0.0]])
        assert float(jensen_shannon(far, -far)) == 1 == float(total_variation(far, -far))
        # Lin 1991: JS in bits <= TV; Pinsker: KL >= 2 TV^2
        assert bool((Categorical().kl(p, q) >= 2 * total_variation(p, q) ** 2 - 1e-12).all())
        assert bool((jensen_shannon(p, q) <= total_variation(p, q) + 1e-12).all())

    @pytest.mark.parametrize("fn", ALL)
    def test_equal_models(self, fn: divergence.Divergence) -> None:
        p = logits(0, 30, 4)
        shifted = p.double() + 7.0  # the same distribution
        assert float((fn(p, shifted) - float(fn is agreement)).abs().max()) < 1e-14

    @pytest.mark.parametrize("fn", ALL)
    def test_ensembles_and_chunks(
        self, fn: divergence.Divergence, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        many, one = logits(0, 3, 7, 4), logits(1, 7, 4)
        expected = torch.stack([fn(m, one) for m in many])
        back = torch.stack([fn(one, m) for m in many])
        both = torch.stack([fn(m, n) for m, n in zip(many, many.flip(0), strict=True)])
        for chunk in (2**20, 24, 1):  # all at once, two samples, one sample
            monkeypatch.setattr(divergence, "CHUNK", chunk)
            torch.testing.assert_close(fn(many, one), expected, rtol=0, atol=1e-14)
            torch.testing.assert_close(fn(one, many), back, rtol=0, atol=1e-14)
            torch.testing.assert_close(fn(many, many.flip(0)), both, rtol=0, atol=1e-14)
        assert expected.dtype == torch.float64

    def test_no_more_than_a_chunk_is_held_in_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []

        def spy(p: Tensor, q: Tensor) -> Tensor:
            assert p.dtype == q.dtype == torch.float64
            seen.append(max(p.numel(), q.numel()))
            return (p - q).sum(-1)

        monkeypatch.setattr(divergence, "CHUNK", 600)
        per_sample(spy, logits(0, 5, 100, 10), logits(1, 100, 10))
        assert max(seen) == 600
        assert sum(seen) == 5000

    def test_refusals(self) -> None:
        p = logits(0, 6, 4)
        for other in (p[:, :3], p[:5], logits(1, 2, 6, 3), logits(1, 2, 5, 4)):
            with pytest.raises(DataError, match="same samples over the same classes"):
                agreement(p, other)
        with pytest.raises(DataError, match="as many models"):
            agreement(logits(0, 2, 6, 4), logits(0, 3, 6, 4))
        for wrong in (p[0], p[:, :1], p[:0], p.long(), logits(0, 1, 2, 6, 4)):
            with pytest.raises(DataError, match="floating-point logits"):
                total_variation(wrong, wrong)
        for bad in (math.nan, math.inf):
            broken = p.clone()
            broken[3, 2] = bad
            for fn in ALL:
                with pytest.raises(NumericalError, match="NaN or infinite"):
                    fn(p, broken)
                with pytest.raises(NumericalError, match="NaN or infinite"):
                    fn(broken, p)


class TestPerClass:
    def test_means(self) -> None:
        values = torch.tensor([1.0, 2.0, 3.0, 10.0])
        targets = torch.tensor([4, 0, 4, 0])
        assert per_class(values, targets) == {0: 6.0, 4: 2.0}
        assert per_class(torch.stack([values, 3 * values]), targets) == {0: 12.0, 4: 4.0}

    def test_refusals(self) -> None:
        values = torch.ones(3)
        for targets in (
            torch.tensor([0, 1]),
            torch.tensor([0.0, 1.0, 2.0]),
            torch.tensor([0, -1, 1]),
        ):
            with pytest.raises(DataError, match=r"one class index a sample|class indices from 0"):
                per_class(values, targets)
        with pytest.raises(DataError, match="one class index a sample"):
            per_class(torch.tensor(1.0), torch.tensor([0]))
