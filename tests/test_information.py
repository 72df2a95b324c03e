"""Information in weights and outputs: explicit matrices, SciPy densities, data-processing
inequality, draws."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import WEIGHT_DECAY, blobs_data, seeded, small_net
from scipy.stats import invwishart, multivariate_normal
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    ConfigError,
    ForgetResult,
    ModelError,
    draw_noise,
    estimate_curvature,
    forget,
)
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import DataError
from fisher_forget.evaluate.information import (
    NoiseLaw,
    gaussian_kl,
    information_in_outputs,
)
from fisher_forget.params import Params, flatten, unflatten

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
STRUCTURES: dict[str, object] = {
    name: name for name in ("diagonal", "ekfac", "dense", "low_rank", "matrix_free")
}
STRUCTURES["mixed"] = {"0.*": "dense", "*": "ekfac"}
TAU, SCALE = 0.05, 0.3


def in_outputs(
    model: nn.Module,
    law: NoiseLaw,
    reference: NoiseLaw,
    split: Split,
    part: Any = "forget",
    **options: Any,
) -> Tensor:
    return information_in_outputs(model, law, reference, split.batches(part), **options)


def shifted(like: Params, length: float, seed: int = 7) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: p + length * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in like.items()
    }


def kl(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray) -> float:
    """Textbook KL between multivariate normals, from explicit matrices."""
    inverse, d = np.linalg.inv(other_cov), mean - other_mean
    logs = np.linalg.slogdet(other_cov)[1] - np.linalg.slogdet(cov)[1]
    return float((d @ inverse @ d + np.trace(inverse @ cov) + logs - len(mean)) / 2)


class Case:
    """A net of 44 weights, a law of its noise, and K = (B + tau I)^-2p as an explicit matrix."""

    def __init__(self, structure: object, exponent: float = 0.25, name: str = "mlp") -> None:
        self.model, data = prepared(name)
        self.x, self.y = data.tensors
        self.split = resolve_split(data, [0, 1, 4])
        like = oracle.start(self.model)
        options = {"rank": 8} if structure == "low_rank" else {}
        damped = estimate_curvature(self.model, data, structure=structure, **options).damped(TAU)
        unit = torch.eye(len(flatten(like)), dtype=torch.float64)
        b = torch.stack([flatten(damped.power(unflatten(e, like), 1.0)) for e in unit], 1)
        self.shape = oracle.power((b + b.T) / 2, -2 * exponent).numpy()
        self.law = NoiseLaw(like, damped, SCALE, exponent)

    def reference(self, scale: float | None = None, length: float = 0.2) -> NoiseLaw:
        return self.law.at(shifted(self.law.mean, length), scale)

    def jacobian(self, n: int) -> np.ndarray:
        like = self.law.mean

        def outputs(w: Tensor) -> Tensor:
            return torch.func.functional_call(
                self.model, unflatten(w, like), (self.x[n : n + 1],)
            ).reshape(-1)

        return torch.autograd.functional.jacobian(outputs, flatten(like)).numpy()

    def outputs(self, mean: Params, n: int) -> np.ndarray:
        return (
            torch.func.functional_call(self.model, mean, (self.x[n : n + 1],))
            .detach()
            .reshape(-1)
            .numpy()
        )


@cache
def case(structure: str, exponent: float = 0.25) -> Case:
    return Case(STRUCTURES[structure], exponent)


structures = pytest.mark.parametrize("structure", STRUCTURES)


def one(mean: float, scale: float, curvature: Diagonal | None = None) -> NoiseLaw:
    like = {"w": torch.tensor([mean], dtype=torch.float64)}
    return NoiseLaw(like, curvature or Diagonal({"w": torch.ones(1, dtype=torch.float64)}), scale)


class TestWeights:
    def test_by_hand(self) -> None:
        law = one(1.0, 1.0)
        assert gaussian_kl(law, law.at({"w": torch.zeros(1)})) == pytest.approx(0.5)
        assert gaussian_kl(
            law.at({"w": torch.zeros(1)}, 2.0), law.at({"w": torch.zeros(1)})
        ) == pytest.approx((4 - 1 - math.log(4)) / 2)
        assert gaussian_kl(law, law.at({"w": torch.zeros(1)}, 2.0)) == pytest.approx(
            (1 / 4 + 1 / 4 - 1 + math.log(4)) / 2
        )
        assert gaussian_kl(law, law) == 0.0

    @structures
    @pytest.mark.parametrize("scale", [None, 0.5, 0.1])
    def test_equals_explicit_matrices(self, structure: str, scale: float | None) -> None:
        for exponent in (0.25, 0.5):
            c = case(structure, exponent)
            law, reference = c.law, c.reference(scale)
            expected = kl(
                flatten(law.mean).numpy(),
                law.scale**2 * c.shape,
                flatten(reference.mean).numpy(),
                reference.scale**2 * c.shape,
            )
            assert gaussian_kl(law, reference) == pytest.approx(expected, rel=1e-5)

    def test_equals_the_mean_log_ratio_of_scipy(self) -> None:
        """E_law[ln law - ln reference] over 6,000 draws of `draw_noise`; within 5 standard errors
        (5.7e-7)."""
        c = case("ekfac")
        law, reference = c.law, c.reference(0.5)
        generator = torch.Generator().manual_seed(0)
        noise = [
            flatten(draw_noise(law.curvature, law.mean, law.scale, generator)) for _ in range(6_000)
        ]
        points = (torch.stack(noise) + flatten(law.mean)).numpy()
        ratio = multivariate_normal(flatten(law.mean).numpy(), SCALE**2 * c.shape).logpdf(points)
        ratio = ratio - multivariate_normal(flatten(reference.mean).numpy(), 0.25 * c.shape).logpdf(
            points
        )
        error = float(ratio.std() / len(ratio) ** 0.5)
        assert error < 0.03 * gaussian_kl(law, reference)
        assert abs(float(ratio.mean()) - gaussian_kl(law, reference)) < 5 * error

    def test_nearly_equal_scales_keep_their_digits(self) -> None:
        """(r - 1 - ln r) / 2 = x^2 / 4 to first order at r = 1 + x, far below rounding of 1."""
        law = one(0.0, (1 + 1e-8) ** 0.5)
        assert gaussian_kl(law, one(0.0, 1.0, law.curvature)) == pytest.approx(
            1e-16 / 4, rel=1e-3, abs=0
        )

    def test_other_shapes_are_refused(self) -> None:
        law = one(1.0, 1.0)
        with pytest.raises(ConfigError, match=r"law\.at"):
            gaussian_kl(law, one(1.0, 1.0))
        with pytest.raises(ConfigError, match=r"law\.at"):
            gaussian_kl(law, replace(law, exponent=0.5))
        for scale in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ConfigError, match="noise scale"):
                law.at(law.mean, scale)
        with pytest.raises(ModelError, match="same architecture"):
            law.at(nn.Linear(2, 1))
        with pytest.raises(ModelError, match="differ in w"):
            law.at({"w": torch.zeros(2)})

    def test_the_second_law_shares_no_memory_with_the_model(self) -> None:
        model = nn.Linear(1, 1, bias=False).double()
        law = NoiseLaw(
            {"weight": torch.zeros(1, 1).double()},
            Diagonal({"weight": torch.ones(1, 1).double()}),
            1.0,
        )
        moved = law.at(model)
        before = moved.mean["weight"].clone()
        with torch.no_grad():
            model.weight += 1
        assert torch.equal(moved.mean["weight"], before)
        assert not moved.mean["weight"].requires_grad


@pytest.fixture(scope="module")
def result(trained: nn.Module) -> ForgetResult:
    generator = torch.Generator().manual_seed(3)
    options: Any = {"weight_decay": WEIGHT_DECAY, "noise": 0.05, "generator": generator}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Retained samples suffered")  # by so much noise
        return forget(trained, blobs_data(), range(5), **options)


class TestResult:
    def test_the_law_is_what_the_noise_was_drawn_from(self, result: ForgetResult) -> None:
        law = NoiseLaw.of(result)
        assert result.noise is not None
        drawn = draw_noise(
            law.curvature, law.mean, law.scale, torch.Generator().manual_seed(3), law.exponent
        )
        found = dict(result.model.named_parameters())
        assert all(torch.equal(law.mean[name] + drawn[name], found[name]) for name in law.mean)

    def test_the_bound_is_the_expected_kl_over_isotropic_errors(self, result: ForgetResult) -> None:
        """E over e ~ (0, sigma^2 I) of KL(h, h + e) is the sum over coordinates of KL(h, h + sigma
        e_i)."""
        law, sigma = NoiseLaw.of(result), 0.02
        flat = flatten(law.mean)
        each = [
            gaussian_kl(law, law.at(unflatten(flat + sigma * e, law.mean)))
            for e in torch.eye(len(flat)).unbind()
        ]
        assert result.noise is not None
        bound = result.information(law.scale, exponent=law.exponent, error=sigma)
        assert bound == pytest.approx(math.fsum(each), rel=1e-3)

    def test_the_default_is_the_number_in_the_result(self, result: ForgetResult) -> None:
        assert result.noise is not None
        bound = result.information(result.noise.scale, exponent=result.noise.exponent)
        assert bound == pytest.approx(result.noise.information)

    def test_without_noise_the_weights_say_everything(self, trained: nn.Module) -> None:
        silent = forget(trained, blobs_data(), range(5), weight_decay=WEIGHT_DECAY, noise=None)
        with pytest.raises(ConfigError, match="without noise"):
            NoiseLaw.of(silent)

    def test_a_retrained_model_end_to_end(self, result: ForgetResult, untouched: Untouched) -> None:
        law = NoiseLaw.of(result)
        retrained = seeded(small_net, 5)
        with untouched(result.model):
            bound = gaussian_kl(law, law.at(retrained))
            found = in_outputs(result.model, law, law.at(retrained), result.split, linearised=True)
        assert found.shape == (5,)
        assert found.dtype == torch.float64
        assert float(found.max()) <= bound
        assert float(found.min()) > 0


class TestOutputs:
    @structures
    @pytest.mark.parametrize("scale", [None, 0.5])
    @pytest.mark.parametrize("linearised", [False, True])
    def test_equals_explicit_matrices(
        self, structure: str, scale: float | None, linearised: bool
    ) -> None:
        c = case(structure)
        law, reference = c.law, c.reference(scale)
        step = flatten(law.mean).numpy() - flatten(reference.mean).numpy()
        found = {
            covariance: in_outputs(
                c.model, law, reference, c.split, covariance=covariance, linearised=linearised
            )
            for covariance in ("full", "diagonal")
        }
        for i, n in enumerate(c.split.forget):
            j = c.jacobian(n)
            shift = (
                j @ step if linearised else c.outputs(law.mean, n) - c.outputs(reference.mean, n)
            )
            full = j @ c.shape @ j.T
            for covariance, gram in (("full", full), ("diagonal", np.diag(np.diag(full)))):
                expected = kl(shift, law.scale**2 * gram, 0 * shift, reference.scale**2 * gram)
                assert float(found[covariance][i]) == pytest.approx(expected, rel=1e-5)

    @structures
    @pytest.mark.parametrize("scale", [None, 0.5])
    def test_outputs_never_say_more_than_weights(self, structure: str, scale: float | None) -> None:
        c = case(structure)
        for length in (1e-3, 1.0):
            reference = c.reference(scale, length)
            found = in_outputs(c.model, c.law, reference, c.split, "all", linearised=True)
            assert found.shape == (9,)
            assert float(found.min()) >= 0
            assert float(found.max()) <= gaussian_kl(c.law, reference) * (1 + 1e-9)

    def test_outputs_that_are_the_weights_say_as_much(self) -> None:
        model = nn.Linear(1, 3).double().eval()
        model.weight.requires_grad_(False)
        data = TensorDataset(torch.zeros(2, 1).double(), torch.tensor([0, 1]))
        like = oracle.start(model)
        law = NoiseLaw(like, Diagonal({"bias": torch.tensor([1.0, 2.0, 3.0]).double()}), 0.4)
        reference = law.at(shifted(like, 1.0), 0.7)
        found = in_outputs(model, law, reference, resolve_split(data, [1]))
        assert float(found) == pytest.approx(gaussian_kl(law, reference), rel=1e-12)

    def test_outputs_that_move_together_count_once_or_as_published_often(self) -> None:
        """Three outputs, all equal to one weight: the full covariance has rank 1."""
        model = Repeated()
        law = NoiseLaw(oracle.start(model), Diagonal({"w": torch.ones(1).double()}), 0.5)
        reference = law.at({"w": torch.zeros(1)}, 0.9)
        split = resolve_split(TensorDataset(torch.ones(2, 1).double(), torch.tensor([0, 1])), [0])
        bound = gaussian_kl(law, reference)
        assert float(in_outputs(model, law, reference, split)) == pytest.approx(bound)
        published = in_outputs(model, law, reference, split, covariance="diagonal")
        assert float(published) == pytest.approx(3 * bound)

    def test_a_difference_that_noise_cannot_make_is_infinite(self) -> None:
        """A unit that is off has no gradient, so no noise hides that another law has it on."""
        model = Repeated(torch.relu, -1.0)
        law = NoiseLaw(oracle.start(model), Diagonal({"w": torch.ones(1).double()}), 0.5)
        split = resolve_split(TensorDataset(torch.ones(2, 1).double(), torch.tensor([0, 1])), [0])
        on = law.at({"w": torch.ones(1)})
        assert float(in_outputs(model, law, on, split)) == math.inf
        assert float(in_outputs(model, law, on, split, linearised=True)) == 0.0
        assert float(in_outputs(model, law, law, split)) == 0.0

    def test_weights_that_outputs_do_not_use_say_nothing(self) -> None:
        """Where no gradient flows, J is zero, and so is what the outputs say, exactly and by
        draws."""
        model = Repeated()
        model.spare = nn.Parameter(torch.ones(1, dtype=torch.float64))
        law = NoiseLaw(
            {"spare": model.spare.detach()}, Diagonal({"spare": torch.ones(1).double()}), 0.5
        )
        split = resolve_split(TensorDataset(torch.ones(2, 1).double(), torch.tensor([0, 1])), [0])
        for options in ({}, {"draws": 9}, {"linearised": True}):
            assert (
                float(in_outputs(model, law, law.at({"spare": torch.zeros(1)}), split, **options))
                == 0.0
            )

    def test_sequences_and_batch_sizes(self, untouched: Untouched) -> None:
        c = Case("diagonal", name="sequence")
        reference = c.reference()
        expected = []
        for n in c.split.indices("all"):
            j, shift = c.jacobian(n), c.outputs(c.law.mean, n) - c.outputs(reference.mean, n)
            gram = SCALE**2 * np.diag(np.diag(j @ c.shape @ j.T))
            expected.append(kl(shift, gram, 0 * shift, gram))
        for size in (1, 2, 256):
            with untouched(c.model):
                found = in_outputs(
                    c.model,
                    c.law,
                    reference,
                    replace(c.split, batch_size=size),
                    "all",
                    covariance="diagonal",
                )
            assert found.tolist() == pytest.approx(expected, rel=1e-9)

    def test_training_mode_changes_nothing(self, untouched: Untouched) -> None:
        c = case("diagonal")
        noisy = nn.Sequential(*copy.deepcopy(c.model), nn.Dropout(0.5)).train()
        with untouched(noisy):
            found = in_outputs(noisy, c.law, c.reference(), c.split)
        assert torch.equal(found, in_outputs(c.model, c.law, c.reference(), c.split))

    def test_refusals(self) -> None:
        c = case("diagonal")
        reference = c.reference()

        def ask(split: Split = c.split, law: NoiseLaw = reference, **options: Any) -> Tensor:
            return in_outputs(c.model, c.law, law, split, **options)

        with pytest.raises(ConfigError, match="covariance="):
            ask(covariance="blocks")
        with pytest.raises(ConfigError, match=r"law\.at"):
            ask(law=replace(reference, exponent=0.5))
        with pytest.raises(DataError, match="without samples"):
            ask(replace(c.split, forget=c.split.forget[:0]))
        for draws in (0, 3, 5, 7.5, True):
            with pytest.raises(
                ConfigError, match="of 4 outputs; expected a whole number of at least 6"
            ):
                ask(draws=draws)
        with pytest.raises(ConfigError, match="at least 3"):
            ask(draws=2, covariance="diagonal")


class Repeated(nn.Module):
    """Three outputs, each fn(w)."""

    def __init__(self, fn: Callable[[Tensor], Tensor] = lambda w: w, start: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.fn = fn
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.w * x).expand(-1, 3)


class TestDraws:
    @pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense"])
    @pytest.mark.parametrize("covariance", ["full", "diagonal"])
    @pytest.mark.parametrize("linearised", [False, True])
    def test_many_draws_come_to_the_exact_number(
        self, structure: str, covariance: Any, linearised: bool
    ) -> None:
        """Relative standard deviation at most (2 / (R - c - 3))^1/2 of each sample; 3 samples at z
        = 5 in 12 cells: 36 * 5.7e-7 = 2e-5 false alarms, and the seed is fixed. Of a sum over
        correlated outputs it is no more.
        """
        c, draws = case(structure), 600
        options: dict[str, Any] = {"covariance": covariance, "linearised": linearised}
        exact = in_outputs(c.model, c.law, c.reference(), c.split, **options)
        found = in_outputs(c.model, c.law, c.reference(), c.split, draws=draws, **options)
        allowed = 5 * (2 / (draws - 4 - 3)) ** 0.5
        assert float((found / exact - 1).abs().max()) < allowed
        assert not torch.equal(found, exact)

    @pytest.mark.parametrize("covariance", ["full", "diagonal"])
    def test_few_draws_are_corrected_for_the_mean_of_an_inverse_wishart(
        self, covariance: Any
    ) -> None:
        """The same draws by hand; R G_drawn is Wishart, of whose inverse SciPy knows the mean."""
        c, draws, size = case("diagonal"), 9, 4 if covariance == "full" else 1
        reference = c.reference(0.5)
        generator, law = torch.Generator().manual_seed(2), c.law
        noise = [
            flatten(draw_noise(law.curvature, law.mean, 1.0, generator)).numpy()
            for _ in range(draws)
        ]
        step = flatten(law.mean).numpy() - flatten(reference.mean).numpy()
        too_large = (
            draws * invwishart(df=draws, scale=np.eye(size)).mean().reshape(size, size)[0, 0]
        )
        ratio = (SCALE / 0.5) ** 2
        found = in_outputs(
            c.model,
            law,
            reference,
            c.split,
            covariance=covariance,
            linearised=True,
            draws=draws,
            seed=2,
        )
        for i, n in enumerate(c.split.forget):
            j = c.jacobian(n)
            y = np.stack(noise) @ j.T
            gram = y.T @ y / draws
            gram = gram if covariance == "full" else np.diag(np.diag(gram))
            quadratic = (j @ step) @ np.linalg.inv(gram) @ (j @ step) / too_large / 0.5**2
            assert float(found[i]) == pytest.approx(
                (quadratic + 4 * (ratio - 1 - math.log(ratio))) / 2, rel=1e-9
            )

    def test_scales_need_no_draws(self) -> None:
        """Of laws with the same mean only the known part is left."""
        c = case("ekfac")
        found = in_outputs(c.model, c.law, c.law.at(c.law.mean, 0.5), c.split, draws=20)
        r = (SCALE / 0.5) ** 2
        assert found.tolist() == pytest.approx([4 * (r - 1 - math.log(r)) / 2] * 3)

    def test_seeds_batches_and_attention(self, untouched: Untouched) -> None:
        c = Case("diagonal", name="sequence")
        reference = c.reference()

        def ask(size: int, seed: int) -> list[float]:
            split = replace(c.split, batch_size=size)
            with untouched(c.model):
                return in_outputs(
                    c.model,
                    c.law,
                    reference,
                    split,
                    "all",
                    covariance="diagonal",
                    draws=9,
                    seed=seed,
                ).tolist()

        assert ask(1, 0) == pytest.approx(ask(256, 0), rel=1e-9)
        assert ask(256, 0) == ask(256, 0)
        assert ask(256, 0) != pytest.approx(ask(256, 1), rel=1e-3)
