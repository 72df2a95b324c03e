"""forget(): data -> curvature -> Newton -> noise, in one call."""

from __future__ import annotations

import copy
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget.checks import check_model, check_options
from fisher_forget.curvature.estimate import Structure, estimate_curvature
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Indices, Split
from fisher_forget.data.split import resolve as resolve_split
from fisher_forget.errors import ConfigError, FisherForgetWarning
from fisher_forget.likelihood import Likelihood
from fisher_forget.likelihood import resolve as resolve_likelihood
from fisher_forget.newton import NewtonStep, Solver, newton_step
from fisher_forget.noise import EXPONENT, NoiseDraw, noise_step
from fisher_forget.objective import Objective
from fisher_forget.randomness import preserved_rng

BUFFER_BATCH = 64  # samples per batch, at least, for BatchNorm statistics


@dataclass(frozen=True)
class ForgetResult:
    """A scrubbed model and everything that was done to get it.

    Attributes:
        model: Scrubbed copy, in eval mode, on the given model's device.
        split: Who was retained and forgotten.
        curvature: Of the retained loss at the given weights, without damping.
        structure: Of the curvature.
        kind: Of the curvature.
        newton: The Newton correction.
        noise: The noise drawn, or `None`.
        losses: Mean loss in nats: retain_before, retain_after, forget_before, forget_after.
        buffers_refreshed: Whether BatchNorm statistics were recomputed on the retained data.
        seconds: Wall time of each stage.
        weight_decay: Of the training objective.
        seed: Of every random choice.
        versions: Of this package, torch and Python.
    """

    model: nn.Module
    split: Split
    curvature: Curvature
    structure: str
    kind: str
    newton: NewtonStep
    noise: NoiseDraw | None
    losses: dict[str, float]
    buffers_refreshed: bool
    seconds: dict[str, float]
    weight_decay: float
    seed: int
    versions: dict[str, str]

    def with_noise(self, scale: float, *, seed: int = 0, exponent: float = EXPONENT) -> nn.Module:
        """The Newton-corrected model with another noise draw, from the same curvature: for sweeps.

        Args:
            scale: s; 0 gives the model without noise.
            seed: Of the draw.
            exponent: p.
        """
        drawn = noise_step(
            None,
            self.split,
            self.curvature,
            self.newton.params,
            noise=scale,
            damping=_noise_damping(self.newton, self.weight_decay),
            exponent=exponent,
            seed=seed,
        )
        scrubbed = P.load(self.model, P.add(self.newton.params, drawn.params)).eval()
        refresh_buffers(scrubbed, self.split)
        return scrubbed

    def __str__(self) -> str:
        n, loss = self.newton, self.losses
        taken = n.accepted
        lines = [
            f"Forgot {len(self.split.forget):,} samples, retained {len(self.split.retain):,}, "
            f"in {sum(self.seconds.values()):.1f} s (seed {self.seed})",
            f"  curvature  {self.structure}, {self.kind} kind, of the retained data; {self.seconds['curvature']:.1f} s",
        ]
        if taken:
            rejected = f", {len(n.path) - len(taken)} rejected" if len(n.path) > len(taken) else ""
            lines.append(
                f"  newton     {len(taken)} sub-step{'s' * (len(taken) > 1)}{rejected}, damping "
                f"{max(s.damping for s in taken):.1e} to {min(s.damping for s in taken):.1e}, |step| {n.norm:.3g}; "
                f"{self.seconds['newton']:.1f} s"
            )
        else:
            lines.append("  newton     no step stayed within the budget: the weights are unchanged")
        if not n.at_minimum:
            done = "the motion without forgetting was subtracted" if n.drift_removed else "the step also trains on"
            lines.append(f"  note       not at a minimum of the objective (stationarity {n.stationarity:.2g}): {done}")
        if self.noise is None:
            lines.append("  noise      none")
        else:
            z = self.noise
            calibrated = f"; retained loss {z.rise:+.1e} of {z.budget:.1e} nats allowed" if z.budget == z.budget else ""
            lines.append(
                f"  noise      {z.scale:.2e} (B + {z.damping:.1e} I)^-{z.exponent:g}, |noise| {z.norm:.3g}{calibrated}"
            )
        if self.buffers_refreshed:
            lines.append("  buffers    BatchNorm statistics recomputed on the retained data")
        lines.append(
            f"  loss       retain {loss['retain_before']:.4g} -> {loss['retain_after']:.4g} nats, "
            f"forget {loss['forget_before']:.4g} -> {loss['forget_after']:.4g} nats"
        )
        lines.append("  An estimate, not a certificate: compare with retrained models to see how close it came.")
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        n, z = self.newton, self.noise
        return {
            "forgotten": len(self.split.forget),
            "retained": len(self.split.retain),
            "curvature": {"structure": self.structure, "kind": self.kind},
            "newton": {
                "substeps": len(n.accepted),
                "rejected": len(n.path) - len(n.accepted),
                "damping": n.damping,
                "norm": n.norm,
                "gradient_norm": n.gradient_norm,
                "stationarity": n.stationarity,
                "at_minimum": n.at_minimum,
                "drift_removed": n.drift_removed,
                "held_back": n.held_back,
                "budget": n.budget,
            },
            "noise": None
            if z is None
            else {
                "scale": z.scale,
                "exponent": z.exponent,
                "damping": z.damping,
                "norm": z.norm,
                "rise": z.rise,
                "budget": z.budget,
            },
            "losses": self.losses,
            "buffers_refreshed": self.buffers_refreshed,
            "seconds": self.seconds,
            "seed": self.seed,
            "versions": self.versions,
        }


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
    steps: int | Literal["auto"] = "auto",
    damping: float | Literal["auto"] = "auto",
    solver: Solver = "auto",
    drift: bool | Literal["auto"] = "auto",
    budget: float | None = None,
    noise: float | Literal["auto"] | None = "auto",
    noise_budget: float | None = None,
    exponent: float = EXPONENT,
    subset: str | tuple[str, ...] | None = None,
    unpack: Unpack | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ForgetResult:
    """Forget training samples without retraining.

    Everything but the first three arguments has a default that needs no tuning. Nothing given is changed: neither the
    model (its weights, mode, gradients, hooks, buffers) nor any global random state.

    Args:
        model: Trained, in eval mode, float32 or float64; forward returns logits or an object with `.logits`.
        retain_loader: Loader over the training data set or a `Subset` of it; only its data set, collate function,
            batch size and workers are used. Samples to be forgotten are left out. Without random augmentation.
        forget_idx: Distinct indices into the training data set (the base of a `Subset`).
        likelihood: "categorical", "bernoulli", "gaussian", or an instance.
        weight_decay: wd of the training objective, mean loss + (wd/2)|w|^2 (the `weight_decay` of SGD).
        structure: Curvature structure, see `estimate_curvature`.
        kind: Curvature kind, see `estimate_curvature`.
        draws: Columns a sample of the random kinds.
        steps: Newton sub-steps, see `newton_step`; 1 is the textbook step.
        damping: tau of each step, see `newton_step`.
        solver: "cg", "direct" or "auto", see `newton_step`.
        drift: Subtract the motion without forgetting, see `newton_step`.
        budget: Allowed rise of the held-back retained loss by the Newton step, nats.
        noise: Scale s of the noise s (B + tau I)^-p xi; "auto" finds it from `noise_budget`; `None` adds none.
        noise_budget: Allowed rise of the retained loss by the noise, nats; default max(0.001, 2 % of it).
        exponent: p.
        subset: Shell patterns of the parameters that may move ("head.*"); `None` for all that require gradients.
        unpack: Function from a batch to (inputs, targets); by default tuples and dicts are understood.
        seed: Of every random choice.
        device: Where to compute; by default where the model is.
        progress: Show progress bars.

    Returns:
        A `ForgetResult`; print it.

    Raises:
        SplitError, DataError, ModelError, CurvatureError, ConfigError, NumericalError: What is wrong, what was
            expected and what to do. The given model is untouched then, too.

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
        check_options(
            weight_decay=weight_decay,
            draws=draws,
            steps=steps,
            damping=damping,
            solver=solver,
            drift=drift,
            budget=budget,
            noise=noise,
            noise_budget=noise_budget,
            exponent=exponent,
            seed=seed,
        )
        likelihood = resolve_likelihood(likelihood)
        check_model(model)
        split = resolve_split(retain_loader, forget_idx, unpack=unpack)
        home = next(model.parameters()).device
        working = model if device is None else _on(model, device)
        seconds: dict[str, float] = {}
        clock = time.perf_counter()

        curvature = estimate_curvature(
            working,
            split,
            likelihood,
            structure=structure,
            kind=kind,
            draws=draws,
            subset=subset,
            seed=seed,
            progress=progress,
        )
        seconds["curvature"] = time.perf_counter() - clock

        objective = Objective(working, likelihood, subset)
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
            seed=seed,
            progress=progress,
        )
        seconds["newton"] = newton.seconds
        if not newton.at_minimum and drift == "auto":
            warnings.warn(
                f"The model is not at a minimum of its training objective (stationarity {newton.stationarity:.2g}, "
                "0.5 expected at most): the motion without forgetting was subtracted. Train it to the end, or check "
                "that weight_decay is the one used in training.",
                FisherForgetWarning,
                stacklevel=2,
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
                damping=_noise_damping(newton, weight_decay),
                budget=noise_budget,
                exponent=exponent,
                seed=seed,
            )
        seconds["noise"] = time.perf_counter() - clock

        clock = time.perf_counter()
        final = newton.params if drawn is None else P.add(newton.params, drawn.params)
        scrubbed = P.load(working, final).eval()
        refreshed = refresh_buffers(scrubbed, split)
        after = Objective(scrubbed, likelihood, subset)
        losses = {
            "retain_before": objective.mean_loss(split.batches("retain"), objective.start),
            "retain_after": after.mean_loss(split.batches("retain"), after.start),
            "forget_before": objective.mean_loss(split.batches("forget"), objective.start),
            "forget_after": after.mean_loss(split.batches("forget"), after.start),
        }
        seconds["check"] = time.perf_counter() - clock
    return ForgetResult(
        model=scrubbed.to(home),
        split=split,
        curvature=curvature,
        structure=structure,
        kind=kind,
        newton=newton,
        noise=drawn,
        losses=losses,
        buffers_refreshed=refreshed,
        seconds=seconds,
        weight_decay=weight_decay,
        seed=seed,
        versions=versions(),
    )


def _on(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy of the model on a device."""
    try:
        return copy.deepcopy(model).to(device)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, not built in, or full
        raise ConfigError(f"device={device!r}: {error}", "a device that torch can use here", "Try 'cpu'.") from error


def _noise_damping(newton: NewtonStep, weight_decay: float) -> float:
    """The noise is damped as the last Newton sub-step was, so that it is as wide where that step was blind."""
    return (newton.damping if newton.accepted else 1.0) + weight_decay


def refresh_buffers(model: nn.Module, split: Split) -> bool:
    """Recompute BatchNorm's running statistics on the retained data, in place: they hold the forgotten data, too.

    As in training, a layer normalises by the statistics of its batch; here batches are drawn at random from all
    retained samples, since in a data set sorted by class neighbours are alike, and each counts by its size.

    Returns:
        Whether there was anything to do, and samples to do it with: a single one has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    order = np.random.default_rng(0).permutation(split.retain)
    if not norms or len(order) < 2:
        return False
    batches = max(1, len(order) // max(split.batch_size, BUFFER_BATCH))
    walk = replace(split, batch_size=-(-len(order) // batches))
    seen = 0
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.train()
    with torch.no_grad():
        for batch in walk.batches(order):
            if len(batch) < 2:
                continue
            seen += len(batch)
            for m in norms:
                m.momentum = len(batch) / seen  # a running mean over all samples so far
            batch = batch.on(model)
            P.call(model, {}, batch.args, batch.kwargs)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.eval()
    return True


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"fisher_forget": version("fisher-forget"), "torch": torch.__version__, "python": platform.python_version()}
