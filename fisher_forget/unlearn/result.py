"""What forget() returns: the scrubbed model, and everything that was done to get it."""

from __future__ import annotations

import copy
import math
import platform
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import Dataset

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import Split
from fisher_forget.errors import DataError
from fisher_forget.ledger import evidence
from fisher_forget.likelihood import named, resolve_likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.batch_norm import refresh_statistics
from fisher_forget.unlearn.newton.step import NewtonStep
from fisher_forget.unlearn.noise import NoiseDraw, information, noise_curvature
from fisher_forget.unlearn.noise_draw import draw_noise
from fisher_forget.unlearn.noise_target import EXPONENT
from fisher_forget.unlearn.options import ForgetOptions
from fisher_forget.unlearn.self_check import SelfCheck
from fisher_forget.unlearn.weight_decay import WeightDecay


class NotStored(Dataset[Any]):
    """In place of the training data, which hold what was to be forgotten, in a stored result.

    Args:
        size: Number of samples.

    Raises:
        DataError: Where a sample is asked for.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        got = "a result that was loaded from a file, for which training data are needed"
        expected = "the training data, which no file of a result holds"
        raise DataError(got, expected, "Do it before the result is stored, or forget again.")


@dataclass(frozen=True)
class NormStatistics:
    """What became of the running statistics of BatchNorm and InstanceNorm layers.

    Attributes:
        refreshed: Names of the layers whose statistics were recomputed on the retained data.
        kept: Names of the other layers with statistics, which are as given.
        rise: By how much the recomputing raised the retained loss, nats.
    """

    refreshed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    rise: float = 0.0


@dataclass(frozen=True, repr=False)
class ForgetResult:
    """A scrubbed model and everything that was done to get it.

    It can be pickled, and saved by `torch.save`, without the training data, and, where noise was
    added, without the weights before it, whose difference from the model's is the noise. What needs
    either (`with_noise`, a matrix-free curvature's products) raises an error then. A copy has both.

    Attributes:
        model: Scrubbed copy, in eval mode, on the given model's device.
        split: Who was retained and forgotten.
        options: Of the call.
        curvature: Of the retained loss at the given weights, without damping.
        newton: The Newton correction.
        noise: What may be said of the noise, or `None` where none was added.
        losses: Mean loss in nats, of 1,000 samples of each part at most: retain_before,
            retain_after, forget_before, forget_after.
        check: What the result can say of itself without retrained models.
        statistics: Which layers' running statistics were recomputed on the retained data.
        seconds: Wall time of each stage.
        versions: Of this package, torch and Python.
    """

    model: nn.Module
    split: Split
    options: ForgetOptions
    curvature: Curvature
    newton: NewtonStep
    noise: NoiseDraw | None
    losses: dict[str, float]
    check: SelfCheck
    statistics: NormStatistics
    seconds: dict[str, float]
    versions: dict[str, str]

    def __getstate__(self) -> dict[str, Any]:
        split = self.split
        stored = Split(NotStored(len(split.base)), split.retain, split.forget, split.batch_size)  # type: ignore[arg-type]
        newton = self.newton
        if self.noise is not None:
            newton = replace(newton, params=P.outline(newton.params))
        return vars(self) | {"split": stored, "newton": newton}

    def __copy__(self) -> Self:
        """All that it holds, which pickle's way of copying would leave out."""
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """All that someone might change; split, curvature and their data are shared."""
        return replace(
            self,
            model=copy_model(self.model),
            newton=copy.deepcopy(self.newton, memo),
            losses=dict(self.losses),
            seconds=dict(self.seconds),
        )

    @property
    def structure(self) -> str:
        """Structure of the curvature."""
        info = self.curvature.info
        return type(self.curvature).__name__ if info is None else info.structure

    @property
    def kind(self) -> str:
        """Kind of the curvature."""
        return "given" if self.curvature.info is None else self.curvature.info.kind

    @property
    def likelihood(self) -> str:
        """Whose loss the model was trained with: its name, or the call that makes it."""
        return str(named(resolve_likelihood(self.options.likelihood)))

    @property
    def buffers_refreshed(self) -> bool:
        """Whether statistics of any layer were recomputed on the retained data."""
        return bool(self.statistics.refreshed)

    @property
    def weight_decay(self) -> WeightDecay:
        """wd of the training objective, as given or read off; by name where it differs."""
        return self.newton.weight_decay

    @property
    def corrected(self) -> Params:
        """The weights before noise, which are to stay with whoever adds it.

        Raises:
            DataError: If the result was loaded from a file, which has none of them.
        """
        if any(p.is_meta for p in self.newton.params.values()):
            got = "a result with noise that was loaded from a file"
            expected = "the weights before noise, which no file of it holds: they tell the noise"
            fix = "Do it before the result is stored, or store one of forget(..., noise=None)."
            raise DataError(got, expected, fix)
        return self.newton.params

    @property
    def seed(self) -> int:
        """Of every random choice but the noise."""
        return self.options.seed

    def noise_curvature(self) -> Curvature:
        """B + (wd + tau) I, which shapes noise of any scale, with the Newton step's damping."""
        return noise_curvature(self.curvature, self.newton, self.weight_decay)[0]

    @isolated()
    def with_noise(
        self,
        scale: float,
        *,
        generator: torch.Generator | None = None,
        exponent: float = EXPONENT,
    ) -> nn.Module:
        """The Newton-corrected model with another noise draw, from the same curvature.

        Whoever sees several draws around the same weights can average them.

        Args:
            scale: s; 0 gives the model without noise.
            generator: As for `forget`.
            exponent: p.

        Raises:
            ConfigError: If the scale is negative, or the generator is none of torch's.
            DataError: If the result was loaded from a file that does not hold what is needed.
        """
        at = self.corrected
        drawn = draw_noise(self.noise_curvature(), at, scale, generator, exponent)
        scrubbed = P.load(self.model, P.add(at, drawn)).eval()
        if self.statistics.refreshed:
            refresh_statistics(scrubbed, self.split, self.statistics.kept)
        return scrubbed

    @isolated()
    def information(
        self, scale: float, *, exponent: float = EXPONENT, error: float | None = None
    ) -> float:
        """Local forgetting bound of noise of this scale, nats: see `fisher_forget.unlearn.noise`.

        Args:
            scale: s.
            exponent: p.
            error: sigma_h, in units of the weights; by default `NewtonStep.error`.
        """
        sigma = self.newton.error if error is None else error
        return information(scale, sigma, self.noise_curvature().power_trace(2 * exponent))

    def __str__(self) -> str:
        loss = self.losses
        lines = [
            f"Forgot {len(self.split.forget):,} samples, retained {len(self.split.retain):,}, "
            f"in {sum(self.seconds.values()):.1f} s",
            f"  objective  {self.likelihood}, weight decay {self._decay()}",
            f"  curvature  {self.structure}, {self.kind} kind, of the retained data, "
            f"seed {self.seed}; {self.seconds['curvature']:.1f} s",
            *self._newton_lines(),
            *self._noise_lines(),
        ]
        if self.statistics.refreshed or self.statistics.kept:
            lines.append(f"  buffers    {self._buffers()}")
        return "\n".join(
            [
                *lines,
                f"  loss       retain {loss['retain_before']:.4g} -> {loss['retain_after']:.4g} "
                f"nats, forget {loss['forget_before']:.4g} -> {loss['forget_after']:.4g} nats",
                *self._check_lines(),
                "  An estimate, not a certificate: compare with retrained models to see how close "
                "it came.",
            ]
        )

    __repr__ = __str__  # its fields hold whole models

    def _decay(self) -> str:
        decay = self.options.known_decay
        if decay == "auto":
            return f"unknown (acts like {self.newton.acts_like:.2g})"
        if not isinstance(decay, Mapping):
            return f"{decay:g}"
        return ", ".join(f"{rate:g} ({pattern})" for pattern, rate in decay.items())

    def _buffers(self) -> str:
        refreshed, kept = len(self.statistics.refreshed), len(self.statistics.kept)
        why = ": this data did not set them" if self.options.batch_norm == "auto" else ""
        if not refreshed:
            return f"BatchNorm statistics kept as given{why}"
        if not kept:
            return "BatchNorm statistics recomputed on the retained data"
        return (
            f"BatchNorm statistics of {refreshed} layers recomputed on the retained data, "
            f"of {kept} kept as given{why}"
        )

    def _newton_lines(self) -> Iterator[str]:
        n = self.newton
        taken = n.accepted
        if taken:
            rejected = f", {len(n.path) - len(taken)} rejected" if len(n.path) > len(taken) else ""
            shortened = f", the last shortened to {taken[-1].share:.2g}"
            shortened = shortened if taken[-1].share < 1 else ""
            yield (
                f"  newton     {len(taken)} sub-step{'s' * (len(taken) > 1)}{rejected}{shortened}, "
                f"|step| {n.norm:.3g}; {self.seconds['newton']:.1f} s"
            )
            dampings = dict.fromkeys(f"{step.damping:.1e}" for step in (taken[0], taken[-1]))
            yield f"  damping    tau {' to '.join(dampings)} nats per squared weight"
        else:
            yield "  newton     no step was taken: the weights are unchanged"

    def _noise_lines(self) -> Iterator[str]:
        z = self.noise
        if z is None or z.scale == 0:
            target = None if z is None else z.target
            yield "  noise      none" + (f": no scale reaches {target}" if target else "")
            if self.newton.accepted:
                yield f"  publish    {BOTH}"
            return
        yield (
            f"  noise      {z.scale:.2e} (B + (wd + tau) I)^-{z.exponent:g}, tau {z.damping:.1e}, "
            f"|noise| {z.norm:.3g}"
        )
        drawn = "secret, drawn by the operating system" if z.secret else "NOT secret, a generator's"
        yield f"             {drawn}"
        if z.target is not None:
            by_score = z.target.kind == "accuracy"
            harm = f"drop {z.drop:.1e}" if by_score else f"loss {z.rise:+.1e}"
            yield f"  reached    {z.target}: {harm} expected, by the noise alone"
        if not math.isnan(z.rise):
            low, high = z.rise_range
            yield f"             nine draws in ten: loss {low:+.1e} to {high:+.1e}"
        if not math.isnan(z.information):
            strong = "below 1: strong, where its assumptions hold"
            says = strong if z.information < 1 else "1 or more: promises little"
            yield f"  bound      {z.information:.2g} nats ({says})"

    def _check_lines(self) -> Iterator[str]:
        for finding in self.check.findings:
            first, *others = textwrap.wrap(finding.says, WIDTH)
            yield f"  {MARKS[finding.verdict]:10} {first}"
            yield from (f"{'':13}{line}" for line in others)

    def evidence(self, model: nn.Module) -> dict[str, Any]:
        """What a ledger keeps of it: method, version, fingerprints of both models, how many samples
        are retained and forgotten, scale of the noise, self-check.

        Args:
            model: The one that was given to `forget`.
        """
        return evidence(
            "fisher-forget",
            model,
            self.model,
            retained=len(self.split.retain),
            forgotten=len(self.split.forget),
            noise=None if self.noise is None else self.noise.scale,
            self_check=self.check.summary(),
        )

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        n, z = self.newton, self.noise
        newton = {name: getattr(n, name) for name in NEWTON_NUMBERS}
        noise = None if z is None else {name: getattr(z, name) for name in NOISE_NUMBERS}
        if z is not None and noise is not None:
            noise["target"] = None if z.target is None else asdict(z.target)
        return {
            "forgotten": len(self.split.forget),
            "retained": len(self.split.retain),
            "curvature": {"structure": self.structure, "kind": self.kind},
            "newton": {
                "substeps": len(n.accepted),
                "rejected": len(n.path) - len(n.accepted),
                **newton,
            },
            "noise": noise,
            "likelihood": self.likelihood,
            "losses": self.losses,
            "check": self.check.summary(),
            "buffers_refreshed": self.buffers_refreshed,
            "batch_norm": asdict(self.statistics),
            "seconds": self.seconds,
            "seed": self.seed,
            "versions": self.versions,
        }


BOTH = "not beside the given model: the step from it to this one gives the forgotten samples away"
WIDTH = 87  # of a finding, behind its mark: lines of 100
MARKS = {"fine": "check", "wrong": "check: NO", "unknown": "check: ?"}
NEWTON_NUMBERS = (
    "damping",
    "norm",
    "gradient_norm",
    "acts_like",
    "horizon",
    "drift_removed",
    "held_out",
    "budget",
)
NOISE_NUMBERS = (
    "scale",
    "exponent",
    "damping",
    "norm",
    "secret",
    "rise",
    "rise_range",
    "drop",
    "information",
    "error",
)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "fisher_forget": version("fisher-forget"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
