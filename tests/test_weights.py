"""Distances, cosines and efficacy: hand-computed values, the dense empirical Fisher, Jensen's
inequality."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import oracle
import pytest
import torch
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import Bernoulli, Categorical, ConfigError, Gaussian, ModelError
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import SplitError
from fisher_forget.evaluate.weights import efficacy, step_cosine, weight_distance
from fisher_forget.likelihood import Likelihood

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def linear(*weights: float) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model


class TestDistance:
    def test_by_hand(self) -> None:
        a, b = linear(4.0, 0.0), linear(1.0, 4.0)
        assert weight_distance(a, b) == pytest.approx(5.0)
        assert weight_distance(a, b, relative=True) == pytest.approx(5 / math.sqrt(17))
        assert weight_distance(b, a, relative=True) == pytest.approx(5 / 4)
        assert weight_distance(a, a) == 0.0

    def test_relative_to_nothing_is_undefined(self) -> None:
        assert math.isnan(weight_distance(linear(1.0), linear(0.0), relative=True))

    def test_frozen_parameters_count_and_buffers_do_not(self) -> None:
        a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        with torch.no_grad():
            b.bias.fill_(3.0)
            b.running_mean.fill_(9.0)
        b.bias.requires_grad_(False)
        assert weight_distance(a, b) == pytest.approx(math.sqrt(18))

    def test_a_small_step_is_not_lost(self) -> None:
        a, b = linear(*[1.0] * 1000).double(), linear(*[1.0] * 1000).double()
        with torch.no_grad():
            b.weight[0, 0] += 2**-40
        assert weight_distance(a, b) == 2**-40

    def test_other_architectures_are_refused(self) -> None:
        for other in (linear(1.0, 2.0, 3.0), nn.Linear(2, 1)):
            with pytest.raises(ModelError, match="same names and shapes"):
                weight_distance(linear(1.0, 2.0), other)


class TestCosine:
    ORIGINAL, SCRUBBED = linear(1.0, 1.0), linear(2.0, 1.0)

    @pytest.mark.parametrize(
        ("retrained", "expected"),
        [
            ((9.0, 1.0), 1.0),
            ((1.0, 3.0), 0.0),
            ((0.5, 1.0), -1.0),
            ((3.0, 3.0), 0.5**0.5),
            ((0.0, 2.0), -(0.5**0.5)),
        ],
    )
    def test_by_hand(self, retrained: tuple[float, float], expected: float) -> None:
        assert step_cosine(self.ORIGINAL, self.SCRUBBED, linear(*retrained)) == pytest.approx(
            expected, abs=1e-12
        )

    def test_several_retrained_models_are_averaged(self) -> None:
        members = [linear(9.0, 1.0), linear(1.0, 3.0), linear(3.0, 3.0)]
        found = step_cosine(self.ORIGINAL, self.SCRUBBED, members)
        assert found == pytest.approx((1 + 0 + 0.5**0.5) / 3)

    def test_a_zero_step_points_nowhere(self) -> None:
        assert math.isnan(step_cosine(self.ORIGINAL, self.ORIGINAL, self.SCRUBBED))
        assert math.isnan(step_cosine(self.ORIGINAL, self.SCRUBBED, [self.SCRUBBED, self.ORIGINAL]))

    def test_no_retrained_model_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="at least one"):
            step_cosine(self.ORIGINAL, self.SCRUBBED, [])
        with pytest.raises(ModelError, match="same architecture"):
            step_cosine(self.ORIGINAL, self.SCRUBBED, linear(1.0))


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, Likelihood]:
    if name in ("mlp", "sequence"):
        model, data = prepared(name)
        return model, *data.tensors, Categorical()
    model, data = prepared("mlp")
    x, y = data.tensors
    hot = nn.functional.one_hot(y, 4).double()
    return model, x, hot, Bernoulli() if name == "bernoulli" else Gaussian(sigma=0.7)


class TestEfficacy:
    @pytest.mark.parametrize("name", ["mlp", "sequence", "bernoulli", "gaussian"])
    def test_against_the_dense_empirical_fisher_and_jensen(
        self, name: str, untouched: Untouched
    ) -> None:
        model, x, y, likelihood = case(name)
        chosen = [0, 2, 3]
        split = resolve_split(TensorDataset(x, y), chosen)
        fisher = oracle.ggn(model, x[chosen], y[chosen], likelihood, empirical=True)
        with untouched(model):
            found = efficacy(model, split, likelihood)
        assert found == pytest.approx(1 / float(fisher.trace()), rel=1e-9)
        mean = (
            likelihood.losses(model(x[chosen]), y[chosen]).sum()
            / likelihood.counts(y[chosen]).sum()
        )
        gradient = torch.autograd.grad(mean, list(model.parameters()))
        assert found <= 1 / sum(float(g.square().sum()) for g in gradient)

    def test_one_forgotten_sample_attains_the_bound(self) -> None:
        model, x, y, likelihood = case("mlp")
        loss = likelihood.losses(model(x[4:5]), y[4:5]).sum()
        square = sum(
            float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters()))
        )
        assert efficacy(model, resolve_split(TensorDataset(x, y), [4])) == pytest.approx(
            1 / square, rel=1e-9
        )

    def test_by_hand(self) -> None:
        """f = w x with w = 2, y = 1, squared error over 2: g = (w x - y) x = 1 at x = 1, and 6 at x
        = 2."""
        data = TensorDataset(
            torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([[1.0], [1.0], [1.0]])
        )
        found = efficacy(linear(2.0).eval(), resolve_split(data, [0, 1]), "gaussian")
        assert found == pytest.approx(1 / ((1 + 36) / 2))

    def test_its_unit_is_the_square_of_the_weights(self) -> None:
        """Weights in a unit 10 times as small are 10 times as large, and efficacy 100 times."""
        model, x, y, _ = case("mlp")
        split = resolve_split(TensorDataset(x, y), [0, 2, 3])
        found = efficacy(model, split)

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = nn.ParameterList(10 * p.detach() for p in model.parameters())

            def forward(self, inputs: Tensor) -> Tensor:
                names = [name for name, _ in model.named_parameters()]
                scaled = dict(zip(names, (p / 10 for p in self.weights), strict=True))
                return torch.func.functional_call(model, scaled, (inputs,))

        assert efficacy(Scaled().eval(), split) == pytest.approx(100 * found, rel=1e-9)

    def test_a_perfect_fit_says_nothing(self) -> None:
        data = TensorDataset(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [0.0]]))
        assert efficacy(linear(2.0).eval(), resolve_split(data, [0]), "gaussian") == math.inf

    def test_nothing_forgotten_is_refused(self) -> None:
        model, x, y, _ = case("mlp")
        with pytest.raises(SplitError, match="without samples"):
            efficacy(model, resolve_split(TensorDataset(x, y), [], allow_empty=True))
