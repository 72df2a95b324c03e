from __future__ import annotations

import pytest
import torch
from torch import nn

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.models import MODELS, build_model

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
SMALL = {
    "linear": {},
    "mlp": {"hidden": (12, 8)},
    "cnn": {"width": 4},
    "all_cnn": {"width": 0.1},
    "resnet18": {"width": 0.1},
}


def small(name: str, shape: tuple[int, ...] = DIGITS, seed: int = 0) -> nn.Module:
    return build_model(name, shape, 10, seed=seed, **SMALL[name])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    @pytest.mark.parametrize("shape", [DIGITS, (1, 28, 28), CIFAR])
    def test_one_row_of_finite_outputs_per_sample(self, name, shape):
        outputs = small(name, shape).eval()(torch.randn(3, *shape))
        assert outputs.shape == (3, 10)
        assert outputs.isfinite().all()

    def test_seed_alone_decides_the_weights(self, name):
        first = small(name).state_dict()
        torch.rand(7)
        again, other = small(name).state_dict(), small(name, seed=1).state_dict()
        assert all(torch.equal(value, again[key]) for key, value in first.items())
        assert not all(torch.equal(value, other[key]) for key, value in first.items())

    def test_global_random_state_is_left_alone(self, name):
        before = torch.get_rng_state()
        small(name)
        assert torch.equal(before, torch.get_rng_state())

    def test_every_relu_is_its_own_and_not_in_place(self, name):
        model = small(name)
        relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
        assert not any(relu.inplace for relu in relus)
        calls = []
        for relu in relus:
            relu.register_forward_hook(lambda module, *_: calls.append(module))
        model.eval()(torch.randn(1, *DIGITS))
        # a residual block uses its own ReLU once, after the addition
        assert len(calls) == len(set(calls)) == len(relus)

    def test_unknown_option_is_refused(self, name):
        with pytest.raises(ConfigError, match="depth"):
            build_model(name, DIGITS, 10, seed=0, depth=3)


class TestArchitecture:
    def test_all_cnn_has_the_published_size(self):
        # weights and biases of All-CNN-C as in table 1: 1.37 million
        channels = [3, 96, 96, 96, 192, 192, 192, 192, 192, 10]
        kernels = [3] * 7 + [1, 1]
        expected = sum(
            a * b * k * k + b for a, b, k in zip(channels, channels[1:], kernels, strict=False)
        )
        assert count(build_model("all_cnn", CIFAR, 10, seed=0, width=1.0)) == expected == 1_369_738

    def test_resnet18_has_the_known_size(self):
        assert count(build_model("resnet18", CIFAR, 10, seed=0, width=1.0)) == 11_173_962

    def test_batch_norm_is_an_option(self):
        plain, normed = (
            build_model("all_cnn", CIFAR, 10, seed=0, width=0.1, batch_norm=b)
            for b in (False, True)
        )
        assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert sum(isinstance(m, nn.BatchNorm2d) for m in normed.modules()) == 8

    def test_large_images_get_a_third_convolution(self):
        for side, expected in ((8, 2), (15, 2), (16, 3), (28, 3)):
            convs = [m for m in small("cnn", (1, side, side)).modules() if isinstance(m, nn.Conv2d)]
            assert len(convs) == expected

    def test_signal_survives_the_depth(self):
        images = torch.randn(32, *CIFAR, generator=torch.Generator().manual_seed(0))
        outputs = build_model("all_cnn", CIFAR, 10, seed=0)(images)
        assert 0.05 < outputs.std(0).mean() < 5  # with torch's own initial weights 2,000 times less

    def test_vectors_fit_the_flat_models(self):
        for name in ("linear", "mlp"):
            assert small(name, (30,))(torch.randn(4, 30)).shape == (4, 10)


class TestRefusals:
    def test_unknown_name_gets_a_suggestion(self):
        with pytest.raises(ConfigError, match="Did you mean 'resnet18'"):
            build_model("resnet", CIFAR, 10, seed=0)

    @pytest.mark.parametrize("name", ["cnn", "all_cnn", "resnet18"])
    def test_vectors_are_no_images(self, name):
        with pytest.raises(ConfigError, match="mlp"):
            build_model(name, (30,), 10, seed=0)
