r"""The two published forms of Fisher forgetting (Golatkar et al. 2020, arXiv:1911.04933).

Neither has a Newton term: noise alone, shaped by the diagonal Fisher information F of the retained
data, hides what the forgotten samples left in the weights. The paper and its public code
(github.com/AdityaGolatkar/SelectiveForgetting) are different methods, the noise being as wide as
F^-1/4 in one and F^-1/2 in the other:

    golatkar-paper  w <- w + s (F + tau I)^-1/4 xi      xi ~ N(0, I)
    golatkar-code   w <- mu + sqrt(var) xi              var = alpha / (F + 1e-8)

where the code also clamps var, averages it over rows and rescales it.

F is the exact diagonal of the generalised Gauss-Newton matrix of the mean loss, in nats per squared
weight. The code sums (1/n_r) sum_n sum_y p_ny (d log p_ny / dw)^2 sample by sample and class by
class. That is the same diagonal, since sum_y p_y (e_y - p)(e_y - p)^T = diag(p) - p p^T is the
output Hessian of the categorical loss.

For comparisons: the noise is drawn from a seed, so it is public, and hides nothing from whoever
knows the seed. A release needs `forget`.

BatchNorm's running statistics, which hold the forgotten data too, stay as they are, as in the
public code; `forget` recomputes them.

The seed is public: such noise is for comparisons and protects nothing. To release a model, use
`forget`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_model, is_whole
from fisher_forget._util.isolation import isolated, seeded
from fisher_forget.baselines.base import DirectMethod, PricedWeights, first_outputs
from fisher_forget.baselines.meter import metered
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.training_loop import require
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.settle import trained_likelihood
from fisher_forget.data.split import Part, Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Categorical, Likelihood
from fisher_forget.params import Params

EXPONENT = 0.25  # of the paper, Prop. 4; the exponent of `forget` is an option
TAU = 1e-8  # the paper has none, and a weight that no retained sample uses has F = 0

# Of the public code, where var is the variance of the noise before and after it is multiplied by
# alpha.
ALPHA = 3e-6
OFFSET = 1e-8  # added to F
CLAMP, CLAMP_LAST = 1e3, 1e2  # largest var before alpha
CLASS_VARIANCE = 1e-4  # var of the forgotten class's row in the last layer
WIDENING = 10.0  # factor on var, last of all, in the last layer and in one-dimensional parameters


@dataclass(frozen=True, kw_only=True)
class Golatkar(DirectMethod):
    """What both forms share: noise around a mean, both of which follow from F and a scale.

    `unlearn` draws once; `draws` keeps the estimate of F, for draws at any scale.
    """

    scale_name: ClassVar[str]  # the setting that scales the noise

    def __post_init__(self) -> None:
        seed = (is_whole(self.seed, 0), "a whole number of at least 0")
        require(self, at_least={self.scale_name: 0}, seed=seed)

    @abstractmethod
    def moments(self, weights: Params, fisher: Curvature, classes: int) -> tuple[Params, Params]:
        """Mean and standard deviation of every weight.

        Args:
            weights: Of the given model.
            fisher: F.
            classes: What `resolved` returned.
        """

    def resolved(self, model: nn.Module, split: Split, likelihood: Likelihood) -> tuple[Self, int]:
        """The method with nothing left open, and the number of classes where that matters."""
        return self, 0

    def draws(self, model: nn.Module, split: Split) -> Draws:
        """Estimate F once, for draws at any scale.

        Args:
            model: In eval mode; never changed.
            split: Who is retained and forgotten.
        """
        check_model(model)
        with isolated():
            likelihood = trained_likelihood(model, split, self.likelihood)
            method, classes = self.resolved(model, split, likelihood)
            fisher = estimate_curvature(
                model, split, likelihood, structure="diagonal", kind="exact", part="retain"
            )
        return Draws(method, fisher, P.load(model, {}), classes)

    def weights(self, model: nn.Module, split: Split, likelihood: Likelihood) -> PricedWeights:
        twin, work = metered(model)
        return replace(self, likelihood=likelihood).draws(twin, split).weights(), work[0]


@dataclass(frozen=True)
class Draws:
    """One estimate of F, from which scrubbed models are drawn at any scale.

    Attributes:
        method: Its scale and seed are the defaults.
        fisher: F: exact, diagonal, of the retained data at the given weights, without damping.
        given: Private copy of the given model.
        classes: Number of the model's outputs, where the method asks for it.
    """

    method: Golatkar
    fisher: Curvature = field(repr=False)
    given: nn.Module = field(repr=False)
    classes: int

    def weights(self, scale: float | None = None, seed: int | None = None) -> Params:
        """One draw; arguments as for `model`."""
        asked: dict[str, Any] = {self.method.scale_name: scale, "seed": seed}
        asked = {name: value for name, value in asked.items() if value is not None}
        method = replace(self.method, **asked)
        start = P.detached(P.trainable(self.given))
        mean, deviation = method.moments(start, self.fisher, self.classes)
        xi = P.randn_like(mean, seeded(method.seed))
        return P.map_params(lambda m, d, x: m + d * x, mean, deviation, xi)

    def model(self, scale: float | None = None, seed: int | None = None) -> nn.Module:
        """A scrubbed copy of the given model, in eval mode; parameters without requires_grad stay.

        Args:
            scale: s of the paper's form, alpha of the public code's.
            seed: The draw depends on it and on the scale alone.

        Raises:
            ConfigError: If one of them is out of range.
            CurvatureError: If F is singular and nothing was added to it.
        """
        return P.load(self.given, self.weights(scale, seed)).eval()


@dataclass(frozen=True)
class GolatkarPaper(Golatkar):
    """The paper's Fisher forgetting, noise s (F + tau I)^-1/4 xi alone.

    s = (lambda sigma_h^2)^(1/4) in the paper (Prop. 4), where neither lambda nor sigma_h is known:
    try several scales.

    Attributes:
        scale: s.
        tau: Added to F, nats per squared weight. The paper has none; without it a weight that no
            retained sample uses gets infinitely wide noise, and at 1e-8 noise of deviation 100 s.

    Raises:
        ConfigError: If a value is out of range.

    Example:
        >>> from fisher_forget.data.split import resolve_split
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> method = GolatkarPaper(scale=1e-3)
        >>> draws = method.draws(torch.nn.Linear(3, 2).eval(), resolve_split(data, [0, 5, 7]))
        >>> scrubbed, wider = draws.model(), draws.model(1e-2, seed=1)
    """

    name = "golatkar-paper"
    grid: ClassVar[Grid] = {"scale": Range(1e-5, 0.1), "tau": Range(1e-8, 0.1)}
    scale_name = "scale"

    scale: float = 1e-3
    tau: float = TAU

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, at_least={"tau": 0})

    def moments(self, weights: Params, fisher: Curvature, classes: int) -> tuple[Params, Params]:
        # s (F + tau I)^-1/4, which is diagonal: applied to ones it is the deviation of every weight
        ones = P.map_params(torch.ones_like, weights)
        return weights, P.scale(fisher.damped(self.tau).power(ones, -EXPONENT), self.scale)


@dataclass(frozen=True)
class GolatkarCode(Golatkar):
    """The public code of Golatkar et al., noise of variance alpha / (F + 1e-8), clamps and all;
    classes only.

    For every parameter tensor, in this order:

    1. var = 1 / (F + 1e-8), at most 1e3; at most 1e2 where the first dimension equals the number of
       classes, which is the code's notion of the last layer (its bias included, and any hidden
       layer that happens to be as wide);
    2. var *= alpha;
    3. var = its mean over the second dimension, for tensors of more than one;
    4. where a whole class is forgotten, mean 0 and var 1e-4 for that class's row of the last layer,
       whatever alpha is;
    5. var *= 10 in the last layer and in one-dimensional tensors, so that the class's row ends at
       1e-3;
    6. w <- mean + sqrt(var) xi.

    The code fails on parameters without requires_grad; here they stay as they are.

    Attributes:
        alpha: Scale of the variance.
        forgotten_class: The class whose row is reset, or `None` for no row; "auto" for the class
            that all forgotten samples and no retained ones have, if there is one.
        likelihood: Only "categorical", or such an instance: the code sums over classes.

    Raises:
        ConfigError: If a value is out of range, or, in `unlearn`, the likelihood is another one.
    """

    name = "golatkar-code"
    grid: ClassVar[Grid] = {"alpha": Range(1e-9, 1e-4)}
    scale_name = "alpha"

    alpha: float = ALPHA
    forgotten_class: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        row = self.forgotten_class
        named = isinstance(row, Integral) and not isinstance(row, bool)
        good = named or row is None or row == "auto"
        require(self, forgotten_class=(good, "a class, None or 'auto'"))

    def resolved(self, model: nn.Module, split: Split, likelihood: Likelihood) -> tuple[Self, int]:
        if not isinstance(likelihood, Categorical):
            expected = "'categorical': the public code sums over the classes of a softmax"
            fix = "Use 'golatkar-paper' or forget() for other likelihoods."
            raise ConfigError(f"the likelihood {likelihood.name!r}", expected, fix)
        classes = likelihood.rows(first_outputs(model, split, likelihood)).shape[-1]
        row = self.forgotten_class
        if row == "auto":
            row = _whole_class(split, classes)
        if row is not None and not 0 <= row < classes:
            fix = "Name a class of the model's outputs."
            raise ConfigError(f"forgotten_class={row}", f"a class from 0 to {classes - 1}", fix)
        return replace(self, forgotten_class=None if row is None else int(row)), classes

    def moments(self, weights: Params, fisher: Curvature, classes: int) -> tuple[Params, Params]:
        mean, deviation = weights, {}
        for name, diagonal in fisher.diagonal().items():
            last = diagonal.dim() > 0 and len(diagonal) == classes
            # the numbers are the steps of the docstring
            variance = (1 / (diagonal + OFFSET)).clamp(max=CLAMP_LAST if last else CLAMP)  # 1
            variance = self.alpha * variance  # 2
            if diagonal.dim() > 1:  # 3
                variance = variance.mean(1, keepdim=True).expand_as(diagonal).clone()
            row = self.forgotten_class
            if last and isinstance(row, int):  # 4
                mean[name][row], variance[row] = 0, CLASS_VARIANCE
            if last or diagonal.dim() == 1:  # 5
                variance *= WIDENING
            deviation[name] = variance.sqrt()
        return mean, deviation


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
