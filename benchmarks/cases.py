"""The benchmark's cases: model, data, batch size, and the ratios that are aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget.errors import DataError
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.models import build_model
from fisher_forget.params import logits

VOCABULARY, TOKENS = 5_000, 128


@dataclass(frozen=True)
class Data:
    """Inputs and targets in memory, so that no loader takes part in what is timed."""

    x: Tensor
    y: Tensor
    batch_size: int
    note: str = ""

    def __len__(self) -> int:
        return len(self.x)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in order."""
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same batches as a loader."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size)

    def first(self, count: int) -> Data:
        """The first samples."""
        return Data(self.x[:count], self.y[:count], self.batch_size, self.note)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Data:
        """On a device; floating-point inputs in `dtype`."""
        x = self.x.to(device, dtype) if self.x.is_floating_point() else self.x.to(device)
        return Data(x, self.y.to(device), self.batch_size, self.note)


@dataclass(frozen=True)
class Case:
    """One model on one data set.

    Attributes:
        title: What the table says.
        build: Makes the model; its weights depend on a fixed seed only.
        data: Makes `samples` samples.
        samples: How many are timed.
        batch_size: Of the plain pass and of every estimator.
        classes: Outputs a position.
        goals: Ratio aimed at, by row; for EKFAC without its eigendecompositions.
        error_samples: Samples (and tokens a sample, for sequences) on which the error is measured.
        reference_draws: 0 compares with the exact diagonal, else with the mean of this many
            sketches.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[int, int], Data]
    samples: int
    batch_size: int
    classes: int
    goals: dict[str, float]
    error_samples: int
    error_tokens: int | None = None
    reference_draws: int = 0

    def error_data(self) -> Data:
        """The samples on which the error is measured."""
        data = self.data(self.samples, self.batch_size).first(self.error_samples)
        cut = self.error_tokens
        return (
            data
            if cut is None
            else Data(data.x[:, :cut], data.y[:, :cut], data.batch_size, data.note)
        )


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over all positions."""
    out = logits(model(x))
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def plain(model: nn.Module, data: Data) -> None:
    """What every estimator is compared with: gradient of the mean cross-entropy, batch after
    batch."""
    params = [p for p in model.parameters() if p.requires_grad]
    for x, y in data.batches():
        torch.autograd.grad(loss(model, x, y), params)


def _random_images(shape: tuple[int, int, int]) -> Callable[[int, int], Data]:
    def make(count: int, batch_size: int) -> Data:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, *shape, generator=generator)
        return Data(
            x, torch.randint(0, 10, (count,), generator=generator), batch_size, "random inputs"
        )

    return make


def mnist(count: int, batch_size: int) -> Data:
    """The first training images, or random ones of their shape where MNIST is not on disk."""
    try:
        x, y = load_dataset("mnist").train[:count]
    except DataError:
        data = _random_images((1, 28, 28))(count, batch_size)
        return Data(
            data.x, data.y, batch_size, "random inputs of MNIST's shape: MNIST is not on disk"
        )
    return Data(x, y, batch_size, "MNIST")


def _tokens(count: int, batch_size: int) -> Data:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (count, TOKENS + 1), generator=generator)
    return Data(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), batch_size, "random tokens")


def _image_model(name: str, shape: tuple[int, ...], **options: object) -> Callable[[], nn.Module]:
    return lambda: build_model(name, shape, 10, seed=0, **options).eval()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=TOKENS,
        n_embd=256,
        n_layer=4,
        n_head=4,
        use_cache=False,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = GPT2LMHeadModel(config).eval()
    return model


CASES: dict[str, Case] = {
    "mlp": Case(
        "MLP 784-1024-1024-10",
        _image_model("mlp", (1, 28, 28)),
        mnist,
        samples=2048,
        batch_size=256,
        classes=10,
        goals={"sketch": 1.2, "exact": 3.8, "ekfac": 3.5},
        error_samples=64,
    ),
    "all_cnn": Case(
        "All-CNN, width 0.5, 3 x 32 x 32",
        _image_model("all_cnn", (3, 32, 32), width=0.5),
        _random_images((3, 32, 32)),
        samples=512,
        batch_size=128,
        classes=10,
        goals={"sketch": 1.5, "exact": 8.0, "ekfac": 5.0},
        error_samples=16,
    ),
    "resnet18": Case(
        "ResNet-18, width 0.5, 3 x 32 x 32, BatchNorm in eval mode",
        _image_model("resnet18", (3, 32, 32), width=0.5),
        _random_images((3, 32, 32)),
        samples=256,
        batch_size=64,
        classes=10,
        goals={"sketch": 1.8, "ekfac": 6.0},
        error_samples=8,
    ),
    "gpt2": Case(
        f"GPT-2, 4 layers, d 256, 4 heads, vocabulary {VOCABULARY:,}, tied embedding, "
        f"{TOKENS} tokens",
        _gpt2,
        _tokens,
        samples=32,
        batch_size=8,
        classes=VOCABULARY,
        goals={"sketch": 1.5, "ekfac": 4.0},
        error_samples=2,
        error_tokens=16,
        reference_draws=64,
    ),
}
