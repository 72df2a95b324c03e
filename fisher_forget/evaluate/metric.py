"""What a metric is: a number of a model, of a pair, or of a group, and what it is computed from.

A *solo* metric is a number of one model, r(model); a *pair* metric compares a model with one
retrained model and is averaged over these; a *group* metric compares the distribution of several
models with that of the retrained ones. The target of each is what retrained models score
themselves: r of each, for pairs of each against others, and for groups of as many retrained models
against the rest. Nothing is read against 0 or 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fisher_forget._util.isolation import seeded
from fisher_forget.data.split import Split
from fisher_forget.evaluate import klom
from fisher_forget.evaluate.intervals import Interval
from fisher_forget.evaluate.scale import COSINE, COUNT, LINEAR, LOG, Scale, logit
from fisher_forget.evaluate.verdict import Far
from fisher_forget.likelihood import Categorical, Likelihood

GROUP_SAMPLES = 2000  # of a part, that distributions of models are compared on
LEAST = 3  # models on either side of such a comparison


@dataclass(frozen=True)
class Subject:
    """One model as the metrics see it.

    Attributes:
        outputs: Part -> outputs [N, ...].
        model: The model itself.
        original: The model it was made from; of a retrained one, any model trained on everything.
    """

    outputs: Mapping[str, Tensor]
    model: nn.Module
    original: nn.Module


@dataclass(frozen=True)
class Context:
    """What is the same for all subjects.

    Attributes:
        likelihood: Of outputs and targets, which have the classes last.
        trained: Of the model's own outputs.
        targets: Part -> targets [N, ...].
        split: The training data, for metrics that train or differentiate; `None` leaves them out.
        teacher: Outputs on the forget set of a model with random weights, for ZRF, or `None`.
        seed: Of subsamples.
    """

    likelihood: Likelihood
    trained: Likelihood
    targets: Mapping[str, Tensor]
    split: Split | None = None
    teacher: Tensor | None = None
    seed: int = 0

    def samples(self, part: str) -> int:
        """Targets of a part."""
        return self.targets[part].numel()


Solo = Callable[[Subject, str, Context], float]
Pair = Callable[[Subject, Subject, str, Context], float]
Group = Callable[[Tensor, Tensor], float]
Kind = Literal["linear", "log", "count", "cosine", "logit"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Key in tables.
        unit: "nats", "%", ...
        definition: One line.
        formula, source: Its formula, and where it comes from.
        solo: Number of a model; or
        pair: number of a model and a retrained one; or
        group: number of the margins [K, N] of several models and those [M, N] of several retrained
            ones, of `LEAST` each at least.
        bounds: The same and its 95 % interval over samples, where it has one.
        parts: Parts of the data it is computed on; empty for all.
        most: Largest value that is possible, of numbers from 0 on.
        cap: Where counting ends: the true number may be larger.
        samples: Of each part, that it takes at least.
        needs: Besides outputs: "categorical", "membership", "split", "teacher" (see `missing`), or
            "weights" of the original's architecture, without which it is undefined.
        far: "high" of a distance to retrained models, "low" of a likeness; else both sides are.
        scale: On which scores are roughly normal (`evaluate.scale`); of group metrics none is used.
        primary: Parts whose rows decide whether a model is as retrained; the others describe.
        by_name: Computed only where asked for by name: it takes long, or follows from others.
    """

    name: str
    unit: str
    definition: str
    formula: str
    source: str
    solo: Solo | None = None
    pair: Pair | None = None
    group: Group | None = None
    bounds: Callable[[Tensor, Tensor], Interval] | None = None
    parts: tuple[str, ...] = ()
    most: float = math.inf
    cap: float = math.inf
    samples: int = 1
    needs: frozenset[str] = field(default_factory=frozenset)
    by_name: bool = False
    far: Far | None = None
    scale: Kind = "log"
    primary: tuple[str, ...] = ()

    def is_primary(self, part: str) -> bool:
        """Whether its row on this part is one of those that decide."""
        return part in self.primary

    def scale_in(self, context: Context, part: str) -> Scale:
        """Its scale; a "score" is a share or a squared error."""
        share = self.name == "score" and self.unit_in(context) == "%"
        if self.scale == "logit" or share:
            return logit(context.samples(part))
        scales = {"linear": LINEAR, "log": LOG, "count": COUNT, "cosine": COSINE}
        scale = scales[self.scale]
        return scale if math.isinf(self.most) else scale.up_to(self.most)

    def grouped(self, models: Sequence[Subject], part: str, context: Context) -> Tensor:
        """Margins [M, N] of models, of the same `GROUP_SAMPLES` samples at most."""
        targets, generator = context.targets[part], seeded(context.seed)
        sample_idx = torch.randperm(len(targets), generator=generator)[:GROUP_SAMPLES]
        outputs = torch.stack([a.outputs[part][sample_idx] for a in models])
        return klom.margins(outputs, targets[sample_idx])

    def unit_in(self, context: Context) -> str:
        """Its unit; that of "score" is the likelihood's."""
        return context.likelihood.score.unit if self.name == "score" else self.unit

    def missing(self, context: Context) -> str | None:
        """Why it cannot be computed here, or `None`."""
        if "categorical" in self.needs and not isinstance(context.likelihood, Categorical):
            return "it is defined for class probabilities only"
        if "split" in self.needs and context.split is None:
            return "it needs the training data: pass split="
        if "teacher" in self.needs and context.teacher is None:
            return "it needs a model with random weights: pass teacher="
        if "membership" in self.needs and not {"forget", "retain", "test"} <= set(context.targets):
            return "it needs the parts forget, retain and test"
        for part in self.parts:
            count = len(context.targets.get(part, ()))
            if count < self.samples:
                return f"it takes {self.samples} samples of {part} data, and there are {count}"
        return None
