"""forget(): data -> curvature -> Newton -> noise, in one call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated
from fisher_forget.data import batches
from fisher_forget.data.own_loss import LossFn
from fisher_forget.data.split import Indices, Part, Split, some
from fisher_forget.errors import FisherForgetWarning
from fisher_forget.likelihood import Likelihood
from fisher_forget.likelihood.independent import IndependentOutputs
from fisher_forget.params import Params
from fisher_forget.unlearn.batch_norm import norm_layers, refresh_statistics
from fisher_forget.unlearn.newton.step import NewtonStep, newton_step
from fisher_forget.unlearn.noise import noise_step
from fisher_forget.unlearn.noise_draw import check_generator
from fisher_forget.unlearn.options import ForgetOptions, RequestKeywords, merged
from fisher_forget.unlearn.problem import Problem, with_solver
from fisher_forget.unlearn.result import ForgetResult, NormStatistics, versions

LOSS_SAMPLES = 2000  # of each part, for the losses before and after
# Rise of the retained loss by recomputed statistics, nats and share, above which a warning says so:
# the budget of a Newton step
RISE, RISE_SHARE = 0.01, 0.1
PARTS: tuple[Part, ...] = ("retain", "forget")


def forget(
    model: nn.Module,
    retain_loader: DataLoader[Any] | Dataset[Any] | Split,
    forget_idx: Sequence[int] | Indices | Tensor | range,
    options: ForgetOptions | None = None,
    *,
    unpack: batches.Unpack | None = None,
    loss_fn: LossFn | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **changes: Unpack[RequestKeywords],
) -> ForgetResult:
    """Forget training samples without retraining.

    Everything but the first three arguments has a default that needs no tuning. Nothing given is
    changed: neither the model (its weights, mode, gradients, hooks, buffers) nor any global random
    state. The noise is drawn from the operating system, another one in each call; all else follows
    from `seed`.

    Args:
        model: Trained, in eval mode, float32 or float64; forward gives logits or `.logits`.
        retain_loader: Loader over the training data set or a `Subset` of it; only its data set,
            collate function, batch size and workers are used. Samples to be forgotten are left out.
            Without random augmentation. Or a `Split`.
        forget_idx: Distinct indices into the training data set (the base of a plain `Subset`), or a
            boolean mask over it.
        options: Everything else that decides the result, by default `ForgetOptions()`.
        unpack: Function from a batch to (inputs, targets); by default for tuples and dicts.
        loss_fn: What the model was trained with, (outputs, targets) -> the mean loss:
            `nn.MSELoss()`, or a function. The likelihood must have this loss; one that was given
            by name gives way to another that has it (`ForgetResult.options` says which). By
            default a model that takes `labels` is asked for its own loss.
        device: Where to compute; by default where the model is.
        progress: Show progress bars.
        **changes: Fields of `ForgetOptions` by name, over those of `options`: `weight_decay=5e-4`;
            and for experiments `generator`, a `torch.Generator` that the noise is drawn from. Such
            noise is not secret, and `ForgetResult.noise` says so.

    Returns:
        A `ForgetResult`; print it.

    Raises:
        SplitError, DataError, ModelError, CurvatureError, ConfigError, NumericalError: What is
            wrong, what was expected and what to do. The given model is untouched then, too.

    Example:
        >>> import torch
        >>> from fisher_forget import forget
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(3, 2).eval()
        >>> result = forget(model, data, [0, 5, 7], drift=True, progress=False)
        >>> len(result.split.retain)
        37
    """
    with isolated():
        generator = changes.pop("generator", None)
        check_generator(generator)
        options = merged(options, changes)
        problem = Problem.of(
            model,
            retain_loader,
            forget_idx,
            options,
            unpack=unpack,
            loss_fn=loss_fn,
            device=device,
            progress=progress,
        )
        options = options.with_loss(problem.objective.likelihood, loss_fn)
        return scrub(model, problem, options, generator=generator, progress=progress)


def scrub(
    model: nn.Module,
    problem: Problem,
    options: ForgetOptions,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> ForgetResult:
    """Newton correction, noise, buffers and losses, once curvature and gradient are known.

    Args:
        model: Original; untouched.
        problem: Of that model.
        options: As for `forget`.
        generator: As for `forget`.
        progress: Show progress bars.
    """
    objective, split = problem.objective, problem.split
    options = with_solver(options, objective, split)
    newton = newton_step(problem, options, progress=progress)
    if not newton.at_minimum and options.drift == "auto":
        _warn_of_drift(newton, objective.likelihood)

    clock = time.perf_counter()
    final, about = newton.params, None
    if options.noise is not None:
        drawn, about = noise_step(
            problem,
            newton,
            noise=options.noise,
            exponent=options.exponent,
            seed=options.seed,
            generator=generator,
        )
        final = P.add(newton.params, drawn)
    noised = time.perf_counter()

    scrubbed = P.load(model, final).eval()
    home = next(scrubbed.parameters()).device
    scrubbed.to(next(iter(objective.start.values())).device)
    statistics, losses = _refresh(problem, scrubbed, options)
    return ForgetResult(
        model=scrubbed.to(home),
        split=split,
        options=options,
        curvature=problem.curvature,
        newton=newton,
        noise=about,
        losses=losses,
        statistics=statistics,
        seconds=problem.seconds
        | {"newton": newton.seconds, "noise": noised - clock}
        | {"check": time.perf_counter() - noised},
        versions=versions(),
    )


def _refresh(
    problem: Problem, scrubbed: nn.Module, options: ForgetOptions
) -> tuple[NormStatistics, dict[str, float]]:
    """Recompute running statistics of the scrubbed model as the options say, in place; and the
    losses after that."""
    layers = tuple(norm_layers(scrubbed))
    kept = {"auto": problem.sums.foreign, "refresh": (), "keep": layers}[options.batch_norm]
    if set(kept) >= set(layers):
        return NormStatistics(kept=layers), _losses(problem, scrubbed, options.seed)
    given = _loss(problem, "retain", scrubbed, options.seed)
    refreshed = refresh_statistics(scrubbed, problem.split, kept)
    losses = _losses(problem, scrubbed, options.seed)
    others = tuple(name for name in layers if name not in refreshed)
    statistics = NormStatistics(refreshed, others, losses["retain_after"] - given)
    if statistics.rise > max(RISE, RISE_SHARE * given):
        _warn_of_rise(statistics, losses["retain_after"])
    return statistics, losses


def _losses(problem: Problem, scrubbed: nn.Module, seed: int) -> dict[str, float]:
    """Mean loss of samples of each part, before and after, nats."""
    losses = {}
    for part in PARTS:
        losses[f"{part}_before"] = _loss(problem, part, None, seed)
        losses[f"{part}_after"] = _loss(problem, part, scrubbed, seed)
    return losses


def _loss(problem: Problem, part: Part, scrubbed: nn.Module | None, seed: int) -> float:
    """Mean loss of samples of a part, nats, of the scrubbed model or the original."""
    objective, split = problem.objective, problem.split
    at: Params = objective.start
    if scrubbed is not None:
        at = dict(scrubbed.named_parameters()) | dict(scrubbed.named_buffers())
    samples = some(split.indices(part), LOSS_SAMPLES, seed)
    return objective.mean_loss(split.batches(samples), at)


def _warn_of_drift(newton: NewtonStep, likelihood: Likelihood) -> None:
    hint = ""
    if isinstance(likelihood, IndependentOutputs) and likelihood.reduction == "sum":
        hint = "; nn.MSELoss() is likelihood='mse', nn.BCEWithLogitsLoss() is 'bce'"
    moves = "what is retained moves it, within a strict budget"
    if newton.absent:
        moves = "only an absent class's output row moves"
    elif newton.drift_removed:
        moves = "only what forgetting adds to its gradient moves it"
    warnings.warn(
        f"The model is not at a minimum of its training objective ({newton.unsettled}), so "
        f"{moves}. Train it to the end, or check that weight_decay and the loss are those of the "
        f"training: loss_fn= compares the loss{hint}.",
        FisherForgetWarning,
        stacklevel=4,
    )


def _warn_of_rise(statistics: NormStatistics, loss: float) -> None:
    warnings.warn(
        f"Recomputing the statistics of {len(statistics.refreshed)} BatchNorm layers on the "
        f"retained data raised the retained loss by {statistics.rise:.3g} nats, to {loss:.3g}. "
        "batch_norm='keep' leaves them as given, which is right where this data did not set them "
        "(a frozen backbone); statistics that it set hold the forgotten samples, too.",
        FisherForgetWarning,
        stacklevel=5,
    )
