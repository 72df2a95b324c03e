"""Error against cost of the curvature kinds: draws docs/curvature.png (`python -m
benchmarks.picture`).

A digits CNN trained to the end and one stopped early; x is the time over that of a forward and
backward pass of the same batches, measured in turns; y the relative error of the diagonal's
Euclidean norm, mean over seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from fisher_forget import estimate_curvature
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.experiments.models import build_model
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.params import flatten

ROUNDS, SEEDS = 5, 5
EPOCHS = (3, 30)
DRAWS = {"sketch": (1, 2, 4, 8, 16), "sampled": (1, 2, 4, 8, 16), "empirical": (1,), "exact": (1,)}
STYLES = {
    "sketch": ("#0072B2", "o"),
    "sampled": ("#D55E00", "s"),
    "empirical": ("#595959", "X"),
    "exact": ("#009E73", "D"),
}
LEAST = 1e-4  # where the exact kind is drawn: its error is rounding

Points = dict[
    int, dict[str, list[tuple[float, float]]]
]  # epochs -> kind -> (ratio, error) by draws


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(epochs: int) -> dict[str, list[tuple[float, float]]]:
    """(ratio, error) of every kind and number of draws, on a network of so many epochs."""
    data = load_dataset("digits").train
    x, y = data.tensors
    loader = torch.utils.data.DataLoader(data, batch_size=256)
    settings = TrainSettings(epochs=epochs, lr=0.05)
    model = train(build_model("cnn", (1, 8, 8), 10, seed=0), data, settings, seed=0, progress=False)

    def plain() -> None:
        for i in range(0, len(x), 256):
            loss = F.cross_entropy(model(x[i : i + 256]), y[i : i + 256])
            torch.autograd.grad(loss, list(model.parameters()))

    def diagonal(kind: str, draws: int, seed: int) -> torch.Tensor:
        found = estimate_curvature(
            model, loader, structure="diagonal", kind=kind, draws=draws, seed=seed
        )
        return flatten(found.diagonal())

    truth = diagonal("exact", 1, 0)
    points: dict[str, list[tuple[float, float]]] = {}
    for kind, numbers in DRAWS.items():
        for draws in numbers:

            def run(kind: str = kind, draws: int = draws) -> torch.Tensor:
                return diagonal(kind, draws, 0)

            ratio = median(seconds(run) / seconds(plain) for _ in range(ROUNDS))
            errors = [
                float((diagonal(kind, draws, s) - truth).norm() / truth.norm())
                for s in range(SEEDS)
            ]
            error = max(sum(errors) / SEEDS, LEAST)
            points.setdefault(kind, []).append((ratio, error))
            print(f"{epochs} epochs, {kind}, {draws} draws: {ratio:.2f}x, error {error:.3g}")
    return points


def draw(points: Points, path: Path) -> None:
    """One panel a network."""
    figure, axes = plt.subplots(1, len(points), figsize=(9, 3.8), layout="constrained", sharey=True)
    for ax, (epochs, kinds) in zip(axes, points.items(), strict=True):
        for kind, (color, marker) in STYLES.items():
            ax.plot(*zip(*kinds[kind], strict=True), marker=marker, color=color, label=kind)
        ax.set(xscale="log", yscale="log", title=f"digits CNN after {epochs} epochs")
        ax.set_xticks([1, 2, 4, 8, 16], labels=["1", "2", "4", "8", "16"])
        ax.minorticks_off()
        ax.set_xlabel("time (forward and backward passes)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the diagonal")
    axes[1].legend(title="kind, 1 to 16 draws", fontsize=8, loc="center left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(
        {epochs: measure(epochs) for epochs in EPOCHS},
        Path(__file__).parent.parent / "docs" / "curvature.png",
    )
