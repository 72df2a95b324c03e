"""What is trained and what is forgotten: the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SEEDS = (3, 4, 5)  # of the originals that the table shows: no choice was made with them


@dataclass(frozen=True)
class Training:
    """How a network is trained, as its user would do it.

    Attributes:
        optimizer: "sgd", "momentum" (SGD with 0.9), "adam" or "adamw".
        lr: Peak learning rate.
        weight_decay: As `torch.optim` takes it: decoupled for AdamW.
        epochs: Passes over the data.
        batch: Samples a step at most.
        schedule: A key of `fisher_forget.experiments.training.SCHEDULES`.
    """

    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "momentum"
    lr: float = 0.1
    weight_decay: float = 5e-4
    epochs: int = 30
    batch: int = 128
    schedule: str = "onecycle"


@dataclass(frozen=True)
class Setup:
    """Data, model and training: what originals have in common.

    Attributes:
        title: What the table says of data and model.
        data: A key of `benchmarks.forgetting.data.SOURCES`.
        model: As for `build_model`, and its options.
        training: See `Training`.
        early: Whether training is stopped long before its end.
        wrong: So many labels are wrong, in training and in what is forgotten.
    """

    title: str
    data: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    early: bool = False
    wrong: int = 0


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: Short, for the command line and the stored numbers.
        setup: See `Setup`.
        forget: "class", "samples" (of a class), "random", "module" (of docstrings) or "wrong"
            (labels).
        of: The class, or the module.
        count: Samples to forget, where not all.
        held_out: The row had no part in any choice but one (docs/results.md).
    """

    name: str
    setup: Setup
    forget: Literal["class", "samples", "random", "module", "wrong"]
    of: int | str | None = None
    count: int = 0
    held_out: bool = False

    @property
    def forgotten(self) -> str:
        """What is forgotten, in words."""
        return {
            "class": f"class {self.of}",
            "samples": f"{self.count} of class {self.of}",
            "random": f"{self.count} random",
            "module": f"all of {self.of}",
            "wrong": f"{self.setup.wrong} wrong labels",
        }[self.forget]


def _mlp(*hidden: int) -> dict[str, Any]:
    return {"model": "mlp", "options": {"hidden": hidden}}


def _setup(title: str, data: str, model: dict[str, Any], *training: Any, **more: Any) -> Setup:
    return Setup(title, data, **model, training=Training(*training), **more)


_CNN: dict[str, Any] = {"model": "cnn", "options": {"width": 8}}
_ALL_CNN: dict[str, Any] = {"model": "all_cnn", "options": {"width": 0.25}}
_NORMED: dict[str, Any] = {"model": "all_cnn", "options": {"width": 0.125, "batch_norm": True}}
_BAG: dict[str, Any] = {
    "model": "benchmarks.forgetting.docstrings:BagOfWords",
    "options": {"width": 32, "hidden": 32},
}
EARLY: dict[str, Any] = {"early": True}

_WINE = _setup("wine, MLP", "wine", _mlp(32, 32), "momentum", 0.05, 5e-4, 40, 32)
_WINE_W = _setup("wine, MLP", "wine", _mlp(32, 32), "adamw", 5e-3, 1e-2, 60, 32, "cosine")
_CANCER = _setup("breast cancer, MLP", "breast_cancer", _mlp(64, 32), "adam", 1e-2, 5e-4, 40, 32)
_CANCER_S = _setup("breast cancer, MLP", "breast_cancer", _mlp(64, 32), "sgd", 0.1, 1e-3, 60, 32)
_DIGITS = _setup("digits, MLP", "digits", _mlp(64, 64))
_DIGITS_S = _setup("digits, MLP", "digits", _mlp(64, 64), "sgd", 0.3, 5e-4, 60)
_DIGITS_W = _setup("digits, MLP", "digits", _mlp(64, 64), "adamw", 3e-3, 1e-2, 40, 64)
_DIGITS_E = _setup("digits, MLP", "digits", _mlp(64, 64), "momentum", 0.1, 5e-4, 6, **EARLY)
_WRONG = _setup("digits, MLP", "digits", _mlp(64, 64), "momentum", 0.1, 1e-4, 120, 64, wrong=60)
_DCNN = _setup("digits, CNN", "digits", _CNN, "adam", 3e-3, 1e-4, 20, 64)
_DCNN_E = _setup("digits, CNN", "digits", _CNN, "adamw", 1e-3, 1e-2, 5, 64, "constant", **EARLY)
_DCNN_W = _setup("digits, CNN", "digits", _CNN, "momentum", 0.05, 5e-4, 60, 32, wrong=60)
_MNIST = _setup("MNIST, 6,000, CNN", "mnist", _CNN, "momentum", 0.03, 5e-4, 15)
_MNIST_E = _setup("MNIST, 6,000, CNN", "mnist", _CNN, "adam", 1e-3, 1e-4, 2, 64, **EARLY)
_MNIST_S = _setup("MNIST, 6,000, CNN", "mnist", _CNN, "sgd", 0.1, 0.0, 15, 64)
_CIFAR = _setup("CIFAR-10, 5,000, All-CNN", "cifar10", _ALL_CNN, "momentum", 0.05, 5e-4, 12)
_CIFAR_N = _setup(
    "CIFAR-10, 5,000, All-CNN, BatchNorm", "cifar10", _NORMED, "momentum", 0.1, 5e-4, 10, 64
)
_CIFAR_E = _setup(
    "CIFAR-10, 5,000, All-CNN, BatchNorm",
    "cifar10",
    _NORMED,
    "adam",
    2e-3,
    0.0,
    4,
    128,
    "constant",
    **EARLY,
)
_TEXT = _setup("docstrings, bag of words", "docstrings", _BAG, "adamw", 1e-2, 1e-2, 15, 64)
_TEXT_A = _setup("docstrings, bag of words", "docstrings", _BAG, "adam", 1e-2, 0.0, 15, 64)
_TEXT_E = _setup("docstrings, bag of words", "docstrings", _BAG, "adam", 5e-3, 0.0, 5, 64, **EARLY)

_LOOKED_AT = (
    Row("wine-20", _WINE, "samples", 1, 20),
    Row("breast-cancer-40", _CANCER, "samples", 0, 40),
    Row("digits-mlp-50", _DIGITS, "samples", 5, 50),
    Row("digits-mlp-class-sgd", _DIGITS_S, "class", 3),
    Row("digits-mlp-60-adamw", _DIGITS_W, "samples", 5, 60),
    Row("digits-mlp-class-early", _DIGITS_E, "class", 3),
    Row("wrong-labels-mlp", _WRONG, "wrong"),
    Row("mnist-class", _MNIST, "class", 3),
    Row("mnist-250", _MNIST, "samples", 5, 250),
    Row("mnist-random", _MNIST, "random", None, 300),
    Row("cifar10-200", _CIFAR, "samples", 5, 200),
    Row("cifar10-class", _CIFAR, "class", 3),
    Row("docstrings-module", _TEXT, "module", "scipy.signal"),
)
_HELD_OUT = (
    Row("wine-class-adamw", _WINE_W, "class", 0, held_out=True),
    Row("breast-cancer-40-sgd", _CANCER_S, "samples", 1, 40, held_out=True),
    Row("digits-cnn-class-adam", _DCNN, "class", 8, held_out=True),
    Row("digits-cnn-60-adam", _DCNN, "samples", 2, 60, held_out=True),
    Row("digits-cnn-60-early", _DCNN_E, "samples", 9, 60, held_out=True),
    Row("wrong-labels-cnn", _DCNN_W, "wrong", held_out=True),
    Row("mnist-250-early", _MNIST_E, "samples", 7, 250, held_out=True),
    Row("mnist-random-sgd", _MNIST_S, "random", None, 300, held_out=True),
    Row("cifar10-class-norm", _CIFAR_N, "class", 1, held_out=True),
    Row("cifar10-200-norm-early", _CIFAR_E, "samples", 6, 200, held_out=True),
    Row("docstrings-60-adam", _TEXT_A, "samples", 4, 60, held_out=True),
    Row("docstrings-class-early", _TEXT_E, "class", 2, held_out=True),
)
ROWS = {row.name: row for row in (*_LOOKED_AT, *_HELD_OUT)}
