"""forget(): data -> curvature -> Newton -> noise, in one call."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model, check_options
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.curvature.estimate import Structure, estimate_curvature
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Indices, Split, resolve_split, some
from fisher_forget.errors import ConfigError, FisherForgetWarning
from fisher_forget.likelihood import Likelihood, resolve_likelihood
from fisher_forget.unlearn.data_sums import Snapshot, take_snapshot
from fisher_forget.unlearn.newton.step import Solver, newton_step
from fisher_forget.unlearn.noise import EXPONENT, NoiseTarget, noise_step
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.result import (
    ForgetResult,
    newton_error,
    noise_damping,
    refresh_buffers,
    versions,
)

PRECONDITIONER_SAMPLES = 2000
LOSS_SAMPLES = 2000  # of each part, for the losses before and after
PARTS: tuple[Literal["retain", "forget"], ...] = ("retain", "forget")


def forget(
    model: nn.Module,
    retain_loader: DataLoader[Any] | Dataset[Any],
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    likelihood: Likelihood | str = "categorical",
    weight_decay: float = 0.0,
    structure: Structure = "ekfac",
    kind: Kind = "auto",
    draws: int = 1,
    max_samples: int | Literal["auto"] | None = "auto",
    steps: int | Literal["auto"] = "auto",
    damping: float | Literal["auto"] = "auto",
    solver: Solver = "auto",
    drift: bool | Literal["auto"] = "auto",
    budget: float | None = None,
    noise: float | Literal["auto"] | NoiseTarget | None = "auto",
    exponent: float = EXPONENT,
    subset: str | tuple[str, ...] | None = None,
    unpack: Unpack | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ForgetResult:
    """Forget training samples without retraining.

    Everything but the first three arguments has a default that needs no tuning. Nothing given is
    changed: neither the model (its weights, mode, gradients, hooks, buffers) nor any global random
    state.

    Args:
        model: Trained, in eval mode, float32 or float64; forward returns logits or an object with
            `.logits`.
        retain_loader: Loader over the training data set or a `Subset` of it; only its data set,
            collate function, batch size and workers are used. Samples to be forgotten are left out.
            Without random augmentation.
        forget_idx: Distinct indices into the training data set (the base of a `Subset`).
        likelihood: "categorical", "bernoulli", "gaussian", or an instance.
        weight_decay: wd of the training objective, mean loss + (wd/2)|w|^2 (the `weight_decay` of
            SGD).
        structure: Curvature structure, see `estimate_curvature`.
        kind: Curvature kind, see `estimate_curvature`; where max_samples="auto" leaves samples out,
            "auto" is one sketched column a sample, since the curvature is an estimate for a
            preconditioner then.
        draws: Columns a sample of the random kinds.
        max_samples: Retained samples that the curvature is estimated on; `None` for all. "auto" is
            2,000 where it only preconditions and shapes the noise, and all where it is inverted
            itself (solver="direct").
        steps: Newton sub-steps, see `newton_step`; 1 is the textbook step.
        damping: tau of each step, see `newton_step`.
        solver: "cg", "direct" or "auto", see `newton_step`.
        drift: Subtract the force that is not owed to the forget set, see `newton_step`.
        budget: Allowed rise of the held-back retained loss by the Newton step, see `newton_step`,
            nats.
        noise: Scale s of the noise s (B + tau I)^-p xi; or a `NoiseTarget` that it is to reach,
            which is by default ("auto") that the retained loss rises by max(0.0002 nats, 0.2 % of
            it); `None` adds none.
        exponent: p.
        subset: Shell patterns of the parameters that may move ("head.*"); `None` for all that
            require gradients.
        unpack: Function from a batch to (inputs, targets); by default tuples and dicts are
            understood.
        seed: Of every random choice.
        device: Where to compute; by default where the model is.
        progress: Show progress bars.

    Returns:
        A `ForgetResult`; print it.

    Raises:
        SplitError, DataError, ModelError, CurvatureError, ConfigError, NumericalError: What is
            wrong, what was expected and what to do. The given model is untouched then, too.

    Example:
        >>> import torch
        >>> from fisher_forget import forget
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(3, 2).eval()
        >>> result = forget(model, torch.utils.data.DataLoader(data), [0, 5, 7], drift=True, progress=False)
        >>> len(result.split.retain)
        37
    """
    with preserved_rng():
        options: dict[str, Any] = {
            "steps": steps,
            "damping": damping,
            "solver": solver,
            "drift": drift,
            "budget": budget,
            "noise": noise,
            "exponent": exponent,
            "seed": seed,
            "weight_decay": weight_decay,
        }
        check_options(draws=draws, **options)
        likelihood = resolve_likelihood(likelihood)
        if isinstance(noise, NoiseTarget):
            noise.check(likelihood)
        check_model(model)
        split = resolve_split(retain_loader, forget_idx, unpack=unpack)
        home = next(model.parameters()).device
        working = model if device is None else _on(model, device)
        seconds: dict[str, float] = {}
        clock = time.perf_counter()

        part = curvature_samples(split, max_samples, structure, solver, seed)
        sketched = kind == "auto" and max_samples == "auto" and len(part) < len(split.retain)
        curvature = estimate_curvature(
            working,
            split,
            likelihood,
            structure=structure,
            kind="sketch" if sketched else kind,
            draws=draws,
            part=part,
            subset=subset,
            seed=seed,
            progress=progress,
        )
        seconds["curvature"] = time.perf_counter() - clock

        clock = time.perf_counter()
        objective = Objective(working, likelihood, subset)
        snapshot = take_snapshot(objective, split, progress=progress)
        seconds["gradient"] = time.perf_counter() - clock
        result = scrub(
            working,
            objective,
            split,
            curvature,
            snapshot,
            seconds=seconds,
            progress=progress,
            **options,
        )
    return replace(result, model=result.model.to(home))


def scrub(
    model: nn.Module,
    objective: Objective,
    split: Split,
    curvature: Curvature,
    snapshot: Snapshot,
    *,
    seconds: dict[str, float],
    weight_decay: float,
    steps: int | Literal["auto"],
    damping: float | Literal["auto"],
    solver: Solver,
    drift: bool | Literal["auto"],
    budget: float | None,
    noise: float | Literal["auto"] | NoiseTarget | None,
    exponent: float,
    seed: int,
    progress: bool,
) -> ForgetResult:
    """Newton correction, noise, buffers and losses, once curvature and gradient are known; options
    as in `forget`.

    Args:
        model: Original; untouched.
        objective: Of that model.
        split: Who is retained and forgotten.
        curvature: Of the retained loss, undamped.
        snapshot: Of all data.
        seconds: Wall time of what came before.
    """
    newton = newton_step(
        objective,
        split,
        curvature,
        weight_decay=weight_decay,
        steps=steps,
        damping=damping,
        solver=solver,
        drift=drift,
        budget=budget,
        snapshot=snapshot,
        seed=seed,
        progress=progress,
    )
    seconds = seconds | {"newton": newton.seconds}
    if not newton.at_minimum and drift == "auto":
        moves = "what is retained moves it, within a strict budget"
        if newton.absent:
            moves = "only an absent class's output row moves"
        elif newton.drift_removed:
            moves = "only what forgetting adds to its gradient moves it"
        warnings.warn(
            f"The model is not at a minimum of its training objective (stationarity {newton.stationarity:.2g}, "
            f"0.5 expected at most, or training on would lower its loss), so {moves}. Train it to the end, or "
            "check that weight_decay is the one used in training.",
            FisherForgetWarning,
            stacklevel=3,
        )

    clock = time.perf_counter()
    drawn = None
    if noise is not None:
        drawn = noise_step(
            objective,
            split,
            curvature,
            newton.params,
            noise=noise,
            damping=noise_damping(newton, weight_decay),
            error=newton_error(newton),
            exponent=exponent,
            seed=seed,
        )
    seconds["noise"] = time.perf_counter() - clock

    clock = time.perf_counter()
    final = newton.params if drawn is None else P.add(newton.params, drawn.params)
    scrubbed = P.load(model, final).eval()
    refreshed = refresh_buffers(scrubbed, split)
    after = Objective(scrubbed, objective.likelihood)
    shown = {part: some(split.indices(part), LOSS_SAMPLES, seed) for part in PARTS}
    losses = {}
    for part, chosen in shown.items():
        losses[f"{part}_before"] = objective.mean_loss(split.batches(chosen), objective.start)
        losses[f"{part}_after"] = after.mean_loss(split.batches(chosen), after.start)
    seconds["check"] = time.perf_counter() - clock
    info = curvature.info
    return ForgetResult(
        model=scrubbed,
        split=split,
        curvature=curvature,
        structure=info.structure if info is not None else type(curvature).__name__,
        kind=info.kind if info is not None else "given",
        newton=newton,
        noise=drawn,
        losses=losses,
        buffers_refreshed=refreshed,
        seconds=seconds,
        weight_decay=weight_decay,
        seed=seed,
        versions=versions(),
    )


def curvature_samples(
    split: Split,
    max_samples: int | Literal["auto"] | None,
    structure: Structure,
    solver: Solver,
    seed: int,
) -> Indices:
    """The retained samples that curvature is estimated on: the first so many of one permutation of
    all samples.

    "auto" takes a few thousand where the curvature is a preconditioner and the shape of the noise,
    and all of them where it is inverted itself. One permutation for all splits, so that most of the
    samples stay after a deletion.
    """
    if max_samples == "auto":
        direct = solver == "direct" or (solver == "auto" and structure == "dense")
        max_samples = None if direct else PRECONDITIONER_SAMPLES
    if max_samples is None or max_samples >= len(split.retain):
        return split.retain
    order = np.random.default_rng(seed).permutation(split.indices("all"))
    return np.sort(order[np.isin(order, split.retain)][:max_samples])


def _on(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy of the model on a device."""
    try:
        return copy.deepcopy(model).to(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, not built in, or full
        raise ConfigError(
            f"device={device!r}: {error}", "a device that torch can use here", "Try 'cpu'."
        ) from error
