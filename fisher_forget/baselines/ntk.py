r"""NTK scrubbing: the change of weights that leaving D_f out makes in the linearised network.

With outputs f(w') = f(w) + J (w' - w), J [R, d] where R = samples x outputs, residuals r = f(w) - Y
(softmax - onehot for classes) and the ridge rho = n wd of the objective's sum over n samples, the
fit of a part is

    Delta(part) = -J^T (J J^T + rho I)^-1 r

and w <- w + Delta(D_r) - Delta(D). Golatkar et al. 2020b (arXiv:2003.02960). In block form, Theta =
J J^T + rho I,

    Delta(D_r) - Delta(D) = (J_f^T - J_r^T Theta_rr^-1 Theta_rf) M V
    M = (Theta_ff - Theta_rf^T Theta_rr^-1 Theta_rf)^-1
    V = r_f - Theta_rf^T Theta_rr^-1 r_r

which does not subtract two large fits from each other. The kernel of n C outputs is large: where it
does not fit, it is that of a uniform draw of m retained samples, each of which stands for n_r / m,
so that its rows and residuals are times (n_r / m)^1/2. Both fits have the same ridge there; the
public code has n wd for D and n_r wd for D_r, and moves the weights by that alone. It linearises at
the trained weights, the paper at the initial ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.isolation import seeded
from fisher_forget.baselines.base import DirectMethod, PricedWeights, first_outputs
from fisher_forget.baselines.jacobian_rows import MEMORY, Rows, most_rows
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.data.split import Split, some
from fisher_forget.errors import ModelError, NumericalError
from fisher_forget.likelihood import Gaussian, Likelihood
from fisher_forget.likelihood.independent import IndependentOutputs
from fisher_forget.params import Params
from fisher_forget.unlearn.noise_draw import draw_noise


@dataclass(frozen=True)
class Ntk(DirectMethod):
    """NTK scrubbing.

    Attributes:
        weight_decay: wd of the objective, mean loss + (wd/2)|w - w_0|^2; above 0.
        initial: The model before its training. With it the step is lengthened as in the public code
            (see `stretch`).
        linearise: "trained" takes J and r at the given weights, "initial" at those of `initial`,
            without lengthening.
        form: "block", or "difference" for the public code's two fits with a ridge each.
        samples: Retained samples of the kernel; `None` takes as many as fit the memory.
        memory: Bytes for rows of J at a time, and for a solve with J J^T; a solve needs 24 (n C)^2.
        likelihood: Name or instance. The Gaussian's residuals and rows are in units of its sigma.

    Raises:
        ConfigError: If a value is out of range.
    """

    name = "ntk"
    grid: ClassVar[Grid] = {"weight_decay": Range(1e-3, 10.0)}

    weight_decay: float = 0.1
    initial: nn.Module | None = field(default=None, repr=False, compare=False)
    linearise: Literal["trained", "initial"] = "trained"
    form: Literal["block", "difference"] = "block"
    samples: int | None = None
    memory: int = MEMORY

    def __post_init__(self) -> None:
        places = ("trained", "initial") if self.initial is not None else ("trained",)
        expected = "'trained', or 'initial' with the model `initial`"
        few = self.samples is None or self.samples >= 1
        require(
            self,
            at_least={"memory": 1},
            above={"weight_decay": 0},  # without a ridge J J^T is singular
            linearise=(self.linearise in places, expected),
            form=(self.form in ("block", "difference"), "'block' or 'difference'"),
            samples=(few, "a number of at least 1, or None"),
        )

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        start = P.detached(P.trainable(model))
        before = None if self.initial is None else _same_shapes(self.initial, start)
        place = model if self.linearise == "trained" or self.initial is None else self.initial
        rows, stand = self._rows(place, split, likelihood)
        step, fit = self._fits(rows, stand)
        if before is not None and place is model:
            # e = w - w_0 - Delta(D_r), what linearisation does not explain of the training
            step = P.scale(step, stretch(step, P.add(P.add(start, before, -1), fit, -1)))
        return P.add(start, step), rows.gradients

    def _rows(self, model: nn.Module, split: Split, likelihood: Likelihood) -> tuple[Rows, float]:
        """Rows of J of D_r, or a draw, and of D_f; how many samples a drawn one stands for."""
        network = P.load(model, {}).eval()
        first = first_outputs(network, split, likelihood)
        outputs, unit = first.numel(), _unit(likelihood, first)
        # rows of D_f all count; what is left of the memory goes to D_r
        fitting = max(1, most_rows(self.memory) // outputs - len(split.forget))
        retained = some(split.retain, self.samples or fitting, self.seed)
        rows = Rows(
            network,
            split,
            (retained, split.forget),
            likelihood,
            lambda outputs, targets: _coordinates(likelihood, outputs, targets, unit),
            self.memory,
        )
        return rows, len(split.retain) / len(retained)

    def _fits(self, rows: Rows, stand: float) -> tuple[Params, Params]:
        """Delta(D_r) - Delta(D), and Delta(D_r)."""
        likelihood = rows.likelihood
        kept, gone = rows.outputs(lambda f, y: likelihood.residual(f, y) / _unit(likelihood, f))
        counts = rows.positions()
        # a drawn sample stands for several: its rows and residuals are times the root of how many
        weights = torch.cat([torch.full_like(kept, math.sqrt(stand)), torch.ones_like(gone)])
        gram = rows.gram() * weights[:, None] * weights
        solve = by_blocks if self.form == "block" else by_difference
        sizes = (counts[0] * stand, counts[1], self.weight_decay)
        coefficients = solve(gram, math.sqrt(stand) * kept, gone, *sizes)
        step, fit = rows.transposed(torch.stack([c * weights for c in coefficients], 1))
        return step, fit


@dataclass(frozen=True)
class NtkFisher(Ntk):
    """NTK scrubbing, then noise N(0, alpha (F + tau I)^-1), F the diagonal Fisher of D_r there.

    The seed is public: such noise is for comparisons and protects nothing. To release a model, use
    `forget`.

    Attributes:
        alpha: Scale of the variance.
        tau: Added to F, nats per squared weight; the public code cuts 1/F off at 1/tau instead.
    """

    name = "ntk-fisher"
    grid: ClassVar[Grid] = Ntk.grid | {"alpha": Range(1e-11, 1e-7)}

    alpha: float = 1e-9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, at_least={"alpha": 0}, above={"tau": 0})

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        weights, gradients = super().weights(model, split, likelihood)
        moved = P.load(model, weights).eval()
        fisher = estimate_curvature(moved, split, likelihood, structure="diagonal", kind="exact")
        generator = seeded(self.seed)
        # covariance alpha (F + tau I)^-1: its root is the exponent 1/2
        scale = math.sqrt(self.alpha)
        noise = draw_noise(fisher.damped(self.tau), weights, scale, generator, exponent=0.5)
        columns = likelihood.column_count(first_outputs(moved, split, likelihood))
        # the exact diagonal: one forward pass, and a backward pass for every column
        gradients += len(split.retain) * (1 + 2 * columns) / 3
        return P.add(weights, noise), gradients


def by_blocks(
    gram: Tensor, kept: Tensor, gone: Tensor, n_kept: float, n_gone: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    r"""Coefficients c of Delta(D_r) - Delta(D) = J^T c, and of Delta(D_r), with the ridge n wd.

    Args:
        gram: J J^T [R, R], rows of D_r first.
        kept: r on D_r.
        gone: r on D_f.
        n_kept: Scored positions of D_r; the mean loss is over these.
        n_gone: Of D_f.
        weight_decay: wd.
    """
    theta = _ridged(gram, (n_kept + n_gone) * weight_decay)
    cut = len(kept)
    rf, ff = theta[:cut, cut:], theta[cut:, cut:]
    # Theta_rr^-1 of both right-hand sides at once; then c_f = M V, c_r = -Theta_rr^-1 Theta_rf M V
    solved = _solve(theta[:cut, :cut], torch.cat([rf, kept[:, None]], 1))
    across, fit = solved[:, :-1], solved[:, -1]
    c = _solve(ff - rf.T @ across, (gone - rf.T @ fit)[:, None])[:, 0]
    return torch.cat([-across @ c, c]), torch.cat([-fit, torch.zeros_like(gone)])


def by_difference(
    gram: Tensor, kept: Tensor, gone: Tensor, n_kept: float, n_gone: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    r"""The same by two separate fits with the ridges n_r wd and n wd; arguments of `by_blocks`."""
    cut = len(kept)
    # Delta(D_r) = -J_r^T (J_r J_r^T + n_r wd I)^-1 r_r: zero coefficients on D_f
    retained = -_solve(_ridged(gram[:cut, :cut], n_kept * weight_decay), kept[:, None])[:, 0]
    fit = torch.cat([retained, torch.zeros_like(gone)])
    residuals = torch.cat([kept, gone])[:, None]
    return fit + _solve(_ridged(gram, (n_kept + n_gone) * weight_decay), residuals)[:, 0], fit


def stretch(step: Params, missing: Params) -> float:
    r"""The public code's stretch: (|delta| + 2 |cos(delta, e)| |e|) / |delta|; 1 for no step.

    A linearised step is too short where the network is not linear. e = w - w_0 - Delta(D_r) is the
    part of the training path that linearisation does not explain; step and path are taken for the
    sides of a symmetric trapezium.

    Args:
        step: delta.
        missing: e.
    """
    length, rest = P.norm(step), P.norm(missing)
    if not length or not rest:
        return 1.0
    cosine = P.dot(step, missing) / (length * rest)
    # the longer base of a trapezium with the shorter base |delta| and legs |e|
    return (length + 2 * abs(cosine) * rest) / length


def _coordinates(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor, unit: float
) -> list[Tensor]:
    """One unit vector an output, zero where it is not scored."""
    mask, columns = likelihood.mask(outputs, targets), []
    for k in range(outputs[0].numel()):
        column = torch.zeros_like(outputs)
        column.view(len(outputs), -1)[:, k] = unit
        columns.append(column if mask is None else column * mask)
    return columns


def _unit(likelihood: Likelihood, outputs: Tensor) -> float:
    """1/sigma of a Gaussian, whose rows and residuals are in units of sigma; over the root of the
    number of outputs where their mean is the loss."""
    unit = 1 / likelihood.sigma if isinstance(likelihood, Gaussian) else 1.0
    if isinstance(likelihood, IndependentOutputs):
        unit *= math.sqrt(likelihood.share(outputs))
    return unit


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    theta = gram.clone()  # both fits need the matrix without a ridge
    theta.diagonal().add_(ridge)
    return theta


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky factors, since the matrix is positive definite.

    Raises:
        NumericalError: If rounding errors exceed its ridge.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        got = "a ridge below the rounding errors of J J^T"
        raise NumericalError(got, "J J^T + rho I that is positive definite", "Raise weight_decay.")
    return torch.cholesky_solve(right, factor)


def _same_shapes(initial: nn.Module, like: Params) -> Params:
    """The initial weights, where they are those of the same network."""
    weights = P.detached(P.trainable(initial))
    if {n: p.shape for n, p in weights.items()} != {n: p.shape for n, p in like.items()}:
        got = "an initial model with other parameters than the trained one"
        raise ModelError(got, "the same names and shapes", "Pass its start.")
    return P.map_params(lambda p, x: x.to(p), like, weights)
