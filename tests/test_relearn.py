"""Learning again: closed forms, independent NumPy loops, the order of checks, caps, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from small_models import prepared
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget import ConfigError, NumericalError
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import SplitError
from fisher_forget.evaluate.relearn import relearn_steps, relearn_time

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def linear(weight: Any, bias: float | None = None) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float64)
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        model.weight.copy_(weight)
        if bias is not None:
            model.bias.fill_(bias)
    return model.eval()


def regression(n: int = 30, d: int = 3) -> tuple[np.ndarray, np.ndarray, Split]:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 1))
    return x, y, resolve_split(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), range(5))


class TestTime:
    @pytest.mark.parametrize(("start", "end", "lr", "samples", "batch"), [
        (4.0, 1.0, 0.01, 500, 128), (4.0, 1.0, 0.03, 5, 5), (-2.0, 0.7, 0.01, 7, 3),
        (1.0, 0.999, 0.1, 1, 1),
    ])  # fmt: skip
    def test_closed_form(
        self, start: float, end: float, lr: float, samples: int, batch: int
    ) -> None:
        """All samples are x = 1, y = 0, so that each step multiplies w by 1 - lr, and the loss is
        w^2 / 2."""
        data = TensorDataset(
            torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
        )
        steps = math.ceil(samples / batch)
        expected = math.ceil(math.log(end / abs(start)) / (steps * math.log(1 - lr)))
        found = relearn_time(
            linear([[start]]),
            resolve_split(data, [1, 2]),
            linear([[end]]),
            "gaussian",
            samples=samples,
            batch_size=batch,
            lr=lr,
        )
        assert found.reached
        assert found.epochs == expected
        assert found.published == expected + 1
        assert found.target == pytest.approx(end**2 / 2)
        assert found.losses == pytest.approx(
            [(start * (1 - lr) ** (steps * t)) ** 2 / 2 for t in range(expected + 1)], rel=1e-9
        )
        assert found.losses[-1] <= found.target < found.losses[-2]

    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_against_a_loop_in_numpy(self, weight_decay: float, untouched: Untouched) -> None:
        x, y, split = regression()
        w, lr, rng = np.full((3, 1), 2.0), 0.02, np.random.default_rng(11)
        model = linear(w.T)

        def loss() -> float:
            return float(((x[:5] @ w - y[:5]) ** 2).sum() / 2 / 5)

        losses = [loss()]
        for _ in range(12):
            chosen = rng.choice(30, 25, replace=True)
            for rows in (chosen[:10], chosen[10:20], chosen[20:]):
                w = w - lr * (x[rows].T @ (x[rows] @ w - y[rows]) / len(rows) + weight_decay * w)
            losses.append(loss())
        target = (losses[8] + min(losses[:8])) / 2
        assert losses[8] < target  # the eighth epoch is the first below
        options: dict[str, Any] = {
            "samples": 25,
            "batch_size": 10,
            "lr": lr,
            "weight_decay": weight_decay,
            "seed": 11,
        }
        with untouched(model):
            found = relearn_time(model, split, target, "gaussian", **options)
        assert found.epochs == 8
        assert found.reached
        assert found.losses == pytest.approx(losses[:9], rel=1e-9)
        assert relearn_time(model, split, target, "gaussian", **options) == found
        assert (
            relearn_time(model, split, target, "gaussian", **options | {"seed": 12}).losses
            != found.losses
        )

    def test_the_original_needs_no_epoch(self) -> None:
        model = seeded(small_net)
        split = resolve_split(blobs_data(), range(7))
        found = relearn_time(model, split, seeded(small_net).requires_grad_(False))
        assert (found.epochs, found.published, found.reached) == (0, 1, True)
        assert found.losses == (found.target,)

    def test_a_cap_is_said(self) -> None:
        found = relearn_time(
            seeded(small_net), resolve_split(blobs_data(), range(7)), -1.0, max_epochs=3, samples=8
        )
        assert (found.epochs, found.reached, len(found.losses)) == (3, False, 4)
        found = relearn_time(
            seeded(small_net), resolve_split(blobs_data(), range(7)), -1.0, max_epochs=0
        )
        assert (found.epochs, found.reached) == (0, False)

    def test_a_target_met_by_the_last_epoch_is_reached(self) -> None:
        split = regression()[2]
        free = relearn_time(linear([[2.0] * 3]), split, -1.0, "gaussian", max_epochs=4)
        assert free.losses[4] < min(free.losses[:4])
        found = relearn_time(linear([[2.0] * 3]), split, free.losses[4], "gaussian", max_epochs=4)
        assert (found.epochs, found.reached) == (4, True)

    def test_frozen_parameters_stay(self) -> None:
        """Only the bias learns: f = 1 + b on targets 0, so b + 1 shrinks by 1 - lr a step."""
        data = TensorDataset(
            torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
        )
        model = linear([[1.0]], bias=0.0)
        model.weight.requires_grad_(False)
        found = relearn_time(
            model, resolve_split(data, [0]), -1.0, "gaussian", samples=4, lr=0.1, max_epochs=3
        )
        assert found.losses == pytest.approx([0.9 ** (2 * t) / 2 for t in range(4)])

    def test_training_mode_changes_nothing(self, untouched: Untouched) -> None:
        def build() -> nn.Module:
            return nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
            )

        split = resolve_split(blobs_data(), range(7))
        model = seeded(build)
        still = relearn_time(model, split, -1.0, max_epochs=2, samples=20)
        with untouched(model.train()):
            assert relearn_time(model, split, -1.0, max_epochs=2, samples=20) == still

    def test_divergence_and_bad_options_are_refused(self) -> None:
        split = regression()[2]
        with pytest.raises(NumericalError, match="Lower lr"):
            relearn_time(linear([[2.0] * 3]), split, -1.0, "gaussian", lr=1e6)
        with pytest.raises(SplitError, match="learn again"):
            relearn_time(
                linear([[2.0] * 3]),
                resolve_split(split.base, [], allow_empty=True),
                0.1,
                "gaussian",
            )
        for options in (
            {"samples": 0}, {"batch_size": 1.5}, {"lr": 0.0}, {"lr": math.nan}, {"lr": True},
            {"weight_decay": -1.0}, {"max_epochs": -1}, {"seed": "1"}, {"original": math.nan},
            {"original": "model"},
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=next(iter(options))):
                relearn_time(
                    linear([[2.0] * 3]),
                    split,
                    **{"original": 0.1, "likelihood": "gaussian"} | options,
                )


class Rows(Dataset[Any]):
    """Dict samples, collated with a keyword of their own."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.data[index]
        return {"x": x, "shift": torch.ones(1), "labels": y}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.net(x) + shift - 1


class TestInputs:
    def test_dict_batches_equal_tensors(self) -> None:
        plain, named = blobs_data(), Named().eval()
        split = resolve_split(DataLoader(Rows(plain), batch_size=16), range(7))
        found = relearn_time(named, split, -1.0, max_epochs=2, samples=20)
        expected = relearn_time(
            named.net, resolve_split(plain, range(7)), -1.0, max_epochs=2, samples=20
        )
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)

    def test_sequences_count_scored_positions(self) -> None:
        model, data = prepared("sequence")
        x, y = data.tensors
        found = relearn_time(model, resolve_split(data, [0, 1]), -1.0, max_epochs=1, samples=4)
        kept = y[:2] != -100
        expected = nn.functional.cross_entropy(model(x[:2])[kept], y[:2][kept])
        assert found.losses[0] == pytest.approx(float(expected.detach()), rel=1e-9)
        assert found.losses[1] != found.losses[0]

    def test_bernoulli(self) -> None:
        data = blobs_data()
        hot = TensorDataset(data.tensors[0], nn.functional.one_hot(data.tensors[1], 3))
        split = resolve_split(hot, range(7))
        found = relearn_time(seeded(small_net), split, 0.5, "bernoulli", lr=0.3)
        assert found.reached
        assert 0 < found.epochs < 100
        steps = relearn_steps(seeded(small_net), split, 0.9, "bernoulli", lr=0.3)
        assert steps.reached
        assert steps.steps > 0


class TestSteps:
    def test_against_a_loop_in_numpy(self, untouched: Untouched) -> None:
        """Softmax regression; the original separates its forgotten samples, the start takes each
        for the other."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 2)) + 1.5 * np.repeat([[1.0, 0.0], [-1.0, 0.0]], 20, axis=0)
        y = np.repeat([0, 1], 20)
        forget = [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
        split = resolve_split(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), forget)
        original, start = linear([[3.0, 0.0], [-3.0, 0.0]]), np.array([[-1.0, 0.5], [1.0, -0.5]])
        model, lr, w = linear(start), 0.1, start.copy()

        def accuracy(weights: np.ndarray) -> float:
            return float(np.mean((x[forget] @ weights.T).argmax(1) == y[forget]))

        target = (1 - 0.05) * accuracy(np.array([[3.0, 0.0], [-3.0, 0.0]]))
        expected, order = [accuracy(w)], np.random.default_rng(5)
        while expected[-1] < target and len(expected) < 200:
            shuffled = order.permutation(40)
            for rows in (shuffled[:16], shuffled[16:32], shuffled[32:]):
                if expected[-1] >= target:
                    break
                p = np.exp(x[rows] @ w.T)
                p = p / p.sum(1, keepdims=True) - np.eye(2)[y[rows]]
                w = w - lr * p.T @ x[rows] / len(rows)
                expected.append(accuracy(w))
        assert 3 < len(expected) < 200  # more than one pass over the data
        with untouched(model):
            found = relearn_steps(model, split, original, lr=lr, batch_size=16, seed=5)
        assert found.steps == len(expected) - 1
        assert found.reached
        assert found.target == pytest.approx(target)
        assert found.accuracies == pytest.approx(expected)
        capped = relearn_steps(
            model, split, original, lr=lr, batch_size=16, seed=5, max_steps=found.steps - 1
        )
        assert (capped.steps, capped.reached, capped.accuracies) == (
            found.steps - 1,
            False,
            found.accuracies[:-1],
        )

    def test_the_margin_is_a_share_of_the_original_accuracy(self) -> None:
        split = resolve_split(blobs_data(), range(7))
        assert relearn_steps(seeded(small_net), split, 0.8, max_steps=0).target == pytest.approx(
            0.76
        )
        assert relearn_steps(
            seeded(small_net), split, 0.8, margin=0.5, max_steps=0
        ).target == pytest.approx(0.4)

    def test_a_model_that_knows_needs_no_step(self, trained: nn.Module) -> None:
        found = relearn_steps(trained, resolve_split(blobs_data(), range(7)), trained, margin=0.0)
        assert (found.steps, found.reached, len(found.accuracies)) == (0, True, 1)

    def test_refusals(self) -> None:
        split = regression()[2]
        with pytest.raises(ConfigError, match="squared error"):
            relearn_steps(linear([[2.0] * 3]), split, 0.5, "gaussian")
        split = resolve_split(blobs_data(), range(7))
        for options in (
            {"margin": 1.0},
            {"margin": math.nan},
            {"max_steps": 1.5},
            {"batch_size": 0},
        ):
            with pytest.raises(ConfigError, match=next(iter(options))):
                relearn_steps(seeded(small_net), split, 0.5, **options)
        with pytest.raises(SplitError, match="learn again"):
            relearn_steps(seeded(small_net), resolve_split(blobs_data(), [], allow_empty=True), 0.5)
