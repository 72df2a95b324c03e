"""How long a model was trained, in units of gradient flow, and with which weight decay."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, SequentialLR

from fisher_forget._util.checks import is_number, is_whole
from fisher_forget._util.copies import unwrapped
from fisher_forget.errors import ConfigError
from fisher_forget.unlearn.weight_decay import WeightDecay, is_weight_decay

SAME = 0.01  # relative difference of two times that are one
# At rest when the mean of gradient + wd w vanishes, whatever they divide it by.
COUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax")
)


@dataclass(frozen=True)
class TrainingTime:
    r"""What the training was, as far as it is known; what is not is read off the model.

    Small steps of SGD follow the gradient flow dw/dt = -grad L: one at the rate lr with momentum mu
    moves along it for the time lr / (1 - mu), so that the training lasted

        T = sum over steps t of lr_t / (1 - mu_t).

    An optimizer that divides its steps by the size of the gradient has no such sum: Adam's time is
    sum lr_t / sqrt(v_t), and only the last v is left of all.

    Attributes:
        time: T, squared weight per nat; `None` where it cannot be told.
        weight_decay: wd of the objective, mean loss + (1/2) sum_i wd_i w_i^2, a number or numbers
            by parameter name; `None` where it cannot be told.
        source: Where both are from, in words.

    Raises:
        ConfigError: If a value is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> halved = torch.optim.lr_scheduler.StepLR(sgd, step_size=100, gamma=0.5)
        >>> for _ in range(200):
        ...     sgd.step()
        ...     halved.step()
        >>> training = TrainingTime.of(sgd, steps=200, scheduler=halved)
        >>> round(training.time, 6), training.weight_decay
        (150.0, 0.0005)
    """

    time: float | None = None
    weight_decay: WeightDecay | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        good_time = self.time is None or (is_number(self.time) and self.time > 0)
        good_decay = self.weight_decay is None or is_weight_decay(self.weight_decay)
        for name, good, expected in (
            ("time", good_time, "a finite number above 0, or None"),
            ("weight_decay", good_decay, "a number of at least 0, such numbers by name, or None"),
            ("source", isinstance(self.source, str), "words"),
        ):
            if not good:
                got = f"TrainingTime({name}={getattr(self, name)!r})"
                raise ConfigError(got, expected, "Correct it, or leave it to the model: None.")
        if isinstance(self.weight_decay, Mapping):
            rates = {name: float(rate) for name, rate in self.weight_decay.items()}
            object.__setattr__(self, "weight_decay", rates)

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        *,
        steps: int | None = None,
        scheduler: LRScheduler | None = None,
        model: nn.Module | None = None,
    ) -> Self:
        """What a torch optimizer did, as it is after the training; it is not changed.

        The schedule is run again on a stand-in, and believed if it ends at the optimizer's rates.
        Where rates were set by hand, or went by a metric, use `of_rates`.

        The decay of AdamW is no term of the loss, but its steps come to rest where the mean
        gradient is -wd sqrt(v) w: that of a decay wd sqrt(v), whose mean over a tensor, weighted by
        w^2, is what is given by name. It is exact at the end of a long training.

        Args:
            optimizer: Of the training.
            steps: That it took; needed for SGD.
            scheduler: Of its rates, stepped once a step, or once every so many (an epoch).
            model: Whose parameters it moved. Their names are needed where they decay differently,
                unless the optimizer was made of `model.named_parameters()`.

        Returns:
            Its `time` is `None` for optimizers other than SGD, for parameters at different rates
            and for schedules that cannot be run again; `source` says so.

        Raises:
            ConfigError: No torch optimizer; a missing number of steps or scheduler; one of another
                optimizer; a model of other parameters.
        """
        # accelerate wraps both
        optimizer, scheduler = _within(optimizer), getattr(scheduler, "scheduler", scheduler)
        if not isinstance(optimizer, Optimizer):
            got = f"an optimizer of type {type(optimizer).__name__}"
            raise ConfigError(got, "one of torch.optim", "Pass TrainingTime(time=...) itself.")
        time, told = _time(optimizer, steps, scheduler)
        decay, decays = _weight_decay(optimizer, model)
        return cls(time, decay, "; ".join((f"{type(optimizer).__name__}, {told}", *decays)))

    @classmethod
    def of_rates(
        cls,
        rates: Sequence[float],
        *,
        momentum: float = 0.0,
        weight_decay: WeightDecay | None = None,
    ) -> Self:
        """SGD at these learning rates.

        Args:
            rates: One for each step; those of a log by `logged_rates`.
            momentum: mu.
            weight_decay: wd of the objective.

        Raises:
            ConfigError: If a value is out of range.

        Example:
            >>> TrainingTime.of_rates([0.1] * 50 + [0.01] * 50, momentum=0.9).time
            55.0
        """
        if not (is_number(momentum) and momentum < 1):
            raise ConfigError(f"momentum={momentum!r}", "a number in [0, 1)", "Correct it.")
        if not len(rates) or not all(is_number(rate) for rate in rates):
            got = f"rates {list(rates)[:4]}"
            raise ConfigError(got, "one number of at least 0 for each step", "Correct them.")
        time = round(math.fsum(map(float, rates)) / (1 - momentum), 12)
        return cls(time or None, weight_decay, f"SGD, {len(rates):,} steps")


def logged_rates(state: Any) -> list[float]:
    """The learning rate of each step, from the log of a Hugging Face `Trainer`.

    Between logged steps they are interpolated.

    Args:
        state: `trainer.state`, or the path of a `trainer_state.json`.

    Raises:
        ConfigError: If the file cannot be read, or has no learning rates.
    """
    try:
        seen = json.loads(Path(state).read_text()) if isinstance(state, str | Path) else vars(state)
        log = [entry for entry in seen["log_history"] if "learning_rate" in entry]
        steps = [int(entry["step"]) for entry in log]
        rates = [float(entry["learning_rate"]) for entry in log]
        return [float(r) for r in np.interp(range(1, seen["global_step"] + 1), steps, rates)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{state if isinstance(state, str | Path) else type(state).__name__}: {error!r}",
            "the state of a transformers.Trainer, with learning rates in its log",
            "Pass the rates themselves: TrainingTime.of_rates([...]).",
        ) from error


def _time(
    optimizer: Optimizer, steps: int | None, scheduler: LRScheduler | None
) -> tuple[float | None, str]:
    """The time that the steps of an optimizer took, and what it is from."""
    if type(optimizer) is not torch.optim.SGD:
        return None, "whose rates are no time of gradient flow"
    if not is_whole(steps, 1):
        fix = "Pass steps=len(loader) * epochs."
        raise ConfigError(f"steps={steps!r} for SGD", "the number of steps that it took", fix)
    assert steps is not None
    if scheduler is None:
        if any("initial_lr" in group for group in optimizer.param_groups):
            got, expected = "an optimizer with an LR scheduler, and scheduler=None", "both"
            raise ConfigError(got, expected, "Pass scheduler=, or use TrainingTime.of_rates.")
        ticks = [_speeds(optimizer)]
        told = f"{steps:,} steps at a constant rate"
    else:
        name = type(scheduler).__name__
        if _within(getattr(scheduler, "optimizer", None)) is not optimizer:
            got = f"a {name} of another optimizer"
            raise ConfigError(got, "that of this optimizer", "Pass the two of one training.")
        told = f"{steps:,} steps of {name}"
        try:
            ticks = _replayed(optimizer, scheduler)
        except Exception:  # whatever a scheduler of the user's, or one by a metric, raises
            return None, f"{told}, which cannot be run again"
        if not ticks:
            return None, f"{told}, which ends at other rates when it is run again"
        if len(ticks) > steps:
            got = f"steps={steps} for a {name} of {len(ticks)}"
            raise ConfigError(got, "as many at least", "Pass steps=len(loader) * epochs.")
    times = [steps * math.fsum(speeds) / len(speeds) for speeds in zip(*ticks, strict=True)]
    if max(times) - min(times) > SAME * max(times):
        return None, f"{told}, which differ between its parameter groups"
    return times[0] or None, told


def _within(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _speeds(optimizer: Optimizer) -> list[float]:
    """Time of a step of SGD, for each parameter group."""
    return [
        float(group["lr"]) * (1 - group["dampening"]) / (1 - group["momentum"])
        if group["momentum"]
        else float(group["lr"])
        for group in optimizer.param_groups
    ]


def _replayed(optimizer: Optimizer, scheduler: LRScheduler) -> list[list[float]]:
    """`_speeds` at every step of the scheduler so far; empty if its last rates are not those that
    the optimizer has."""
    groups = []
    for group in optimizer.param_groups:
        kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(copy.deepcopy(kept) | {"params": [torch.zeros(())]})
    stand_in = torch.optim.SGD(groups, lr=0.0)
    LambdaLR(stand_in, lambda _: 1.0)  # back to the initial rates
    stand_in.step()  # or torch warns that it takes none
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    _restart(twin)
    ticks = [_speeds(stand_in)]
    for _ in range(_steps_of(scheduler)):
        twin.step()
        ticks.append(_speeds(stand_in))
    ends = zip(stand_in.param_groups, optimizer.param_groups, strict=True)
    if not all(math.isclose(a["lr"], b["lr"], rel_tol=1e-6, abs_tol=1e-12) for a, b in ends):
        return []
    return ticks[:-1] or ticks  # the last has not been used


def _steps_of(scheduler: LRScheduler) -> int:
    """How often a scheduler was stepped; a chain of several does not count itself."""
    if isinstance(scheduler, ChainedScheduler):
        return _steps_of(scheduler._schedulers[0])
    return scheduler.last_epoch


def _restart(scheduler: Any) -> None:
    """Take a scheduler, and the rates of its optimizer, to where its constructor left them."""
    if isinstance(scheduler, ChainedScheduler | SequentialLR):
        for part in scheduler._schedulers:
            _restart(part)
        if isinstance(scheduler, SequentialLR):
            parts = scheduler._schedulers, scheduler._milestones
            SequentialLR.__init__(scheduler, scheduler.optimizer, *parts)
    else:
        scheduler.last_epoch = -1
        scheduler._initial_step()


def _weight_decay(
    optimizer: Optimizer, model: nn.Module | None
) -> tuple[WeightDecay | None, list[str]]:
    """wd of the objective that an optimizer comes to rest at, and what is to be said of it."""
    names = _names(optimizer, model)
    decays: list[float] = []
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay", 0.0))
        for p in group["params"]:
            if not decay:
                decays.append(0.0)
            elif group.get("decoupled_weight_decay"):
                scale = _typical_gradient(p, optimizer.state.get(p, {}), group)
                if scale is None:
                    return None, ["whose state does not tell its decay"]
                decays.append(decay * scale)
            elif type(optimizer) in COUPLED:
                decays.append(decay)
            else:
                return None, ["whose decay may be no term of the loss"]
    if len({*decays}) == 1:
        return decays[0], []
    if names is None:
        return None, ["parameters that decay differently, without names: pass model="]
    return dict(zip(names, decays, strict=True)), []


def _typical_gradient(
    p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> float | None:
    """Mean of sqrt(v) + eps over a parameter, weighted by w^2: what AdamW divides its steps by."""
    v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if v is None or not (step := float(state["step"])):
        return None
    root = (v.double() / (1 - float(group["betas"][1]) ** step)).sqrt() + group["eps"]
    weight = p.detach().double().square()
    weight = weight if float(weight.sum()) else torch.ones_like(weight)
    return float((weight * root).sum() / weight.sum())


def _names(optimizer: Optimizer, model: nn.Module | None) -> list[str] | None:
    """Of the optimizer's parameters, in its order; `None` where nothing tells them."""
    if model is None:
        known = [group.get("param_names", ()) for group in optimizer.param_groups]
        return [name for names in known for name in names] if all(known) else None
    by_id = {id(p): name for name, p in unwrapped(model).named_parameters()}
    moved = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if not set(moved) <= by_id.keys():
        got = "an optimizer of parameters that the model does not have"
        raise ConfigError(got, "those of the model", "Pass the model that it trained.")
    return [by_id[key] for key in moved]
