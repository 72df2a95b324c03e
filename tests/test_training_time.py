"""How long a training was: real torch trainings with every scheduler, whose rates are written down
as they go; closed forms; a Hugging Face Trainer; and what AdamW comes to rest at."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import prepared
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from fisher_forget import ConfigError, ForgetOptions, TrainingTime, TrainSettings, logged_rates
from fisher_forget.experiments.config import RunConfig
from fisher_forget.experiments.config_file import load_config

STEPS = 40


class Wavy(LRScheduler):
    """One of a user's own, recursive."""

    def get_lr(self) -> list[float]:
        groups = self.optimizer.param_groups
        turn = 1 + 0.3 * math.sin(self.last_epoch) if self.last_epoch else 1
        return [float(group["lr"]) * turn for group in groups]


class Counting(LRScheduler):
    """One that keeps a count of its own, which nobody can set back."""

    calls = 0

    def get_lr(self) -> list[float]:
        self.calls += 1
        return [base / self.calls for base in self.base_lrs]


def warmed(sgd: Optimizer) -> LRScheduler:
    parts = [schedules.LinearLR(sgd, 0.1, 1.0, 5), schedules.CosineAnnealingLR(sgd, 35)]
    return schedules.SequentialLR(sgd, parts, [5])


def restarted(sgd: Optimizer) -> LRScheduler:
    parts = [schedules.ConstantLR(sgd, 0.2, 4), schedules.CosineAnnealingWarmRestarts(sgd, 9, 2)]
    return schedules.SequentialLR(sgd, parts, [4])


def chained(sgd: Optimizer) -> LRScheduler:
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(sgd, 0.1, 6), schedules.ExponentialLR(sgd, 0.95)]
    )


def nested(sgd: Optimizer) -> LRScheduler:
    inner = [schedules.ConstantLR(sgd, 0.5, 3), schedules.ExponentialLR(sgd, 0.9)]
    parts = [schedules.SequentialLR(sgd, inner, [4]), schedules.CosineAnnealingLR(sgd, 50)]
    return schedules.SequentialLR(sgd, parts, [10])


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "step": lambda sgd: schedules.StepLR(sgd, 7, 0.5),
    "milestones": lambda sgd: schedules.MultiStepLR(sgd, [3, 11], 0.3),
    "cosine": lambda sgd: schedules.CosineAnnealingLR(sgd, STEPS),
    "restarts": lambda sgd: schedules.CosineAnnealingWarmRestarts(sgd, 7, 2),
    "exponential": lambda sgd: schedules.ExponentialLR(sgd, 0.93),
    "polynomial": lambda sgd: schedules.PolynomialLR(sgd, STEPS, 2.0),
    "lambda": lambda sgd: schedules.LambdaLR(sgd, lambda step: 1 / (1 + step)),
    "multiplicative": lambda sgd: schedules.MultiplicativeLR(sgd, lambda step: 0.9),
    "cyclic": lambda sgd: schedules.CyclicLR(sgd, 0.01, 0.2, 6, mode="triangular2"),
    "onecycle": lambda sgd: schedules.OneCycleLR(sgd, 0.3, total_steps=STEPS + 1),
    "warmed": warmed,
    "restarted": restarted,
    "chained": chained,
    "nested": nested,
    "averaged": lambda sgd: SWALR(sgd, 0.01, anneal_epochs=10),
    "own": Wavy,
}


def trained(
    make: Callable[[Optimizer], LRScheduler], every: int = 1, **options: Any
) -> tuple[SGD, LRScheduler, float]:
    """An optimizer and its scheduler after STEPS steps, and the sum of lr / (1 - momentum)."""
    weight = nn.Parameter(torch.ones(3))
    sgd = SGD([weight], **{"lr": 0.1, "momentum": 0.9} | options)
    with warnings.catch_warnings():  # torch's own, at one sequence within another
        warnings.simplefilter("ignore")
        scheduler = make(sgd)
    time = 0.0
    for step in range(STEPS):
        (group,) = sgd.param_groups
        time += float(group["lr"]) / (1 - group["momentum"])
        weight.grad = torch.zeros(3)
        sgd.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return sgd, scheduler, time


def state(sgd: Optimizer, scheduler: LRScheduler) -> Any:
    parts = getattr(scheduler, "_schedulers", [])
    kept = [copy.deepcopy(part.state_dict()) for part in (sgd, scheduler, *parts)]
    return repr([{k: v for k, v in held.items() if k != "_schedulers"} for held in kept])


class TestScheduler:
    @pytest.mark.parametrize("name", list(SCHEDULERS))
    def test_the_sum_of_the_steps_taken(self, name: str, recwarn: pytest.WarningsRecorder) -> None:
        sgd, scheduler, time = trained(SCHEDULERS[name])
        before, recwarn.list[:] = state(sgd, scheduler), []
        found = TrainingTime.of(sgd, steps=STEPS, scheduler=scheduler)
        assert found.time == pytest.approx(time, rel=1e-9), found.source
        assert state(sgd, scheduler) == before
        assert not recwarn.list
        assert type(scheduler).__name__ in found.source

    @pytest.mark.parametrize("name", ["step", "cosine", "lambda", "exponential"])
    def test_once_an_epoch(self, name: str) -> None:
        sgd, scheduler, time = trained(SCHEDULERS[name], every=8)
        found = TrainingTime.of(sgd, steps=STEPS, scheduler=scheduler)
        assert found.time == pytest.approx(time, rel=1e-9)

    def test_never_stepped(self) -> None:
        sgd, scheduler, time = trained(warmed, every=STEPS + 1)
        found = TrainingTime.of(sgd, steps=STEPS, scheduler=scheduler)
        assert found.time == pytest.approx(time)

    def test_restored_from_a_checkpoint(self) -> None:
        sgd, scheduler, time = trained(warmed)
        other, twin, _ = trained(warmed, every=STEPS + 1)
        other.load_state_dict(sgd.state_dict())
        twin.load_state_dict(scheduler.state_dict())
        found = TrainingTime.of(other, steps=STEPS, scheduler=twin)
        assert found.time == pytest.approx(time, rel=1e-9)

    def test_wrapped_as_accelerate_does(self) -> None:
        class Wrapper(Optimizer):
            def __init__(self, optimizer: Optimizer) -> None:
                self.optimizer = optimizer

        class Outer:
            def __init__(self, scheduler: LRScheduler) -> None:
                self.scheduler = scheduler

        sgd, scheduler, time = trained(SCHEDULERS["cosine"])
        wrapped: Any = Outer(scheduler)
        assert TrainingTime.of(Wrapper(sgd), steps=STEPS, scheduler=wrapped).time == pytest.approx(
            time
        )
        scheduler.optimizer = Wrapper(sgd)
        assert TrainingTime.of(sgd, steps=STEPS, scheduler=scheduler).time == pytest.approx(time)

    @pytest.mark.parametrize("make", [Counting, schedules.ReduceLROnPlateau])
    def test_what_cannot_be_run_again(self, make: Any) -> None:
        weight = nn.Parameter(torch.ones(1))
        sgd = SGD([weight], 0.1, weight_decay=1e-3)
        scheduler, given = make(sgd), ([1.0] if make is schedules.ReduceLROnPlateau else [])
        for _ in range(30):
            sgd.step()
            scheduler.step(*given)
        found = TrainingTime.of(sgd, steps=30, scheduler=scheduler)
        assert found.time is None
        assert found.weight_decay == 1e-3
        assert make.__name__ in found.source
        assert "again" in found.source

    def test_changed_by_hand_after_the_schedule(self) -> None:
        sgd, scheduler, _ = trained(SCHEDULERS["step"])
        sgd.param_groups[0]["lr"] = 0.7
        found = TrainingTime.of(sgd, steps=STEPS, scheduler=scheduler)
        assert found.time is None
        assert "other rates" in found.source


class TestSgd:
    def test_constant(self) -> None:
        sgd = SGD([nn.Parameter(torch.ones(2))], 0.2, momentum=0.8, dampening=0.5, weight_decay=0.1)
        found = TrainingTime.of(sgd, steps=10)
        assert found.time == pytest.approx(10 * 0.2 * 0.5 / 0.2)
        assert found.weight_decay == 0.1

    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
    def test_is_the_time_of_gradient_flow(self, options: Any) -> None:
        """On a quadratic of small curvature h the flow is exp(-h T)."""
        weight, h, steps = nn.Parameter(torch.ones(1).double()), 0.01, 400
        sgd = SGD([weight], 0.05, **options)
        for _ in range(steps):
            weight.grad = h * weight.detach()
            sgd.step()
        time = TrainingTime.of(sgd, steps=steps).time
        assert time is not None
        # momentum starts from rest, mu / (1 - mu) = 9 steps late
        assert -math.log(float(weight.detach())) / h == pytest.approx(time, rel=0.03)

    def test_groups_of_different_rates(self) -> None:
        parts = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (0.1, 0.2)]
        found = TrainingTime.of(SGD(parts, 0.1), steps=10)
        assert found.time is None
        assert "differ" in found.source

    @pytest.mark.parametrize("steps", [None, 0, 2.5, True])
    def test_steps_are_needed(self, steps: Any) -> None:
        with pytest.raises(ConfigError, match="steps="):
            TrainingTime.of(SGD([nn.Parameter(torch.ones(2))], 0.1), steps=steps)

    def test_the_scheduler_is_needed(self) -> None:
        sgd, scheduler, _ = trained(SCHEDULERS["cosine"])
        with pytest.raises(ConfigError, match="scheduler="):
            TrainingTime.of(sgd, steps=STEPS)
        with pytest.raises(ConfigError, match="of 40"):
            TrainingTime.of(sgd, steps=STEPS - 1, scheduler=scheduler)
        with pytest.raises(ConfigError, match="another optimizer"):
            TrainingTime.of(trained(warmed)[0], steps=STEPS, scheduler=scheduler)
        for wrong in (None, nn.Linear(2, 2), 0.1):
            with pytest.raises(ConfigError, match="optimizer of type"):
                TrainingTime.of(wrong)  # type: ignore[arg-type]


def at_rest(make: Callable[..., Optimizer], decay: float) -> tuple[nn.Module, Optimizer]:
    """A regression with a noisy gradient, trained until it moves no more."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=draw, dtype=torch.float64)
    y = x @ torch.randn(6, 2, generator=draw, dtype=torch.float64) + 1
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 6, generator=draw))
    optimizer = make(model.named_parameters(), lr=0.02, weight_decay=decay)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        rows = torch.randint(0, 512, (32,), generator=draw)
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    return model, optimizer


def felt(weight: Tensor) -> float:
    """-<grad L, w> / <w, w>."""
    assert weight.grad is not None
    held = weight.detach()
    return -float((weight.grad * held).sum() / held.square().sum())


class TestWeightDecay:
    def test_of_adamw_is_what_its_model_feels(self) -> None:
        """The force that holds the weights where they are, which no formula of AdamW goes into."""
        model, adamw = at_rest(AdamW, 0.3)
        found = TrainingTime.of(adamw)
        assert found.time is None
        assert isinstance(found.weight_decay, dict)
        for name, weight in model.named_parameters():
            assert found.weight_decay[name] == pytest.approx(felt(weight), rel=0.1)
        assert found == TrainingTime.of(adamw, model=model)

    def test_of_adam_is_that_of_the_objective(self) -> None:
        model, adam = at_rest(Adam, 0.05)
        assert TrainingTime.of(adam) == TrainingTime(
            None, 0.05, "Adam, whose rates are no time of gradient flow"
        )
        assert felt(model.weight) == pytest.approx(0.05, rel=0.02)

    def test_without_decay_nothing_else_is_asked(self) -> None:
        weight = [nn.Parameter(torch.ones(2))]
        for optimizer in (AdamW(weight, weight_decay=0), torch.optim.Rprop(weight)):
            assert TrainingTime.of(optimizer).weight_decay == 0.0

    def test_what_cannot_be_told(self) -> None:
        weight = [nn.Parameter(torch.ones(2))]
        assert TrainingTime.of(AdamW(weight)).weight_decay is None  # never stepped
        assert TrainingTime.of(torch.optim.ASGD(weight, weight_decay=0.1)).weight_decay is None

    def test_by_name(self) -> None:
        model = prepared("mlp")[0]
        named = list(model.named_parameters())
        parts = [
            {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        ]
        expected = {n: 0.1 if n.endswith("weight") else 0.0 for n, _ in named}
        sgd = SGD(parts, 0.1)
        assert TrainingTime.of(sgd, steps=1, model=model).weight_decay == expected
        assert TrainingTime.of(sgd, steps=1, model=nn.DataParallel(model)).weight_decay == expected
        untold = TrainingTime.of(sgd, steps=1)
        assert untold.weight_decay is None
        assert "model=" in untold.source
        with pytest.raises(ConfigError, match="does not have"):
            TrainingTime.of(sgd, steps=1, model=nn.Linear(2, 2))


class TestRates:
    def test_their_sum(self) -> None:
        found = TrainingTime.of_rates([0.1, 0.2, 0.3], momentum=0.5, weight_decay={"*": 1})
        assert found == TrainingTime(1.2, {"*": 1.0}, "SGD, 3 steps")
        assert TrainingTime.of_rates([0.0]).time is None

    @pytest.mark.parametrize(
        ("rates", "momentum"), [([], 0.0), ([-0.1], 0.0), (["a"], 0.0), ([0.1], 1.0), ([0.1], -1)]
    )
    def test_out_of_range(self, rates: Any, momentum: Any) -> None:
        with pytest.raises(ConfigError):
            TrainingTime.of_rates(rates, momentum=momentum)

    def test_of_a_log(self, tmp_path: Path) -> None:
        log = [{"step": s, "learning_rate": 1 - s / 100, "loss": 1.0} for s in range(10, 101, 10)]
        path = tmp_path / "trainer_state.json"
        path.write_text(json.dumps({"global_step": 100, "log_history": [*log, {"step": 100}]}))
        found = logged_rates(path)
        assert len(found) == 100
        # linear: exact between the logged steps, and the first one's before them
        assert math.fsum(found) == pytest.approx(
            9 * 0.9 + math.fsum(1 - s / 100 for s in range(10, 101))
        )
        assert found == logged_rates(str(path))

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"global_step": 9, "log_history": []}', "{NaN"]
    )
    def test_no_log(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "trainer_state.json"
        for _ in range(2):
            with pytest.raises(ConfigError, match="trainer_state"):
                logged_rates(path)
            path.write_text(content)
        with pytest.raises(ConfigError, match="Trainer"):
            logged_rates(3)


class TestOption:
    @pytest.mark.parametrize(
        "values",
        [
            {"time": 0},
            {"time": -1.0},
            {"time": math.inf},
            {"time": "3"},
            {"weight_decay": -1},
            {"weight_decay": {}},
            {"source": 3},
        ],
    )
    def test_out_of_range(self, values: Any) -> None:
        with pytest.raises(ConfigError, match="TrainingTime"):
            TrainingTime(**values)

    def test_what_was_given_is_copied(self) -> None:
        given = {"a": 1}
        found = TrainingTime(weight_decay=given)
        given["a"] = 2
        assert found.weight_decay == {"a": 1.0}

    def test_is_an_option(self) -> None:
        with pytest.raises(ConfigError, match="training="):
            ForgetOptions(training=26.0)  # type: ignore[arg-type]
        assert ForgetOptions(training=TrainingTime(26.0)).training == TrainingTime(26.0)


RECIPE = "name: some\nforget_sets: [{name: some, kind: random, count: 2}]\n"


class TestRecipe:
    @pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
    def test_its_own_training(self, schedule: Any) -> None:
        """T is lr / (1 - mu) times the steps, of which a cosine takes half, and one cycle with
        warm-up from 1/25 within 0.3 of them 0.3 (1 + 1/25) / 2 + 0.7 / 2."""
        share = {"constant": 1.0, "cosine": 0.5, "onecycle": 0.506}[schedule]
        settings = TrainSettings(epochs=20, batch_size=10, lr=0.1, momentum=0.8, schedule=schedule)
        found = settings.training_time(995)
        assert found.time == pytest.approx(2000 * 0.5 * share, rel=2e-3)
        assert found.weight_decay == settings.weight_decay

    @pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"epochs": 0}])
    def test_none_to_tell(self, options: Any) -> None:
        assert TrainSettings(**options).training_time(100).time is None

    def test_options_have_it(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(RECIPE)
        config = load_config(path)
        assert isinstance(config, RunConfig)
        assert config.forget_options(0).training is None  # read off the model, as in a call
        path.write_text(RECIPE + "forget: {training: {time: 26.0}}\n")
        given = load_config(path).forget_options(0).training
        assert given == TrainingTime(26.0)
        by_flag = load_config(path, ["--forget.training.time", "9"])
        assert by_flag.forget_options(0).training == TrainingTime(9.0)
