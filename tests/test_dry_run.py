"""`--dry-run`: it writes nothing, counts what a run then does, and foresees its cost."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import ForgetOptions, forget
from fisher_forget.cli import main
from fisher_forget.experiments import cases, dry_run
from fisher_forget.experiments.config import ForgetSet, ModelSettings, RunConfig, SweepConfig
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.dry_run import activation_bytes, predicted_cost
from fisher_forget.unlearn.options import PRECONDITIONER_SAMPLES

CONTENT = {
    "name": "small",
    "data": {"name": "digits", "max_train": 200, "max_test": 60},
    "model": {"name": "cnn", "options": {"width": 4}},
    "training": {"epochs": 2, "batch_size": 32, "lr": 0.05},
    "forget_sets": [
        {"name": "class 3", "kind": "class", "label": 3},
        {"name": "wrong", "kind": "mislabelled", "count": 20},
        {"name": "some", "kind": "random", "count": 12, "retrained": 3},
    ],
    "seeds": [0, 1],
    "retrained": 2,
    "progress": False,
}
ENOUGH = {"forget_sets": CONTENT["forget_sets"][:2], "retrained": 4}  # for an evaluation
COMMANDS = ["run", "sweep", "compare", "evaluate"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::fisher_forget.FisherForgetWarning"
)  # trained for a moment only


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(CONTENT))
    return "small.yaml"


def counts(text: str) -> dict[str, tuple[int, int]]:
    """Title -> (to train, stored)."""
    return {
        t: (int(a), int(b))
        for t, a, b in re.findall(
            r"^(?:  models)? +(\w[\w ]*): (?:at most )?(\d+) to train, (\d+) stored", text, re.M
        )
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_writes_nothing_and_leaves_the_random_state(
    path: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    Path(path).write_text(yaml.safe_dump(CONTENT | ENOUGH))
    assert main([command, path, "--dry-run"]) == 0
    assert [p.name for p in Path().rglob("*")] == ["small.yaml"]
    assert torch.equal(before, torch.get_rng_state())
    assert f"Dry run of `fisher-forget {command}`" in capsys.readouterr().out


def test_an_evaluation_needs_enough_retrained_models(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", path, "--dry-run"]) == 2
    assert "retrained: 2 for the forget set 'class 3'" in capsys.readouterr().err


def test_says_how_many_settings_and_originals(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(path).write_text(yaml.safe_dump(CONTENT | ENOUGH))
    assert main(["compare", path, "--dry-run", "--methods", "[finetune, ssd]"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"methods: 2 x \d forget sets, 8 trials and 2 originals each", text)


def test_counts_what_the_run_then_trains(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", path, "--dry-run"]) == 0
    text = capsys.readouterr().out
    first = counts(text)
    assert "class 3: 20 samples, 180 retained" in text
    assert "digits, 200 training and 60 test samples, 10 classes" in text
    assert first["without some"] == (3, 0)  # its own number
    assert (
        first["original"] == first["original with wrong"] == (2, 0)
    )  # labels made wrong want their own
    trained = []
    train_one = cases.train_one

    def counted(config: object, data: object, rows: object, seed: int) -> object:
        trained.append(seed)
        return train_one(config, data, rows, seed)

    monkeypatch.setattr(cases, "train_one", counted)
    assert main(["run", path]) == 0
    assert len(trained) == 2 + 2 + 2 + 2 + 3 == int(re.search(r"training: (\d+) models", text)[1])
    for file in Path("runs/small/some/retrained").glob("seed-1001*"):
        file.unlink()
    capsys.readouterr()
    assert main(["run", path, "--dry-run"]) == 0
    assert counts(capsys.readouterr().out) == {
        "original": (0, 2),
        "original with wrong": (0, 2),
        "without class 3": (0, 2),
        "without wrong": (0, 2),
        "without some": (1, 2),
    }
    assert main(["run", path, "--dry-run", "--training.epochs", "3"]) == 0
    assert {stored for _, stored in counts(capsys.readouterr().out).values()} == {0}


def test_memorised_samples_need_models_first(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "run",
                path,
                "--dry-run",
                "--forget_sets",
                "[{name: known, kind: memorised, count: 9}]",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert counts(text)["on subsets"] == (20, 0)
    assert "without known: at most 2 to train" in text
    assert "known: 9 samples, 191 retained, chosen by models" in text


def test_prints_the_resolved_configuration(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", path, "--dry-run", "--forget.noise.loss", "0.1", "--draws", "2"]) == 0
    text = capsys.readouterr().out
    Path("again.yaml").write_text(text.split("with all defaults:\n")[1])
    given = [
        load_config(p, f, SweepConfig)
        for p, f in ((path, ["--draws", "2", "--forget.noise.loss", "0.1"]), ("again.yaml", []))
    ]
    assert given[0] == given[1]
    assert "sweep: 14 cells for each of 3 forget sets" in text  # 7 scales, 2 draws


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data.name", "minst"], "'mnist'"),
        (["--forget_sets", "[{name: a, kind: class, label: 77}]"], "label 77"),
        (["--model.options", "{depth: 3}"], "depth"),
        (
            ["--training.augment", "true", "--data.name", "diabetes", "--model.name", "linear"],
            "label",
        ),
    ],
)
def test_finds_mistakes_without_training(
    path: str, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", path, "--dry-run", *flags]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "columns", "samples"),
    [
        ({}, 1, PRECONDITIONER_SAMPLES),  # "auto" is a sketch where samples are left out
        ({"kind": "exact"}, 2, PRECONDITIONER_SAMPLES),  # of three classes
        ({"max_samples": None}, 2, PRECONDITIONER_SAMPLES + 97),
        ({"solver": "direct"}, 2, PRECONDITIONER_SAMPLES + 97),
        ({"max_samples": 50}, 2, 50),
    ],
    ids=str,
)
def test_foresees_the_samples_and_kind_of_the_curvature_that_forget_estimates(
    options: dict[str, Any], columns: int, samples: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(PRECONDITIONER_SAMPLES + 100, 4, generator=generator)
    train = TensorDataset(inputs, torch.arange(len(inputs)) % 3)
    data = DataBundle("made up", train, train, ("a", "b", "c"))
    config = RunConfig(
        "large",
        [ForgetSet("three", "indices", indices=[3, 4, 5])],
        model=ModelSettings("linear"),
        forget=ForgetOptions(**options, drift=True, noise=None),
    )
    model, forgotten = cases.untrained(config, data, 0), np.array([3, 4, 5])
    cost = predicted_cost(config, data, model, forgotten).curvature
    assert (cost.columns, cost.samples) == (columns, samples)
    result = forget(model, train, forgotten, config.forget_options(0), progress=False)
    assert result.curvature.info.count == samples
    assert result.kind == ("sketch" if columns == 1 else "exact")


def test_an_epoch_takes_as_long_as_its_samples(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a sample of training moves on by two seconds."""
    clock = 0.0
    train = dry_run.train

    def timed(model: nn.Module, data: TensorDataset, *args: Any, **options: Any) -> nn.Module:
        nonlocal clock
        clock += 2 * len(options["indices"])
        return train(model, data, *args, **options)

    config = load_config(path)
    data = config.data.load()
    monkeypatch.setattr(dry_run, "train", timed)
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: clock))
    cost = predicted_cost(config, data, cases.untrained(config, data, 0), np.arange(20))
    assert cost.epoch == pytest.approx(2 * len(data.train))


def test_memory_is_that_of_weights_and_activations(path: str) -> None:
    config = load_config(path)
    data = config.data.load()
    model = cases.untrained(config, data, 0)
    cost = predicted_cost(config, data, model, np.arange(20))
    assert cost.weights == 4 * sum(p.numel() for p in model.parameters())
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    # of Flatten's view the images' own memory is kept, and the weights for the gradient of the
    # input are not
    assert activation_bytes(linear, data, torch.arange(32).numpy()) == 4 * 32 * 64
