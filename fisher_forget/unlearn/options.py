"""Every option of `forget`, in one place: meaning, default and allowed values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypedDict, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fisher_forget._util.checks import check_names, is_number, is_whole
from fisher_forget.curvature.estimate import CurvatureKeywords
from fisher_forget.curvature.kinds import Kind
from fisher_forget.curvature.structures import STRUCTURES, Structure
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.pieces import MEMORY, PIECE
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood, named, resolve_likelihood
from fisher_forget.unlearn.noise_target import EXPONENT, NoiseTarget
from fisher_forget.unlearn.training_time import TrainingTime
from fisher_forget.unlearn.weight_decay import WeightDecay, is_weight_decay

Solver = Literal["auto", "cg", "direct"]
BatchNorm = Literal["auto", "refresh", "keep"]
LEAST_MEMORY = 2**20  # below this a number is meant in other units than bytes
PRECONDITIONER_SAMPLES = 1000  # that a curvature is estimated on which only preconditions

NUMBER = "a finite number of at least 0"
WHOLE = "a whole number of at least"


@dataclass(frozen=True)
class ForgetOptions:
    """What `forget` may be told beside model and data; every default needs no tuning.

    Attributes:
        likelihood: "categorical", "next_token", "mse", "gaussian", "bce", "bernoulli", or an
            instance, with whose loss the model was trained. A name gives way to the loss that
            `loss_fn`, or a model that takes `labels` itself, is found to have.
        weight_decay: wd of the training objective, mean loss + (wd/2)|w|^2 (the `weight_decay` of
            SGD). Or numbers by shell pattern of parameter names, first match wins, 0 where none
            matches: {"*.weight": 5e-4}. "auto" is what the model acts like (`ReadOff`): the
            training's own at a minimum, and before, how strongly its finite length regularises.
        training: How long and with which weight decay the model was trained, where that is known
            (`TrainingTime.of(optimizer, ...)`); by default it is read off the model.
        structure: Curvature structure, see `estimate_curvature`.
        kind: Curvature kind, see `estimate_curvature`; where max_samples="auto" leaves samples out,
            "auto" is one sketched column a sample, since the curvature is an estimate for a
            preconditioner then.
        draws: Columns a sample of the random kinds.
        max_samples: Retained samples that the curvature is estimated on; `None` for all. "auto" is
            2,000 where it only preconditions and shapes the noise, and all where it is inverted
            itself (solver="direct").
        subset: Shell patterns of the parameters that may move ("head.*"); `None` for all trainable.
        seed: Of every random choice but the noise, which no seed gives away.
        steps: Newton sub-steps along the flow (`newton_step`), eight and more by default; with a
            given damping, too, it is the textbook step, taken that often.
        damping: tau of each step, nats per squared unit of weight; "auto" shares the time that the
            model tells (`Horizon`) among the steps.
        solver: "cg" on exact GGN products, "direct" inverse of the curvature, which stays that of
            the start at every sub-step; "auto" is direct for a dense curvature, else cg.
        drift: Subtract the force that is not owed to the forget set, under which training would go
            on; "auto" does, except with a given number of steps and a given damping. True does so
            there, too: the Newton step of all samples is subtracted.
        budget: How far the mean loss on held-out retained samples may rise above the lowest on the
            way, plus how far those losses rise that do (`SubStep.shift`), nats; by default 0.1, a
            mere safety.
        noise: Scale s of the noise s (B + (wd + tau) I)^-p xi; or a `NoiseTarget` that it is to
            reach, which is by default ("auto") that the retained loss rises by max(0.0002 nats,
            0.2 % of it); `None` adds none.
        exponent: p.
        batch_norm: Running statistics of BatchNorm layers: "refresh" recomputes them on the
            retained data, "keep" leaves them as given; "auto" recomputes those that this data set,
            and keeps the others (those of a frozen backbone).
        memory: Bytes that activations may take at a time: graphs, recorded layer inputs, outputs.
            The model, copies of its weights, the curvature and the data come on top; and a single
            sample (eight where layers and products are verified) is taken whole. What fits is not
            computed again: a larger bound is faster where it does not.

    Raises:
        ConfigError: For the first option that is out of range or of a wrong type.
    """

    likelihood: Likelihood | str = "categorical"
    weight_decay: WeightDecay | Literal["auto"] = "auto"
    training: TrainingTime | None = None
    structure: Structure = "ekfac"
    kind: Kind = "auto"
    draws: int = 1
    max_samples: int | Literal["auto"] | None = "auto"
    subset: str | tuple[str, ...] | None = None
    seed: int = 0
    steps: int | Literal["auto"] = "auto"
    damping: float | Literal["auto"] = "auto"
    solver: Solver = "auto"
    drift: bool | Literal["auto"] = "auto"
    budget: float | None = None
    noise: float | Literal["auto"] | NoiseTarget | None = "auto"
    exponent: float = EXPONENT
    batch_norm: BatchNorm = "auto"
    memory: int = MEMORY

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if getattr(value := getattr(self, name), "ndim", 0):  # whose comparisons are arrays
                got, fix = f"{name} of shape {tuple(value.shape)}", f"Correct {name}."
                raise ConfigError(got, "a single value", fix)
        likelihood = resolve_likelihood(self.likelihood)
        good_decay = self.weight_decay == "auto" or is_weight_decay(self.weight_decay)
        good_training = self.training is None or isinstance(self.training, TrainingTime)
        steps, damping, noise = self.steps, self.damping, self.noise
        whole_samples = self.max_samples in ("auto", None) or is_whole(self.max_samples, 1)
        # the flow goes on for the time 1 / tau
        in_time = steps != "auto" or damping == "auto" or not is_number(damping) or damping > 0
        good_noise = noise in (None, "auto") or isinstance(noise, NoiseTarget) or is_number(noise)
        good_drift = self.drift == "auto" or isinstance(self.drift, bool)
        norms = ("auto", "refresh", "keep")
        good_budget = self.budget is None or self.budget == math.inf or is_number(self.budget)
        for name, good, expected in (
            ("weight_decay", good_decay, f"{NUMBER}, such numbers by pattern of names, or 'auto'"),
            ("training", good_training, "a TrainingTime, or None"),
            ("draws", is_whole(self.draws, 1), f"{WHOLE} 1"),
            ("max_samples", whole_samples, f"{WHOLE} 1, 'auto' or None"),
            ("steps", steps == "auto" or is_whole(steps, 1), f"{WHOLE} 1, or 'auto'"),
            ("damping", damping == "auto" or is_number(damping), f"{NUMBER}, or 'auto'"),
            ("damping", in_time, "a finite number above 0 with steps='auto'"),
            ("solver", self.solver in ("auto", "cg", "direct"), "'auto', 'cg' or 'direct'"),
            ("drift", good_drift, "True, False or 'auto'"),
            ("budget", good_budget, "nats of at least 0, or None"),
            ("noise", good_noise, f"{NUMBER}, 'auto', a NoiseTarget or None"),
            ("exponent", is_number(self.exponent), NUMBER),
            ("batch_norm", self.batch_norm in norms, "'auto', 'refresh' or 'keep'"),
            ("seed", is_whole(self.seed, 0), f"{WHOLE} 0"),
            ("memory", is_whole(self.memory, LEAST_MEMORY), f"{WHOLE} {LEAST_MEMORY:,} bytes"),
        ):
            if not good:
                got = f"{name}={getattr(self, name)!r}"
                raise ConfigError(got, expected, f"Correct {name}, or leave it at its default.")
        if isinstance(noise, NoiseTarget):
            noise.check(likelihood)
        if isinstance(self.weight_decay, Mapping):  # a copy, of numbers that are stored as JSON
            decay = {pattern: float(rate) for pattern, rate in self.weight_decay.items()}
            object.__setattr__(self, "weight_decay", decay)
        for name in ("seed", "memory"):  # NumPy's integers are not stored as JSON
            object.__setattr__(self, name, int(getattr(self, name)))

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same options with other values for some.

        Raises:
            ConfigError: An unknown option, with the nearest right name; a value out of range.
        """
        check_names(changes, [field.name for field in fields(self)])
        return replace(self, **changes)

    def with_loss(self, likelihood: Likelihood, loss_fn: LossFn | None) -> Self:
        """The same options with the likelihood that was found to have the user's own loss; an
        instance, which is taken at its word, where only `loss_fn` could tell."""
        if loss_fn is not None:
            return replace(self, likelihood=likelihood)
        same = resolve_likelihood(self.likelihood) == likelihood
        return self if same else replace(self, likelihood=named(likelihood))

    @property
    def known_decay(self) -> WeightDecay | Literal["auto"]:
        """wd as it is given, or as the known training has it; else "auto"."""
        known = None if self.training is None else self.training.weight_decay
        return known if self.weight_decay == "auto" and known is not None else self.weight_decay

    @property
    def training_time(self) -> float | None:
        """T of the training, where it is known."""
        return None if self.training is None else self.training.time

    @property
    def literal(self) -> bool:
        """Whether it is the textbook step: number of steps and damping are given."""
        return self.steps != "auto" and self.damping != "auto"

    @property
    def tilted(self) -> bool:
        """Whether the force that is not owed to the forget set is subtracted."""
        return not self.literal if self.drift == "auto" else self.drift

    @property
    def whole(self) -> bool:
        """Whether the gradient of all samples is a force itself, and no mean that some tell."""
        return self.literal or self.drift is False

    @property
    def spec(self) -> StructureSpec | None:
        """What is known of the structure; `None` of a mixture, or of one that there is not."""
        return STRUCTURES.get(self.structure) if isinstance(self.structure, str) else None

    @property
    def inverts(self) -> bool:
        """Whether the curvature is inverted itself, and no preconditioner."""
        if self.solver != "auto" or self.spec is None:
            return self.solver == "direct"
        return any(operator.whole for operator in self.spec.operators)

    def curvature_plan(self, split: Split) -> tuple[Indices, Kind]:
        """The retained samples that the curvature is estimated on, and the kind of it.

        The samples are the first of one permutation of all, so that most of them stay the same
        after a deletion.
        """
        kind, most = self.kind, self.max_samples
        if most == "auto":
            most = None if self.inverts else PRECONDITIONER_SAMPLES
        if most is None or most >= len(split.retain):
            return split.retain, kind
        if kind == "auto" and self.max_samples == "auto":
            kind = "sketch"
        order = np.random.default_rng(self.seed).permutation(split.indices("all"))
        return np.sort(order[np.isin(order, split.retain)][:most]), kind

    def curvature_keywords(self, part: Indices, kind: Kind) -> CurvatureKeywords:
        """What `estimate_curvature` is told of these options, for the samples and kind of a plan;
        `subset` is told to the tape."""
        return {
            "structure": self.structure,
            "kind": kind,
            "draws": self.draws,
            "part": part,
            "seed": self.seed,
            "memory": self.memory // PIECE,
        }


class ForgetKeywords(TypedDict, total=False):
    """The fields of `ForgetOptions` as keywords of a call."""

    likelihood: Likelihood | str
    weight_decay: WeightDecay | Literal["auto"]
    training: TrainingTime | None
    structure: Structure
    kind: Kind
    draws: int
    max_samples: int | Literal["auto"] | None
    subset: str | tuple[str, ...] | None
    seed: int
    steps: int | Literal["auto"]
    damping: float | Literal["auto"]
    solver: Solver
    drift: bool | Literal["auto"]
    budget: float | None
    noise: float | Literal["auto"] | NoiseTarget | None
    exponent: float
    batch_norm: BatchNorm
    memory: int


class RequestKeywords(ForgetKeywords, total=False):
    """The same, and what belongs to one call alone and to no stored options."""

    generator: torch.Generator | None
    held_out: DataLoader[Any] | Dataset[Any] | Split | None


def merged(options: ForgetOptions | None, changes: ForgetKeywords) -> ForgetOptions:
    """Options, the defaults where there are none, with the keywords of a call over them.

    Raises:
        ConfigError: Options of another type, an unknown keyword, or a value out of range.
    """
    if options is not None and not isinstance(options, ForgetOptions):
        raise ConfigError(
            f"options of type {type(options).__name__}",
            "a ForgetOptions",
            "Pass ForgetOptions(...), or single options by name.",
        )
    return (options or ForgetOptions()).changed(cast("Mapping[str, Any]", changes))
