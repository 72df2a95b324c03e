r"""Re-purposing: is a model a better start than none, for someone who wants the attribute?

Someone with a few labels of the attribute puts a new linear head on a layer and trains it and what
is before it. The same is done from fresh weights. What the model gives away is

    accuracy from the model - accuracy from scratch,

the mean over draws of labels, heads and fresh weights; its interval is Student's over these draws,
for the same samples asked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget._util.checks import is_whole
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import isolated, seeded_rng
from fisher_forget._util.progress import bar
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.baselines.training_loop import require
from fisher_forget.data.samples import read_samples, take
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, DataError, ModelError
from fisher_forget.evaluate.intervals import Array, Interval, t_interval
from fisher_forget.evaluate.predictions import predict, whole_splits
from fisher_forget.overlearn.activations import activations, finite_samples, layer_of
from fisher_forget.overlearn.attribute import Attribute, Codes, sensitive
from fisher_forget.overlearn.probe import halves


@dataclass(frozen=True)
class Repurposed:
    """What a model is worth to someone who wants the attribute.

    Attributes:
        layer: That the new head is on.
        labels: That are known.
        tuned: Mean accuracy from the model.
        scratch: Mean accuracy from fresh weights.
        gain: Their difference, with its 95 % interval.
    """

    layer: str
    labels: int
    tuned: float
    scratch: float
    gain: Interval

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Repurposing:
    """Fine-tune from a layer with few labels, against from scratch; see the module.

    Attributes:
        layer: Name of a layer, of `model.named_modules()`.
        labels: Samples whose attribute is known.
        draws: Of them; at least two.
        epochs: Passes over them.
        lr: Learning rate of SGD with momentum .9.
        batch_size: Samples a step at most.
        seed: Of everything random.
        progress: Show a progress bar.

    Raises:
        ConfigError: If a value is out of range.

    Source: Song & Shmatikov 2020, arXiv:1905.11742, section 4.
    """

    layer: str
    labels: int = 100
    draws: int = 5
    epochs: int = 30
    lr: float = 0.02
    batch_size: int = 32
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        require(self, at_least={"epochs": 1, "batch_size": 1, "labels": 2}, above={"lr": 0})
        if not is_whole(self.draws, 2):
            got = f"draws={self.draws!r}"
            raise ConfigError(got, "a whole number of at least 2", "Pass draws=5, say.")

    @isolated()
    def run(self, model: nn.Module, data: Any, attribute: Attribute) -> Repurposed:
        """Ask what the model is worth.

        Args:
            model: In eval mode; untouched.
            data: Samples that it has not seen; half of them are asked, labels are of the others.
            attribute: One value a sample [N].

        Raises:
            DataError: If the attribute has one value, there are fewer samples than labels, or
                inputs are not finite.
            ModelError: If the layer is not there, or the model has weights that cannot be drawn
                anew.
        """
        samples = finite_samples(data)
        values = sensitive(attribute, len(samples))
        pool, asked = halves(values, self.seed)
        if self.labels > len(pool):
            got = f"{self.labels} labels of {len(pool)} samples that are not asked"
            raise DataError(got, "no more than these", "Pass more samples, or lower `labels`.")
        few = take(samples, np.arange(min(len(samples), 2)))
        width = activations(model, few, [self.layer])[self.layer].shape[1]
        rows, scores = np.random.default_rng(self.seed), []
        for draw in bar(range(self.draws), self.draws, "labels drawn", self.progress):
            known = np.sort(rows.choice(pool, self.labels, replace=False))
            seed = self.seed + draw
            starts = (model, fresh(model, seed))
            scores.append([
                self._accuracy(start, width, samples, values, (known, asked), seed)
                for start in starts
            ])  # fmt: skip
        tuned, scratch = np.array(scores).T
        means = float(tuned.mean()), float(scratch.mean())
        return Repurposed(self.layer, self.labels, *means, t_interval(tuned - scratch))

    def _accuracy(
        self,
        start: nn.Module,
        width: int,
        samples: Any,
        values: Codes,
        parts: tuple[Codes, Codes],
        seed: int,
    ) -> float:
        with seeded_rng(seed):
            headed = _Headed(start, self.layer, width, int(values.max()) + 1)
        known, asked = ((samples[rows][0], torch.from_numpy(values[rows])) for rows in parts)
        split = resolve_split(read_samples(known), [], allow_empty=True)
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("epochs", "lr", "batch_size")
        }
        tuned = FineTune(momentum=0.9, seed=seed, **options).unlearn(headed.eval(), split).model
        outputs, targets = predict(tuned, whole_splits({"asked": read_samples(asked)})["asked"])
        right: Array = (outputs.argmax(1) == targets).double().numpy()
        return float(right.mean())


class _Headed(nn.Module):
    """A model up to a layer, and a new linear head."""

    def __init__(self, model: nn.Module, layer: str, width: int, classes: int) -> None:
        super().__init__()
        self.model, self.head = copy_model(model).requires_grad_(), nn.Linear(width, classes)
        self.seen: Tensor | None = None
        layer_of(self.model, layer).register_forward_hook(self._note)

    def _note(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The head's outputs."""
        self.model(*args, **kwargs)
        assert self.seen is not None  # the layer is called: its width is known
        seen, self.seen = self.seen, None
        logits: Tensor = self.head(seen.flatten(1))
        return logits


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy with weights drawn anew, by `reset_parameters` of each of its modules.

    Raises:
        ModelError: If a module with weights has none.
    """
    twin = copy_model(model)
    with seeded_rng(seed):
        for name, module in twin.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif list(module.parameters(recurse=False)):
                got = f"{name or 'the model'}, a {type(module).__name__}, without reset_parameters"
                fix = "Give it the method `reset_parameters`, which draws its weights."
                raise ModelError(got, "modules whose weights can be drawn anew", fix)
    return twin.eval()
