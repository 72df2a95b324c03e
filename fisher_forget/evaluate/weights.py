r"""How far apart weights are, which way they moved, and how well a model hides a forget set from
its gradients.

    distance = |a - b|,  relative = |a - b| / |b|              [units of the weights; no unit]
    cosine   = <scrubbed - original, retrained - original> / (|.| |.|)            [-1, 1]
    efficacy = 1 / tr F_f,  F_f = (1/N_f) sum over n in D_f of g_n g_n^T  [squared weight / nats]

with g_n the gradient of sample n's loss and N_f the scored positions of D_f. A Fisher matrix F is
in nats per squared weight, since d^T F d / 2 is the KL of a step d, in nats; so is its trace, a sum
over weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature import estimate_curvature
from fisher_forget.data.split import Split
from fisher_forget.errors import ConfigError, ModelError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params


def weight_distance(a: nn.Module, b: nn.Module, *, relative: bool = False) -> float:
    """Euclidean distance |a - b| over all named parameters, frozen ones included; buffers do not
    count.

    Lower is closer; the distance between two retrained models says how low is low enough.

    Args:
        a: A scrubbed model, say.
        b: The model it is compared with, a retrained one, say.
        relative: Divide by |b|; NaN where b is zero.

    Raises:
        ModelError: If names or shapes of the parameters differ.
    """
    other = _parameters(b)
    distance = P.norm(_difference(_parameters(a), other))
    if not relative:
        return distance
    length = P.norm(other)
    return distance / length if length else math.nan


def step_cosine(
    original: nn.Module, scrubbed: nn.Module, retrained: nn.Module | Sequence[nn.Module]
) -> float:
    """Cosine between the step that scrubbing took and the one that retraining took.

    The target is the cosine of two retrained models' steps from the same original. It is far from
    1, since retraining from another initialisation moves far in directions that have nothing to do
    with forgetting. The cosine is blind to the length of both steps.

    Args:
        original: The model before forgetting.
        scrubbed: The model after.
        retrained: A model trained without the forgotten data, or several: then the mean of their
            cosines.

    Returns:
        NaN where a step is zero, since it points nowhere.

    Raises:
        ConfigError: If there is no retrained model.
        ModelError: If names or shapes of the parameters differ.
    """
    members = [retrained] if isinstance(retrained, nn.Module) else list(retrained)
    if not members:
        fix = "Pass a model that was trained without the forget set."
        raise ConfigError("no retrained model", "at least one", fix)
    start = _parameters(original)
    step = _difference(_parameters(scrubbed), start)
    steps = (_difference(_parameters(member), start) for member in members)
    return float(np.mean([_cosine(step, other) for other in steps]))


@isolated()
def efficacy(model: nn.Module, split: Split, likelihood: Likelihood | str = "categorical") -> float:
    """1 over the trace of the empirical Fisher of the forget set at the model's weights.

    The larger, the less the forgotten samples' gradients say. By Jensen's inequality it is at most
    1 / |gradient of the mean loss of D_f|^2. Its target is the value of a retrained model, not
    infinity: a model that fits D_f perfectly has vanishing gradients, too. The index of "Evaluating
    machine unlearning via epistemic uncertainty" (Becker & Liebig 2022, arXiv:2208.10836).

    Args:
        model: In eval mode.
        split: Gives the forget set.
        likelihood: Name or instance.

    Returns:
        Squared weight / nats; infinity where every gradient is zero.

    Raises:
        ModelError, DataError, NumericalError: As for `estimate_curvature`.
        SplitError: If nothing is forgotten.
    """
    fisher = estimate_curvature(
        model, split, likelihood, structure="diagonal", kind="empirical", part="forget"
    )
    trace = fisher.trace()  # (1/N_f) sum_n |g_n|^2
    return 1 / trace if trace else math.inf


def _parameters(model: nn.Module) -> Params:
    return {name: p.detach().to("cpu", torch.float64) for name, p in model.named_parameters()}


def _difference(a: Params, b: Params) -> Params:
    shapes, others = ({name: tuple(p.shape) for name, p in x.items()} for x in (a, b))
    if shapes != others:
        odd = sorted(name for name in shapes | others if shapes.get(name) != others.get(name))
        got = f"models that differ in {', '.join(odd[:4])}"
        expected = "parameters of the same names and shapes"
        raise ModelError(got, expected, "Compare models of the same architecture.")
    return P.add(a, b, -1.0)


def _cosine(a: Params, b: Params) -> float:
    lengths = P.norm(a) * P.norm(b)
    return P.dot(a, b) / lengths if lengths else math.nan
