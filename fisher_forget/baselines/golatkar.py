r"""The two published forms of Fisher forgetting, to compare `forget` with (Golatkar et al. 2020,
arXiv:1911.04933).

Neither has a Newton term: noise alone, shaped by the diagonal Fisher information F of the retained
data, hides what the forgotten samples left in the weights. The paper and its public code
(github.com/AdityaGolatkar/SelectiveForgetting) are different methods, the noise being as wide as
F^-1/4 in one and F^-1/2 in the other:

    paper           w <- w + s (F + tau I)^-1/4 xi           xi ~ N(0, I)
    reference-code  w <- mu + sqrt(var) xi                   var = alpha / (F + 1e-8), clamped, averaged and rescaled

F is the exact diagonal of the generalised Gauss-Newton matrix of the mean loss, in nats per squared
weight. The code sums (1/n_r) sum_n sum_y p_ny (d log p_ny / dw)^2 sample by sample and class by
class. That is the same diagonal, since sum_y p_y (e_y - p)(e_y - p)^T = diag(p) - p p^T is the
output Hessian of the categorical loss.

BatchNorm's running statistics, which hold the forgotten data too, stay as they are, as in the
public code; `forget` recomputes them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget._util.random_state import preserved_rng
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.batches import Unpack
from fisher_forget.data.split import Indices, Part, Split, resolve_split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Categorical, Likelihood, resolve_likelihood
from fisher_forget.params import Params

EXPONENT = (
    0.25  # of the paper, Prop. 4; its own name, since the default method's exponent is an option
)
TAU = 1e-8  # the paper has none, and a weight that no retained sample uses has F = 0

# Of the public code, where var is the variance of the noise before and after it is multiplied by
# alpha.
ALPHA = 3e-6
OFFSET = 1e-8  # added to F
CLAMP, CLAMP_LAST = 1e3, 1e2  # largest var before alpha
CLASS_VARIANCE = 1e-4  # var of the forgotten class's row in the last layer
WIDENING = 10.0  # factor on var, last of all, in the last layer and in one-dimensional parameters


@dataclass(frozen=True)
class Variant(ABC):
    """A published form of Fisher forgetting, ready to be drawn at any scale from one estimate of F.

    Attributes:
        split: Who was retained and forgotten.
        curvature: F: exact, diagonal, of the retained data at the given weights, without damping.
        scale: Default of `model`.
        seed: Default of `model`.
        given: Private copy of the given model.
    """

    name: ClassVar[str]

    split: Split
    curvature: Curvature = field(repr=False)
    scale: float
    seed: int
    given: nn.Module = field(repr=False)

    @abstractmethod
    def moments(self, scale: float) -> tuple[Params, Params]:
        """Mean and standard deviation of every weight at a scale."""

    def model(self, scale: float | None = None, seed: int | None = None) -> nn.Module:
        """One draw: a scrubbed copy of the given model, in eval mode; parameters without
        requires_grad stay.

        Args:
            scale: s of the paper's form, alpha of the reference code's.
            seed: The draw depends on it and on the scale alone.

        Raises:
            ConfigError: If one of them is out of range.
            CurvatureError: If F is singular and nothing was added to it.
        """
        scale, seed = self.scale if scale is None else scale, self.seed if seed is None else seed
        _check(seed, scale=scale)
        mean, deviation = self.moments(scale)
        xi = P.randn_like(mean, torch.Generator().manual_seed(int(seed)))
        return P.load(
            self.given, P.map_params(lambda m, d, x: m + d * x, mean, deviation, xi)
        ).eval()


@dataclass(frozen=True)
class Paper(Variant):
    """w + s (F + tau I)^-1/4 xi.

    Attributes:
        tau: Added to F, nats per squared weight.
    """

    name = "paper"

    tau: float

    def moments(self, scale: float) -> tuple[Params, Params]:
        mean = P.detached(P.trainable(self.given))
        ones = P.map_params(torch.ones_like, mean)
        return mean, P.scale(self.curvature.damped(self.tau).power(ones, -EXPONENT), scale)


@dataclass(frozen=True)
class ReferenceCode(Variant):
    """mu + sqrt(var) xi, see `reference_code_forget`.

    Attributes:
        classes: Number of outputs; parameters whose first dimension is as long count as the last
            layer.
        forgotten_class: The class whose row is reset, or `None`.
    """

    name = "reference-code"

    classes: int
    forgotten_class: int | None

    def moments(self, scale: float) -> tuple[Params, Params]:
        mean = P.detached(P.trainable(self.given))
        deviation: Params = {}
        for name, fisher in self.curvature.diagonal().items():
            last = fisher.dim() > 0 and len(fisher) == self.classes
            variance = scale * (1 / (fisher + OFFSET)).clamp(max=CLAMP_LAST if last else CLAMP)
            if fisher.dim() > 1:
                variance = variance.mean(1, keepdim=True).expand_as(fisher).clone()
            if last and self.forgotten_class is not None:
                mean[name][self.forgotten_class] = 0
                variance[self.forgotten_class] = CLASS_VARIANCE
            if last or fisher.dim() == 1:
                variance *= WIDENING
            deviation[name] = variance.sqrt()
        return mean, deviation


def paper_forget(
    model: nn.Module,
    retain_loader: DataLoader[Any] | Dataset[Any],
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    scale: float,
    tau: float = TAU,
    likelihood: Likelihood | str = "categorical",
    unpack: Unpack | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Paper:
    r"""Fisher forgetting as the paper has it: w <- w + s (F + tau I)^-1/4 xi, without a Newton
    term.

    s = (lambda sigma_h^2)^(1/4) in the paper (Prop. 4), where neither lambda nor sigma_h is known:
    try several scales.

    Args:
        model: As for `forget`; never changed. BatchNorm's running statistics stay as they are in
            the result, too.
        retain_loader: As for `forget`.
        forget_idx: As for `forget`.
        scale: s >= 0; `Variant.model` draws others from the same estimate.
        tau: Added to F, nats per squared weight. The paper has none; without it a weight that no
            retained sample uses gets infinitely wide noise.
        likelihood: "categorical", "bernoulli", "gaussian", or an instance.
        unpack: As for `forget`.
        seed: Of the draw.
        progress: Show a progress bar.

    Raises:
        SplitError, DataError, ModelError, ConfigError, NumericalError: As for `forget`.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> variant = paper_forget(torch.nn.Linear(3, 2).eval(), data, [0, 5, 7], scale=1e-3, progress=False)
        >>> scrubbed, wider = variant.model(), variant.model(1e-2, seed=1)
    """
    _check(seed, scale=scale, tau=tau)
    likelihood = resolve_likelihood(likelihood)
    check_model(model)
    with preserved_rng():
        split = resolve_split(retain_loader, forget_idx, unpack=unpack)
        curvature = _estimate(model, split, likelihood, progress)
    return Paper(split, curvature, scale, seed, P.load(model, {}), tau)


def reference_code_forget(
    model: nn.Module,
    retain_loader: DataLoader[Any] | Dataset[Any],
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    alpha: float = ALPHA,
    forgotten_class: int | Literal["auto"] | None = "auto",
    likelihood: Likelihood | str = "categorical",
    unpack: Unpack | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ReferenceCode:
    """Fisher forgetting as the public code of the paper does it, clamps and all, which is not what
    the paper says.

    For every parameter tensor, in this order:

    1. var = 1 / (F + 1e-8), at most 1e3; at most 1e2 where the first dimension equals the number of
    classes, which is
       the code's notion of the last layer (its bias included, and any hidden layer that happens to
       be as wide);
    2. var *= alpha;
    3. var = its mean over the second dimension, for tensors of more than one;
    4. where a whole class is forgotten, mean 0 and var 1e-4 for that class's row of the last layer,
    whatever alpha is;
    5. var *= 10 in the last layer and in one-dimensional tensors, so that the class's row ends at
    1e-3;
    6. w <- mean + sqrt(var) xi.

    The code fails on parameters without requires_grad; here they stay as they are.

    Args:
        model: As for `forget`; never changed. BatchNorm's running statistics stay as they are in
            the result, too.
        retain_loader: As for `forget`.
        forget_idx: As for `forget`.
        alpha: Scale of the variance; `Variant.model` draws others from the same estimate.
        forgotten_class: The class whose row is reset, or `None` for no row; "auto" for the class
            that all forgotten samples and no retained ones have, if there is one.
        likelihood: Only "categorical", or such an instance: the code sums over classes.
        unpack: As for `forget`.
        seed: Of the draw.
        progress: Show a progress bar.

    Raises:
        SplitError, DataError, ModelError, NumericalError: As for `forget`.
        ConfigError: If an option is out of range, or the likelihood is another one.

    Example:
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> positive = (x[:, 0] > 0).nonzero().flatten()
        >>> variant = reference_code_forget(torch.nn.Linear(3, 2).eval(), data, positive[1:], progress=False)
        >>> print(variant.forgotten_class)  # a sample of it is retained
        None
    """
    _check(seed, alpha=alpha)
    likelihood = resolve_likelihood(likelihood)
    if not isinstance(likelihood, Categorical):
        raise ConfigError(
            f"the likelihood {likelihood.name!r}",
            "'categorical': the reference code sums over the classes of a softmax",
            "Use paper_forget or forget for other likelihoods.",
        )
    named = isinstance(forgotten_class, Integral) and not isinstance(forgotten_class, bool)
    if not (named or forgotten_class is None or forgotten_class == "auto"):
        raise ConfigError(
            f"forgotten_class={forgotten_class!r}",
            "a class, None or 'auto'",
            "Leave it at its default.",
        )
    check_model(model)
    with preserved_rng():
        split = resolve_split(retain_loader, forget_idx, unpack=unpack)
        classes = _classes(model, split, likelihood)
        chosen = _whole_class(split, classes) if forgotten_class == "auto" else forgotten_class
        if chosen is not None and not 0 <= chosen < classes:
            raise ConfigError(
                f"forgotten_class={chosen}",
                f"a class from 0 to {classes - 1}",
                "Name a class of the model's outputs.",
            )
        curvature = _estimate(model, split, likelihood, progress)
    return ReferenceCode(split, curvature, alpha, seed, P.load(model, {}), classes, chosen)


VARIANTS: dict[str, Callable[..., Variant]] = {
    "paper": paper_forget,
    "reference-code": reference_code_forget,
}
"""The published forms by name."""


def _estimate(model: nn.Module, split: Split, likelihood: Likelihood, progress: bool) -> Curvature:
    """F."""
    return estimate_curvature(
        model,
        split,
        likelihood,
        structure="diagonal",
        kind="exact",
        part="retain",
        progress=progress,
    )


def _classes(model: nn.Module, split: Split, likelihood: Likelihood) -> int:
    """The number of the model's outputs."""
    batch = next(split.batches(split.retain[:1])).on(model)
    with torch.no_grad():
        outputs = P.call(model, {}, batch.args, batch.kwargs)
    likelihood.check(outputs, batch.targets)
    return outputs.shape[-1]


def _whole_class(split: Split, classes: int) -> int | None:
    """The class that all forgotten samples and no retained ones have, if there is one."""
    gone = _labels(split, "forget")
    if len(gone) != 1 or not gone <= set(range(classes)) or gone & _labels(split, "retain"):
        return None
    return gone.pop()


def _labels(split: Split, part: Part) -> set[int]:
    """The classes of a part; none where a sample has several, or a distribution over them."""
    labels: set[int] = set()
    for batch in split.batches(part):
        if batch.targets.dim() == 1 and not batch.targets.is_floating_point():
            labels |= set(batch.targets.tolist())
    return labels


def _check(seed: Any, **numbers: Any) -> None:
    """Refuse numbers that are negative or not finite, and seeds that are no whole number.

    Raises:
        ConfigError: For the first that is out of range or of a wrong type.
    """
    for name, value in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, Real)
            or not 0 <= float(value) < math.inf
        ):
            raise ConfigError(
                f"{name}={value!r}", "a finite number of at least 0", f"Correct {name}."
            )
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) < 0:
        raise ConfigError(
            f"seed={seed!r}", "a whole number of at least 0", "Correct seed, or leave it at 0."
        )
