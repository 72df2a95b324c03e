"""One typed schema for YAML files and command-line flags: one YAML, one run."""

from __future__ import annotations

import dataclasses
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fisher_forget._util import files
from fisher_forget.errors import ConfigError
from fisher_forget.evaluate.evaluation import HELD_OUT, REFERENCE
from fisher_forget.experiments.datasets import DataBundle, load_dataset
from fisher_forget.experiments.faults import Fault
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.sweep.cells import OURS, expand
from fisher_forget.sweep.run import RUIN
from fisher_forget.unlearn.options import ForgetOptions

LONGEST = 100  # bytes of a folder's name


@dataclass(frozen=True)
class DataSettings:
    """Which data set.

    Attributes:
        name: "digits", "mnist", "cifar10", "breast_cancer" or "diabetes"; the name of a plug-in; or
            the import path of a function of your own that returns (train, test),
            "package.module:function", where code is allowed.
        root: Folder that holds it; by default the environment variable FISHER_FORGET_DATA names it,
            else it is the user's data folder (`fisher-forget data` shows it).
        max_train: Most training samples, class by class in proportion; all by default.
        max_test: Most test samples.
        options: Of a function of your own.
        fault: Put into the training data on purpose, such as {kind: trigger, share: 0.01}; reports
            then have the test samples that it concerns as a part of their own.
    """

    name: str = "digits"
    root: str | None = None
    max_train: int | None = None
    max_test: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None

    def load(self) -> DataBundle:
        """The data set in memory.

        Raises:
            ConfigError, DataError: As `load_dataset` and `Fault.put`.
        """
        data = load_dataset(
            self.name,
            self.root,
            max_train=self.max_train,
            max_test=self.max_test,
            options=self.options,
        )
        return data if self.fault is None else data.with_fault(self.fault)


@dataclass(frozen=True)
class ModelSettings:
    """Which model.

    Attributes:
        name: "linear", "mlp", "cnn", "all_cnn" or "resnet18"; the name of a plug-in; or the import
            path of a function or class of your own that makes a module, "package.module:function",
            where code is allowed.
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
            "indices", "fault" (the part of the data's fault that is known).
        label: The class, for "class" and "samples".
        count: How many, for "samples", "random", "mislabelled" and "memorised".
        indices: For "indices".
        gamma: Share of the faulty samples that are known, for "fault".
        seed: Of the choice.
        retrained: Models retrained without it; by default as many as the run has for each.
        who: Opaque reference of who asked for it, such as the number of a ticket: the run then
            records the request, and what became of it, in a ledger in its folder. Of the kinds
            "class" and "indices".
    """

    name: str
    kind: Literal["class", "samples", "random", "mislabelled", "memorised", "indices", "fault"]
    label: int | None = None
    count: int | None = None
    indices: list[int] = field(default_factory=list)
    gamma: float | None = None
    seed: int = 0
    retrained: int | None = None
    who: str = ""

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return folder_name(self.name)


@dataclass(frozen=True)
class RunConfig:
    """Train, forget, retrain, compare.

    Attributes:
        name: Of the run; results go to `folder`.
        data: Data set.
        model: Architecture.
        training: Of the original and the retrained models.
        likelihood: "categorical", "next_token", "bernoulli", "bce", "gaussian" or "mse".
        forget_sets: What to forget, one after the other.
        forget: Options of the method; likelihood and seed are the run's, and so are its weight
            decay and training unless others are given.
        seeds: One original model, scrubbed once, for each.
        noise_seed: Of the noise of all scrubbed models, for an experiment that is to be repeated
            number by number: such noise is not secret. By default the operating system gives it.
        retrained: Number of models retrained without each forget set; `evaluate` and `compare` need
            four.
        jobs: Worker processes for training.
        out: Parent folder of the results; in a file, below the current folder or the file's.
        progress: Show progress bars.
    """

    name: str
    forget_sets: list[ForgetSet]
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    likelihood: Literal["categorical", "next_token", "bernoulli", "bce", "gaussian", "mse"] = (
        "categorical"
    )
    forget: ForgetOptions = field(default_factory=ForgetOptions)
    seeds: list[int] = field(default_factory=lambda: [0])
    noise_seed: int | None = None
    retrained: int = 5
    jobs: int = 1
    out: str = "runs"
    progress: bool = True

    def __post_init__(self) -> None:
        counts = [s.retrained for s in self.forget_sets if s.retrained is not None]
        fewest = min([self.retrained, *counts])
        names = [s.name for s in self.forget_sets]
        slugs = {s.slug.casefold() for s in self.forget_sets}  # some file systems know no case
        seeds_differ = min(self.seeds, default=0) >= 0 and len(set(self.seeds)) == len(self.seeds)
        misplaced = self.forget.likelihood != "categorical" or self.forget.seed != 0
        asked = [s.name for s in self.forget_sets if s.who and s.kind not in ("class", "indices")]
        different = "a different name for each, in its letters and digits: they name folders"
        no_path = "no folder name before it: `out` is the parent"
        own = "the run's own likelihood and seeds, at the top of the configuration"
        _check(
            (f"retrained: {fewest}", fewest >= 2, "at least 2: the floor needs a pair"),
            ("no seeds or no forget_sets", self.seeds and names, "at least one of each"),
            (f"seeds: {self.seeds}", seeds_differ, "different numbers of at least 0"),
            (f"noise_seed: {self.noise_seed}", (self.noise_seed or 0) >= 0, "at least 0, or null"),
            (f"forget_sets named {names}", len(slugs) == len(names), different),
            (f"who asked for {asked}", not asked, "it for the kinds class and indices only"),
            ("likelihood or seed in the section forget", not misplaced, own),
            (f"the name {self.name!r}", "/" not in self.name, no_path),
            ("an empty name", "" not in (self.name, *names), "a title"),
        )
        self.forget_options(self.seeds[0])  # refuses what does not go with the likelihood

    def check_evaluable(self) -> None:
        """Refuse too few retrained models for an evaluation.

        Raises:
            ConfigError: With the forget set that has them, and how many it takes.
        """
        least = REFERENCE + HELD_OUT
        why = f"{REFERENCE} whose spread is the yardstick, and {HELD_OUT} scored as a control"
        for settings in self.forget_sets:
            count = settings.retrained or self.retrained
            if count < least:
                got = f"retrained: {count} for the forget set {settings.name!r}"
                fix = f"Set retrained: {least}, or more."
                raise ConfigError(got, f"at least {least} for an evaluation: {why}", fix)

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.out) / folder_name(self.name, keep=" _.", distinct=True)

    @property
    def named(self) -> list[tuple[str, str]]:
        """(role, name) of all that may stand for code; the roles are `import_path.GROUPS`."""
        return [("the data", self.data.name), ("the model", self.model.name)]

    def forget_options(self, seed: int) -> ForgetOptions:
        """The options of `forget` for the model of one seed; what the training was is read off the
        model, as in a call."""
        return self.forget.changed({"likelihood": self.likelihood, "seed": seed})


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
        expand(self.axes)  # refuses what is out of range

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
        methods: Names in `fisher_forget.baselines.METHODS` or of plug-ins, or
            "package.module:Class" of your own where code is allowed; all by default.
        options: Name of a method -> its fields that have one value in all trials, such as {ntk:
            {memory: 268435456}}.
        trials: Settings that each method with something to choose tries, its defaults first, the
            others from its grid.
        validation: Share of the test data that the settings are chosen on, and that no score is
            computed on.
    """

    methods: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    trials: int = 8
    validation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        likelihood, from_seeds = self.likelihood, "null: compared methods draw from their seeds"
        _check(
            (f"noise_seed: {self.noise_seed}", self.noise_seed is None, from_seeds),
            (f"trials: {self.trials}", self.trials >= 1, "at least 1"),
            (f"validation: {self.validation}", 0 < self.validation < 1, "between 0 and 1"),
            (f"likelihood: {likelihood}", likelihood == "categorical", "'categorical'"),
        )
        self.check_evaluable()

    @property
    def named(self) -> list[tuple[str, str]]:
        """(role, name) of all that may stand for code, methods among them."""
        return [*super().named, *(("a method", name) for name in self.methods)]


def folder_name(title: str, keep: str = "", distinct: bool = False) -> str:
    """A title as the name of a folder that lies in its parent: its letters and digits of any
    script, and hyphens.

    A hash of the title takes the place of what it has beyond that, where nothing or too much is
    left.

    Args:
        title: Any text.
        keep: Further characters that stay, other than at the ends.
        distinct: Add the hash wherever the name is not the title, so that no two share one.

    Example:
        >>> folder_name("class 3: \u00fcbrig"), folder_name("a/../b_1.2", keep="_.")
        ('class-3--übrig', 'a-..-b_1.2')
    """
    title = unicodedata.normalize("NFC", title)
    name = "".join(c if c.isalnum() or c in keep else "-" for c in title).strip("-. ")
    short = name.encode()[:LONGEST].decode(errors="ignore")
    if name and short in ([title] if distinct else [name]):
        return short
    return f"{short}-{files.fingerprint(title)[:8]}".lstrip("-")


def _check(*checks: tuple[str, object, str]) -> None:
    """Refuse the first (got, whether it is good, expected) that is not good."""
    for got, good, expected in checks:
        if not good:
            raise ConfigError(got, expected, "Correct the configuration.")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, as written beside the results."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    """Without tuples, which YAML writes as Python's own."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
