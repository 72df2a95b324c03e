r"""A model forgets an attribute: what a linear probe reads of it goes, at least cost in the task.

A linear layer gives z = W x + b. Let u [r] be the attribute, centred among samples of the same
`given` label (`attribute.beyond`), and C = E[x u^T] [I, r]. No linear probe of z does better than
guessing, given the label, where

    Cov(z, u) = (W + dW) C = 0.

Among all such changes the one that costs least in the task's loss, to second order around its
minimum, with B the curvature of the loss in [W b] and tau a damping:

    minimise 1/2 d^T (B + tau I) d   such that   (W + dW) C = 0,        d = (dW, db),

    d = -(B + tau I)^-1 K^T (K (B + tau I)^-1 K^T)^+ vec(W C),          K d = vec(dW C).

It needs one solve for each output of the layer and dimension of C, of whose columns an orthonormal
basis takes the place. Where B = A (x) G is a Kronecker
product, G cancels: dW = -W C (C^T A^-1 C)^+ C^T A^-1. What is left by rounding is taken away by the
shortest further change, so that the covariance on the given samples is zero.

LEACE (Belrose et al. 2023, arXiv:2306.03819, section 4) instead changes z, as little as it can
in mean square whatever the task is:

    z' = z - S^{1/2} P S^{-1/2} (z - E z),    S = Cov(z),  P onto the columns of S^{-1/2} Cov(z, u).

What neither promises: a nonlinear probe, or layers that come after a nonlinearity, which may make
of a higher moment a mean again. Probe them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_names, is_number, is_whole
from fisher_forget._util.copies import copy_model
from fisher_forget._util.isolation import isolated
from fisher_forget._util.progress import bar
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.curvature.estimate import estimate_curvature
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ConfigError, ModelError
from fisher_forget.likelihood import Likelihood
from fisher_forget.overlearn.activations import (
    fed_before,
    in_order,
    inputs_of,
    layer_of,
)
from fisher_forget.overlearn.attribute import Attribute
from fisher_forget.overlearn.task import Task, beyond_rounding, loaded, matrix
from fisher_forget.params import Params

MOST = 4096  # solves: outputs of a layer times dimensions of the attribute
ROUNDING = 1e-10
NOTHING = 1e-5  # of a leakage, relative to |W| |x|: weights and activations are float32
STRUCTURES = ("ekfac", "dense", "diagonal")


@dataclass(frozen=True)
class AttributeForgotten:
    """A model that has forgotten an attribute.

    Attributes:
        model: A copy, in eval mode.
        layers: That were changed, in the order of the model.
        still: Those of them whose leakage is more than rounding: above 1e-5 |W| |x|, as they were,
            |x| the root mean square of the layer's inputs.
        leakage: By layer, |Cov(z, u)| of the given samples before its change and after all.
        predicted: Cost in the task's loss that the curvature predicts, 1/2 d^T B d, nats, by layer;
            NaN for LEACE.
        loss: Mean loss of the task on the given samples before and after, nats.
        score: The task's score (accuracy of classes) before and after.
    """

    model: nn.Module
    layers: tuple[str, ...]
    still: tuple[str, ...]
    leakage: Mapping[str, tuple[float, float]]
    predicted: Mapping[str, float]
    loss: tuple[float, float]
    score: tuple[float, float]

    def __str__(self) -> str:
        (old, new), (before, after) = self.loss, self.score
        done = ", ".join(name for name in self.layers if name not in self.still)
        said = [f"No linear probe of {done} reads the attribute in the given samples."] * bool(done)
        for name in self.still:
            left = "from {:.3g} to {:.3g}".format(*self.leakage[name])
            said.append(f"{name} still tells of it in the given samples: its leakage went {left}.")
        return (
            f"{' '.join(said)} The task's loss there went from {old:.4f} to {new:.4f} nats, its "
            f"score from {before:.4f} to {after:.4f}. Probe other samples, other layers, and "
            "nonlinearly."
        )


class AttributeOptions(TypedDict, total=False):
    """How an attribute is forgotten.

    Attributes:
        structure: Of the curvature of one layer: "ekfac" by default, "dense" or "diagonal".
        damping: tau, in units of the mean eigenvalue of B; .001 by default. More damping prefers
            shorter changes.
        repair: Epochs of SGD on the task after each layer's change, of this layer and those after
            it, within W C = 0; none by default. The layer's input goes through a projection
            meanwhile, which is then multiplied into W. The model stays in eval mode: statistics of
            normalisation do not move, and nothing is dropped.
        lr: Of the repair; .01 by default, with momentum .9.
        seed: Of the repair.
        progress: Show a progress bar; by default.
    """

    structure: Literal["ekfac", "dense", "diagonal"]
    damping: float
    repair: int
    lr: float
    seed: int
    progress: bool


DEFAULTS: AttributeOptions = {
    "structure": "ekfac", "damping": 1e-3, "repair": 0, "lr": 0.01, "seed": 0, "progress": True,
}  # fmt: skip


def forget_attribute(
    model: nn.Module,
    data: Any,
    attribute: Attribute,
    layers: str | Sequence[str],
    *,
    given: Attribute | None = None,
    likelihood: Likelihood | str = "categorical",
    **options: Unpack[AttributeOptions],
) -> AttributeForgotten:
    """Take an attribute out of the outputs of linear layers, at least cost in the task's loss.

    Args:
        model: In eval mode; untouched.
        data: Samples of the task, best those that it was trained on: a data set of (inputs,
            target), or a tuple (inputs, targets).
        attribute: One value a sample [N].
        layers: Names of linear layers, which are changed in the order in which the model calls
            them, frozen ones too. Each is changed with what the ones before it give then.
        given: Labels that may be told, such as the task's own targets; by default the attribute
            must not be read at all, not even where the task depends on it.
        likelihood: Of the task: name or instance.
        **options: See `AttributeOptions`.

    Raises:
        ModelError: If a layer is not there, is no `nn.Linear` of vectors, or shares its weights
            with another.
        DataError: If the attribute has one value, too few samples of one, or is told wholly by the
            given labels; or inputs are not finite.
        NumericalError: If inputs of a layer are not finite.
        ConfigError: If an option is out of range, or there are too many solves to be made.

    Example:
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> task, sex = (x[:, 0] > 0).long(), (x[:, 1] > 0).long()
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> found = forget_attribute(net, (x, task), sex, "0", progress=False)
        >>> found.leakage["0"][1] < 1e-6
        True
    """
    chosen = _checked(DEFAULTS | options)

    def step(task: Task, layer: str) -> tuple[nn.Module, float]:
        moved, predicted = _least_cost(task, layer, chosen)
        return (_repaired(task, moved, layer, chosen) if chosen["repair"] else moved), predicted

    return _forgotten(Task.of(model, data, attribute, given, likelihood), layers, step)


def leace(
    model: nn.Module,
    data: Any,
    attribute: Attribute,
    layers: str | Sequence[str],
    *,
    given: Attribute | None = None,
    likelihood: Likelihood | str = "categorical",
) -> AttributeForgotten:
    """The same by LEACE, multiplied into W and b: the least change of the layer's outputs.

    Args and errors are as for `forget_attribute`.
    """

    def step(task: Task, layer: str) -> tuple[nn.Module, float]:
        weight, bias = matrix(task.model, layer)
        if bias is None:
            got, expected = f"{layer!r}, which has no bias", "one that can hold the mean"
            raise ModelError(got, expected, "Use forget_attribute, or a layer with a bias.")
        x = inputs_of(task.model, task.samples, layer).double()
        z = x @ weight.T + bias
        centred = z - z.mean(0)
        scales, basis = torch.linalg.eigh(centred.T @ centred / len(z))
        kept = beyond_rounding(scales, ROUNDING)
        root, basis = scales[kept].sqrt(), basis[:, kept]
        q, sizes, _ = torch.linalg.svd(
            (basis / root).T @ centred.T @ task.hidden / len(z), full_matrices=False
        )
        q = q[:, beyond_rounding(sizes, ROUNDING)]
        oblique = (basis * root) @ q @ q.T @ (basis / root).T
        change = {"weight": weight - oblique @ weight, "bias": bias - oblique @ (bias - z.mean(0))}
        return loaded(task.model, layer, change), float("nan")

    return _forgotten(Task.of(model, data, attribute, given, likelihood), layers, step)


# what is done to one layer: the model then, and the cost that was predicted
Step = Callable[[Task, str], tuple[nn.Module, float]]


def _forgotten(task: Task, layers: str | Sequence[str], step: Step) -> AttributeForgotten:
    """Change one layer after the other."""
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not names:
        raise ConfigError("no layers", "at least one", "Name a linear layer.")
    for name in names:
        matrix(task.model, name)
    names = in_order(task.model, task.samples, names)
    before, leaked, size, predicted = task.performance(), {}, {}, {}
    with isolated():
        for name in names:
            leaked[name], size[name] = task.leakage(name), task.size(name)
            model, predicted[name] = step(task, name)
            task = replace(task, model=_exact(replace(task, model=model), name))
    after, left = task.performance(), {name: task.leakage(name) for name in names}
    return AttributeForgotten(
        model=task.model,
        layers=names,
        still=tuple(name for name in names if left[name] > NOTHING * size[name]),
        leakage={name: (leaked[name], left[name]) for name in names},
        predicted=predicted,
        loss=(before[0], after[0]),
        score=(before[1], after[1]),
    )


def _checked(options: AttributeOptions) -> AttributeOptions:
    check_names(options, AttributeOptions.__annotations__)
    for name, good, expected in (
        ("structure", options["structure"] in STRUCTURES, f"one of {STRUCTURES}"),
        ("damping", is_number(options["damping"]) and options["damping"] > 0, "a number above 0"),
        ("repair", is_whole(options["repair"], 0), "a whole number of at least 0"),
        ("lr", is_number(options["lr"]) and options["lr"] > 0, "a number above 0"),
        ("seed", is_whole(options["seed"], 0), "a whole number of at least 0"),
    ):
        if not good:
            got = f"{name}={dict(options)[name]!r}"
            raise ConfigError(got, expected, f"Correct {name}, or leave it at its default.")
    return options


def _least_cost(task: Task, layer: str, options: AttributeOptions) -> tuple[nn.Module, float]:
    """The closed form, and its cost to second order."""
    weight, bias = matrix(task.model, layer)
    c = task.told(layer)
    outputs, rank = len(weight), c.shape[1]
    if not rank:
        return task.model, 0.0
    if outputs * rank > MOST:
        got = f"{outputs} outputs of {layer!r}, and an attribute of {rank} dimensions"
        expected = f"at most {MOST} solves, their product"
        raise ConfigError(got, expected, "Take a narrower layer, or join values.")
    names = {
        key: f"{layer}.{key}" for key in ("weight", "bias") if key == "weight" or bias is not None
    }
    twin = copy_model(task.model)
    layer_of(twin, layer).requires_grad_()
    b = estimate_curvature(
        twin, task.samples, task.likelihood, structure=options["structure"],
        subset=tuple(names.values()), progress=False,
    )  # fmt: skip
    b_tau = b.damped(options["damping"] * b.trace() / P.size(b.zeros()))

    def solved(multipliers: Tensor) -> Params:
        """(B + tau I)^-1 K^T of multipliers [O, r]."""
        pull = b.zeros()
        pull[names["weight"]] = (multipliers @ c.T).to(pull[names["weight"]])
        return {name: x.cpu().double() for name, x in b_tau.power(pull, -1).items()}

    basis = torch.eye(outputs * rank, dtype=torch.float64).reshape(-1, outputs, rank)
    columns = [
        (solved(e)[names["weight"]] @ c).flatten()
        for e in bar(basis, len(basis), f"solves for {layer}", options["progress"])
    ]
    system = torch.stack(columns)
    leaked = (weight @ c).flatten()
    multipliers = torch.linalg.pinv((system + system.T) / 2, hermitian=True) @ leaked
    d = P.scale(solved(multipliers.reshape(outputs, rank)), -1)
    on = {name: x.to(b.zeros()[name]) for name, x in d.items()}
    predicted = P.dot(on, b.power(on, 1)) / 2
    change = {"weight": weight + d[names["weight"]]}
    if bias is not None:
        change["bias"] = bias + d[names["bias"]]
    return loaded(task.model, layer, change), predicted


def _exact(task: Task, layer: str) -> nn.Module:
    """The shortest further change that leaves no covariance: W - W Q Q^T, Q a basis of C."""
    weight, _ = matrix(task.model, layer)
    c = task.told(layer)
    change = {"weight": weight - weight @ c @ c.T}
    return loaded(task.model, layer, change)


def _repaired(task: Task, model: nn.Module, layer: str, options: AttributeOptions) -> nn.Module:
    """The layer and those after it, trained on the task with W C = 0."""
    c = task.told(layer)
    twin = copy_model(model)
    module = layer_of(twin, layer)
    across = torch.eye(len(c), dtype=torch.float64) - c @ c.T
    project = across.to(next(module.parameters()))
    handle = module.register_forward_pre_hook(lambda _, args: (args[0] @ project,))
    given = {name: p.requires_grad for name, p in twin.named_parameters()}
    module.requires_grad_()
    for name in fed_before(model, task.samples, layer):
        twin.get_parameter(name).requires_grad_(False)
    twin.train = partial(_stays, twin)  # type: ignore[method-assign]
    split = resolve_split(task.samples, [], allow_empty=True)
    settings: dict[str, Any] = {
        "epochs": options["repair"],
        "lr": options["lr"],
        "seed": options["seed"],
    }
    training = FineTune(momentum=0.9, likelihood=task.likelihood, **settings)
    trained = training.unlearn(twin, split).model
    del trained.train
    del layer_of(trained, layer)._forward_pre_hooks[handle.id]
    for name, p in trained.named_parameters():
        p.requires_grad_(given[name])
    weight, _ = matrix(trained, layer)
    return loaded(trained, layer, {"weight": weight @ across})


def _stays(model: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train` of a model that stays in eval mode."""
    return model
