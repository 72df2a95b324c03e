"""The demo: what a deletion request costs beside the training that it saves.

Small data would hide it, since a network of a thousand images is retrained in two seconds. So
every scan of scikit-learn's digits is there in fixed variants, which are forgotten together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget._util.isolation import seeded
from fisher_forget._util.numbers import number
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices
from fisher_forget.evaluate.closeness import Reference
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.unlearn.prepare import prepare
from fisher_forget.unlearn.result import ForgetResult

# Of a variant: rotation in radians, relative size, and shift in halves of the image's side.
TURN, SIZE, SHIFT = 0.25, 0.15, 0.25
RETRAINED = 2  # the least that have a KL between them


@dataclass(frozen=True)
class Demo:
    """A training, two deletion requests, and what they take.

    Attributes:
        scans: Training scans.
        variants: Images of each.
        epochs: Of the training.
        request: Scans that each of the two requests names, with all their variants.
        retrain: Also retrain without them, and compare.
        progress: Show progress bars.
    """

    scans: int = 1437
    variants: int = 20
    epochs: int = 20
    request: int = 10
    retrain: bool = False
    progress: bool = True

    def run(self) -> Iterator[str]:
        """What the demo says, line by line, each once it is known."""
        digits = load_dataset("digits", max_train=self.scans)
        data = variants(digits.train, self.variants)
        yield (
            f"{len(digits.train):,} scans of handwritten digits, each turned, scaled and shifted "
            f"in {self.variants} ways: {len(data):,} images"
        )
        model, training = self._trained(data, np.arange(len(data)), 0)
        yield _row(f"training a CNN for {self.epochs} epochs", training)

        clock = time.perf_counter()
        loader = DataLoader(data, batch_size=256)
        prepared = prepare(model, loader, progress=self.progress)
        yield _row("prepare(), once", time.perf_counter() - clock)
        images, models = self.request * self.variants, [model]
        for word, begin in (("first", 0), ("second", images)):
            clock = time.perf_counter()
            result = prepared.forget(range(begin, begin + images), progress=self.progress)
            seconds = time.perf_counter() - clock
            what = f"{word} request: {self.request} scans, {images:,} images"
            yield _row(what, seconds, f"1/{training / seconds:.0f} of the training")
            models.append(result.model)

        yield "\naccuracy                           before   first  second"
        parts = {"forgotten images": take(data, result.split.forget), "test scans": digits.test}
        for name, part in parts.items():
            shown = "".join(f"{100 * _accuracy(one, part):6.1f} %" for one in models)
            yield f"  {name:32}{shown}"
        yield f"\nwhat the result says of itself\n{indent(str(result.check), '  ')}"
        if self.retrain:
            yield from self._compared(data, parts, model, result)

    def _trained(self, data: TensorDataset, rows: Indices, seed: int) -> tuple[nn.Module, float]:
        """A model trained on some rows, and the seconds that it took."""
        clock = time.perf_counter()
        settings = TrainSettings(
            epochs=self.epochs, lr=0.05, weight_decay=2e-3, schedule="onecycle"
        )
        model = build_model("cnn", tuple(data.tensors[0].shape[1:]), 10, seed=seed, width=16)
        model = train(model, data, settings, seed=seed, indices=rows, progress=self.progress)
        return model, time.perf_counter() - clock

    def _compared(
        self,
        data: TensorDataset,
        parts: Mapping[str, TensorDataset],
        original: nn.Module,
        result: ForgetResult,
    ) -> Iterator[str]:
        """How close the result came to models trained without the forgotten images."""
        retained = result.split.retain
        trained = [self._trained(data, retained, seed) for seed in range(1, RETRAINED + 1)]
        yield "\n" + _row("retraining without them", sum(s for _, s in trained) / RETRAINED)
        close = Reference(original, [model for model, _ in trained], parts).closeness(result.model)
        yield "KL from retrained models, nats      before   after   between two of them"
        for name, part in close.parts.items():
            values = (part.kl_original, part.kl_scrubbed, part.floor)
            yield f"  {name:32}" + "".join(f"{number(value):>8}" for value in values)


def variants(scans: TensorDataset, count: int, seed: int = 0) -> TensorDataset:
    """Every scan `count` times in a row, each turned, scaled and shifted a little at random.

    Args:
        scans: Images [N, C, H, W] and targets [N].
        count: Of the images of one scan.
        seed: Of what is done to them, once for all.

    Returns:
        Images [N count, C, H, W] and targets [N count]; those of scan i begin at i count.
    """
    images, targets = (part.repeat_interleave(count, 0) for part in scans.tensors)
    turn, size, right, down = torch.rand(4, len(images), generator=seeded(seed)) * 2 - 1
    turn, size, shift = TURN * turn, 1 + SIZE * size, SHIFT * torch.stack([right, down], -1)
    cos, sin = size * turn.cos(), size * turn.sin()
    moves = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], -1).view(-1, 2, 3)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    return TensorDataset(F.grid_sample(images, grid, align_corners=False), targets)


def _accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, targets = data.tensors
    with torch.no_grad():
        right: Tensor = model(images).argmax(1) == targets
    return float(right.double().mean())


def _row(what: str, seconds: float, more: str = "") -> str:
    return f"{what:52}{seconds:7.1f} s   {more}".rstrip()
