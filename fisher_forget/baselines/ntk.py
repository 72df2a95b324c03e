r"""NTK scrubbing: the change of weights that leaving D_f out would have made, were the network linear in its weights.

With outputs f(w') = f(w) + J (w' - w), J [R, d] where R = samples x outputs, residuals r = f(w) - Y (softmax - onehot
for classes) and the ridge rho = n wd of the objective's sum over n samples, the fit of a part is

    Delta(part) = -J^T (J J^T + rho I)^-1 r

and w <- w + Delta(D_r) - Delta(D). Golatkar et al. 2020b (arXiv:2003.02960). In block form, Theta = J J^T + rho I,

    Delta(D_r) - Delta(D) = (J_f^T - J_r^T Theta_rr^-1 Theta_rf) M V
    M = (Theta_ff - Theta_rf^T Theta_rr^-1 Theta_rf)^-1
    V = r_f - Theta_rf^T Theta_rr^-1 r_r

which does not subtract two large fits from each other. Both fits have the same ridge there; the public code has n wd
for D and n_r wd for D_r, and moves the weights by that alone. It linearises at the trained weights, the paper at the
initial ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget.baselines.protocol import Unlearned
from fisher_forget.checks import check_model
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError, ModelError, NumericalError
from fisher_forget.likelihood import Gaussian, Likelihood, resolve
from fisher_forget.noise import draw_noise
from fisher_forget.params import Params
from fisher_forget.randomness import preserved_rng

Columns = Callable[[Tensor, Tensor], Sequence[Tensor]]  # (outputs, targets) -> vectors of the outputs' shape
MEMORY = 1 << 30
ALIVE = 4  # blocks of rows that may exist at one moment, copies included
SQUARES = 3  # matrices of the Gram matrix's size that a solve needs


class Rows:
    """The rows s_nk^T J_n of G [R, d], sample after sample; blocks that do not fit the memory are made again.

    Args:
        model: Copied; never touched.
        split: The data.
        parts: Samples, in this order; no block reaches over the end of a part.
        likelihood: Gives residuals and counts.
        columns: The vectors s that are back-propagated.
        memory: Bytes that rows may take at a time, and that a solve with the Gram matrix may take.

    Attributes:
        gradients: Sample gradients computed so far; a forward pass is a third, a backward pass two thirds.

    Raises:
        ConfigError: If the Gram matrix does not fit the memory.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        parts: Sequence[Indices],
        likelihood: Likelihood,
        columns: Columns,
        memory: int,
    ) -> None:
        check_model(model)
        self.tape, self.split, self.likelihood, self.columns = Tape(model), split, likelihood, columns
        self.like = P.detached(self.tape.params)
        first = next(split.batches(np.concatenate(list(parts))[:2])).on(self.tape.model)
        probe = self.tape.verify(first)
        likelihood.check(probe.outputs, first.targets)
        each = len(columns(probe.outputs, first.targets))
        total = each * sum(map(len, parts))
        if SQUARES * 8 * total**2 > memory:
            raise ConfigError(
                f"{total:,} rows, whose products with each other need {SQUARES * 8 * total**2 / 2**30:,.1f} GiB",
                f"at most {math.isqrt(memory // (SQUARES * 8)):,} rows within memory={memory}",
                "Raise `memory`, or give the method fewer samples.",
            )
        step = max(1, memory // (ALIVE * each * P.size(self.like) * P.flatten(self.like).element_size()))
        self._blocks = [part[i : i + step] for part in parts for i in range(0, len(part), step)]
        self._parts = [k for k, part in enumerate(parts) for _ in range(0, len(part), step)]
        self._count = len(parts)
        self._held: tuple[int, Tensor] | None = None
        self.gradients = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks [r, d], in order."""
        return (self._block(i) for i in range(len(self._blocks)))

    def _batch(self, index: int) -> Batch:
        chosen = self._blocks[index]
        return next(replace(self.split, batch_size=len(chosen)).batches(chosen)).on(self.tape.model)

    def _block(self, index: int) -> Tensor:
        if self._held is not None and self._held[0] == index:
            return self._held[1]
        self._held = None  # frees its memory before the next one is made
        batch = self._batch(index)
        record = self.tape.run(batch)
        outputs = record.outputs.detach()
        self.likelihood.check(outputs, batch.targets)
        columns, found = self.columns(outputs, batch.targets), []
        for column in columns:
            grads = record.pull(column)
            with torch.no_grad():
                found.append(
                    torch.cat([g.reshape(len(batch), -1) for g in record.per_sample(column, grads).values()], 1)
                )
        self.gradients += len(batch) * (1 + 2 * len(columns)) / 3
        rows = torch.stack(found, 1).flatten(0, 1)
        self._held = (index, rows)
        return rows

    def outputs(self, read: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """What `read` makes of outputs and targets: one vector a part, float64, on the CPU."""
        found: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] for _ in range(self._count)]
        for index, part in enumerate(self._parts):
            batch = self._batch(index)
            with torch.no_grad():
                outputs = P.call(self.tape.model, {}, batch.args, batch.kwargs)
            found[part].append(read(outputs, batch.targets).double().cpu().reshape(-1))
            self.gradients += len(batch) / 3
        return [torch.cat(pieces) for pieces in found]

    def positions(self) -> list[float]:
        """Scored positions of each part, which its mean loss is over."""
        found = [0.0] * self._count
        for index, part in enumerate(self._parts):
            found[part] += float(self.likelihood.counts(self._batch(index).targets).double().sum())
        return found

    def gram(self) -> Tensor:
        """G G^T [R, R], float64, on the CPU."""
        lines = []
        for i in range(len(self._blocks)):
            own = self._block(i)  # held by its name while the blocks before it are made again
            lines.append([(own @ self._block(j).T).double().cpu() for j in range(i)] + [(own @ own.T).double().cpu()])
        return torch.cat(
            [torch.cat([*line, *(lines[k][i].T for k in range(i + 1, len(lines)))], 1) for i, line in enumerate(lines)]
        )

    def times(self, v: Params) -> Tensor:
        """G v [R], float64, on the CPU."""
        flat = P.flatten(v)
        return torch.cat([(block @ flat).double().cpu() for block in self])

    def transposed(self, c: Tensor) -> list[Params]:
        """G^T c for every column of c [R, k]."""
        flat = P.flatten(self.like)
        total, at = flat.new_zeros(len(flat), c.shape[1], dtype=torch.float64), 0
        for block in self:
            total += (block.T @ c[at : at + len(block)].to(block)).double()
            at += len(block)
        return [P.unflatten(x.to(flat.dtype).contiguous(), self.like) for x in total.T]


@dataclass(frozen=True)
class Ntk:
    """NTK scrubbing.

    Attributes:
        weight_decay: wd of the objective, mean loss + (wd/2)|w - w_0|^2; above 0.
        initial: The model before its training. With it the step is lengthened as in the public code (see `stretch`).
        linearise: "trained" takes J and r at the given weights, "initial" at those of `initial`, without lengthening.
        form: "block", or "difference" for the public code's two fits with a ridge each.
        memory: Bytes for rows of J at a time, and for a solve with J J^T; a solve needs 24 (n C)^2.
        likelihood: Name or instance. The Gaussian's residuals and rows are in units of its sigma.
        seed: Nothing is random here.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: ClassVar[str] = "ntk"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"weight_decay": (0.001, 0.01, 0.1, 1.0)}

    weight_decay: float = 0.1
    initial: nn.Module | None = field(default=None, repr=False, compare=False)
    linearise: Literal["trained", "initial"] = "trained"
    form: Literal["block", "difference"] = "block"
    memory: int = MEMORY
    likelihood: Likelihood | str = "categorical"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("weight_decay", 0 < self.weight_decay < math.inf, "a number above 0: without a ridge J J^T is singular"),
            ("linearise", self.linearise in ("trained", "initial"), "'trained' or 'initial'"),
            ("linearise", self.linearise == "trained" or self.initial is not None, "'trained' without `initial`"),
            ("form", self.form in ("block", "difference"), "'block' or 'difference'"),
            ("memory", self.memory >= 1, "bytes"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)!r}", expected, "Correct the method's settings.")

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        """Forget `split.forget`; the given model is untouched."""
        begun = time.perf_counter()
        with preserved_rng():
            found, gradients = self._scrub(model, split)
        return Unlearned(found, time.perf_counter() - begun, gradients / len(split.retain))

    def _scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        """The scrubbed model, and how many sample gradients it cost."""
        check_model(model)
        likelihood = resolve(self.likelihood)
        start = P.detached(P.trainable(model))
        before = None if self.initial is None else _same_shapes(self.initial, start)
        point = self.initial if self.initial is not None and self.linearise == "initial" else model
        unit = 1 / likelihood.sigma if isinstance(likelihood, Gaussian) else 1.0
        rows = Rows(
            P.load(point, {}).eval(),
            split,
            (split.retain, split.forget),
            likelihood,
            lambda outputs, targets: _coordinates(likelihood, outputs, targets, unit),
            self.memory,
        )
        residuals = rows.outputs(lambda outputs, targets: likelihood.residual(outputs, targets) / unit)
        counts = rows.positions()
        solve = by_blocks if self.form == "block" else by_difference
        both = solve(rows.gram(), residuals[0], residuals[1], counts[0], counts[1], self.weight_decay)
        step, fit = rows.transposed(torch.stack(both, 1))
        if before is not None and self.linearise == "trained":
            step = P.scale(step, stretch(step, P.add(P.add(start, before, -1), fit, -1)))
        if not P.finite(step):
            raise NumericalError("a step that is not finite", "finite weights", "Raise weight_decay.")
        return P.load(model, P.add(start, step)).eval(), rows.gradients


@dataclass(frozen=True)
class NtkFisher(Ntk):
    """NTK scrubbing and then noise N(0, alpha (F + tau I)^-1), F the diagonal Fisher of D_r at the scrubbed weights.

    Attributes:
        alpha: Scale of the variance.
        tau: Added to F, nats per squared weight; the public code cuts 1/F off at 1/tau instead.
    """

    name: ClassVar[str] = "ntk-fisher"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {**Ntk.grid, "alpha": (1e-10, 1e-9, 1e-8, 1e-7)}

    alpha: float = 1e-9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, good, expected in (
            ("alpha", 0 <= self.alpha < math.inf, "a number of at least 0"),
            ("tau", 0 < self.tau < math.inf, "a number above 0"),
        ):
            if not good:
                raise ConfigError(f"{name}={getattr(self, name)!r}", expected, "Correct the method's settings.")

    def _scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        moved, gradients = super()._scrub(model, split)
        likelihood = resolve(self.likelihood)
        fisher = estimate_curvature(moved, split, likelihood, structure="diagonal", kind="exact")
        start = P.detached(P.trainable(moved))
        generator = torch.Generator().manual_seed(self.seed)
        noise = draw_noise(fisher.damped(self.tau), start, math.sqrt(self.alpha), generator, exponent=0.5)
        batch = next(split.batches(split.retain[:1])).on(moved)
        columns = likelihood.column_count(P.call(moved, {}, batch.args, batch.kwargs))
        gradients += len(split.retain) * (1 + 2 * columns) / 3
        return P.load(moved, P.add(start, noise)).eval(), gradients


def by_blocks(
    gram: Tensor, kept: Tensor, gone: Tensor, n_kept: float, n_gone: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    r"""Coefficients c of Delta(D_r) - Delta(D) = J^T c, and of Delta(D_r), with the common ridge n wd.

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
    solved = _solve(theta[:cut, :cut], torch.cat([rf, kept[:, None]], 1))
    across, fit = solved[:, :-1], solved[:, -1]
    c = _solve(ff - rf.T @ across, (gone - rf.T @ fit)[:, None])[:, 0]
    return torch.cat([-across @ c, c]), torch.cat([-fit, torch.zeros_like(gone)])


def by_difference(
    gram: Tensor, kept: Tensor, gone: Tensor, n_kept: float, n_gone: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    r"""The same as two separate fits with the ridges n_r wd and n wd; arguments as in `by_blocks`."""
    cut = len(kept)
    retained = -_solve(_ridged(gram[:cut, :cut], n_kept * weight_decay), kept[:, None])[:, 0]
    fit = torch.cat([retained, torch.zeros_like(gone)])
    every = torch.cat([kept, gone])[:, None]
    return fit + _solve(_ridged(gram, (n_kept + n_gone) * weight_decay), every)[:, 0], fit


def stretch(step: Params, missing: Params) -> float:
    r"""By how much the public code lengthens the step: (|delta| + 2 |cos(delta, e)| |e|) / |delta|; 1 for no step.

    A linearised step is too short where the network is not linear. e = w - w_0 - Delta(D_r) is the part of the training
    path that linearisation does not explain; step and path are taken for the sides of a symmetric trapezium.

    Args:
        step: delta.
        missing: e.
    """
    length, rest = P.norm(step), P.norm(missing)
    if not length or not rest:
        return 1.0
    cosine = P.dot(step, missing) / (length * rest)
    return (length + 2 * abs(cosine) * rest) / length


def _coordinates(likelihood: Likelihood, outputs: Tensor, targets: Tensor, unit: float) -> list[Tensor]:
    """One unit vector an output, zero where it is not scored."""
    mask, found = likelihood.mask(outputs, targets), []
    for k in range(outputs[0].numel()):
        column = torch.zeros_like(outputs)
        column.view(len(outputs), -1)[:, k] = unit
        found.append(column if mask is None else column * mask)
    return found


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    theta = gram.clone()
    theta.diagonal().add_(ridge)
    return theta


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky factors, since the matrix is positive definite.

    Raises:
        NumericalError: If rounding errors exceed its ridge.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise NumericalError(
            "a ridge below the rounding errors of J J^T",
            "J J^T + rho I that is positive definite",
            "Raise weight_decay.",
        )
    return torch.cholesky_solve(right, factor)


def _same_shapes(initial: nn.Module, like: Params) -> Params:
    """The initial weights, where they are those of the same network."""
    found = P.detached(P.trainable(initial))
    if {name: p.shape for name, p in found.items()} != {name: p.shape for name, p in like.items()}:
        raise ModelError(
            "an initial model with other parameters than the trained one",
            "the same names and shapes",
            "Pass its start.",
        )
    return P.map_params(lambda p, x: x.to(p), like, found)
