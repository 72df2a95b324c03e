r"""DeltaGrad: replay the training without D_f, with gradients corrected from the first run's.

Training by gradient descent is recorded: weights w_t and gradients grad L_t of every batch t. The
replay knows the gradients of the forgotten samples exactly and guesses those of the others from the
recorded ones,

    g = n_t (B_t (w - w_t) + grad L_t(w_t)) - sum_{forgotten in t} grad l_i(w)
    w <- w - lr (g / (n_t - m_t) + wd w)

with n_t samples in a batch, m_t of them forgotten, and B_t a limited-memory BFGS approximation of
the Hessian from steps whose gradient is computed in full: the first j_0 and then every T_0-th. Wu,
Dobriban and Davidson 2020 (arXiv:2006.14755); compact form of B_t from Byrd, Nocedal and Schnabel
1994 (Mathematical Programming 63, 129-156).

The weight decay is exact in every step. Networks are neither convex nor smooth everywhere: a pair
that shows no positive curvature does not enter B_t, and a step is computed in full where there is
no pair yet, or where |B_t (w - w_t)| exceeds |w - w_t| / lr, a curvature that the recorded descent
could not have followed either.

That is not enough where the learning rate is one that trains a network well: close to the edge of
stability two descents part exponentially, whatever the batch size and however few samples are
gone, and a guess of rank two does not hold them together. So the last step in full says whether
guesses go on: where B_t was off by more than `tolerance`, the next step is computed in full, too.
With it the replay of a CNN ends well and costs about as much as its retraining; without it, as
published, it ends as a constant predictor. With period 1 every step is in full: the exact replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget._util.isolation import isolated
from fisher_forget.baselines.base import Method
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, ModelError, NumericalError, SplitError
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Gradient, Objective

MEMORY = 4 << 30
# least cosine between a change of weights and one of gradients that tells of a curvature
CONVEX = 1e-6


class Schedule(Protocol):
    """What DeltaGrad needs to know of a training that it is to record."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """Plain gradient descent, which DeltaGrad can replay. BatchNorm and Dropout stay in eval mode.

    Attributes:
        epochs: Passes over the data.
        lr: Learning rate, constant.
        batch_size: Samples per step at most.
        weight_decay: wd of the objective.
        likelihood: Name or instance.
        seed: Of the order of the samples.
        memory: Bytes that recorded weights and gradients may take.

    Raises:
        ConfigError: If a value is out of range.
    """

    epochs: int = 50
    lr: float = 0.1
    batch_size: int = 512
    weight_decay: float = 0.0005
    likelihood: Likelihood | str = "categorical"
    seed: int = 0
    memory: int = MEMORY

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "weight_decay": 0}
        require(self, at_least=least, above={"lr": 0})


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A recorded training.

    Attributes:
        model: The trained model, in eval mode.
        plan: How it was trained.
        samples: Indices of all samples, sorted.
        batches: Indices of each step's samples.
        weights: Each step's weights before it [d].
        gradients: Each step's gradient of the batch's mean loss there, without weight decay [d].
        counts: Each step's scored positions, which that mean is over.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    samples: Indices = field(repr=False)
    batches: tuple[Indices, ...] = field(repr=False)
    weights: tuple[Tensor, ...] = field(repr=False)
    gradients: tuple[Tensor, ...] = field(repr=False)
    counts: tuple[float, ...] = field(repr=False)

    def steps(self) -> Iterator[tuple[Indices, Tensor, Tensor, float]]:
        """(samples, weights before, gradient, scored positions) of every step."""
        return zip(self.batches, self.weights, self.gradients, self.counts, strict=True)


def record(model: nn.Module, split: Split, plan: Plan) -> Trajectory:
    """Train a copy of the model on all samples, retained and forgotten, and keep the way.

    Args:
        model: At its initial weights, in eval mode; untouched.
        split: Gives the data.
        plan: How to train.

    Raises:
        ConfigError: If the recorded tensors would not fit the memory.
        NumericalError: If the training diverges.
    """
    check_model(model)
    with isolated():
        plan = replace(plan, likelihood=trained_likelihood(model, split, plan.likelihood))
        objective = Objective(model, resolve_likelihood(plan.likelihood))
        samples, at = split.indices("all"), objective.start
        per_epoch = -(-len(samples) // plan.batch_size)
        _check_memory(plan, per_epoch * plan.epochs, at)
        rng = np.random.default_rng(plan.seed)
        steps: list[tuple[Indices, Tensor, Tensor, float]] = []
        for _ in range(plan.epochs):
            for drawn in np.array_split(rng.permutation(samples), per_epoch):
                rows = np.sort(drawn)
                gradient = objective.gradient(split.batches(rows), at)
                steps.append((rows, P.flatten(at), P.flatten(gradient.mean()), gradient.count))
                at = _step(at, gradient.mean(), plan)
    batches, weights, gradients, counts = zip(*steps, strict=True)
    trained = P.load(model, at).eval()
    return Trajectory(trained, plan, samples, batches, weights, gradients, counts)


@dataclass(frozen=True)
class DeltaGrad(Method):
    """Replay of a recorded training without the forgotten samples.

    Attributes:
        trajectory: What `record` returned for the model that is to forget. Without it, a model of
            its own is trained and recorded, from `initial` as `training` says, and forgets.
        initial: A model at its initial weights.
        training: Epochs, learning rate, momentum, batch size and weight decay to train with. Plain
            descent at lr / (1 - momentum) takes the place of descent with momentum.
        batch_size: Least number of samples per step of that training. Larger batches make the
            curvature of one step more like that of another.
        likelihood: Of that training: name or instance.
        period: T_0, steps from one full gradient to the next.
        burn_in: j_0, steps with full gradients at the start.
        history: Pairs in B_t.
        tolerance: Largest error of the gradient guessed where it was last computed in full, over
            the size of that gradient, at which guesses go on; `None`, as published, lets them.
        seed: Of the order of the samples in that training; the replay draws nothing.

    Raises:
        ConfigError: If a value is out of range; in `unlearn`, without a trajectory or a training.
        ModelError: In `unlearn`, if the trajectory does not end at the given model.
        SplitError: In `unlearn`, if the split has other samples than the trajectory.
        NumericalError: In `unlearn`, if the replay diverges.
    """

    name = "deltagrad"
    grid: ClassVar[Grid] = {
        "period": Range(2, 20, whole=True),
        "burn_in": Range(5, 100, whole=True),
    }

    trajectory: Trajectory | None = field(default=None, compare=False)
    initial: nn.Module | None = field(default=None, repr=False, compare=False, kw_only=True)
    training: Schedule | None = field(default=None, compare=False, kw_only=True)
    batch_size: int = field(default=256, kw_only=True)
    likelihood: Likelihood | str = field(default="categorical", kw_only=True)
    period: int = 5
    burn_in: int = 20
    history: int = 2
    tolerance: float | None = 0.2

    def __post_init__(self) -> None:
        least = {"period": 1, "burn_in": 0, "history": 1, "batch_size": 1}
        if self.tolerance is not None:
            least["tolerance"] = 0
        require(self, at_least=least)

    def prepare(self, model: nn.Module, split: Split) -> tuple[Self, nn.Module]:
        if self.trajectory is not None:
            return self, model
        if self.initial is None or self.training is None:
            got = "no trajectory"
            fix = "Train with delta_grad.record(), and pass DeltaGrad(trajectory=...)."
            raise ConfigError(got, "the recorded training of the model that is to forget", fix)
        plan = Plan(
            epochs=self.training.epochs,
            # what momentum adds up to over many steps
            lr=self.training.lr / (1 - self.training.momentum),
            batch_size=max(self.training.batch_size, self.batch_size),
            weight_decay=self.training.weight_decay,
            likelihood=self.likelihood,
            seed=self.seed,
        )
        trajectory = record(self.initial, split, plan)
        return replace(self, trajectory=trajectory), trajectory.model

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        check_model(model)
        assert self.trajectory is not None  # `prepare` saw to it
        _check_fit(self.trajectory, model, split)
        weights, gradients = self._replay(self.trajectory, model, split)
        return P.load(model, weights), gradients

    def _replay(
        self, trajectory: Trajectory, model: nn.Module, split: Split
    ) -> tuple[Params, float]:
        """Weights after the replay, and the sample gradients that it computed."""
        plan, gradients = trajectory.plan, 0
        objective = Objective(model, resolve_likelihood(plan.likelihood))
        at = P.unflatten(trajectory.weights[0], objective.start)
        pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.history)
        trusted = True
        for number, (rows, before, known, count) in enumerate(trajectory.steps()):
            gone = np.intersect1d(rows, split.forget)
            kept = np.setdiff1d(rows, split.forget)
            if not len(kept):  # training without the forgotten samples had not had this batch
                continue
            away = P.flatten(at) - before  # w - w_t
            forgotten = objective.gradient(split.batches(gone), at)
            gradients += len(gone)
            curved = self._curved(number, pairs, away, plan.lr) if trusted else None
            if curved is not None:
                # n_t (B_t (w - w_t) + grad L_t(w_t)), less what the forgotten samples add at w
                guess = P.unflatten(known + curved, at)
                gradient = (Gradient(P.scale(guess, count), 0.0, count) - forgotten).mean()
            else:  # in full, and another pair for B_t
                retained = objective.gradient(split.batches(kept), at)
                gradients += len(kept)
                gradient = retained.mean()
                change = P.flatten((retained + forgotten).mean()) - known
                trusted = self._good(lbfgs_product(pairs, away) - change, gradient)
                if _convex(away, change):
                    pairs.append((away, change))
            at = _step(at, gradient, plan)
        return at, gradients

    def _curved(
        self, number: int, pairs: Sequence[tuple[Tensor, Tensor]], away: Tensor, lr: float
    ) -> Tensor | None:
        """B_t (w - w_t), where the gradient may be guessed from it; `None` for a full gradient."""
        if number < self.burn_in or (number - self.burn_in) % self.period == 0:
            return None
        if not pairs and bool(away.any()):
            return None
        curved = lbfgs_product(pairs, away)
        # a curvature above 1 / lr is one that the recorded descent could not have followed
        return curved if bool(curved.norm() * lr <= away.norm()) else None

    def _good(self, error: Tensor, gradient: Params) -> bool:
        """Whether a guess that is off by so much is good enough for guesses to go on."""
        return self.tolerance is None or float(error.norm()) <= self.tolerance * P.norm(gradient)


def _check_fit(trajectory: Trajectory, model: nn.Module, split: Split) -> None:
    """Refuse another model or other samples than those of the trajectory."""
    given, end = P.trainable(model), P.trainable(trajectory.model)
    if given.keys() != end.keys() or not all(torch.equal(p, end[n]) for n, p in given.items()):
        got = "a model whose weights are not those that the trajectory ends with"
        raise ModelError(got, "trajectory.model", "Pass that model, or record its training.")
    if not np.array_equal(trajectory.samples, split.indices("all")):
        got = f"{split} for a trajectory of {len(trajectory.samples):,} samples"
        raise SplitError(got, "the samples that were trained on", "Pass a split of the same data.")


def _check_memory(plan: Plan, steps: int, weights: Params) -> None:
    """Refuse a training whose steps' weights and gradients do not fit."""
    needed = 2 * steps * sum(x.numel() * x.element_size() for x in weights.values())
    if needed > plan.memory:
        got = f"{steps:,} steps whose weights and gradients need {needed / 2**30:,.1f} GiB"
        fix = "Raise `memory` or `batch_size`, or lower `epochs`."
        raise ConfigError(got, f"at most memory={plan.memory} bytes", fix)


def lbfgs_product(pairs: Sequence[tuple[Tensor, Tensor]], v: Tensor) -> Tensor:
    r"""B v, where B is what BFGS updates make of sigma I, pair after pair; zero without pairs.

    Columns S and Y, sigma = y^T s / s^T s of the last pair, D the diagonal and L what is below it
    of S^T Y:

        B = sigma I - [sigma S, Y] [[sigma S^T S, L], [L^T, -D]]^-1 [sigma S, Y]^T

    Args:
        pairs: (s, y), changes of weights and of gradients [d], oldest first, with s^T y > 0.
        v: [d].
    """
    if not pairs:
        return torch.zeros_like(v)
    s, y = (torch.stack(column, 1).double() for column in zip(*pairs, strict=True))
    sigma = (s[:, -1] @ y[:, -1]) / (s[:, -1] @ s[:, -1])
    across = s.T @ y  # L + D + what is above the diagonal
    below = across.tril(-1)
    middle = torch.cat(
        [torch.cat([sigma * s.T @ s, below], 1), torch.cat([below.T, -across.diag().diag()], 1)]
    )
    sides = torch.cat([sigma * s, y], 1)  # in double precision: pairs may be nearly parallel
    wide = v.double()
    product: Tensor = sigma * wide - sides @ torch.linalg.solve(middle, sides.T @ wide)
    return product.to(v.dtype)


def _convex(s: Tensor, y: Tensor) -> bool:
    """Whether a pair tells of a positive curvature."""
    s, y = s.double(), y.double()
    return bool(s @ y > CONVEX * s.norm() * y.norm())


def _step(at: Params, gradient: Params, plan: Plan) -> Params:
    """w - lr (gradient + wd w)."""
    after = P.add(at, P.add(gradient, at, plan.weight_decay), -plan.lr)
    if not P.finite(after):
        raise NumericalError(
            "weights that are not finite", "a descent that converges", "Lower the plan's lr."
        )
    return after
