"""One typed schema for YAML files and command-line flags: one YAML, one run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.datasets import DataBundle, load_dataset
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.sweep.cells import OURS, expand
from fisher_forget.sweep.run import RUIN
from fisher_forget.unlearn.options import ForgetOptions

KEY = "config"  # jsonargparse nests the schema under one argument
NAMED = ("data", "model")  # sections that a plain name may stand for


@dataclass(frozen=True)
class DataSettings:
    """Which data set.

    Attributes:
        name: "digits", "mnist", "cifar10", "breast_cancer" or "diabetes"; or the import path of a
            function of your own that returns (train, test), "package.module:function".
        root: Folder that holds it; default the environment variable FISHER_FORGET_DATA.
        max_train: Most training samples, class by class in proportion; all by default.
        max_test: Most test samples.
        options: Of a function of your own.
    """

    name: str = "digits"
    root: str | None = None
    max_train: int | None = None
    max_test: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> DataBundle:
        """The data set in memory.

        Raises:
            ConfigError, DataError: As `load_dataset`.
        """
        return load_dataset(
            self.name,
            self.root,
            max_train=self.max_train,
            max_test=self.max_test,
            options=self.options,
        )


@dataclass(frozen=True)
class ModelSettings:
    """Which model.

    Attributes:
        name: "linear", "mlp", "cnn", "all_cnn" or "resnet18"; or the import path of a function or
            class of your own that makes a module, "package.module:function".
        options: Its options, such as {width: 16}.
    """

    name: str = "cnn"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForgetSet:
    """Which training samples to forget.

    Attributes:
        name: Title in reports and name of the folder.
        kind: "class" (all of one), "samples" (some of one class), "random" (some of all),
            "mislabelled" (some of all, whose labels are made wrong before the original models are
            trained), "memorised" (those that a model gets right only if it was trained on them),
            "indices".
        label: The class, for "class" and "samples".
        count: How many, for all kinds but "class" and "indices".
        indices: For "indices".
        seed: Of the choice.
        retrained: Models retrained without it; by default as many as the run has for each.
    """

    name: str
    kind: Literal["class", "samples", "random", "mislabelled", "memorised", "indices"]
    label: int | None = None
    count: int | None = None
    indices: list[int] = field(default_factory=list)
    seed: int = 0
    retrained: int | None = None

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name).strip("-")


@dataclass(frozen=True)
class RunConfig:
    """Train, forget, retrain, compare.

    Attributes:
        name: Of the run; results go to <out>/<name>/.
        data: Data set.
        model: Architecture.
        training: Of the original and the retrained models.
        likelihood: "categorical", "bernoulli" or "gaussian".
        forget_sets: What to forget, one after the other.
        forget: Options of the method; likelihood and seed are the run's, and so is its weight decay
            unless another is given.
        seeds: One original model, scrubbed once, for each.
        retrained: Number of models retrained without each forget set.
        jobs: Worker processes for training.
        reference_variant: Also score the public code of Golatkar et al. 2020, at the best of twelve
            scales.
        out: Parent folder of the results.
        progress: Show progress bars.
    """

    name: str
    forget_sets: list[ForgetSet]
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    forget: ForgetOptions = ForgetOptions()
    seeds: list[int] = field(default_factory=lambda: [0])
    retrained: int = 5
    jobs: int = 1
    reference_variant: bool = False
    out: str = "runs"
    progress: bool = True

    def __post_init__(self) -> None:
        fewest = min(
            [self.retrained, *(s.retrained for s in self.forget_sets if s.retrained is not None)]
        )
        if fewest < 2:
            raise ConfigError(
                f"retrained: {fewest}", "at least 2: the floor needs a pair", "Raise it."
            )
        if not self.seeds or not self.forget_sets:
            raise ConfigError(
                "no seeds or no forget_sets",
                "at least one of each",
                "Add one to the configuration.",
            )
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds: {self.seeds}", "different numbers of at least 0", "Correct the seeds."
            )
        names = [s.name for s in self.forget_sets]
        if len({s.slug for s in self.forget_sets}) < len(names):
            raise ConfigError(
                f"forget_sets named {names}", "a different name for each", "Rename one."
            )
        if self.reference_variant and self.likelihood != "categorical":
            raise ConfigError(
                f"reference_variant with the likelihood {self.likelihood!r}",
                "'categorical': the public code sums over the classes of a softmax",
                "Leave reference_variant out.",
            )
        if self.forget.likelihood != "categorical" or self.forget.seed != 0:
            raise ConfigError(
                "likelihood or seed in the section forget",
                "the run's own `likelihood` and `seeds`",
                "Move them to the top of the configuration.",
            )
        self.forget_options(self.seeds[0])  # refuses what does not go with the likelihood
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"the name {self.name!r}", "a folder name", "Use letters, digits and hyphens."
            )

    def forget_options(self, seed: int) -> ForgetOptions:
        """The options of `forget` for the model of one seed."""
        decay = self.forget.weight_decay
        if decay is None:
            decay = self.training.weight_decay
        changes = {"likelihood": self.likelihood, "seed": seed, "weight_decay": decay}
        return self.forget.changed(changes)


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """A run with a sweep from the first original model, for every forget set.

    Attributes:
        grid: Option of `forget` (or of a method) -> values, as for `fisher_forget.sweep`, which are
            crossed; "method" takes names of methods. Its "noise" and "seed" stand before `scales`
            and `draws`.
        scales: Noise scales s.
        draws: Noise draws for each scale.
        ruin: Nats by which noise may raise the retained loss before larger scales are skipped; null
            runs them all.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    scales: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    draws: int = 3
    ruin: float | None = RUIN

    def __post_init__(self) -> None:
        super().__post_init__()
        expand(self.axes, {})  # refuses what is out of range

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The whole grid."""
        axes: dict[str, list[Any]] = {"seed": list(range(self.draws))}
        if OURS in self.grid.get("method", [OURS]):  # no other method has noise
            axes["noise"] = list(self.scales)
        return axes | self.grid


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """Methods x seeds x forget sets.

    Attributes:
        methods: Names in `fisher_forget.baselines.METHODS`, or "package.module:Class" of your own;
            all by default.
        options: Name of a method -> its fields that have one value in all trials, such as {ntk:
            {memory: 268435456}}.
        trials: Settings that each method may try, its defaults first, the others drawn from its
            grid.
        tuning: Sample gradients that the settings of a method may cost together, in trainings: once
            they have cost more, no other is tried.
        validation: Share of the test data that the settings are chosen on, and that no score is
            computed on.
    """

    methods: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: int = 6
    tuning: float = 5.0
    validation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, good, expected in (
            ("trials", self.trials >= 1, "at least 1"),
            ("tuning", self.tuning > 0, "a positive number"),
            ("validation", 0 < self.validation < 1, "a share between 0 and 1"),
            ("likelihood", self.likelihood == "categorical", "'categorical'"),
        ):
            if not good:
                raise ConfigError(
                    f"{name}: {getattr(self, name)}", expected, "Correct the configuration."
                )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """Read a YAML file and apply `--key value` flags.

    `data` and `model` may be a plain name, which stands for {name: ...}.

    Args:
        path: The file.
        overrides: Such as ["--training.epochs", "5"].
        kind: `RunConfig`, `SweepConfig` or `CompareConfig`.

    Raises:
        ConfigError: An unknown key (with its place and the nearest right name), a wrong type, an
            unreadable file.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: {error}", "a readable YAML file", "Correct the path."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: {error}", "valid YAML", "Correct the file at that place."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holding {type(content).__name__}",
            "keys and values",
            "See configs/digits.yaml.",
        )
    for key in NAMED:
        if isinstance(content.get(key), str):
            content[key] = {"name": content[key]}
    _known(content, kind, str(path))
    content = {
        key: value for key, value in content.items() if value is not None
    }  # an empty section: its defaults
    overrides = _spelled_out(overrides)
    flags = [f"--{KEY}.{flag[2:]}" if flag.startswith("--") else flag for flag in overrides]
    for flag in overrides:
        if flag.startswith("--"):
            _known(_nested(flag[2:].split("=")[0]), kind, "the command line")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{KEY}", type=kind)
    try:
        # the file first, then the flags over it
        parsed = parser.parse_args([f"--{KEY}={json.dumps(content, default=str)}", *flags])
        return typing.cast(RunConfig, parser.instantiate(parsed)[KEY])
    except ConfigError:
        raise
    except (
        ArgumentError,
        TypeError,
        ValueError,
    ) as error:  # the parser unpacks a section before it looks at its type
        message = " ".join(str(error).replace(f"{KEY}.", "").split())
        raise ConfigError(
            f"{path}: {message}", "values of the documented types", "Correct that key."
        ) from error


def _spelled_out(overrides: Sequence[str]) -> list[str]:
    """The flags with --data.name and --model.name, where a plain name follows --data and
    --model."""
    found: list[str] = []
    for flag in overrides:
        key, equals, value = flag.partition("=")
        if key in {f"--{name}" for name in NAMED} and equals and not value.startswith("{"):
            flag = f"{key}.name={value}"
        elif found and found[-1] in {f"--{name}" for name in NAMED} and not flag.startswith("{"):
            found[-1] += ".name"
        found.append(flag)
    return found


def _nested(key: str) -> dict[str, Any]:
    """`a.b` as {"a": {"b": None}}."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest) if rest else None}


def _known(content: Mapping[str, Any], kind: Any, place: str) -> None:
    """Refuse unknown keys before any type is looked at, with the nearest right name."""
    hints = typing.get_type_hints(kind)
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            fix = (
                f"Did you mean {near[0]!r}?"
                if near
                else "Remove it, or see the documentation of the schema."
            )
            raise ConfigError(f"the unknown key {key!r} in {place}", f"one of {sorted(hints)}", fix)
        inner = hints[key]
        if dataclasses.is_dataclass(inner) and not isinstance(value, Mapping | None):
            raise ConfigError(
                f"{place} with {key}: {value!r}", "keys and values below it", f"Correct {key!r}."
            )
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            _known(value, inner, f"{place} at {key!r}")
        for choice in typing.get_args(inner):
            if dataclasses.is_dataclass(choice) and isinstance(
                value, Mapping
            ):  # one of several types
                _known(value, choice, f"{place} at {key!r}")
        item = typing.get_args(inner)[0] if typing.get_origin(inner) is list else None
        if dataclasses.is_dataclass(item) and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    _known(entry, item, f"{place} at {key}[{index}]")


def option_names(kind: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Every key that a flag may set, with dots, and the words that it may be.

    Example:
        >>> option_names(RunConfig)["training.optimizer"]
        ('sgd', 'adam')
    """
    found: dict[str, tuple[str, ...]] = {}
    for key, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= option_names(hint, f"{prefix}{key}.")
            continue
        literals = [
            option
            for option in (hint, *typing.get_args(hint))
            if typing.get_origin(option) is Literal
        ]
        words = tuple(str(word) for option in literals for word in typing.get_args(option))
        found[prefix + key] = ("true", "false") if hint is bool else words
    return found


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, as written beside the results."""
    return dataclasses.asdict(config)
