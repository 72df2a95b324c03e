"""Noise laws: covariance through every structure, calibration, Prop. 4 of Golatkar et al. 2020."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import seeded
from scipy import stats
from scipy.optimize import minimize_scalar
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    Categorical,
    ConfigError,
    Curvature,
    FisherForgetWarning,
    Gaussian,
    NoiseTarget,
    NumericalError,
    calibrate_noise,
    draw_noise,
    estimate_curvature,
    forget,
    newton_step,
)
from fisher_forget import params as P
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.curvature.structures.matrix_free import MatrixFree
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.params import add, flatten, norm, unflatten
from fisher_forget.unlearn import noise
from fisher_forget.unlearn.noise_target import KINDS
from fisher_forget.unlearn.objective import Objective

DRAWS = 6000


def dense(operator: object, like: dict[str, Tensor], p: float) -> Tensor:
    d = sum(v.numel() for v in like.values())
    unit = torch.eye(d, dtype=torch.float64)
    return torch.stack([flatten(operator.power(unflatten(e, like), p)) for e in unit], 1)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "ekfac"])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_covariance(structure: str, exponent: float) -> None:
    """Sample covariance of R draws against s^2 (B + tau I)^-2p.

    For a Gaussian the entry C_ij has standard error sqrt((C_ii C_jj + C_ij^2) / R); 44 * 45 / 2 =
    990 entries in each of 6 cells at z = 5 (two-sided 5.7e-7) give an expected 0.004 false alarms;
    the seed is fixed.
    """
    model, data = prepared("mlp")
    operator = estimate_curvature(model, data, structure=structure).damped(0.05)
    like = oracle.start(model)
    scale = 0.3
    expected = scale**2 * dense(operator, like, -2 * exponent)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [flatten(draw_noise(operator, like, scale, generator, exponent)) for _ in range(DRAWS)]
    )
    found = draws.T @ draws / DRAWS
    spread = ((expected.diag()[:, None] * expected.diag() + expected.square()) / DRAWS).sqrt()
    assert float(((found - expected) / spread).abs().max()) < 5.0
    assert float((draws.mean(0) / (expected.diag() / DRAWS).sqrt()).abs().max()) < 5.0


def test_the_exponent_is_the_minimiser_of_the_forgetting_lagrangian() -> None:
    """Prop. 4: Sigma* = (lambda s_h^2)^(1/2) B^(-1/2) minimises tr(B Sigma)/2 + lambda s_h^2
    tr(Sigma^-1)/2,

    with Sigma B Sigma = lambda s_h^2 I and value sqrt(lambda s_h^2) tr(B^(1/2)).
    """
    model, data = prepared("mlp")
    operator = estimate_curvature(model, data, structure="ekfac").damped(0.05)
    like = oracle.start(model)
    b, strength = dense(operator, like, 1.0), 0.02
    noise_root = dense(operator, like, -0.25) * strength**0.25  # what draw_noise multiplies xi by
    sigma = noise_root @ noise_root.T

    def lagrangian(s: Tensor) -> float:
        return float((b @ s).trace() / 2 + strength / 2 * torch.linalg.inv(s).trace())

    assert torch.allclose(
        sigma @ b @ sigma, strength * torch.eye(len(b), dtype=torch.float64), atol=1e-10
    )
    assert lagrangian(sigma) == pytest.approx(strength**0.5 * float(oracle.power(b, 0.5).trace()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.randn(b.shape, generator=generator, dtype=torch.float64)
        assert lagrangian(
            sigma + 0.02 * float(sigma.trace()) / len(b) * (a @ a.T) / len(b)
        ) > lagrangian(sigma)


STRUCTURES = [
    "diagonal",
    "ekfac",
    "dense",
    "low_rank",
    "matrix_free",
    {"0.*": "dense", "*": "ekfac"},
]


class TestPowerTrace:
    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    @pytest.mark.parametrize("p", [0.5, -0.5, 1.0, -1.0, 0.0])
    def test_equals_the_eigenvalues_of_the_matrix(self, structure: object, p: float) -> None:
        """Of products alone an estimate, within 5 standard errors (2 sum_{i != j} A_ij^2 /
        probes)^1/2 (Hutchinson)."""
        model, data = prepared("mlp")
        plain = estimate_curvature(model, data, structure=structure)
        damped, like = plain.damped(0.05), oracle.start(model)
        values, vectors = torch.linalg.eigh(dense(plain, like, 1.0))
        for factor in (values.clamp(min=0), None):
            each = (values.clamp(min=0) + 0.05) ** p * (1.0 if factor is None else factor)
            matrix = vectors * each @ vectors.T
            off = (matrix - matrix.diag().diag()).square().sum()
            slack = 5 * float((2 * off / 50).sqrt()) if structure == "matrix_free" else 0.0
            found = damped.power_trace(p, times_curvature=factor is not None, probes=50)
            assert found == pytest.approx(float(each.sum()), rel=1e-6, abs=slack)

    def test_the_probes_are_seeded(self) -> None:
        model, data = prepared("mlp")
        damped = estimate_curvature(model, data, structure="matrix_free").damped(0.05)
        one, again, other = (damped.power_trace(0.5, seed=seed) for seed in (3, 3, 4))
        assert one == again != other

    def test_single_precision_is_summed_in_double(self) -> None:
        values = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
        found = Diagonal({"w": values}, tau=1e-3).power_trace(-0.5, times_curvature=True)
        expected = values.numpy().astype(np.float64)
        assert found == pytest.approx(float((expected / np.sqrt(expected + 1e-3)).sum()), rel=1e-12)

    def test_all_eigenpairs_of_a_low_rank_leave_no_rest(self) -> None:
        like = {"w": torch.zeros(2, dtype=torch.float64)}
        full = LowRank(
            basis=torch.eye(2).double(),
            eigenvalues=torch.tensor([4.0, 1.0]).double(),
            delta=0.0,
            like=like,
        )
        assert full.power_trace(-0.5, times_curvature=True) == 3.0


class TestTarget:
    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"loss": 0.1, "accuracy": 0.1}, "at most one of loss, accuracy"),
            ({"information": 1.0, "trade_off": 1.0}, "at most one"),
            ({"loss": 0.0}, "noise=None"),
            ({"loss": -1.0}, "loss=-1.0"),
            ({"loss": "much"}, "loss='much'"),
            ({"loss": True}, "loss=True"),
            ({"loss": float("inf")}, "finite"),
            ({"accuracy": 1.0}, "between 0 and 1"),
            ({"accuracy": 5}, "between 0 and 1"),
            ({"information": float("nan")}, "information=nan"),
            ({"trade_off": [1.0]}, "trade_off"),
            ({"error": 0.0}, "error=0.0"),
        ],
        ids=str,
    )
    def test_refused(self, options: dict[str, Any], word: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(word)) as caught:
            NoiseTarget(**options)
        assert caught.value.fix

    def test_kind(self) -> None:
        assert [NoiseTarget(**{kind: 0.5}).kind for kind in KINDS] == list(KINDS)
        assert NoiseTarget(error=0.1).kind == "loss"

    def test_a_squared_error_is_no_accuracy(self) -> None:
        objective, split, operator = ridge()
        with pytest.raises(ConfigError, match="squared error"):
            calibrate_noise(
                objective, split, operator, objective.start, target=NoiseTarget(accuracy=0.1)
            )
        data = TensorDataset(torch.zeros(9, 2), torch.zeros(9, 1))
        with pytest.raises(ConfigError, match="squared error"):  # before any work
            forget(
                nn.Linear(2, 1),
                data,
                [0],
                likelihood="gaussian",
                noise=NoiseTarget(accuracy=0.1),
                progress=False,
            )


def pieces(structure: object = "ekfac") -> tuple[Objective, Split, Curvature]:
    model, data = prepared("mlp")
    split = resolve_split(data, [], allow_empty=True)
    return (
        Objective(model, Categorical()),
        split,
        estimate_curvature(model, split, structure=structure).damped(0.05),
    )


def ridge(structure: str = "dense") -> tuple[Objective, Split, Curvature]:
    """Least squares at its minimum: the loss is exactly quadratic, with the GGN as its matrix."""
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(80, 5, generator=g, dtype=torch.float64)
        * torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03]).double()
    )
    y = torch.randn(80, 2, generator=g, dtype=torch.float64)
    model = nn.Linear(5, 2, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    split = resolve_split(TensorDataset(x, y), [], allow_empty=True)
    curvature = estimate_curvature(model, split, Gaussian(0.5), structure=structure).damped(0.02)
    return Objective(model, Gaussian(0.5)), split, curvature


def measured(
    objective: Objective, split: Split, operator: Curvature, scale: float, seed: int
) -> tuple[float, float]:
    """Rise of the loss and drop of the accuracy, again, without the search."""
    generator = torch.Generator().manual_seed(seed)
    (batch,) = split.batches("retain")

    def means(at: dict[str, Tensor]) -> tuple[float, float]:
        outputs = torch.func.functional_call(objective.model, at, batch.args)
        hit = (outputs.argmax(-1) == batch.targets).double().mean()
        return float(nn.functional.cross_entropy(outputs, batch.targets)), float(hit)

    loss, score = means(objective.start)
    count = noise.pairs(P.size(objective.start))
    draws = [draw_noise(operator, objective.start, scale, generator) for _ in range(count)]
    noisy = [means(add(objective.start, d, sign)) for d in draws for sign in (1, -1)]
    return np.mean([x for x, _ in noisy]) - loss, score - np.mean([y for _, y in noisy])


class TestCalibration:
    @pytest.mark.parametrize("budget", [1e-4, 1e-2, 0.3])
    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    def test_the_rise_meets_the_loss_from_below(self, budget: float, structure: object) -> None:
        objective, split, operator = pieces(structure)
        found = calibrate_noise(
            objective, split, operator, objective.start, target=NoiseTarget(loss=budget), seed=3
        )
        assert found.target == NoiseTarget(loss=budget)
        assert found.rise <= budget < measured(objective, split, operator, 1.03 * found.scale, 3)[0]
        rise, drop = measured(objective, split, operator, found.scale, 3)
        assert rise == pytest.approx(found.rise)
        assert drop == pytest.approx(found.drop)

    def test_by_default_a_share_of_the_loss(self) -> None:
        objective, split, operator = pieces()
        found = calibrate_noise(objective, split, operator, objective.start)
        loss = objective.mean_loss(split.batches("retain"), objective.start)
        assert found.target.loss == max(0.0002, 0.002 * loss)
        again = calibrate_noise(objective, split, operator, objective.start, target=found.target)
        assert (again.scale, again.rise, again.drop) == (found.scale, found.rise, found.drop)
        assert np.isnan(again.information)  # nobody knows the error

    @pytest.mark.parametrize("allowed", [0.05, 0.2])
    def test_the_drop_meets_the_accuracy_from_below(self, allowed: float) -> None:
        objective, split, operator = pieces()
        labels = torch.cat(
            [f.argmax(-1) for f, _ in objective.forward(split.batches("retain"), objective.start)]
        )
        (batch,) = split.batches("retain")
        split = resolve_split(
            TensorDataset(*batch.args, labels), [], allow_empty=True
        )  # which the model gets all right
        found = calibrate_noise(
            objective,
            split,
            operator,
            objective.start,
            target=NoiseTarget(accuracy=allowed),
            seed=3,
        )
        rise, drop = measured(objective, split, operator, found.scale, 3)
        assert drop == pytest.approx(found.drop)
        assert rise == pytest.approx(found.rise)
        assert found.drop <= allowed
        assert found.scale > 0
        assert (
            measured(objective, split, operator, 1.03 * found.scale, 3)[1] > allowed
        )  # the largest that does

    def test_an_accuracy_that_noise_cannot_reach(self) -> None:
        objective, split, operator = pieces()
        with pytest.raises(ConfigError, match=r"accuracy 0\.99, within which"):
            calibrate_noise(
                objective, split, operator, objective.start, target=NoiseTarget(accuracy=0.99)
            )

    @pytest.mark.filterwarnings("ignore:No step was taken")  # no weight changes anything
    @pytest.mark.parametrize("scale", [0.0, 1e-12])
    def test_a_default_that_no_noise_reaches(self, scale: float) -> None:
        """Outputs that no weight changes, or hardly: nobody asked for a rise of the loss."""

        class Mute(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return scale * super().forward(x)

        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        data, net = TensorDataset(x, torch.arange(30) % 3), seeded(lambda: Mute(4, 3))
        with pytest.warns(FisherForgetWarning, match=r"No noise was added: no scale"):
            result = forget(net, data, [1], progress=False)
        assert result.noise is not None
        assert result.noise.scale == result.noise.norm == 0
        assert "noise      none: no scale reaches loss 0.0022" in str(result)
        with pytest.raises(ConfigError, match="within which noise of any scale stays"):
            forget(net, data, [1], noise=NoiseTarget(loss=0.01), progress=False)

    def test_the_search_ends_below_from_either_side(self) -> None:
        for unknown in (math.nan, 0.0, math.inf):  # it has nowhere to begin
            with pytest.raises(NumericalError, match="scale"):
                noise.largest_scale(lambda s: 1.0, 1.0, unknown)
        assert noise.largest_scale(lambda s: math.inf, 1.0, 1.0) == 0.0
        assert noise.largest_scale(lambda s: 1.0, 1.0, 1.0) == math.inf
        assert 0.97 < noise.largest_scale(lambda s: 0.0 if s <= 1.0 else math.inf, 1.0, 1e4) <= 1.0
        assert 0.97 < noise.largest_scale(lambda s: 0.0 if s <= 1.0 else math.inf, 1.0, 1e-4) <= 1.0

    @pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 20.0, 1e3])
    def test_quadratic_harm_is_found_in_a_few_looks(self, first: float) -> None:
        looks: list[float] = []

        def harm(scale: float) -> float:
            looks.append(scale)
            return 3 * scale**2 + scale**4

        found = noise.largest_scale(harm, 0.7, first)
        assert found <= math.sqrt((math.sqrt(9 + 2.8) - 3) / 2) < 1.024 * found
        assert len(looks) <= 12  # bisection would take up to 21

    def test_a_larger_loss_gives_a_larger_scale(self) -> None:
        objective, split, operator = pieces()
        scales = [
            calibrate_noise(
                objective, split, operator, objective.start, target=NoiseTarget(loss=b)
            ).scale
            for b in (1e-4, 1e-3, 1e-2)
        ]
        assert scales == sorted(scales)
        assert scales[0] > 0

    @pytest.mark.parametrize("structure", ["dense", "matrix_free"])
    @pytest.mark.parametrize("exponent", [0.25, 0.5])
    def test_the_rise_of_a_quadratic_loss(
        self, structure: str, exponent: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """E[rise] = s^2/2 tr(A), A = B (B + tau)^-2p; the mean over R pairs has the variance s^4/2
        tr(A^2) / R, whatever the slope."""
        monkeypatch.setattr(noise, "PAIRS", 400)
        objective, split, operator = ridge(structure)
        b = oracle.ggn(objective.model, *split.base.tensors, objective.likelihood)
        shape = b @ oracle.power(b + 0.02 * torch.eye(len(b)).double(), -2 * exponent)
        target = NoiseTarget(loss=0.01)
        found = calibrate_noise(
            objective, split, operator, objective.start, target=target, exponent=exponent
        )
        expected = found.scale**2 / 2 * float(shape.trace())
        spread = found.scale**2 * float((shape @ shape).trace() / 2 / noise.pairs(10)) ** 0.5
        assert 0.0096 < found.rise <= 0.01
        assert abs(expected - found.rise) < 5 * spread
        assert found.drop == pytest.approx(
            2 * 0.5**2 * found.rise
        )  # the squared error is the loss times 2 sigma^2

    @pytest.mark.parametrize("structure", STRUCTURES, ids=str)
    @pytest.mark.parametrize("exponent", [0.25, 0.5])
    def test_information(
        self, structure: object, exponent: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against the KL between the two Gaussians, averaged over the error's covariance sigma_h^2
        I."""
        objective, split, operator = pieces(structure)
        if structure == "matrix_free":  # as exact as the others: its probes are the coordinates
            monkeypatch.setattr(MatrixFree, "power_trace", exactly)
        target = NoiseTarget(information=40.0, error=0.02)
        found = calibrate_noise(
            objective, split, operator, objective.start, target=target, exponent=exponent, seed=3
        )
        sigma = found.scale**2 * dense(operator, objective.start, -2 * exponent)
        assert 0.02**2 / 2 * float(torch.linalg.inv(sigma).trace()) == pytest.approx(40.0)
        assert 40.0 * (1 - 1e-12) < found.information <= 40.0
        if exponent == 0.25:
            assert (found.rise, found.drop) == pytest.approx(
                measured(objective, split, operator, found.scale, 3)
            )

    def test_information_halves_when_the_scale_grows_by_the_root_of_two(self) -> None:
        objective, split, operator = pieces()
        one, two = (
            calibrate_noise(
                objective,
                split,
                operator,
                objective.start,
                target=NoiseTarget(information=i),
                error=0.1,
            )
            for i in (2.0, 1.0)
        )
        assert two.scale == pytest.approx(2**0.5 * one.scale)
        assert noise.information(2**0.5, 0.3, 7.0) == pytest.approx(
            noise.information(1.0, 0.3, 7.0) / 2
        )
        assert noise.information(0.0, 0.3, 7.0) == float("inf")

    @pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense", "low_rank", "matrix_free"])
    @pytest.mark.parametrize("exponent", [0.25, 0.5])
    def test_the_trade_off_is_the_minimum_of_the_lagrangian(
        self, structure: str, exponent: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        objective, split, operator = pieces(structure)
        if structure == "matrix_free":
            monkeypatch.setattr(MatrixFree, "power_trace", exactly)
        b = dense(operator, objective.start, 1.0)
        shape, plain = oracle.power(b, -2 * exponent), b - 0.05 * torch.eye(len(b)).double()

        def lagrangian(log: float) -> float:
            sigma = np.exp(2 * log) * shape
            return float(
                (plain @ sigma).trace() / 2 + 0.3 * 0.02**2 / 2 * torch.linalg.inv(sigma).trace()
            )

        target = NoiseTarget(trade_off=0.3, error=0.02)
        found = calibrate_noise(
            objective, split, operator, objective.start, target=target, exponent=exponent
        )
        least = minimize_scalar(
            lagrangian, bounds=(-10, 3), method="bounded", options={"xatol": 1e-8}
        )
        assert np.log(found.scale) == pytest.approx(least.x, abs=1e-5)

    def test_the_papers_scale(self) -> None:
        """s = (lambda sigma_h^2)^1/4 at p = 1/4 without damping (Golatkar et al. 2020, Prop. 4)."""
        objective, split, _ = ridge()
        curvature = estimate_curvature(objective.model, split, Gaussian(0.5), structure="dense")
        target = NoiseTarget(trade_off=0.2, error=0.03)
        found = calibrate_noise(objective, split, curvature, objective.start, target=target)
        assert found.scale == pytest.approx((0.2 * 0.03**2) ** 0.25)

    @pytest.mark.parametrize("kind", ["information", "trade_off"])
    def test_an_error_is_needed(self, kind: str) -> None:
        objective, split, operator = pieces()
        with pytest.raises(ConfigError, match=re.escape("NoiseTarget(..., error=...)")):
            calibrate_noise(
                objective, split, operator, objective.start, target=NoiseTarget(**{kind: 1.0})
            )
        own = NoiseTarget(**{kind: 1.0}, error=0.1)
        found = calibrate_noise(objective, split, operator, objective.start, target=own, error=9.0)
        assert found.error == 0.1  # the target's goes first

    def test_without_curvature_there_is_no_trade_off(self) -> None:
        objective, split, _ = pieces()
        flat = Diagonal({name: torch.zeros_like(p) for name, p in objective.start.items()}).damped(
            0.1
        )
        with pytest.raises(NumericalError, match="curvature of zero"):
            calibrate_noise(
                objective,
                split,
                flat,
                objective.start,
                target=NoiseTarget(trade_off=1.0, error=0.1),
            )


class TestTheLinearPart:
    """A model at a minimum with weight decay: the retained loss has a slope there, and one draw's
    rise is mostly that."""

    @staticmethod
    def sloped() -> tuple[Objective, Split, Curvature]:
        """Least squares half-way to zero: quadratic, with a slope of any size."""
        objective, split, curvature = ridge()
        return (
            Objective(P.load(objective.model, P.scale(objective.start, 0.5)), Gaussian(0.5)),
            (split),
            curvature,
        )

    def draws(self, found: float, exponent: float = 0.25) -> np.ndarray:
        """Rises of 2,000 real draws at a scale."""
        objective, split, operator = self.sloped()
        generator, batches = torch.Generator().manual_seed(1), list(split.batches("retain"))
        at = objective.start
        losses = [
            objective.mean_loss(
                batches, add(at, draw_noise(operator, at, found, generator, exponent))
            )
            for _ in range(2000)
        ]
        return np.array(losses) - objective.mean_loss(batches, at)

    @pytest.mark.parametrize("seed", range(6))
    def test_the_expected_rise_meets_the_target(self, seed: int) -> None:
        """The expectation has a closed form, s^2/2 tr(A). n pairs know it to the relative
        standard deviation (2 tr(A^2) / n)^1/2 / tr(A); within four of these, two-sided 6e-5."""
        objective, split, operator = self.sloped()
        target = NoiseTarget(loss=2e-3)
        found = calibrate_noise(
            objective, split, operator, objective.start, target=target, seed=seed
        )
        plain = dense(operator, objective.start, 1.0) - 0.02 * torch.eye(10).double()
        a = plain @ dense(operator, objective.start, -0.5)
        expected = found.scale**2 / 2 * float(a.trace())
        spread = float((2 * (a @ a).trace() / noise.pairs(10)) ** 0.5 / a.trace())
        assert abs(expected / 2e-3 - 1) < 4 * spread + 0.05  # the search ends up to 5 % below
        # four unpaired draws would miss by the slope, which is larger than the target
        slope = objective.gradient(split.batches("retain"), objective.start).mean()
        assert found.scale * norm(operator.power(slope, -0.25)) / 2 > 2e-3

    @pytest.mark.parametrize("loss", [1e-4, 2e-3, 0.05])
    def test_nine_draws_in_ten_are_in_the_range(self, loss: float) -> None:
        """Over calibrations with six seeds, which know the expectation to a tenth each; the share
        of 12,000 draws itself has a standard deviation of .003."""
        objective, split, operator = self.sloped()
        target, inside = NoiseTarget(loss=loss), []
        for seed in range(6):
            found = calibrate_noise(
                objective, split, operator, objective.start, target=target, seed=seed
            )
            rises, (low, high) = self.draws(found.scale), found.rise_range
            inside.append(np.mean((low <= rises) & (rises <= high)))
        assert np.mean(inside) == pytest.approx(0.9, abs=0.06)

    def test_few_weights_take_more_pairs(self) -> None:
        assert [noise.pairs(weights) for weights in (1, 7, 14, 100, 10**6)] == [64, 58, 29, 4, 4]

    def test_at_a_minimum_no_draw_lowers_the_loss(self) -> None:
        objective, split, operator = ridge()
        found = calibrate_noise(objective, split, operator, objective.start)
        assert 0 <= found.rise_range[0] < found.rise < found.rise_range[1]

    def test_quantiles_in_closed_form(self) -> None:
        """Without a slope a scaled chi-square, without degrees a Gaussian; of 100,000 draws."""
        for degrees in (1.0, 4.0, 50.0):
            expected = stats.chi2.ppf((0.05, 0.95), degrees) * 0.3 / degrees
            found = noise.rise_quantiles(0.3, 0.0, degrees)
            assert found == pytest.approx(expected, rel=0.03, abs=1e-4)
        expected = 0.3 + 0.2 * stats.norm.ppf((0.05, 0.95))
        assert noise.rise_quantiles(0.3, 0.2, math.inf) == pytest.approx(expected, abs=5e-3)
        assert np.isnan(noise.rise_quantiles(math.inf, 1.0, 3.0)).all()


def exactly(operator: MatrixFree, p: float, times_curvature: bool = False, **_: object) -> float:
    """What `power_trace` estimates for an operator that only has products."""
    found = dense(operator, operator.like, p)
    plain = dense(operator, operator.like, 1.0) - operator.tau * torch.eye(len(found)).double()
    return float((plain @ found if times_curvature else found).trace())


def test_draws_depend_on_the_generator_alone() -> None:
    model, data = prepared("residual")
    operator = estimate_curvature(model, data).damped(0.1)
    like = oracle.start(model)
    one, two = (
        flatten(draw_noise(operator, like, 1.0, torch.Generator().manual_seed(7))) for _ in range(2)
    )
    other = flatten(draw_noise(operator, like, 1.0, torch.Generator().manual_seed(8)))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_forget_adds_exactly_the_noise_it_reports() -> None:
    model, data = prepared("mlp")
    options: Any = {"steps": 1, "damping": 1.0, "drift": True, "noise": 0.05, "progress": False}
    generator = torch.Generator().manual_seed(7)
    result = forget(model, data, [0, 1], generator=generator, **options)
    assert result.noise is not None
    moved = add(oracle.start(result.model), result.newton.params, -1)
    again = draw_noise(result.noise_curvature(), moved, 0.05, torch.Generator().manual_seed(7))
    assert norm(add(moved, again, -1)) < 1e-12
    lengths = [
        norm(draw_noise(result.noise_curvature(), moved, 0.05)) ** 2 for _ in range(DRAWS // 10)
    ]
    # |noise|^2 has at most the relative standard deviation 2^1/2; five of the mean's
    assert result.noise.norm**2 == pytest.approx(
        np.mean(lengths), rel=5 * (2 / len(lengths)) ** 0.5
    )
    assert result.noise.scale == 0.05
    assert not result.noise.secret
    assert "NOT secret" in str(result)


@pytest.mark.parametrize(
    "target",
    [None, {"loss": 0.01}, {"accuracy": 0.02}, {"information": 100.0}, {"trade_off": 1e-3}],
    ids=str,
)
def test_forget_reports_what_its_noise_does(target: dict[str, float] | None) -> None:
    model, data = prepared("mlp")
    wanted: Any = "auto" if target is None else NoiseTarget(**target)
    result = forget(
        model, data, [0, 1], steps=2, damping=0.1, drift=False, noise=wanted, progress=False
    )
    z = result.noise
    assert z is not None
    assert z.error == result.newton.error
    assert z.information == pytest.approx(result.information(z.scale))
    assert z.information == pytest.approx(4 * result.information(2 * z.scale, error=None))
    assert result.information(z.scale, error=2 * z.error) == pytest.approx(4 * z.information)
    if target is None:
        assert z.target.loss >= 0.001
        assert 0 < z.rise <= z.target.loss
    else:
        assert z.target == wanted
    summary = result.summary()["noise"]
    assert {k: v for k, v in summary["target"].items() if v is not None} == (
        target or {"loss": z.target.loss}
    )
    assert summary["information"] == z.information
    lines = str(result).splitlines()
    line = next(line for line in lines if line.startswith("  reached"))
    reached = f"drop {z.drop:.1e}" if z.target.accuracy else f"loss {z.rise:+.1e}"
    target = f"{z.target.kind} {getattr(z.target, z.target.kind):.2g}"
    assert line.endswith(f" {target}: {reached} expected, by the noise alone")
    promise = "below 1" if z.information < 1 else "1 or more: promises little"
    assert f"  bound      {z.information:.2g} nats ({promise}" in str(result)
    low, high = z.rise_range
    assert low < z.rise < high
    assert f"nine draws in ten: loss {low:+.1e} to {high:+.1e}" in str(result)
    assert summary["rise_range"] == z.rise_range
    assert summary["secret"] is z.secret is True
    assert max(map(len, lines)) <= 100


def test_a_given_scale_has_no_target() -> None:
    model, data = prepared("mlp")
    result = forget(
        model, data, [0, 1], steps=1, damping=1.0, drift=True, noise=0.05, progress=False
    )
    z = result.noise
    assert z.target is None
    assert np.isnan(z.rise)
    assert z.information == pytest.approx(result.information(0.05))
    assert f"bound      {z.information:.2g} nats" in str(result)


@pytest.mark.parametrize("kind", ["information", "trade_off"])
def test_an_error_that_is_not_known(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = prepared("mlp")
    module = sys.modules["fisher_forget.unlearn.forget"]
    monkeypatch.setattr(
        module, "newton_step", lambda *a, **o: replace(newton_step(*a, **o), error=math.nan)
    )
    options: dict[str, Any] = {"steps": 1, "damping": 1.0, "drift": True, "progress": False}
    result = forget(model, data, [0, 1], noise="auto", **options)
    assert np.isnan([result.noise.error, result.noise.information, result.information(1.0)]).all()
    assert result.noise.rise > 0
    assert "bound" not in str(result)
    with pytest.raises(ConfigError, match="whose error is not known"):
        forget(model, data, [0, 1], noise=NoiseTarget(**{kind: 1.0}), **options)
