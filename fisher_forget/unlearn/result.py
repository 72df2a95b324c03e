"""What forget() returns: the scrubbed model, and everything that was done to get it."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_forget import params as P
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Split
from fisher_forget.unlearn.newton.step import NewtonStep
from fisher_forget.unlearn.noise import (
    EXPONENT,
    NoiseDraw,
    information,
    noise_curvature,
    noise_step,
    power_trace,
)

BUFFER_BATCH = 64  # samples per batch, at least, for BatchNorm statistics
BUFFER_SAMPLES = 20_000  # retained samples for BatchNorm statistics, at most


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
        losses: Mean loss in nats, of 2,000 samples of each part at most: retain_before,
            retain_after, forget_before, forget_after.
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
            damping=noise_damping(self.newton, self.weight_decay),
            exponent=exponent,
            seed=seed,
        )
        scrubbed = P.load(self.model, P.add(self.newton.params, drawn.params)).eval()
        refresh_buffers(scrubbed, self.split)
        return scrubbed

    def information(
        self, scale: float, *, exponent: float = EXPONENT, error: float | None = None
    ) -> float:
        """Local forgetting bound of noise of this scale, nats: see `fisher_forget.unlearn.noise`.

        Args:
            scale: s.
            exponent: p.
            error: sigma_h, in units of the weights; by default `newton_error`, NaN where no step
                was taken.
        """
        damped, _ = noise_curvature(
            self.curvature, self.newton.params, noise_damping(self.newton, self.weight_decay)
        )
        sigma = newton_error(self.newton) if error is None else error
        return information(scale, sigma, power_trace(damped, self.newton.params, 2 * exponent))

    def __str__(self) -> str:
        n, loss = self.newton, self.losses
        taken, cleared = n.accepted, ", ".join(map(str, n.absent))
        lines = [
            f"Forgot {len(self.split.forget):,} samples, retained {len(self.split.retain):,}, "
            f"in {sum(self.seconds.values()):.1f} s (seed {self.seed})",
            f"  curvature  {self.structure}, {self.kind} kind, of the retained data; {self.seconds['curvature']:.1f} s",
        ]
        if n.absent:
            lines.append(
                f"  absent     no sample of class {cleared} is left: its output row starts from zero"
            )
        if taken:
            rejected = f", {len(n.path) - len(taken)} rejected" if len(n.path) > len(taken) else ""
            shortened = (
                f", the last shortened to {taken[-1].share:.2g}" if taken[-1].share < 1 else ""
            )
            lines.append(
                f"  newton     {len(taken)} sub-step{'s' * (len(taken) > 1)}{rejected}{shortened}, damping "
                f"{max(s.damping for s in taken):.1e} to {min(s.damping for s in taken):.1e}, |step| {n.norm:.3g}; "
                f"{self.seconds['newton']:.1f} s"
            )
        elif n.path or not n.absent:
            unchanged = "" if n.absent else ": the weights are unchanged"
            lines.append(f"  newton     no step stayed within the budget{unchanged}")
        if not n.at_minimum:
            done = (
                "only what forgetting adds to the gradient acts"
                if n.drift_removed
                else "the step also trains on"
            )
            done = done if n.path else "no step follows"
            lines.append(
                f"  note       not at a minimum of the objective (stationarity {n.stationarity:.2g}): {done}"
            )
        if self.noise is None:
            lines.append("  noise      none")
        else:
            z = self.noise
            line = f"  noise      {z.scale:.2e} (B + {z.damping:.1e} I)^-{z.exponent:g}, |noise| {z.norm:.3g}"
            if z.target is not None:
                reached = (
                    f"drop {z.drop:.1e}" if z.target.kind == "accuracy" else f"loss {z.rise:+.1e}"
                )
                line += f"; {z.target}: {reached}"
            lines.append(
                line if math.isnan(z.information) else f"{line}, bound {z.information:.2g} nats"
            )
        if self.buffers_refreshed:
            lines.append("  buffers    BatchNorm statistics recomputed on the retained data")
        lines.append(
            f"  loss       retain {loss['retain_before']:.4g} -> {loss['retain_after']:.4g} nats, "
            f"forget {loss['forget_before']:.4g} -> {loss['forget_after']:.4g} nats"
        )
        lines.append(
            "  An estimate, not a certificate: compare with retrained models to see how close it came."
        )
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
                "absent": list(n.absent),
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
                "drop": z.drop,
                "information": z.information,
                "error": z.error,
                "target": None if z.target is None else asdict(z.target),
            },
            "losses": self.losses,
            "buffers_refreshed": self.buffers_refreshed,
            "seconds": self.seconds,
            "seed": self.seed,
            "versions": self.versions,
        }


def noise_damping(newton: NewtonStep, weight_decay: float) -> float:
    """The noise is damped as the last Newton sub-step was (1 without), so that it is as wide where
    that was blind."""
    return (newton.damping if newton.accepted else 1.0) + weight_decay


def newton_error(newton: NewtonStep) -> float:
    """sigma_h, by which the Newton step misses per weight, root mean square: |last sub-step taken|
    / sqrt(d).

    A rough guess from above of what the flow still had to go, as its sub-steps get shorter; NaN
    where none was taken.
    """
    return (
        newton.accepted[-1].norm / math.sqrt(P.size(newton.params)) if newton.accepted else math.nan
    )


def refresh_buffers(model: nn.Module, split: Split) -> bool:
    """Recompute BatchNorm's running statistics on the retained data, in place: they hold the
    forgotten data, too.

    As in training, a layer normalises by the statistics of its batch; here batches are drawn at
    random from all retained samples (20,000 at most), since in a data set sorted by class
    neighbours are alike, and each counts by its size.

    Returns:
        Whether there was anything to do, and samples to do it with: a single one has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    order = np.random.default_rng(0).permutation(split.retain)[:BUFFER_SAMPLES]
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
    return {
        "fisher_forget": version("fisher-forget"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
