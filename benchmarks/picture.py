"""Error against cost of the curvature kinds: draws docs/curvature.png (`python -m benchmarks.picture`).

A digits CNN trained to the end and one stopped early; x is the time over that of a forward and backward pass of the
same batches, measured in turns; y the relative error of the diagonal's Euclidean norm, mean over seeds.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fisher_forget import estimate_curvature
from fisher_forget.data.datasets import load_dataset
from fisher_forget.models import build_model
from fisher_forget.params import flatten
from fisher_forget.training import TrainSettings, train

ROUNDS, SEEDS = 5, 5
STYLES = {
    "sketch": ("#0072B2", "o"),
    "sampled": ("#D55E00", "s"),
    "empirical": ("#595959", "X"),
    "exact": ("#009E73", "D"),
}


def seconds(run: object) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - begun


def main() -> None:
    """Measure and draw."""
    data = load_dataset("digits").train
    x, y = data.tensors
    loader = torch.utils.data.DataLoader(data, batch_size=256)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for ax, epochs in zip(axes, (3, 30), strict=True):
        settings = TrainSettings(epochs=epochs, lr=0.05)
        model = train(build_model("cnn", (1, 8, 8), 10, seed=0), data, settings, seed=0, progress=False)

        def plain(model: nn.Module = model) -> None:
            for i in range(0, len(x), 256):
                loss = F.cross_entropy(model(x[i : i + 256]), y[i : i + 256])
                torch.autograd.grad(loss, list(model.parameters()))

        def diagonal(kind: str, draws: int, seed: int, model: nn.Module = model) -> torch.Tensor:
            found = estimate_curvature(model, loader, structure="diagonal", kind=kind, draws=draws, seed=seed)
            return flatten(found.diagonal())

        truth = diagonal("exact", 1, 0)
        for kind, (color, marker) in STYLES.items():
            points = []
            for draws in (1, 2, 4, 8, 16) if kind in ("sketch", "sampled") else (1,):
                ratios = [
                    seconds(lambda k=kind, d=draws, s=s: diagonal(k, d, s)) / seconds(plain)  # type: ignore[misc]
                    for s in range(ROUNDS)
                ]
                errors = [(diagonal(kind, draws, s) - truth).norm() / truth.norm() for s in range(SEEDS)]
                points.append((median(ratios), max(float(torch.stack(errors).mean()), 1e-4)))
                print(f"{epochs} epochs, {kind}, {draws} draws: {points[-1][0]:.2f}x, error {points[-1][1]:.3g}")
            ax.plot(*zip(*points, strict=True), marker=marker, color=color, label=kind, linestyle="-", markersize=6)
        ax.set(xscale="log", yscale="log", title=f"digits CNN after {epochs} epochs")
        ax.set_xlabel("time / forward and backward pass")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("relative error of the diagonal")
    axes[1].legend(title="kind (1 ... 16 draws)", fontsize=8)
    figure.savefig(Path(__file__).parent.parent / "docs" / "curvature.png", dpi=150)


if __name__ == "__main__":
    main()
