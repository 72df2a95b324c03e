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
from fisher_forget.data.split import Indices, Part, Split, resolve_split
from fisher_forget.errors import ConfigError, FisherForgetWarning
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
from fisher_forget.unlearn.self_check import RISE, Answers, self_check

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
            `held_out`, a loader or data set of samples that the model was not trained on, which
            tell the self-check what unseen samples look like (`ForgetResult.check`); and for
            experiments `generator`, a `torch.Generator` that the noise is drawn from. Such noise is
            not secret, and `ForgetResult.noise` says so.

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
        generator, held_out = changes.pop("generator", None), changes.pop("held_out", None)
        check_generator(generator)
        unseen = held_out_split(held_out, unpack)
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
        result = scrub(
            model, problem, options, generator=generator, held_out=unseen, progress=progress
        )
    result.check.warn(stacklevel=2)
    return result


def held_out_split(
    source: DataLoader[Any] | Dataset[Any] | Split | None, unpack: batches.Unpack | None = None
) -> Split | None:
    """Samples that the model was not trained on, for the self-check."""
    if source is None:
        return None
    if not isinstance(source, DataLoader | Split) and not hasattr(source, "__getitem__"):
        got, expected = f"held_out={source!r}", "a loader or data set, or None"
        raise ConfigError(got, expected, "Pass samples that the model was not trained on.")
    return resolve_split(source, [], unpack=unpack, allow_empty=True)


def scrub(
    model: nn.Module,
    problem: Problem,
    options: ForgetOptions,
    *,
    generator: torch.Generator | None = None,
    held_out: Split | None = None,
    progress: bool = False,
) -> ForgetResult:
    """Newton correction, noise, buffers and self-check, once curvature and gradient are known.

    Args:
        model: Original; untouched.
        problem: Of that model.
        options: As for `forget`.
        generator: As for `forget`.
        held_out: Samples that the model was not trained on, all of them retained ones of the split.
        progress: Show progress bars.
    """
    objective, split = problem.objective, problem.split
    options = with_solver(options, objective, split)
    newton = newton_step(problem, options, progress=progress)
    if newton.contradiction:
        _warn_of_decay(newton.contradiction, objective.likelihood)

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
    before = _answers(problem, objective.start, options.seed)
    statistics, after = _refresh(problem, scrubbed, options)
    check = self_check(
        problem,
        (before, after),
        _weights(scrubbed),
        moved=newton.norm,
        allowed=0.0 if about is None else about.asked,
        causes={
            "absent classes": _of_budget(newton),
            "retained samples": _of_statistics(statistics),
        },
        held_out=held_out,
        seed=options.seed,
    )
    return ForgetResult(
        model=scrubbed.to(home),
        split=split,
        options=options,
        curvature=problem.curvature,
        newton=newton,
        noise=about,
        losses={
            f"{part}_{when}": answers[part].loss
            for part in PARTS
            for when, answers in (("before", before), ("after", after))
        },
        check=check,
        statistics=statistics,
        seconds=problem.seconds
        | {"newton": newton.seconds, "noise": noised - clock}
        | {"check": time.perf_counter() - noised},
        versions=versions(),
    )


def _refresh(
    problem: Problem, scrubbed: nn.Module, options: ForgetOptions
) -> tuple[NormStatistics, dict[Part, Answers]]:
    """Recompute running statistics of the scrubbed model as the options say, in place; and its
    answers after that."""
    layers = tuple(norm_layers(scrubbed))
    kept = problem.kept_statistics(options.batch_norm)
    given = _answers(problem, _weights(scrubbed), options.seed)
    if set(kept) >= set(layers):
        return NormStatistics(kept=layers), given
    refreshed = refresh_statistics(scrubbed, problem.split, kept)
    after = _answers(problem, _weights(scrubbed), options.seed)
    others = tuple(name for name in layers if name not in refreshed)
    return NormStatistics(refreshed, others, after["retain"].loss - given["retain"].loss), after


def _answers(problem: Problem, at: Params, seed: int) -> dict[Part, Answers]:
    """Of samples of each part, at some weights and buffers."""
    objective, split = problem.objective, problem.split
    return {part: Answers.of(objective, split, part, at, seed) for part in PARTS}


def _weights(scrubbed: nn.Module) -> Params:
    return dict(scrubbed.named_parameters()) | dict(scrubbed.named_buffers())


def _warn_of_decay(contradiction: str, likelihood: Likelihood) -> None:
    hint = ""
    if isinstance(likelihood, IndependentOutputs) and likelihood.reduction == "sum":
        hint = "; nn.MSELoss() is likelihood='mse', nn.BCEWithLogitsLoss() is 'bce'"
    warnings.warn(
        f"The given weight_decay is not that of this model: {contradiction}. Leave it out, or "
        f"check that it and the loss are those of the training: loss_fn= compares the loss{hint}.",
        FisherForgetWarning,
        stacklevel=4,
    )


def _of_budget(newton: NewtonStep) -> str:
    """That the budget ended the correction, where it did."""
    # a share of 0 is that of a system without a solution
    if not newton.accepted or not 0 < newton.path[-1].share < 1:
        return ""
    return (
        f"The correction was cut short where retained samples would have lost {newton.budget:g} "
        "nats: a larger budget= lets it go on."
    )


def _of_statistics(statistics: NormStatistics) -> str:
    """What recomputed statistics did to the retained loss, where they raised it."""
    if statistics.rise <= RISE:
        return ""
    return (
        f"Recomputing the statistics of {len(statistics.refreshed)} BatchNorm layers on the "
        f"retained data raised the retained loss by {statistics.rise:.3g} nats. "
        "batch_norm='keep' leaves them as given, which is right where this data did not set them "
        "(a frozen backbone); statistics that it set hold the forgotten samples, too."
    )
