r"""Categorical, Bernoulli and Gaussian likelihoods: all that is known about a model's outputs.

Notation: a sample n has outputs f_n (logits or means; all positions of a sequence together), loss
l_n = -log p(y_n | f_n) in nats, output gradient r_n = dl_n/df_n and output Hessian H_n = d^2
l_n/df_n^2. All three are exponential families in their natural parameter, so H_n is also the Fisher
information of f_n: generalised Gauss-Newton (GGN) and Fisher coincide (Martens 2020,
arXiv:1412.1193, section 9.2).

A *column* is a tensor S of the shape of the outputs; a set of columns represents H when sum_k E[S_k
S_k^T] = H_n for every sample n. Random columns are drawn sample after sample from one stream, so
they do not depend on the batch size.
"""

from __future__ import annotations

import math
from typing import Any

from fisher_forget._util.moved import renamed
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood.base import Likelihood, Score
from fisher_forget.likelihood.bernoulli import Bernoulli
from fisher_forget.likelihood.categorical import Categorical
from fisher_forget.likelihood.gaussian import Gaussian

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Score",
    "named",
    "resolve_likelihood",
]

# "mse" and "bce" are `torch.nn.MSELoss()` and `torch.nn.BCEWithLogitsLoss()`
LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical(),
    "next_token": Categorical(shift=True),
    "bernoulli": Bernoulli(),
    "bce": Bernoulli(reduction="mean"),
    "gaussian": Gaussian(),
    "mse": Gaussian(sigma=math.sqrt(0.5), reduction="mean"),
}


def named(likelihood: Likelihood) -> Likelihood | str:
    """The name of a likelihood that has one, else itself: what to pass for it."""
    return next((name for name, known in LIKELIHOODS.items() if known == likelihood), likelihood)


def resolve_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """A likelihood from its name, or itself.

    Raises:
        ConfigError: An unknown name, or a class of one's own that lacks a `Score`.
    """
    if isinstance(likelihood, Likelihood):
        if not hasattr(likelihood, "score"):
            raise ConfigError(
                f"the likelihood {type(likelihood).__name__} without `score`",
                "a class variable score = Score(name, unit, higher_is_better)",
                "Add it; it takes the place of score_name.",
            )
        return likelihood
    if not isinstance(likelihood, str) or likelihood not in LIKELIHOODS:
        got = f"likelihood={likelihood!r}"
        raise ConfigError(got, f"one of {sorted(LIKELIHOODS)}", "Pass a name or an instance.")
    return LIKELIHOODS[likelihood]


def __getattr__(name: str) -> Any:
    return renamed(name, __name__, {"resolve": "likelihood.resolve_likelihood"})
