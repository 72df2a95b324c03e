r"""UNSIR: impair with noise that the model gets most wrong for D_f, then repair on D_r.

    noise:   x <- Adam step down  -loss(f_w(x), y) + penalty |x|^2,   x from N(0, I)
    impair:  w <- Adam step down  the mean loss of (x, y), over and over, and of part of D_r
    repair:  w <- Adam step down  the mean loss of the same part of D_r

with y the target of a sample of D_f.

Tarun et al. 2023 (arXiv:2111.08947) forget whole classes of CIFAR-10. For one class their impair
epoch shows 256 noise inputs 20 times each and 1,000 samples of each of the nine others: 36 % noise,
in 56 steps, and 36 steps of repair. Here the share is what is kept, whatever the size of D_r; few
samples make few steps in batches as large as theirs. The noise inputs share the targets of samples
drawn from D_f: the same where D_f is one class, and in its proportions where it is not. The public
code labels the noise of every class as class 0 and optimises it in training mode; here it keeps its
target, and the model is in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import seeded
from fisher_forget.baselines.base import Method, Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import Descent, Loss, descend, require
from fisher_forget.data.batches import Batch
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Indices, Split, some
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood


@dataclass(frozen=True, kw_only=True)
class Unsir(Method):
    """Error-maximising noise, impair, repair.

    Attributes:
        noises: Number of noise inputs, at most as many as an impair epoch shows.
        steps: Adam steps that make them.
        noise_lr: Learning rate of these steps, in units of the inputs.
        penalty: Of |x|^2, nats per squared unit of the inputs.
        noise_share: Of the samples that an impair epoch shows; the noise inputs take turns.
        retained: Samples of D_r that are used, drawn once; all, if there are fewer.
        impair_epochs: Passes over noise and the part of D_r.
        impair_lr: Learning rate of Adam.
        repair_epochs: Passes over the part of D_r.
        repair_lr: Learning rate of Adam.
        batch_size: Samples per step.
        likelihood: Name or instance.

    Raises:
        ConfigError: If a value is out of range; in `unlearn`, if the inputs hold no floating-point
            tensor that could be noise, or the shapes of the samples differ.
    """

    name = "unsir"
    grid: ClassVar[Grid] = {
        "impair_lr": Range(2e-3, 0.2),
        "repair_lr": Range(1e-3, 0.1),
        "batch_size": Range(8, 256, whole=True),
    }

    noises: int = 256
    steps: int = 40
    noise_lr: float = 0.1
    penalty: float = 0.1
    noise_share: float = 0.36
    retained: int = 9000
    impair_epochs: int = 1
    impair_lr: float = 0.02
    repair_epochs: int = 1
    repair_lr: float = 0.01
    batch_size: int = 256
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        counts = {"noises": 1, "retained": 1, "batch_size": 1}
        epochs = {"steps": 0, "impair_epochs": 0, "repair_epochs": 0}
        require(
            self,
            at_least=counts | epochs | {"penalty": 0},
            above={"noise_lr": 0, "impair_lr": 0, "repair_lr": 0},
            noise_share=(0 <= self.noise_share < 1, "a share of at least 0, below 1"),
        )

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        likelihood = trained_likelihood(model, split, self.likelihood)
        training = Training(model, split, likelihood, self.batch_size)
        foreign = training.foreign
        kept = some(split.retain, self.retained, self.seed)
        turns = self.turns(len(kept)) if len(split.forget) else np.arange(0)
        noise = self.noise(training, turns.max() + 1) if len(turns) else None
        shown = np.concatenate([-1 - turns, kept])

        def impair(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            order = rng.permutation(shown)
            for rows in np.array_split(order, -(-len(order) // self.batch_size)):
                yield partial(_mixed_loss, training, noise, rows)

        repair = training.over(kept, training.mean_loss)
        settings = Descent(self.impair_epochs, self.impair_lr, optimizer="adam")
        # a new optimizer, and another order of the samples, for each phase
        impaired = descend(model, settings, impair, seed=self.seed, kept=foreign)
        settings = Descent(self.repair_epochs, self.repair_lr, optimizer="adam")
        seed = self.seed + 1
        repaired = descend(impaired, settings, repair, seed=seed, kept=foreign)
        return repaired, training.gradients

    def turns(self, kept: int) -> Indices:
        """Numbers of the noise inputs that an impair epoch shows beside so many retained samples:
        noise_share = shown / (shown + kept)."""
        shown = round(self.noise_share / (1 - self.noise_share) * kept)
        return np.resize(np.arange(min(self.noises, shown)), shown)

    def noise(self, training: Training, count: int) -> Batch:
        """Noise inputs [count, ...] and the targets they are to be as wrong for as they can.

        Floating-point inputs are noise; others (masks, say) are those of the samples of D_f.
        """
        rows = np.random.default_rng(self.seed).choice(training.split.forget, count)
        twin = copy_model(training.model).eval().requires_grad_(False)
        batch = next(training.split.read([rows])).on(twin)
        batch, leaves = _drawn(batch, seeded(self.seed))
        if not leaves:
            got = f"{self.name} for inputs without a floating-point tensor"
            fix = "Choose another method: token ids cannot be moved a little."
            raise ConfigError(got, "inputs that can be optimised by their gradient", fix)
        optimizer = torch.optim.Adam(leaves, lr=self.noise_lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                # ascent on the loss: -loss(f_w(x), y) + penalty |x|^2, mean over the noise inputs
                size = torch.stack([x.square().sum() for x in leaves]).sum() / len(batch)
                optimizer.zero_grad()
                (self.penalty * size - training.mean_loss(twin, batch)).backward()
                optimizer.step()
        return batch.map(Tensor.detach)


def _drawn(batch: Batch, generator: torch.Generator) -> tuple[Batch, list[Tensor]]:
    """The batch with N(0, I) for its floating-point inputs, and these, which need gradients."""
    inputs, structure = pytree.tree_flatten((batch.args, batch.kwargs))
    leaves = []
    for i, (x, dim) in enumerate(zip(inputs, pytree.tree_leaves(batch.dims()), strict=True)):
        if dim == 0 and x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            inputs[i] = noise.to(x.device).requires_grad_()
            leaves.append(inputs[i])
    args, kwargs = pytree.tree_unflatten(inputs, structure)
    return replace(batch, args=args, kwargs=kwargs), leaves


def _mixed_loss(training: Training, noise: Batch | None, rows: Indices, model: nn.Module) -> Tensor:
    """Mean loss of one batch of retained samples (rows from 0) and noise inputs (rows below 0: -1
    is the first)."""
    parts = []
    if noise is not None and (rows < 0).any():
        parts.append(noise.take(torch.from_numpy(-1 - rows[rows < 0])))
    if (rows >= 0).any():
        retained = rows[rows >= 0]
        parts.append(next(training.split.read([retained])).on(model))
    return training.mean_loss(model, parts[0] if len(parts) == 1 else _joined(*parts))


def _joined(first: Batch, second: Batch) -> Batch:
    """One batch of both; tensors that do not lead with the batch are those of the first."""
    a, structure = pytree.tree_flatten((first.args, first.kwargs))
    b, dims = (pytree.tree_leaves(x) for x in ((second.args, second.kwargs), first.dims()))
    try:
        joined = [
            x if dim is None else torch.cat([x, y]) for x, y, dim in zip(a, b, dims, strict=True)
        ]
        targets = torch.cat([first.targets, second.targets])
    except (RuntimeError, ValueError) as error:
        got = f"unsir for batches whose samples differ in shape ({error})"
        expected = "samples of one shape, so that noise and retained ones fit in a batch"
        fix = "Pad all samples to one length, or choose another method."
        raise ConfigError(got, expected, fix) from error
    args, kwargs = pytree.tree_unflatten(joined, structure)
    return Batch(args, kwargs, targets, first.dims())
