"""Methods x seeds x forget sets: a small comparison whole, resumed, and its table by hand."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fisher_forget import ConfigError
from fisher_forget.baselines import METHODS, Unlearned
from fisher_forget.baselines.base import Method
from fisher_forget.cli import main
from fisher_forget.data.split import Split
from fisher_forget.errors import NumericalError
from fisher_forget.evaluate.evaluation import Evaluation
from fisher_forget.evaluate.scoring import EvaluationRow
from fisher_forget.evaluate.verdict import NOT_FORGOTTEN, UNDECIDED
from fisher_forget.experiments.cases import prepare_case, untrained
from fisher_forget.experiments.compare import _code, compare
from fisher_forget.experiments.config import CompareConfig
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.method_setup import chosen_methods, configured
from fisher_forget.report.pages.comparison import (
    answer,
    frame,
    overview,
    overview_markdown,
    plotted,
    to_markdown,
)
from fisher_forget.report.ranking import CONTROL, read_rows, rows

CALLS: list[str] = []


@dataclass(frozen=True)
class Shrink:
    """Weights times a factor; 0 is refused."""

    name: ClassVar[str] = "shrink"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"by": (1.0, 0.5, 0.0)}
    by: float = 1.0
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        CALLS.append(f"{self.by:g} {self.seed}")
        if self.by == 0:
            raise NumericalError("nothing left", "something", "Raise by.")
        twin = type(model)(*model)
        twin.load_state_dict({key: self.by * value for key, value in model.state_dict().items()})
        return Unlearned(twin.eval(), 0.5, 0.25)


@dataclass(frozen=True)
class Refuse:
    """Never works."""

    name: ClassVar[str] = "refuse"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {}
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        raise ConfigError("this", "that", "Do otherwise.")


@dataclass(frozen=True)
class Learns(Method):
    """Needs a model of its own, which it trains once."""

    name = "learns"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"by": (1.0, 0.9, 0.8)}
    by: float = 1.0
    ready: bool = False

    def prepare(self, model: nn.Module, split: Split) -> tuple[Self, nn.Module]:
        CALLS.append(f"prepare {self.seed} {self.ready}")
        twin = copy.deepcopy(model)
        nn.init.zeros_(twin[-1].weight)
        return (self, model) if self.ready else (replace(self, ready=True), twin)

    def scrub(self, model: nn.Module, split: Split) -> tuple[nn.Module, float]:
        assert self.ready
        assert not bool(model[-1].weight.any())
        CALLS.append(f"scrub {self.by} {self.seed}")
        return copy.deepcopy(model), 1.0


def config(folder: Path, **changes: Any) -> str:
    content = {
        "name": "small",
        "data": {"name": "digits", "max_train": 150, "max_test": 120},
        "model": {"name": "mlp", "options": {"hidden": [12]}},
        "training": {"epochs": 15, "lr": 0.1, "weight_decay": 0.001},
        "forget_sets": [
            {"name": "class 3", "kind": "class", "label": 3},
            {"name": "ten wrong", "kind": "mislabelled", "count": 10},
        ],
        "seeds": [0, 1],
        "retrained": 4,
        "methods": [f"{__name__}:Shrink", f"{__name__}:Refuse", "finetune", "sisa", "retrain"],
        "trials": 3,
        "out": str(folder),
        "progress": False,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def allowed() -> Iterator[None]:
    """Methods of this file are named by their import paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISHER_FORGET_ALLOW_CODE", "1")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("compare")
    CALLS.clear()
    assert main(["compare", config(folder)]) == 0
    return folder, list(CALLS)


class TestWhole:
    def test_every_method_and_forget_set_is_in_the_table_and_on_the_page(
        self, finished: Any
    ) -> None:
        folder, _ = finished
        report = json.loads((folder / "small" / "comparison.json").read_text())
        page = (folder / "small" / "comparison.html").read_text()
        for name, case in report["cases"].items():
            found = {row["method"] for row in case["rows"]}
            assert found == {"original", CONTROL, "shrink", "finetune", "sisa", "retrain"}
            assert name in page
            assert "Do otherwise" in page
            assert all(math.isfinite(row["kl"]) for row in case["rows"])
        for slug in ("class-3", "ten-wrong"):
            assert "| finetune" in (folder / "small" / slug / "comparison.md").read_text()

    def test_rows_are_read_back(self, finished: Any) -> None:
        folder, _ = finished
        stored = read_rows(folder / "small")
        assert list(stored) == ["class 3", "ten wrong"]
        for row in stored[
            "class 3"
        ]:  # two originals: wide intervals, and none below 0 or above 100
            ends = [row[f"accuracy_{end}"] for end in ("low", "high")]
            assert all(math.isnan(x) or 0 <= x <= 100 for x in ends)
            assert not row["kl_low"] <= 0
        control = next(row for row in stored["class 3"] if row["method"] == CONTROL)
        assert math.isnan(control["kl_low"])  # a single model has no interval
        assert (
            to_markdown(stored["class 3"])
            in (folder / "small" / "class-3" / "comparison.md").read_text()
        )

    def test_the_setting_is_chosen_on_the_first_original_and_used_on_all(
        self, finished: Any
    ) -> None:
        folder, calls = finished
        report = json.loads((folder / "small" / "comparison.json").read_text())
        assert len(calls) == 2 * (
            3 + 1
        )  # three trials on seed 0 and the chosen one on seed 1, for two forget sets
        for case in report["cases"].values():
            outcome = next(o for o in case["outcomes"] if o["method"] == "shrink")
            judged = [t for t in outcome["trials"] if not t["error"]]
            sane = [t for t in judged if t["damage"] <= 2]
            best = min(sane or judged, key=lambda t: t["memory" if sane else "damage"])
            assert outcome["settings"] == best["settings"]
            assert [t["error"] != "" for t in outcome["trials"]].count(True) == 1
            assert f"{outcome['settings'].get('by', 1.0):g} 1" in calls
            assert len(outcome["seconds"]) == 2

    def test_mislabelled_samples_are_wrong_in_the_originals_training(self, finished: Any) -> None:
        folder, _ = finished
        assert (folder / "small" / "original" / "seed-0.safetensors").exists()
        assert (folder / "small" / "ten-wrong" / "original" / "seed-0.safetensors").exists()

    def test_started_again_nothing_is_done_twice(self, finished: Any) -> None:
        folder, _ = finished
        before = json.loads((folder / "small" / "comparison.json").read_text())
        CALLS.clear()
        (folder / "small" / "ten-wrong" / "methods" / "shrink" / "seed-1.safetensors").unlink()
        assert main(["compare", config(folder)]) == 0
        assert len(CALLS) == 4  # the one whose model is missing
        after = json.loads((folder / "small" / "comparison.json").read_text())
        for name, case in before["cases"].items():
            assert after["cases"][name]["evaluation"] == case["evaluation"]
            if name == "class 3":
                assert after["cases"][name] == case

    def test_other_settings_of_the_comparison_are_not_taken_for_the_same(
        self, finished: Any
    ) -> None:
        folder, _ = finished
        CALLS.clear()
        assert (
            main(
                ["compare", config(folder), "--trials", "1", "--methods", f"['{__name__}:Shrink']"]
            )
            == 0
        )
        assert CALLS == ["1 0", "1 1", "1 0", "1 1"]


def test_options_hold_in_every_trial_and_change_their_method_alone(finished: Any) -> None:
    folder, _ = finished
    CALLS.clear()
    path = config(folder, options={"shrink": {"by": 0.25}, "ntk": {"memory": 1 << 20}})
    assert load_config(path, [], CompareConfig).options["shrink"] == {"by": 0.25}
    stamps = {
        p: p.stat().st_mtime_ns for p in (folder / "small").glob("*/methods/finetune/outcome.json")
    }
    assert main(["compare", path]) == 0
    assert CALLS == ["0.25 0", "0.25 1"] * 2  # a field that is fixed is not tried
    assert len(stamps) == 2
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ntkk": {"memory": 1}}, "ntkk"),
        ({"ntk": {"memry": 1}}, "memry"),
        ({"ntk": {"weight_decay": "much"}}, "'ntk'"),
        ({"ntk": {"weight_decay": -1.0}}, "weight_decay"),
    ],
)
def test_options_that_a_method_does_not_take_are_refused_before_training(
    tmp_path: Path, capsys: Any, options: Any, says: str
) -> None:
    assert main(["compare", config(tmp_path, options=options)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "small" / "original").exists()


def test_what_a_method_prepares_is_made_once_for_all_settings(tmp_path: Path) -> None:
    CALLS.clear()
    only = [{"name": "class 3", "kind": "class", "label": 3}]
    path = config(
        tmp_path, methods=[f"{__name__}:Learns", "deltagrad", "finetune"], forget_sets=only
    )
    compare(load_config(path, [], CompareConfig))
    made = [call for call in CALLS if call.endswith("False")]
    assert made == ["prepare 0 False", "prepare 1 False"]
    scrubbed = [call for call in CALLS if call.startswith("scrub")]
    assert len(scrubbed) == 4  # three settings on seed 0, and the chosen one on seed 1
    assert len({call.split()[1] for call in scrubbed[:3]}) == 3
    rows = read_rows(tmp_path / "small")["class 3"]
    assert {"learns", "deltagrad"} <= {row["method"] for row in rows}


def test_with_a_class_gone_no_ruined_setting_is_chosen_where_one_is_sane(tmp_path: Path) -> None:
    """Each of these methods ruins the model with some of its settings, and then recognises nothing
    of the class."""
    only = [{"name": "class 3", "kind": "class", "label": 3}]
    data = {"name": "digits", "max_train": 600}
    path = config(
        tmp_path,
        methods=["golatkar-paper", "neggrad+", "unsir"],
        forget_sets=only,
        data=data,
        seeds=[0],
        trials=8,
    )
    folder = compare(load_config(path, [], CompareConfig)).parent
    case = json.loads((folder / "comparison.json").read_text())["cases"]["class 3"]
    for outcome in case["outcomes"]:
        trials = [t for t in outcome["trials"] if not t["error"]]
        chosen = next(t for t in trials if t["settings"] == outcome["settings"])
        assert min(t["damage"] for t in trials) <= 2
        assert chosen["damage"] <= 2
        assert chosen["memory"] == min(t["memory"] for t in trials if t["damage"] <= 2)
        # what memory alone would have chosen
        assert any(t["damage"] > 20 and t["memory"] <= chosen["memory"] for t in trials)
    accuracy = {row["method"]: row["accuracy"] for row in case["rows"]}
    assert min(accuracy[o["method"]] for o in case["outcomes"]) > accuracy["original"] - 8


def test_a_search_of_ranges_is_the_same_in_another_folder(tmp_path: Path) -> None:
    only = [{"name": "class 3", "kind": "class", "label": 3}]
    found = []
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        path = config(place, methods=["ssd"], forget_sets=only, trials=6)
        report = compare(load_config(path, [], CompareConfig)).with_name("comparison.json")
        case = json.loads(report.read_text())["cases"]["class 3"]
        found.append([(o["settings"], o["trials"]) for o in case["outcomes"]])
        assert [len(trials) for _, trials in found[-1]] == [6]
    assert found[0] == found[1]


@dataclass(frozen=True)
class Fragile:
    """NaN weights, errors of torch and of Python for some settings."""

    name: ClassVar[str] = "fragile"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"how": ("well", "nan", "torch", "value")}
    how: str = "well"
    seed: int = 0

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        twin = copy.deepcopy(model)
        if self.how == "value":
            raise ValueError("cannot")
        if self.how == "torch":
            torch.linalg.cholesky(-torch.eye(2))
        if self.how == "nan":
            nn.init.constant_(twin[-1].weight, math.nan)
        return Unlearned(twin.eval(), 0.1, 0.0)


@dataclass(frozen=True)
class Picky(Shrink):
    """Works on every original with its defaults alone."""

    name: ClassVar[str] = "picky"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"by": (1.0, 0.99, 0.98)}

    def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
        if self.by < 1 and self.seed == 1:
            raise NumericalError("not this one", "another", "Pass another.")
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[-1].bias[3] -= 1e3 * (1 - self.by)  # no memory, and so the better choice
        return Unlearned(twin.eval(), 0.1, 0.0)


def test_trials_that_fail_count_and_the_comparison_goes_on(tmp_path: Path) -> None:
    only = [{"name": "class 3", "kind": "class", "label": 3}]
    path = config(tmp_path, methods=[f"{__name__}:Fragile"], forget_sets=only, trials=4)
    folder = compare(load_config(path, [], CompareConfig)).parent
    case = json.loads((folder / "comparison.json").read_text())["cases"]["class 3"]
    (outcome,) = case["outcomes"]
    errors = {t["settings"].get("how", "well"): t["error"] for t in outcome["trials"]}
    assert {how: bool(error) for how, error in errors.items()} == {
        "well": False, "nan": True, "torch": True, "value": True,
    }  # fmt: skip
    assert outcome["settings"] == {}
    assert "cannot" in (folder / "comparison.html").read_text()


def test_settings_that_fail_on_another_original_give_way_to_the_next_best(tmp_path: Path) -> None:
    only = [{"name": "class 3", "kind": "class", "label": 3}]
    path = config(tmp_path, methods=[f"{__name__}:Picky"], forget_sets=only, trials=4)
    folder = compare(load_config(path, [], CompareConfig)).parent
    case = json.loads((folder / "comparison.json").read_text())["cases"]["class 3"]
    (outcome,) = case["outcomes"]
    errors = {t["settings"].get("by", 1.0): t["error"] for t in outcome["trials"]}
    worked = {by for by, error in errors.items() if not error}
    assert worked == {1.0}
    for by in (0.99, 0.98):
        assert re.match("original 1: .*not this one", errors[by])
    assert outcome["settings"] == {}
    assert len(outcome["seconds"]) == 2


def test_without_optuna_ranges_are_refused_before_training(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
    )
    path = config(tmp_path, methods=["ssd"])
    assert main(["compare", path]) == 2
    assert "pip install 'fisher-forget[compare]'" in capsys.readouterr().err
    assert not (tmp_path / "small" / "original").exists()
    fixed = config(tmp_path, methods=["ssd"], options={"ssd": {"alpha": 5.0, "lam": 1.0}})
    chosen_methods(load_config(fixed, [], CompareConfig))  # nothing is left to search
    chosen_methods(load_config(path, ["--trials", "1"], CompareConfig))


def test_unknown_methods_are_refused_before_training(tmp_path: Path, capsys: Any) -> None:
    assert main(["compare", config(tmp_path, methods=["finetunne"])]) == 2
    assert "finetune" in capsys.readouterr().err
    assert not (tmp_path / "small" / "original").exists()


ONE_SET = {"name": "class 3", "kind": "class", "label": 3}


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retrained": 2}, ("retrained: 2 for the forget set 'class 3'", "at least 4")),
        ({"retrained": 3}, ("retrained: 3 for", "3 whose spread is the yardstick, and 1 scored")),
        ({"forget_sets": [ONE_SET | {"retrained": 3}]}, ("retrained: 3 for", "'class 3'")),
        ({"validation": 0.001}, ("validation: 0.001, which is 0 of 120 test samples",)),
        ({"validation": 0.999}, ("which is 120 of 120",)),
        ({"methods": ["finetunne"]}, ("finetune",)),
        ({"options": {"finetune": {"speed": 3}}}, ("speed",)),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_training(
    tmp_path: Path, capsys: Any, changes: dict[str, Any], words: tuple[str, ...], flags: list[str]
) -> None:
    assert main(["compare", config(tmp_path, **changes), *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert not list(tmp_path.glob("small/*/*"))


def test_as_few_as_are_allowed_are_enough(tmp_path: Path) -> None:
    from fisher_forget.evaluate.evaluation import HELD_OUT, REFERENCE

    changes = {"retrained": REFERENCE + HELD_OUT, "methods": ["finetune"], "trials": 1}
    few = {"seeds": [0], "training": {"epochs": 1}, "forget_sets": [ONE_SET]}
    assert main(["compare", config(tmp_path, **changes, **few)]) == 0


def test_methods_get_what_the_experiment_knows(tmp_path: Path) -> None:
    from fisher_forget.experiments.datasets import load_dataset

    settings = load_config(config(tmp_path), [], CompareConfig)
    data = load_dataset("digits", max_train=150)
    case = prepare_case(settings, data, settings.forget_sets[0], tmp_path)

    def build(name: str, **chosen: Any) -> Any:
        return configured(settings, case, METHODS[name], chosen, 1)

    assert build("finetune", lr=0.3) == METHODS["finetune"](lr=0.3, weight_decay=0.001, seed=1)
    assert build("ntk").weight_decay == METHODS["ntk"]().weight_decay  # chosen from its grid
    initial, again = build("ntk").initial, untrained(settings, data, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(initial.parameters(), again.parameters(), strict=True)
    )
    torch.manual_seed(3)
    fresh = build("eu-k").init()
    others = [untrained(settings, data, s) for s in (0, 1, 3)] + list(case.retrained.models)
    assert not any(
        torch.equal(next(fresh.parameters()), next(other.parameters())) for other in others
    )
    retrained = build("retrain").unlearn(case.originals.models[1], _split(data, case.forget)).model
    assert not any(
        torch.equal(next(retrained.parameters()), next(o.parameters()))
        for o in [*case.originals.models, *others]
    )


def _split(data: Any, forget: Any) -> Split:
    from fisher_forget.data.split import resolve_split

    return resolve_split(data.train, forget)


@dataclass
class Made:
    """Scores of made-up methods on two metrics."""

    scores: list[EvaluationRow] = field(default_factory=list)

    def add(
        self, method: str, kl: list[float], accuracy: float, label: str = NOT_FORGOTTEN
    ) -> Made:
        for metric, part, values, target, std in (
            ("kl", "forget", kl, 0.5, 0.1),
            ("kl", "retain", [0.1], 0.1, 0.01),
            ("score", "test", [accuracy], 90.0, 0.2),
        ):
            mean, half = float(np.mean(values)), 0.1
            ends = (mean - half, mean + half, target, target - 1, target + 1)
            row = (
                method,
                metric,
                part,
                "nats",
                mean,
                len(values),
                *ends,
                label,
                "",
                tuple(values),
                std,
            )
            self.scores.append(EvaluationRow(*row))
        return self

    def table(self) -> Evaluation:
        return Evaluation(tuple(self.scores), 5, {})


def _made(kl: dict[str, list[float]]) -> Made:
    made = Made()
    for name, values in kl.items():
        made.add(name, values, 90)
    return made


class TestTable:
    def found(self) -> list[dict[str, Any]]:
        made = (
            Made()
            .add("original", [5.0, 5.1], 90)
            .add("near", [0.6, 0.62], 89.5)
            .add("like", [0.65, 0.66], 90)
            .add("noisy", [0.5, 9.0], 90)
            .add("far", [2.0, 2.01], 90.5)
            .add("ruined", [0.1, 0.1], 50)
            .add("retrain", [0.01, 0.01], 90)
            .add(CONTROL, [0.5], 90)
        )
        return rows(made.table(), {"near": [1.0, 3.0], "far": [0.1]}, retraining=4.0)

    def test_order_ties_and_costs(self) -> None:
        found = self.found()
        assert [r["method"] for r in found] == [
            "near",
            "like",
            "far",
            "noisy",
            "ruined",
            "retrain",
            CONTROL,
            "original",
        ]
        by = {r["method"]: r for r in found}
        # noisy may be equal, but twice as far might not have been told
        assert [r["method"] for r in found if r["tied"]] == ["near", "like"]
        assert [r["method"] for r in found if r["undecided"]] == ["noisy"]
        assert by["noisy"]["ratio_low"] < 1 < by["noisy"]["ratio_high"]
        assert not by["ruined"]["accurate"]
        assert by["near"]["cost"] == pytest.approx(0.5)
        assert by[CONTROL]["cost"] == 1.0

    def test_other_numbers_of_models_than_the_first_are_not_paired(self) -> None:
        made = Made().add("a", [1.0, 1.1], 90).add("c", [2.0, 2.1, 2.3], 90)
        other = rows(made.table(), {}, 1.0)[1]
        assert math.isnan(other["ratio_low"])
        assert math.isnan(other["smallest_ratio"])
        assert other["undecided"]

    def test_what_is_said_of_a_method_does_not_depend_on_who_else_takes_part(self) -> None:
        """Random sets of methods: each row alone with the first is the row in the full table."""
        rng = np.random.default_rng(0)
        keys = ("ratio", "ratio_low", "ratio_high", "smallest_ratio", "tied", "undecided")
        signs = set()
        for _ in range(20):
            spreads = rng.choice([0.02, 0.3, 2.0], 6)
            kl = {f"m{i}": list(np.exp(rng.normal(0, s, 4))) for i, s in enumerate(spreads)}
            first, *others = rows(_made(kl).table(), {}, 1.0)
            for row in others:
                names = (first["method"], row["method"])
                pair = rows(_made({name: kl[name] for name in names}).table(), {}, 1.0)[1]
                assert [pair[k] for k in keys] == [row[k] for k in keys]
                signs.add((row["tied"], row["undecided"]))
        assert signs == {(True, False), (False, True), (False, False)}

    def test_a_star_needs_that_twice_the_first_would_have_been_told(self) -> None:
        """The power of SciPy's noncentral t at a ratio of 2, by the row's own spread."""
        from scipy.stats import nct, t

        first, factors = np.ones(5), np.exp(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]))
        found = {}
        for spread in (0.4, 0.45, 0.5, 0.6, 0.9):
            other = 1.02 * factors**spread  # geometric mean above the first's
            row = rows(_made({"a": list(first), "b": list(other)}).table(), {}, 1.0)[1]
            std = float(np.std(np.log(other), ddof=1))
            limit, shift = t.ppf(0.975, 4), math.sqrt(5) * math.log(2) / std
            power = nct.sf(limit, 4, shift)  # the other end has 1e-6
            assert row["tied"] == (power >= 0.8)
            assert row["undecided"] == (power < 0.8)
            found[spread] = row["tied"]
        assert set(found.values()) == {True, False}

    def test_where_nothing_is_to_be_forgotten_the_answer_says_so_first(self) -> None:
        for label, starts in ((UNDECIDED, "Nothing to forget is visible"), (NOT_FORGOTTEN, "Clos")):
            made = Made().add("original", [0.5, 0.6], 90, label).add("a", [0.4, 0.5], 90)
            assert answer(rows(made.table(), {}, 1.0)).startswith(starts)

    def test_one_original_tells_no_ratio(self) -> None:
        found = rows(Made().add("a", [1.0], 90).add("b", [2.0], 90).table(), {}, 1.0)
        assert "nan" not in overview({"x": found}).to_string()

    def test_how_far_below_counts_as_equal_follows_the_retrained_models(self) -> None:
        # one more of five models of standard deviation 2 lies 6.1 below their mean at most, in 97.5
        # % of cases
        score = Made().add("a", [1.0], 84.0).add("b", [1.0], 83.8)
        wide = [
            EvaluationRow(**{**s.__dict__, "target_std": 2.0}) if s.metric == "score" else s
            for s in score.table().scores
        ]
        found = {r["method"]: r["accurate"] for r in rows(Evaluation(tuple(wide), 5, {}), {}, 1.0)}
        assert found == {"a": True, "b": False}

    def test_answer_and_tables(self) -> None:
        found = self.found()
        assert answer(found).startswith(
            "Closest to retrained at equal accuracy: near, 0.61 nats at 50 % of the time of a retr"
        )
        ends = sorted(r["smallest_ratio"] for r in found[1:4])
        assert (
            "as close: like; undecided: noisy; with 2 originals the smallest ratio told is "
            f"{ends[0]:.2g} to {ends[-1]:.2g}, by method."
        ) in answer(found)
        assert list(frame(found)["method"])[:3] == ["near *", "like *", "far"]
        assert to_markdown(found).count("\n| ") == 1 + len(found)  # the rule and the rows
        ours = Made().add("near", [0.6, 0.62], 90).add("fisher-forget", [3.0, 3.01], 90)
        assert "fisher-forget is behind: 3 nats" in answer(rows(ours.table(), {}, 1.0))
        single = Made().add("near", [0.6], 90).add("far", [3.0], 90)
        assert "one original tells no difference" in answer(rows(single.table(), {}, 1.0))
        alone = Made().add("near", [0.6, 0.7], 90).add("ruined", [0.3, 0.4], 20)
        assert "every other is less accurate" in answer(rows(alone.table(), {}, 1.0))
        none = Made().add("ruined", [0.6], 20)
        assert (
            answer(rows(none.table(), {}, 1.0))
            == "No method keeps the accuracy of retrained models."
        )

    def test_all_forget_sets_in_one_table(self) -> None:
        other = (
            Made()
            .add("far", [0.5, 0.5], 90)
            .add("near", [0.7, 0.7], 90)
            .add("original", [5.0, 5.0], 90)
        )
        table = overview(
            {"one": self.found(), "two": rows(other.table(), {"far": [0.4]}, 4.0)}
        ).set_index("method")
        assert list(table.index) == [
            "near", "far", "like", "noisy", "ruined", "original", "retrain", CONTROL,
            "retrained, among themselves",
        ]  # fmt: skip
        assert table.loc["near"].tolist() == ["0.61 * (89.5 %)", "0.7 (90.0 %)", "0.25"]
        assert table.loc["ruined"].tolist() == ["0.1 † (50.0 %)", "–", "0"]
        assert (
            "–"
            in overview({"one": self.found()}, ["absent"]).set_index("method").loc["absent", "one"]
        )
        report = {
            "cases": {
                "one": {"rows": self.found(), "outcomes": [{"method": "absent", "refused": "why"}]}
            }
        }
        markdown = re.sub(" +", " ", overview_markdown(report))
        assert "| near | 0.61 * (89.5 %) |" in markdown
        assert "| absent | – |" in markdown

    def test_ratios_are_paired(self) -> None:
        """scipy's paired t-test of ln KL, and its interval; a far original is far for both."""
        from scipy.stats import ttest_rel

        first = np.exp(np.random.default_rng(0).normal(0, 2, 10))
        other = first * np.exp(np.random.default_rng(1).normal(0.5, 0.2, 10))
        made = Made().add("a", list(first), 90).add("b", list(other), 90)
        found = rows(made.add(CONTROL, [0.5], 90).table(), {}, 1.0)
        test = ttest_rel(np.log(other), np.log(first))
        low, high = np.exp(test.confidence_interval(0.95))
        row = found[1]
        assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == pytest.approx(
            (math.exp(np.log(other / first).mean()), low, high)
        )
        assert row["kl"] == pytest.approx(math.exp(np.log(other).mean()))
        assert not row["tied"]
        assert math.isnan(found[2]["ratio_low"])  # a single control has no partner
        assert frame(found)["times the first"][0] == "1"
        assert frame(found)["times the first"][1] == f"{row['ratio']:.3g} ({low:.3g} to {high:.3g})"

    def test_first_is_who_is_least_as_the_ratios_count(self) -> None:
        made = Made().add("even", [1.0, 1.0], 90).add("uneven", [0.1, 2.5], 90)
        assert [(r["method"], r["ratio"] >= 1) for r in rows(made.table(), {}, 1.0)] == [
            ("uneven", True),
            ("even", True),
        ]

    def test_a_method_of_large_spread_does_not_make_others_look_tied(self) -> None:
        rng = np.random.default_rng(0)

        def kl(level: float, spread: float) -> list[float]:
            return list(level * np.exp(rng.normal(0, spread, 10)))

        made = Made().add("first", kl(0.1, 0.05), 90).add("wild", kl(1.0, 3.0), 90)
        for number in range(5):
            made.add(f"far {number}", kl(0.15, 0.05), 90)
        found = {r["method"]: r for r in rows(made.table(), {}, 1.0)}
        assert [name for name, r in found.items() if r["tied"]] == ["first"]
        assert all(found[f"far {n}"]["smallest_ratio"] < 1.2 for n in range(5))

    def test_a_kl_that_is_zero_or_infinite(self) -> None:
        made = Made().add("a", [0.0, 0.0], 90).add("b", [math.inf, 1.0], 90)
        found = rows(made.add("c", [math.inf, math.inf], 90).table(), {}, 1.0)
        assert [r["method"] for r in found if r["tied"]] == ["a"]
        assert not any(r["undecided"] for r in found)  # infinitely far is farther
        assert frame(found)["times the first"][1] == "inf"

    def test_what_is_plotted(self) -> None:
        table = plotted(self.found()).set_index("method")
        assert CONTROL not in table.index
        assert "ruined" not in table.index
        assert table.loc["retrained", ["kl", "accuracy", "cost"]].tolist() == [0.5, 90.0, 1.0]


def test_outcomes_know_the_code_of_their_method() -> None:
    def method(factor: float, held: Any = None) -> Any:
        class Own(METHODS["finetune"]):  # type: ignore[misc]
            name, kept = "own", held

            def scrub(self, model: nn.Module, split: Any) -> tuple[nn.Module, float]:
                return model, factor

        return Own

    assert _code(method(1.0)) == _code(method(1.0)) != _code(method(2.0))
    assert _code(METHODS["finetune"]) != _code(METHODS["ssd"])
    untold = method(1.0, torch.Generator())
    assert _code(untold) != _code(untold)  # never used again
