"""Divergences against SciPy and hand-computed values; laws; the floor against all pairs; Gaussian
fits; refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax
from torch import Tensor

from fisher_forget import Categorical, ConfigError, DataError, NumericalError
from fisher_forget.evaluate import divergence
from fisher_forget.evaluate.divergence import (
    agreement,
    floor,
    gaussian_floor,
    gaussian_kl,
    jensen_shannon,
    kl,
    per_class,
    total_variation,
)

ALL = [kl, jensen_shannon, total_variation, agreement]


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(x: Tensor) -> np.ndarray:
    return softmax(x.double().numpy(), axis=-1)


class TestPerSample:
    def test_equals_scipy(self) -> None:
        p, q = logits(0, 50, 4), logits(1, 50, 4)
        a, b = probabilities(p), probabilities(q)
        np.testing.assert_allclose(kl(p, q), rel_entr(a, b).sum(1), rtol=1e-10)
        np.testing.assert_allclose(
            jensen_shannon(p, q), jensenshannon(a, b, base=2, axis=1) ** 2, rtol=1e-9
        )
        np.testing.assert_allclose(total_variation(p, q), np.maximum(a - b, 0).sum(1), rtol=1e-10)
        np.testing.assert_array_equal(agreement(p, q), a.argmax(1) == b.argmax(1))
        assert 0 < float(agreement(p, q).mean()) < 1

    def test_by_hand(self) -> None:
        """p = (1/2, 1/2) and q = (3/4, 1/4)."""
        p, q = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
        assert float(kl(p, q)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
        assert float(kl(q, p)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
        assert float(total_variation(p, q)) == pytest.approx(0.25)
        bits = [x * math.log2(x) for x in (0.625, 0.375, 0.75, 0.25)]
        assert float(jensen_shannon(p, q)) == pytest.approx(
            -bits[0] - bits[1] - (1 - bits[2] - bits[3]) / 2
        )
        assert float(agreement(p, q)) == 1  # the first of tied classes counts
        assert float(agreement(p, -q)) == 0

    def test_kl_is_that_of_the_likelihood(self) -> None:
        p, q = logits(0, 20, 4), logits(1, 20, 4)
        torch.testing.assert_close(kl(p, q), Categorical().kl(p, q))

    def test_bounds_and_symmetry(self) -> None:
        p, q = logits(0, 200, 5, scale=30.0), logits(1, 200, 5, scale=30.0)
        for fn in (jensen_shannon, total_variation):
            values = fn(p, q)
            assert float(values.min()) >= 0
            assert float(values.max()) <= 1
            torch.testing.assert_close(values, fn(q, p), rtol=0, atol=1e-14)
        far = torch.tensor([[800.0, 0.0]])
        assert float(jensen_shannon(far, -far)) == 1 == float(total_variation(far, -far))
        assert float(kl(far, -far)) == pytest.approx(800)
        # Pinsker: KL >= 2 TV^2; Lin: JS in bits <= TV
        assert bool((kl(p, q) >= 2 * total_variation(p, q) ** 2 - 1e-12).all())
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
        inner = divergence._kl

        def spy(p: Tensor, q: Tensor) -> Tensor:
            seen.append(max(p.numel(), q.numel()))
            return inner(p, q)

        monkeypatch.setattr(divergence, "_kl", spy)
        monkeypatch.setattr(divergence, "CHUNK", 600)
        kl(logits(0, 5, 100, 10), logits(1, 100, 10))
        assert max(seen) == 600
        assert sum(seen) == 5000

    def test_refusals(self) -> None:
        p = logits(0, 6, 4)
        for other in (p[:, :3], p[:5], logits(1, 2, 6, 3), logits(1, 2, 5, 4)):
            with pytest.raises(DataError, match="same samples over the same classes"):
                kl(p, other)
        with pytest.raises(DataError, match="as many models"):
            kl(logits(0, 2, 6, 4), logits(0, 3, 6, 4))
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


class TestFloor:
    def test_is_the_mean_over_all_ordered_pairs(self) -> None:
        """2,000 halvings of 5 models, 4 pairs each, reach the mean over the 20 ordered pairs.

        A halving's mean has a standard deviation below that of the 20 values, so 4.5 of them /
        sqrt(2000) is a false alarm below 7e-6; the seed is fixed.
        """
        ensemble = logits(0, 5, 8, 3)
        pairs = torch.stack([kl(a, b) for a, b in itertools.permutations(ensemble, 2)])
        found = floor(ensemble, kl, seed=1, halvings=2000)
        error = float(pairs.mean(1).std()) / math.sqrt(2000)
        assert found.mean == pytest.approx(float(pairs.mean()), abs=4.5 * error)
        torch.testing.assert_close(found.values, pairs.mean(0), rtol=0.1, atol=0.0)
        assert found.mean == pytest.approx(float(found.values.mean()))
        assert found.members == 5
        means = [
            np.mean(
                [
                    float(kl(a, b).mean() + kl(b, a).mean()) / 2
                    for j, b in enumerate(ensemble)
                    if j != i
                ]
            )
            for i, a in enumerate(ensemble)
        ]
        assert found.std == pytest.approx(np.std(means, ddof=1), rel=0.1)

    def test_two_and_three_members(self) -> None:
        ensemble = logits(0, 3, 8, 3)
        a, b = ensemble[:2]
        found = floor(ensemble[:2], kl)
        torch.testing.assert_close(found.values, (kl(a, b) + kl(b, a)) / 2)
        assert math.isnan(found.std)
        assert math.isnan(floor(ensemble, kl, halvings=1).std)  # one of three sat out
        assert floor(logits(0, 4, 8, 3), kl, halvings=1).std > 0  # all four took part

    def test_no_model_meets_itself(self) -> None:
        ensemble = torch.stack(
            [50.0 * torch.eye(6)[i].expand(4, 6) for i in range(6)]
        )  # six disjoint answers
        found = floor(ensemble, total_variation, halvings=3)
        assert found.mean == pytest.approx(1.0)
        assert found.std == pytest.approx(0.0, abs=1e-12)

    def test_seed_and_global_state(self) -> None:
        ensemble = logits(0, 6, 8, 3)
        state, before = torch.random.get_rng_state(), ensemble.clone()
        first = floor(ensemble, jensen_shannon, seed=3)
        assert first.mean == floor(ensemble, jensen_shannon, seed=3).mean
        assert first.mean != floor(ensemble, jensen_shannon, seed=4).mean
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(ensemble, before)

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match="at least 2 models"):
            floor(logits(0, 1, 8, 3), kl)
        with pytest.raises(DataError, match="3 dimensions"):
            floor(logits(0, 8, 3), kl)
        with pytest.raises(ConfigError, match="halvings=0"):
            floor(logits(0, 4, 8, 3), kl, halvings=0)


class TestGaussian:
    def test_equals_the_integral(self) -> None:
        p, q = logits(0, 9, 3).double(), 1.0 + logits(1, 7, 3, scale=1.0).double()
        for n, found in enumerate(gaussian_kl(p, q)):
            a, b = (stats.norm(float(x.mean()), float(x.std())) for x in (p[:, n], q[:, n]))
            wide = a.mean() - 12 * a.std(), a.mean() + 12 * a.std()
            expected = integrate.quad(lambda t: a.pdf(t) * (a.logpdf(t) - b.logpdf(t)), *wide)[0]  # noqa: B023
            assert float(found) == pytest.approx(expected, rel=1e-6)

    def test_laws(self) -> None:
        p, q = logits(0, 9, 5).double(), logits(1, 9, 5).double()
        assert float(gaussian_kl(p, p.flip(0)).max()) < 1e-12
        torch.testing.assert_close(gaussian_kl(3 * p - 2, 3 * q - 2), gaussian_kl(p, q))
        assert not torch.allclose(gaussian_kl(p, q), gaussian_kl(q, p), rtol=0.01)

    @pytest.mark.parametrize(("models", "oracles"), [(20, 20), (10, 40), (40, 10)])
    def test_floor_by_simulation(self, models: int, oracles: int) -> None:
        """Mean of 20,000 samples within 4.5 standard errors: false alarms below 7e-6 a case."""
        values = gaussian_kl(
            logits(5, models, 20_000).double() + 3, logits(6, oracles, 20_000).double() + 3
        )
        error = float(values.std()) / math.sqrt(len(values))
        assert gaussian_floor(models, oracles) == pytest.approx(
            float(values.mean()), abs=4.5 * error
        )
        assert error < 0.02 * gaussian_floor(models, oracles)

    def test_floor_of_many_models(self) -> None:
        assert gaussian_floor(1000, 1000) == pytest.approx(2 / 1000, rel=0.01)

    def test_refusals(self) -> None:
        p = logits(0, 4, 5)
        flat = p.clone()
        flat[:, 2] = 1.0
        for a, b in ((p, flat), (flat, p)):
            with pytest.raises(DataError, match="1 sample"):
                gaussian_kl(a, b)
        for a, b in ((p, p[:1]), (p[:1], p), (p, p[:, :4]), (p, p[0]), (p, p.long())):
            with pytest.raises(DataError, match="at least 2 models each"):
                gaussian_kl(a, b)
        with pytest.raises(NumericalError, match="NaN"):
            gaussian_kl(p, p * math.nan)
        for sizes in ((1, 4), (2, 3)):
            with pytest.raises(DataError, match="at least 2 and 4"):
                gaussian_floor(*sizes)
