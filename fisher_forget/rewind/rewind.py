r"""rewind(): start from a checkpoint of the training, and train the rest on the retained data.

    w(p) -> w(p) + delta -> the last 1 - p of the training on D_r

w(p) is the checkpoint at the point p. The rest of the training never sees the forget set: the
rewinding of Mu and Klabjan 2024 (arXiv:2409.09778), without their noise. What the forget set has
left in w(p) the Newton correction delta of `forget` takes away, if it is asked for.
docs/how-to/checkpoints.md has measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from fisher_forget import params as P
from fisher_forget._util.checks import check_model, is_number
from fisher_forget._util.copies import unwrapped
from fisher_forget._util.isolation import isolated, seeded_rng
from fisher_forget.data.samples import read_samples
from fisher_forget.data.split import Indices, Split, resolve_split, some
from fisher_forget.errors import ConfigError, NumericalError
from fisher_forget.experiments.training import TrainSettings, resume
from fisher_forget.rewind.checkpoints import Checkpoint, State, checkpoints_of
from fisher_forget.rewind.result import RewindResult
from fisher_forget.unlearn.batch_norm import frozen_statistics, norm_layers, pinned
from fisher_forget.unlearn.forget import PARTS
from fisher_forget.unlearn.newton.step import NewtonStep, newton_step
from fisher_forget.unlearn.objective import Objective
from fisher_forget.unlearn.options import ForgetKeywords, ForgetOptions, merged
from fisher_forget.unlearn.problem import Problem, objective_of
from fisher_forget.unlearn.result import versions
from fisher_forget.unlearn.self_check import ANSWERS

# (model at the checkpoint, retained samples, point) -> the trained model, or None for the given one
Rest = Callable[[nn.Module, Dataset[Any], float], nn.Module | None]
Checkpoints = str | Path | Sequence[Checkpoint] | Mapping[float, State | str | Path]


def rewind(
    model: nn.Module,
    retain_loader: DataLoader[Any] | Dataset[Any] | Split,
    forget_idx: Sequence[int] | Indices | Tensor | range,
    *,
    checkpoints: Checkpoints,
    rest: TrainSettings | Rest,
    share: float = 0.25,
    newton: bool = False,
    progress: bool = True,
    **changes: Unpack[ForgetKeywords],
) -> RewindResult:
    """Forget training samples by training a last part of the training again without them.

    Where a network is far from a minimum of its objective, much of what the forget set has done is
    gone only when the training itself is repeated; here as much of it as you pay for. Nothing given
    is changed, and no noise is added.

    Args:
        model: Trained, in eval mode.
        retain_loader: See `forget`.
        forget_idx: See `forget`; with all samples that were forgotten before, since the checkpoints
            hold them still.
        checkpoints: The folder of a `CheckpointKeeper`, or `list_checkpoints` of it; or files and
            state dicts by how much of the training each has behind it: {0.75: "epoch-30.pt"}.
        rest: How it is trained: the settings of the whole training, if it was `train`; or
            your own loop, a function (model in train mode, retained samples, point) that trains
            the model from that point on, 0.75 say, with the learning rates of there, and returns
            it.
        share: How much of a training may be trained again: the earliest checkpoint whose rest costs
            no more is taken.
        newton: Take the Newton step of `forget` at the checkpoint first, at its cost. It pays where
            that is little beside a training, and no more than a quarter is trained again.
        progress: Show progress bars.
        **changes: Fields of `ForgetOptions` by name, for the Newton step: `weight_decay=5e-4`;
            `likelihood` and `seed` count for the training, too.

    Raises:
        ConfigError: If no checkpoint is that late, the share is none, `rest` returns no model, or
            an option is of the noise.
        StorageError: If a checkpoint cannot be read, or is of another model.
        SplitError, DataError, ModelError, CurvatureError, NumericalError: As `forget`.

    Example:
        >>> import torch
        >>> from fisher_forget import TrainSettings, rewind, train
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> settings, kept = TrainSettings(epochs=4), {}
        >>> def keep(model):
        ...     kept.setdefault(0.25, {k: v.clone() for k, v in model.state_dict().items()})
        >>> start = torch.nn.Linear(3, 2)
        >>> model = train(start, data, settings, seed=0, progress=False, after_step=keep)
        >>> result = rewind(model, data, [0, 5, 7], checkpoints=kept, rest=settings,
        ...                 share=0.8, progress=False)
        >>> result.share
        0.75
    """
    with isolated():
        check_model(model)
        kept = checkpoints_of(checkpoints)
        chosen = _affordable(kept, share)
        options = _newton_options(changes)
        split = resolve_split(retain_loader, forget_idx)
        objective = objective_of(model, split, options, None)
        options = options.with_loss(objective.likelihood, None)

        clock = time.perf_counter()
        start, step = chosen.model(model), None
        if newton:
            start, step = _corrected(start, split, options, progress)
        corrected = time.perf_counter()
        if isinstance(rest, TrainSettings):
            ended = _by_settings(start, split, rest, chosen.point, options, progress)
        else:
            ended = _by_function(start, split, rest, chosen.point, options.seed)
        trained = time.perf_counter()
        ended = ended.to(next(model.parameters()).device)
        losses = _losses(objective, ended, split, options.seed)
        return RewindResult(
            model=ended,
            split=split,
            checkpoint=chosen,
            newton=step,
            losses=losses,
            holding=kept,
            seconds={"newton": corrected - clock, "training": trained - corrected}
            | {"check": time.perf_counter() - trained},
            versions=versions(),
        )


def _newton_options(changes: ForgetKeywords) -> ForgetOptions:
    """The options by name, none of which may be of a stage that does not take place."""
    idle = [name for name in ("noise", "exponent", "batch_norm") if name in changes]
    if idle:
        fix = "Leave it out; draw_noise adds noise to any weights."
        got = f"{idle[0]}={cast('Mapping[str, Any]', changes)[idle[0]]!r}"
        raise ConfigError(got, "options of the Newton step: rewind adds no noise", fix)
    return merged(None, changes)


def _affordable(kept: Sequence[Checkpoint], share: float) -> Checkpoint:
    """The earliest checkpoint whose rest costs no more than the share."""
    if not is_number(share) or not 0 < share <= 1:
        fix = "Pass share=0.25 to train a quarter of the training again."
        raise ConfigError(f"share={share!r}", "a share of the training, above 0, up to 1", fix)
    # 1 - .9 is a little more than .1
    affordable = [one for one in kept if one.rest <= share + 1e-9]
    if not affordable:
        rests = ", ".join(f"{one.rest:.3g}" for one in kept)
        got = f"share={share:g} and checkpoints with {rests} of the training to come"
        raise ConfigError(got, "a checkpoint with no more to come", "Pass a larger share.")
    return affordable[0]


def _corrected(
    start: nn.Module, split: Split, options: ForgetOptions, progress: bool
) -> tuple[nn.Module, NewtonStep]:
    """The checkpoint after its Newton correction."""
    problem = Problem.of(start, split, split.forget, options, progress=progress)
    step = newton_step(problem, options, progress=progress)
    return P.load(start, step.params), step


def _by_settings(
    start: nn.Module,
    split: Split,
    settings: TrainSettings,
    point: float,
    options: ForgetOptions,
    progress: bool,
) -> nn.Module:
    return resume(
        start,
        read_samples(split.base),
        settings,
        point,
        seed=options.seed,
        indices=split.retain,
        likelihood=options.likelihood,
        progress=progress,
    )


def _by_function(start: nn.Module, split: Split, rest: Rest, point: float, seed: int) -> nn.Module:
    if not callable(rest):
        got, fix = f"rest={rest!r}", "Pass TrainSettings(...), or a function."
        raise ConfigError(got, "the settings of the training, or a function", fix)
    retained = Subset(split.base, split.retain.tolist())
    kept = frozen_statistics(start, split)
    with seeded_rng(seed), pinned(start, kept):
        ended = rest(start.train(), retained, point)
    ended = start if ended is None else ended
    if not isinstance(ended, nn.Module):
        got = f"rest to return {type(ended).__name__}"
        raise ConfigError(got, "the trained model", "Return the model at the end of it.")
    ended = unwrapped(ended)
    for layer in norm_layers(ended).values():
        vars(layer).pop("train", None)  # of a copy, see `pinned`
    if not P.finite(dict(ended.named_parameters())):
        fix = "Lower its learning rate, and clear what it keeps of the training before."
        raise NumericalError("NaN or infinite weights from rest", "finite weights", fix)
    ended.zero_grad(set_to_none=True)
    return ended.eval()


def _losses(objective: Objective, ended: nn.Module, split: Split, seed: int) -> dict[str, float]:
    """Mean loss of samples of each part, before and after, nats."""
    losses = {}
    after = dict(ended.named_parameters()) | dict(ended.named_buffers())
    for part in PARTS:
        batches = list(split.batches(some(split.indices(part), ANSWERS, seed)))
        losses[f"{part}_before"] = objective.mean_loss(batches, objective.start)
        losses[f"{part}_after"] = objective.mean_loss(batches, after)
    return losses
