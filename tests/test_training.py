from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget.errors import ConfigError, DataError, NumericalError
from fisher_forget.experiments import training
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import SCHEDULES, TrainSettings, augmented, train

FAST = TrainSettings(epochs=3, batch_size=16, lr=0.05)


@pytest.fixture
def blobs() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (65,), generator=generator)
    return TensorDataset(torch.randn(65, 4, generator=generator) + 2 * targets[:, None], targets)


@pytest.fixture
def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(24, 3, 8, 8, generator=generator), torch.arange(24) % 3)


def dropout_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


class TestDeterminism:
    def test_seed_alone_decides(self, blobs):
        first = train(dropout_net(), blobs, FAST, seed=5, progress=False)
        torch.rand(11)
        assert same(first, train(dropout_net(), blobs, FAST, seed=5, progress=False))
        assert not same(first, train(dropout_net(), blobs, FAST, seed=6, progress=False))

    def test_augmentation_too(self, images):
        settings = TrainSettings(epochs=2, batch_size=8, augment=True)
        model = build_model("cnn", (3, 8, 8), 3, seed=0, width=2)
        first = train(model, images, settings, seed=1, progress=False)
        torch.rand(3)
        assert same(first, train(model, images, settings, seed=1, progress=False))

    def test_nothing_given_is_touched(self, blobs):
        model = dropout_net().eval()
        model[3].train()
        before, data = copy.deepcopy(model), [t.clone() for t in blobs.tensors]
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        train(model, blobs, FAST, seed=0, progress=False)
        assert same(model, before)
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(data, blobs.tensors, strict=True))
        assert torch.equal(state, torch.get_rng_state())
        assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002

    def test_random_state_is_put_back_after_an_error(self, blobs):
        state = torch.get_rng_state()
        with pytest.raises(NumericalError, match="Lower lr"):
            train(dropout_net(), blobs, TrainSettings(epochs=50, lr=1e30), seed=0, progress=False)
        assert torch.equal(state, torch.get_rng_state())


class TestTraining:
    def test_one_step_is_the_gradient_step_of_the_mean_loss(self, blobs):
        model = nn.Linear(4, 3)
        settings = TrainSettings(
            epochs=1, batch_size=100, lr=0.1, momentum=0.0, weight_decay=0.01, schedule="constant"
        )
        result = train(model, blobs, settings, seed=0, progress=False)
        loss = nn.functional.cross_entropy(model(blobs.tensors[0]), blobs.tensors[1])
        loss = loss + 0.01 / 2 * sum(p.square().sum() for p in model.parameters())
        for p, grad, q in zip(
            model.parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            result.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(q, p - 0.1 * grad)

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_learns(self, blobs, optimizer, schedule):
        settings = TrainSettings(
            epochs=15, batch_size=16, lr=0.03, optimizer=optimizer, schedule=schedule
        )
        result = train(
            build_model("mlp", (4,), 3, seed=0, hidden=(16,)),
            blobs,
            settings,
            seed=0,
            progress=False,
        )
        assert not any(m.training for m in result.modules())
        assert (result(blobs.tensors[0]).argmax(1) == blobs.tensors[1]).double().mean() > 0.9

    def test_learns_regression(self):
        inputs = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0]]) + 0.5)
        settings = TrainSettings(epochs=40, batch_size=10, lr=0.05, weight_decay=0.0)
        result = train(
            nn.Linear(2, 1), data, settings, seed=0, likelihood="gaussian", progress=False
        )
        torch.testing.assert_close(result.weight, torch.tensor([[1.0, -2.0]]), atol=1e-3, rtol=0)

    def test_indices_equal_the_subset(self, blobs):
        rows = np.array([3, 60, 7, 12, 40])
        part = TensorDataset(*(t[torch.from_numpy(rows)] for t in blobs.tensors))
        expected = train(dropout_net(), part, FAST, seed=0, progress=False)
        for given in (rows, rows.tolist(), torch.from_numpy(rows)):
            assert same(
                expected, train(dropout_net(), blobs, FAST, seed=0, indices=given, progress=False)
            )

    def test_batch_norm_never_sees_a_single_sample(self, blobs):
        assert len(blobs) % 64 == 1
        train(dropout_net(), blobs, TrainSettings(epochs=1, batch_size=64), seed=0, progress=False)

    def test_frozen_parameters_stay(self, blobs):
        model = dropout_net()
        model[0].requires_grad_(False)
        result = train(model, blobs, FAST, seed=0, progress=False)
        assert same(model[0], result[0])
        assert not same(model[4], result[4])

    def test_no_epochs_return_a_copy(self, blobs):
        model = dropout_net()
        result = train(model, blobs, TrainSettings(epochs=0), seed=0, progress=False)
        assert same(model, result)
        assert result is not model

    def test_float64_model_takes_float32_data(self, blobs):
        assert (
            train(nn.Linear(4, 3).double(), blobs, FAST, seed=0, progress=False).weight.dtype
            == torch.float64
        )

    def test_ignored_positions_do_not_count(self):
        inputs, targets = torch.randn(6, 4), torch.tensor([0, 1, -100, 2, -100, 1])
        kept = targets >= 0
        settings = TrainSettings(epochs=1, lr=0.1, momentum=0.0, schedule="constant")
        model = nn.Linear(4, 3)
        a = train(model, TensorDataset(inputs, targets), settings, seed=0, progress=False)
        b = train(
            model, TensorDataset(inputs[kept], targets[kept]), settings, seed=0, progress=False
        )
        torch.testing.assert_close(a.weight, b.weight)

    def test_progress_bar_shows_the_loss(self, blobs, capsys, monkeypatch):
        monkeypatch.setattr(training, "tqdm", partial(training.tqdm, mininterval=0))
        train(dropout_net(), blobs, FAST, seed=0, progress="oracle")
        shown = capsys.readouterr().err
        assert "oracle" in shown
        assert "loss" in shown
        train(dropout_net(), blobs, FAST, seed=0, progress=False)
        assert capsys.readouterr().err == ""


class TestSchedules:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_peak_is_one_and_steps_are_small(self, name):
        rates = np.array([SCHEDULES[name](t) for t in np.linspace(0, 1, 1001)])
        assert rates.max() == pytest.approx(1)
        assert rates.min() >= 0
        assert np.abs(np.diff(rates)).max() < 0.01

    def test_ends(self):
        assert SCHEDULES["cosine"](0) == 1
        assert SCHEDULES["cosine"](1) == pytest.approx(0)
        assert SCHEDULES["onecycle"](0) == pytest.approx(1 / 25)
        assert SCHEDULES["onecycle"](1) == pytest.approx(0)


class TestAugmentation:
    def test_each_image_is_shifted_over_zeros(self):
        image = torch.rand(1, 32, 32) + 1
        moved = augmented(image.expand(200, 1, 32, 32), torch.Generator().manual_seed(0))
        padded = nn.functional.pad(image, (4, 4, 4, 4))
        windows = {
            padded[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)
        }
        seen = {x.numpy().tobytes() for x in moved}
        assert seen <= windows
        assert len(seen) > 50

    def test_colour_images_are_flipped_half_the_time(self):
        image = torch.rand(3, 8, 8)
        moved = augmented(image.expand(2000, 3, 8, 8), torch.Generator().manual_seed(0))
        still = [x for x in moved if torch.equal(x, image)]
        mirrored = [x for x in moved if torch.equal(x, image.flip(2))]
        # a shift of one pixel at most in each direction leaves one image in nine where it was
        assert len(still) == pytest.approx(2000 / 18, rel=0.4)
        assert len(mirrored) == pytest.approx(2000 / 18, rel=0.4)

    def test_grey_images_are_not_flipped(self):
        image = torch.rand(1, 8, 8)
        moved = augmented(image.expand(500, 1, 8, 8), torch.Generator().manual_seed(0))
        assert not any(torch.equal(x, image.flip(2)) for x in moved)


class TestChannelsLast:
    def test_same_mathematics_and_a_model_laid_out_as_before(self):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
        ).double()
        data = TensorDataset(
            torch.randn(40, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (40,))
        )
        plain, fast = (
            train(
                net,
                data,
                TrainSettings(epochs=3, batch_size=8, channels_last=chosen),
                seed=0,
                progress=False,
            )
            for chosen in (False, True)
        )
        for name, value in fast.state_dict().items():
            assert value.is_contiguous()
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-12)
        assert all(
            not torch.equal(a, b) for a, b in zip(net.parameters(), fast.parameters(), strict=True)
        )


class TestRefusals:
    @pytest.mark.parametrize(
        "wrong",
        [
            "epochs=-1.0",
            "batch_size=0.0",
            "lr=0.0",
            "lr=nan",
            "momentum=1.0",
            "weight_decay=-1.0",
            "optimizer='lbfgs'",
        ],
    )
    def test_settings(self, wrong):
        name, value = wrong.split("=")
        with pytest.raises(ConfigError, match=wrong):
            TrainSettings(**{name: value.strip("'") if name == "optimizer" else float(value)})

    @pytest.mark.parametrize("indices", [[], [65], [-1], [0.5], np.ones(65, dtype=bool)])
    def test_indices(self, blobs, indices):
        with pytest.raises(DataError, match="0 to 64"):
            train(dropout_net(), blobs, FAST, seed=0, indices=indices, progress=False)

    def test_divergence(self, blobs):
        with pytest.raises(NumericalError, match="Lower lr"):
            train(nn.Linear(4, 3), blobs, TrainSettings(epochs=20, lr=1e38), seed=0, progress=False)

    def test_nan_inputs(self, blobs):
        blobs.tensors[0][0] = float("nan")
        with pytest.raises(NumericalError, match="check the inputs for NaN"):
            train(nn.Linear(4, 3), blobs, FAST, seed=0, progress=False)

    @pytest.mark.parametrize("option", ["augment", "channels_last"])
    def test_vectors_are_no_images(self, blobs, option):
        with pytest.raises(ConfigError, match=option):
            train(dropout_net(), blobs, TrainSettings(**{option: True}), seed=0, progress=False)

    def test_targets_that_do_not_fit(self, blobs):
        with pytest.raises(DataError, match="targets from 0 to 2"):
            train(nn.Linear(4, 2), blobs, FAST, seed=0, progress=False)

    def test_inputs_alone(self, blobs):
        with pytest.raises(DataError, match="targets"):
            train(dropout_net(), TensorDataset(blobs.tensors[0]), FAST, seed=0, progress=False)
