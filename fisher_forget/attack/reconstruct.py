r"""Reconstruction: what did a deleted sample look like?

A Newton step moves the weights by delta = (B + tau I)^-1 g, with g the gradient of the deleted
sample's loss and B the curvature. Whoever holds both releases' weights, and other data of the same
kind to estimate B with, has it back, up to its size:

    g ~ (B + tau I) (w' - w),        first layer:  dL/dW = r x^T,  dL/db = r

so x is the direction of the only row space of [dL/dW, dL/db], (x, 1) up to scale. In a linear
regression B = X^T X / n, and x ~ X^T X (beta - beta') (Gao et al. 2022, arXiv:2202.03460, for the
game; the gradient of a layer: Phong et al. 2017, doi:10.1007/978-3-319-67111-6_8). Of a batch of m
deletions m directions are left, which are mixtures of the samples.

What is recovered is a lower bound: others may know better ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import params as P
from fisher_forget._util.checks import is_number
from fisher_forget._util.copies import private_copy, unwrapped
from fisher_forget._util.isolation import isolated
from fisher_forget.attack.findings import Finding
from fisher_forget.attack.inference import seen
from fisher_forget.attack.pairs import Pair, as_pairs, check_apart
from fisher_forget.attack.release import WHOLE, Model, Observer, Release
from fisher_forget.curvature import estimate_curvature
from fisher_forget.data.samples import read_samples
from fisher_forget.errors import ConfigError, DataError, ModelError, NumericalError
from fisher_forget.evaluate.intervals import Interval, t_interval
from fisher_forget.evaluate.predictions import whole_splits
from fisher_forget.evaluate.scale import COSINE
from fisher_forget.likelihood import Likelihood

FEWEST = 3  # deleted samples of which an interval is claimed
SLIGHT = 1e-3  # share of a direction in the bias, below which it does not tell the size
WARNING = (
    "whoever has the weights before and after can see what was deleted. Do not publish both "
    "versions: withdraw the first, add noise, or delete many samples at once"
)


@dataclass(frozen=True)
class Reconstruction(Finding):
    """What was recovered of deleted samples: their inputs to the layer.

    Attributes:
        truth: The deleted samples [N, D].
        recovered: What was recovered of them [N, D].
        recovered_retrained: The same from retrained models [N, D], the first of each pair; `None`
            without them.
    """

    truth: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    recovered: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    recovered_retrained: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class NewtonInversion:
    """Invert the step between two releases with the curvature of public data.

    Threat model: white box. The attacker has both releases' weights and samples of the same kind;
    no deleted sample, no label.

    Attributes:
        public: Samples of the same kind, in no release's training data: a data set or (inputs,
            targets).
        damping: tau. The true one is the training's weight decay and whatever damped the step; a
            larger one bears errors of B better.
        layer: Name of a Linear layer, of which the inputs are recovered; by default the first one
            that the model has. Where the model's inputs are fed to it they are what is recovered,
            else features.
        likelihood: What the models were trained with.
    """

    public: Any
    damping: float = 0.01
    layer: str | None = None
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        if not is_number(self.damping):
            got = f"damping={self.damping!r}"
            raise ConfigError(got, "a finite number of at least 0", "Leave it out.")
        object.__setattr__(self, "public", read_samples(self.public))

    def run(self, pairs: Pair | Iterable[Pair]) -> Reconstruction:
        """Recover the deleted samples of each pair.

        Scored by the cosine of each deleted sample with what is recovered, both without their part
        along the mean of the public data; of m samples that were deleted together, with the likest
        of the m directions. The mean and its interval are taken on the scale of artanh. What is
        nothing is the likeness to the public samples.

        Args:
            pairs: Of modules; `others` are not used. Independent deletions make a fair interval.

        Raises:
            DataError: If fewer than three samples are deleted, or one of them is public.
            ModelError: If a model is no module or has no such layer, or the layer is fed several
                positions a sample.
            CurvatureError, ConfigError, NumericalError: As for `estimate_curvature`.
        """
        listed = as_pairs(pairs)
        check_apart([pair.deleted for pair in listed], [self.public], "deleted", "public")
        check_claim(listed)
        trials = []
        for pair in listed:
            truth, public = (self._inputs(pair.before, x) for x in (pair.deleted, self.public))
            models = (pair.after, *pair.retrained[:1])
            found = [self.recover(pair.before, model, len(truth)) for model in models]
            trials.append(_Trial(truth, public, *found))
        return _reconstruction("inversion of the step", trials, WARNING)

    @isolated()
    def recover(self, before: Model, after: Model, count: int = 1) -> Tensor:
        """What the step between two releases tells of the deleted samples, without a claim.

        Args:
            before: First release, a module.
            after: Second release.
            count: Samples that were deleted.

        Returns:
            [count, D], inputs of the layer, the strongest direction first. Size and sign are told
            by the bias, else by the public data's mean and its norm.
        """
        if not (isinstance(before, nn.Module) and isinstance(after, nn.Module)):
            fix = "Pass modules; of functions see ChangedAnswers."
            raise ModelError("a function", "modules, whose weights are known", fix)
        layer = self._layer(before)
        start, end = P.trainable(before), dict(unwrapped(after).named_parameters())
        step = {name: end[name].detach().to(p) - p.detach() for name, p in start.items()}
        weight, bias = (f"{layer}.{kind}".lstrip(".") for kind in ("weight", "bias"))
        if weight not in step:
            got = f"the layer {layer!r}, which was not trained"
            raise ModelError(got, "a trained Linear layer", "Pass the name of another one.")
        curvature = estimate_curvature(
            before, self.public, self.likelihood, structure="matrix_free", progress=False
        )
        force = P.add(curvature.power(step, 1), step, self.damping)
        gradient = [force[weight], *([force[bias][:, None]] if bias in force else [])]
        rows = torch.cat(gradient, 1).double().cpu()
        if not bool(rows.isfinite().all()):
            got = "a step or a curvature that is NaN or infinite"
            raise NumericalError(got, "finite weights in both models", "Check the weights.")
        directions = torch.linalg.svd(rows, full_matrices=False).Vh[:count]
        return _sized(directions, step[weight].shape[1], self._inputs(before, self.public))

    def _layer(self, model: nn.Module) -> str:
        linear = [name for name, m in unwrapped(model).named_modules() if isinstance(m, nn.Linear)]
        if self.layer is None and linear:
            return str(linear[0])
        if self.layer not in linear:
            got = "a model without a Linear layer" if not linear else f"layer={self.layer!r}"
            raise ModelError(got, f"the name of a Linear layer, of {linear}", "Pass one of these.")
        return str(self.layer)

    @isolated()
    def _inputs(self, model: Model, samples: TensorDataset) -> Tensor:
        """What the layer is fed on samples [N, D], float64."""
        if not isinstance(model, nn.Module):
            fix = "Pass modules; of functions see ChangedAnswers."
            raise ModelError("a function", "modules, whose weights are known", fix)
        twin, fed = private_copy(model), []
        layer = twin.get_submodule(self._layer(model))
        layer.register_forward_pre_hook(lambda _, args: fed.append(args[0].detach().cpu()))
        with torch.no_grad():
            for batch in whole_splits({"asked": samples})["asked"].batches("all"):
                placed = batch.on(twin)
                P.first_call(twin, placed.args, placed.kwargs)
        inputs = torch.cat(fed).double() if fed else torch.empty(0)
        if inputs.dim() != 2 or len(inputs) != len(samples):
            got = f"inputs of shape {tuple(inputs.shape)} of {len(samples)} samples"
            raise ModelError(got, "one row a sample [N, D]", "Pass the name of another layer.")
        return inputs


@dataclass(frozen=True)
class ChangedAnswers:
    """Ask both releases about many inputs, and take the mean of those whose label has changed.

    Threat model: black box. The attacker has inputs to ask about and the answers; no weights. Meant
    for learners that answer by their nearest neighbours, in whose cell the deleted sample lay.
    Where no label has changed the input whose answer changed most is taken, or the mean of all
    where none changed.

    Attributes:
        queries: Inputs to ask about: a data set or (inputs, targets); targets are not used.
        release: What is published of the answers.
        likelihood: What modules were trained with.

    Source: Gao et al. 2022, arXiv:2202.03460, section 5.
    """

    queries: Any
    release: Release = WHOLE
    likelihood: Likelihood | str = "categorical"

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", read_samples(self.queries))

    def run(self, pairs: Pair | Iterable[Pair]) -> Reconstruction:
        """Recover the deleted sample of each pair; of several the one that is likest is scored.

        Scores and intervals are those of `NewtonInversion.run`.

        Raises:
            DataError: If fewer than three samples are deleted, or one of them is among the queries.
            ModelError, ConfigError, NumericalError: If the models cannot be asked.
        """
        listed, public = as_pairs(pairs), _flat(self.queries)
        check_apart([pair.deleted for pair in listed], [self.queries], "deleted", "asked about")
        check_claim(listed)
        trials = []
        for pair in listed:
            truth = _flat(pair.deleted)
            if truth.shape[1] != public.shape[1]:
                got = f"deleted samples of {truth.shape[1]} numbers, queries of {public.shape[1]}"
                raise DataError(got, "inputs of one shape", "Ask about inputs of the models.")
            models = (pair.after, *pair.retrained[:1])
            found = [self.recover(pair.before, model)[None] for model in models]
            trials.append(_Trial(truth, public, *found))
        return _reconstruction("changed answers", trials)

    def recover(self, before: Model, after: Model) -> Tensor:
        """What the answers tell of the deleted sample, without a claim: [D]."""
        observer = Observer(self.release, self.likelihood)
        p, q = seen(observer, before, after, self.queries)
        inputs = _flat(self.queries)
        changed = torch.from_numpy(p.argmax(1) != q.argmax(1))
        if p.shape[1] > 1 and bool(changed.any()):
            return inputs[changed].mean(0)
        size = torch.from_numpy(abs(p - q).sum(1))
        return inputs[size.argmax()] if bool(size.any()) else inputs.mean(0)


def _sized(directions: Tensor, width: int, public: Tensor) -> Tensor:
    """Inputs [m, D] from rows (x, 1) up to scale [m, D + 1], or from rows x."""
    x, mean = directions[:, :width], public.mean(0)
    norm = public.norm(dim=1).mean() / x.norm(dim=1, keepdim=True)
    sign = torch.where(x @ mean < 0, -1.0, 1.0)[:, None].double()
    scale = sign * norm
    if directions.shape[1] > width:
        last = directions[:, width:]
        told = last.abs() > SLIGHT * x.norm(dim=1, keepdim=True)
        scale = torch.where(told, 1 / last.where(told, torch.ones_like(last)), scale)
    sized: Tensor = x * scale
    return sized


@dataclass(frozen=True)
class _Trial:
    """One pair of models.

    Attributes:
        truth: Deleted samples [m, D].
        public: Samples of the same kind [M, D].
        recovered: What was recovered [k, D].
        exact: The same from a retrained model.
    """

    truth: Tensor
    public: Tensor
    recovered: Tensor
    exact: Tensor | None = None

    def likest(self, samples: Tensor, recovered: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of each sample with the likest that was recovered [N], without their part along
        the public mean; and this one [N, D]."""
        mean = self.public.mean(0)
        a, b = (nn.functional.normalize(without_mean(x, mean)) for x in (samples, recovered))
        best = (a @ b.T).max(1)
        return best.values, recovered[best.indices]


def _reconstruction(name: str, trials: list[_Trial], warning: str = "") -> Reconstruction:
    """The finding; the warning is for where more is recovered than nothing.

    What is nothing is the likeness to samples that were not deleted: the public ones. Of m
    directions one is a little like any sample.
    """
    truth, public = (torch.cat([getattr(t, x) for t in trials]) for x in ("truth", "public"))
    cosines, recovered = (
        torch.cat(x) for x in zip(*(t.likest(t.truth, t.recovered) for t in trials), strict=True)
    )
    by_chance = [float(t.likest(t.public, t.recovered)[0].mean()) for t in trials]
    nothing = float(np.average(by_chance, weights=[len(t.truth) for t in trials]))
    exact = [t.likest(t.truth, t.exact) for t in trials if t.exact is not None]
    guess = torch.cat([t.public.mean(0).expand_as(t.truth) for t in trials])
    found = mean_cosine(cosines)
    return Reconstruction(
        attack=name,
        measure="cosine",
        found=found,
        nothing=nothing,
        retrained=mean_cosine(torch.cat([c for c, _ in exact])) if exact else None,
        samples=len(truth),
        meaning="what is recovered of a deleted sample, the public mean apart, is like it with",
        details={
            "cosine with the mean left in": float(torch.cosine_similarity(truth, recovered).mean()),
            "the same of the public mean": float(torch.cosine_similarity(truth, guess).mean()),
            "PSNR (dB)": psnr(truth, recovered, public),
            "PSNR of the public mean (dB)": psnr(truth, guess, public),
        },
        warning=warning if found.low > nothing else "",
        truth=truth,
        recovered=recovered,
        recovered_retrained=torch.cat([x for _, x in exact]) if exact else None,
    )


def without_mean(x: Tensor, mean: Tensor) -> Tensor:
    """Rows [N, D] without their part along the mean [D], which tells nothing of a sample: two
    images of digits have a cosine of .6 already."""
    along = mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
    rest: Tensor = x - (x @ along)[:, None] * along
    return rest


def mean_cosine(cosines: Tensor) -> Interval:
    """Mean [N] -> 1 and its 95 % interval, on the scale of artanh."""
    z = t_interval(COSINE.forward(cosines.numpy()))
    return Interval(*(COSINE.score(x) for x in (z.value, z.low, z.high)))


def psnr(truth: Tensor, recovered: Tensor, public: Tensor) -> float:
    """Mean over samples of 10 log10(range^2 / mean squared error), in dB; what is recovered is
    clipped to the range of the public data."""
    low, high = public.min(), public.max()
    errors = (truth - recovered.clamp(low, high)).square().mean(1)
    floor = torch.finfo(errors.dtype).eps * (high - low) ** 2
    return float((10 * torch.log10((high - low) ** 2 / errors.clamp_min(floor))).mean())


def check_claim(pairs: list[Pair]) -> None:
    """Refuse an interval of fewer than three samples.

    Raises:
        DataError: Then.
    """
    samples = sum(len(pair.deleted) for pair in pairs)
    if samples < FEWEST:
        got = f"{samples} deleted samples"
        fix = "Pass more pairs; `recover` gives what is recovered without a claim."
        raise DataError(got, f"at least {FEWEST}, for an interval", fix)


def _flat(samples: TensorDataset) -> Tensor:
    return samples.tensors[0].double().flatten(1)
