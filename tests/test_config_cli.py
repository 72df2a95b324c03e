"""One YAML, one run: files, flags over them, messages about mistakes, and exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fisher_forget import ForgetOptions, NoiseTarget, cli
from fisher_forget.baselines.fisher import FisherForget
from fisher_forget.errors import ConfigError
from fisher_forget.experiments.config import (
    CompareConfig,
    ForgetSet,
    RunConfig,
    SweepConfig,
    folder_name,
    to_plain,
)
from fisher_forget.experiments.config_file import as_yaml, load_config, option_names
from fisher_forget.experiments.data_sources import MNIST_FILES
from fisher_forget.experiments.training import TrainSettings
from fisher_forget.unlearn.options import ForgetKeywords

CONFIGS = Path(__file__).parent.parent / "configs"
LEAST = {"name": "least", "forget_sets": [{"name": "some", "kind": "random", "count": 2}]}


@pytest.fixture
def written(tmp_path):
    """written(content): the path of a YAML file."""

    def write(content=LEAST):
        path = tmp_path / "run.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


class TestLoad:
    @pytest.mark.parametrize(
        ("name", "kind"), [("digits", RunConfig), ("digits_sweep", SweepConfig)]
    )
    def test_holds_what_the_file_says(self, name, kind):
        config = load_config(CONFIGS / f"{name}.yaml", kind=kind)
        assert type(config) is kind
        assert isinstance(config.training, TrainSettings)
        assert isinstance(config.forget, ForgetOptions)
        assert all(isinstance(entry, ForgetSet) for entry in config.forget_sets)

        def within(said, held):
            if isinstance(said, dict):
                return all(within(value, held[key]) for key, value in said.items())
            if isinstance(said, list):
                return len(said) == len(held) and all(map(within, said, held))
            return said == held

        assert within(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), to_plain(config))

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_shipped_file(self, path):
        assert load_config(
            path, kind=CompareConfig if path.stem.startswith("compare_") else SweepConfig
        ).name

    def test_defaults(self, written):
        config = load_config(written())
        assert config == RunConfig("least", [ForgetSet("some", "random", count=2)])
        assert config.forget.noise == "auto"

    def test_frozen(self, written):
        config = load_config(written())
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.name = "other"

    @pytest.mark.parametrize("kind", [RunConfig, SweepConfig])
    def test_there_and_back(self, written, kind):
        """What is written beside the results is the same run again."""
        first = load_config(
            written(),
            ["--forget.noise", "null", "--seeds", "[4, 2]", "--model.options.width", "8"],
            kind,
        )
        assert load_config(written(to_plain(first)), kind=kind) == first
        assert json.loads(json.dumps(to_plain(first))) == to_plain(first)

    def test_numbers_without_a_dot(self, written):
        """YAML 1.1 reads 1e-3 as text."""
        config = load_config(
            written(yaml.safe_dump(LEAST) + "training: {lr: 1e-3}\nforget: {noise: 2e-3}\n")
        )
        assert (config.training.lr, config.forget.noise) == (1e-3, 2e-3)

    @pytest.mark.parametrize(
        ("noise", "value"),
        [
            (0.5, 0.5),
            ("auto", "auto"),
            (None, None),
            ({"loss": 0.01}, NoiseTarget(loss=0.01)),
            ({"information": 100, "error": "1e-3"}, NoiseTarget(information=100.0, error=1e-3)),
            ({"trade_off": 1.0, "loss": None}, NoiseTarget(trade_off=1.0)),
            ({}, NoiseTarget()),
        ],
        ids=str,
    )
    def test_noise_is_a_number_a_word_or_a_target(self, written, noise, value):
        config = load_config(written(LEAST | {"forget": {"noise": noise}}))
        assert config.forget.noise == value
        assert load_config(written(to_plain(config))) == config  # as written beside the results
        over = load_config(
            written(LEAST | {"forget": {"noise": {"loss": 0.2}}}), ["--forget.noise.loss", "0.3"]
        )
        assert over.forget.noise == NoiseTarget(loss=0.3)

    def test_empty_section(self, written):
        assert (
            load_config(written(yaml.safe_dump(LEAST) + "training:\n")).training == TrainSettings()
        )

    @pytest.mark.parametrize("option", dataclasses.fields(ForgetOptions), ids=lambda f: f.name)
    def test_every_option_of_forget_is_a_key(self, written, option):
        config = load_config(written())
        default = getattr(config.forget, option.name)
        assert default == option.default
        assert f"forget.{option.name}" in option_names(RunConfig)
        section = {option.name: to_plain(config)["forget"][option.name]}
        assert load_config(written(LEAST | {"forget": section})) == config

    def test_every_option_of_forget_reaches_it(self, written):
        """Each takes another value in the file, and those are the options of a model."""
        values = {
            "weight_decay": 0.25,
            "structure": "diagonal",
            "kind": "sampled",
            "draws": 3,
            "max_samples": 77,
            "subset": ["head.*"],
            "steps": 4,
            "damping": 0.5,
            "solver": "cg",
            "drift": False,
            "budget": 0.125,
            "noise": {"loss": 0.01},
            "exponent": 0.5,
        }
        options = load_config(written(LEAST | {"forget": values})).forget_options(seed=9)
        expected = values | {"noise": NoiseTarget(loss=0.01), "subset": ("head.*",), "seed": 9}
        assert {name: getattr(options, name) for name in expected} == expected

    def test_one_list_of_options(self):
        """The method of comparisons and the keywords of calls are the options themselves."""
        names = {option.name for option in dataclasses.fields(ForgetOptions)}
        assert {option.name for option in dataclasses.fields(FisherForget)} == names
        assert set(ForgetKeywords.__annotations__) == names
        assert typing.get_type_hints(ForgetKeywords) == {
            name: hint
            for name, hint in typing.get_type_hints(ForgetOptions).items()
            if name in names
        }


class TestNames:
    """A plain name stands for a section with a name."""

    @pytest.mark.parametrize("name", ["mlp", "my_package.my_module:build"])
    def test_in_the_file(self, written, name):
        config = load_config(written(LEAST | {"model": name, "data": "mnist"}), allow_code=True)
        assert (config.model.name, config.model.options, config.data.name) == (name, {}, "mnist")
        assert load_config(written(to_plain(config)), allow_code=True) == config

    @pytest.mark.parametrize(
        "flags",
        [
            ["--model", "a.b:c", "--data", "d:e"],
            ["--model=a.b:c", "--data=d:e"],
            ["--model.name", "a.b:c", "--data", "{name: 'd:e'}"],
        ],
        ids=" ".join,
    )
    def test_as_flags(self, written, flags):
        config = load_config(
            written(LEAST | {"model": {"name": "cnn", "options": {"width": 3}}}),
            flags,
            allow_code=True,
        )
        assert (config.model.name, config.model.options["width"], config.data.name) == (
            "a.b:c",
            3,
            "d:e",
        )

    def test_option_names_are_the_flags(self, written):
        names = option_names(SweepConfig)
        assert names["training.schedule"] == ("onecycle", "cosine", "constant")
        assert names["forget.steps"] == ("auto",)
        assert names["progress"] == ("true", "false")

        def flat(plain, prefix=""):
            for key, value in plain.items():
                inner = isinstance(value, dict) and value and f"{prefix}{key}" not in names
                yield from flat(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]

        assert set(flat(to_plain(load_config(written(), kind=SweepConfig)))) == set(names)


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "value"),
        [
            (["--training.epochs", "5"], lambda c: c.training.epochs == 5),
            (["--training.epochs=5"], lambda c: c.training.epochs == 5),
            (
                ["--training.epochs", "5", "--training.epochs", "6"],
                lambda c: c.training.epochs == 6,
            ),
            (
                ["--training", "{epochs: 5}"],
                lambda c: (c.training.epochs, c.training.optimizer) == (5, "sgd"),
            ),
            (["--seeds", "[7, 8]"], lambda c: c.seeds == [7, 8]),
            (["--model.options.width", "4"], lambda c: c.model.options["width"] == 4),
            (["--data.max_train", "100"], lambda c: c.data.max_train == 100),
            (["--progress", "false"], lambda c: c.progress is False),
            (["--forget.noise", "null"], lambda c: c.forget.noise is None),
            (["--forget.noise", "0.5"], lambda c: c.forget.noise == 0.5),
            (["--forget.noise", "{loss: 0.5}"], lambda c: c.forget.noise == NoiseTarget(loss=0.5)),
            (
                ["--forget.noise.accuracy", "0.5"],
                lambda c: c.forget.noise == NoiseTarget(accuracy=0.5),
            ),
            (["--forget.steps", "3"], lambda c: c.forget.steps == 3),
            (["--forget.drift", "false"], lambda c: c.forget.drift is False),
            (["--forget.subset", "[head.*]"], lambda c: c.forget.subset == ("head.*",)),
            (["--name", "another run"], lambda c: c.name == "another run"),
            (
                ["--forget_sets", "[{name: a, kind: indices, indices: [1]}]"],
                lambda c: c.forget_sets[0].indices == [1],
            ),
        ],
        ids=lambda x: " ".join(x) if isinstance(x, list) else "",
    )
    def test_override_the_file(self, flags, value):
        plain = load_config(CONFIGS / "digits.yaml")
        changed = load_config(CONFIGS / "digits.yaml", flags)
        assert value(changed)
        assert not value(plain)
        top = flags[0][2:].split("=")[0].split(".")[0]
        rest = {key: value for key, value in to_plain(plain).items() if key != top}
        assert {key: value for key, value in to_plain(changed).items() if key != top} == rest

    def test_through_the_command_line(self, monkeypatch, written, capsys):
        seen = []
        monkeypatch.setattr(
            "fisher_forget.experiments.run.run",
            lambda config: seen.append(config) or Path("report.html"),
        )
        assert (
            cli.main(
                [
                    "run",
                    str(written()),
                    "--training.epochs",
                    "2",
                    "--retrained=3",
                    "--forget.noise",
                    "null",
                ]
            )
            == 0
        )
        assert cli.main(["sweep", str(written()), "--scales", "[0.5]"]) == 0
        assert (seen[0].training.epochs, seen[0].retrained, seen[0].forget.noise) == (2, 3, None)
        assert type(seen[0]) is RunConfig
        assert seen[1].scales == [0.5]
        assert capsys.readouterr().out == "Report: report.html\nReport: report.html\n"


class TestLongLists:
    """They are taken as they are, without a look of the parser at each entry."""

    def test_many_indices_load_within_seconds(self, written):
        entry = {"name": "some", "kind": "indices", "indices": list(range(50_000, 0, -1))}
        path = written(
            json.dumps(LEAST | {"forget_sets": [{**LEAST["forget_sets"][0], "name": "x"}, entry]})
        )
        begun = time.perf_counter()
        config = load_config(path, ["--training.epochs", "3"])
        assert time.perf_counter() - begun < 5
        assert config.forget_sets[1].indices == entry["indices"]
        assert config.training.epochs == 3

    def test_the_same_as_short_ones(self, written):
        content = {"scales": [i / 7 for i in range(1, 200)], "seeds": list(range(150))}
        content["draws"], content["grid"] = 2, {"damping": list(range(1, 120))}
        config = load_config(written(json.dumps(LEAST | content)), kind=SweepConfig)
        assert config.grid == content["grid"]
        assert (config.scales, config.seeds) == (content["scales"], content["seeds"])

    def test_flags_win(self, written):
        path = written(json.dumps(LEAST | {"seeds": list(range(150))}))
        assert load_config(path, ["--seeds", "[0]"]).seeds == [0]
        assert load_config(path, ["--seeds=[0, 3]"]).seeds == [0, 3]

    @pytest.mark.parametrize("odd", [None, "x", 1.5, [1], {}])
    @pytest.mark.parametrize("at", [0, 149])
    def test_a_wrong_entry_is_found(self, written, odd, at):
        seeds = list(range(150))
        seeds[at] = odd
        with pytest.raises(ConfigError, match="seeds"):
            load_config(written(json.dumps(LEAST | {"seeds": seeds})))

    def test_checks_see_all(self, written):
        with pytest.raises(ConfigError, match="different"):
            load_config(written(json.dumps(LEAST | {"seeds": [*range(150), 3]})))
        with pytest.raises(ConfigError, match="seeds"):
            load_config(written(json.dumps(LEAST | {"seeds": [i / 3 for i in range(150)]})))


class TestFolders:
    @given(st.text(min_size=1) | st.sampled_from(["---", ".", "..", "../..", "/etc", "\\", "a\0b"]))
    def test_a_folder_of_its_own_in_its_parent(self, title):
        name, parent = folder_name(title, keep=" _."), Path("/runs")
        assert (parent / name).resolve().parent == parent
        assert not name.startswith(".")
        assert 0 < len(name.encode()) < 120

    def test_titles_without_letters_differ(self):
        titles = ["---", "...", "🎉", "🎊", " ", "-", "a" * 300, "a" * 299 + "b"]
        assert len({folder_name(title) for title in titles}) == len(titles)
        runs = [*titles, "a b", "a/b", "a-b", "a-b-", "🎉 a-b", "../a-b"]
        assert len({folder_name(title, " _.", distinct=True) for title in runs}) == len(runs)
        assert folder_name("digits_sweep 1.2", " _.", distinct=True) == "digits_sweep 1.2"

    def test_what_letters_there_are_stay(self):
        assert folder_name("Ähren 3 🎉") == folder_name("A\u0308hren 3") == "Ähren-3"
        assert folder_name("digits_sweep", keep=" _.") == "digits_sweep"

    @pytest.mark.parametrize("name", ["🎉", "日本", "a: b", "---", "\u202e"])
    def test_any_title_is_read(self, written, name):
        content = LEAST | {"name": name, "forget_sets": [LEAST["forget_sets"][0] | {"name": name}]}
        for text in (content, yaml.safe_dump(content, allow_unicode=True)):
            config = load_config(written(text))
            assert (config.name, config.forget_sets[0].name) == (name, name)
            assert config.folder.parent == Path("runs")
        flags = ["--name", name] if not name.startswith("--") else []
        assert load_config(written(content), flags).name == name

    def test_titles_of_one_folder_are_refused(self, written):
        entry = LEAST["forget_sets"][0]
        sets = [entry | {"name": name} for name in ("a b", "A-b")]
        with pytest.raises(ConfigError, match="in its letters and digits"):
            load_config(written(LEAST | {"forget_sets": sets}))


class TestUnknownKeys:
    """The message names the place and the nearest right name."""

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"retraind": 5}, ("'retraind'", "run.yaml", "'retrained'?")),
            ({"training": {"epoch": 5}}, ("'epoch'", "run.yaml at 'training'", "'epochs'?")),
            ({"forget": {"nois": 5}}, ("'nois'", "run.yaml at 'forget'", "'noise'?")),
            ({"forget": {"noise": {"los": 5}}}, ("'los'", "at 'forget' at 'noise'", "'loss'?")),
            ({"forget": {"noise": {"information": 1.0, "lambda": 2}}}, ("'lambda'", "'trade_off'")),
            (
                {"forget_sets": [LEAST["forget_sets"][0], {"lable": 3}]},
                ("'lable'", "forget_sets[1]", "'label'?"),
            ),
            ({"zzz": 1}, ("'zzz'", "one of ['data', 'forget'", "Remove it")),
            ({"scales": [1.0]}, ("'scales'",)),
            ({1: 2}, ("key 1",)),
        ],
    )
    def test_in_the_file(self, written, content, words):
        with pytest.raises(ConfigError) as caught:
            load_config(written(LEAST | content))
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--retraind", "5"], ("'retraind'", "the command line", "'retrained'?")),
            (["--forget.noise.acuracy", "5"], ("'acuracy'", "'accuracy'?")),
            (["--training.epoch=5"], ("'epoch'", "the command line at 'training'", "'epochs'?")),
            (["--seeds", "[1]", "--trainin.epochs", "5"], ("'trainin'", "'training'?")),
            (["--config.name", "x"], ("'config'",)),
            (["--scales", "[1]"], ("'scales'",)),
        ],
    )
    def test_among_the_flags(self, written, flags, words):
        with pytest.raises(ConfigError) as caught:
            load_config(written(), flags)
        for word in words:
            assert word in str(caught.value)

    def test_a_sweep_knows_more(self, written):
        assert load_config(written(LEAST | {"draws": 7}), kind=SweepConfig).draws == 7


class TestWrongValues:
    @pytest.mark.parametrize(
        ("content", "word"),
        [
            ({"training": 3}, "training: 3"),
            ({"training": {"lr": "fast"}}, "training.lr"),
            ({"training": {"lr": -1.0}}, "lr"),
            ({"model": 3}, "'model'"),
            ({"seeds": 3}, "seeds"),
            ({"seeds": []}, "at least one"),
            ({"seeds": [0, 0]}, "different"),
            ({"seeds": [-1]}, "at least 0"),
            ({"forget_sets": {}}, "forget_sets"),
            ({"forget_sets": [3]}, "forget_sets"),
            ({"forget_sets": []}, "at least one"),
            ({"forget_sets": [{"kind": "random"}]}, "name"),
            ({"forget_sets": LEAST["forget_sets"] * 2}, "different name"),
            ({"name": 3}, "name"),
            ({"name": "a/b"}, "folder name"),
            ({"name": ""}, "an empty name"),
            ({"forget_sets": [{"name": "", "kind": "random", "count": 2}]}, "an empty name"),
            ({"retrained": 1}, "at least 2"),
            ({"forget": {"steps": 0}}, "steps=0"),
            ({"forget": {"damping": -1.0}}, "damping=-1.0"),
            ({"forget": {"noise": -1.0}}, "noise=-1.0"),
            ({"forget": {"noise": "some"}}, "forget.noise"),
            ({"forget": {"noise": {"loss": "much"}}}, "forget.noise"),
            ({"forget": {"noise": {"loss": -1.0}}}, "the noise target loss=-1.0"),
            (
                {"forget": {"noise": {"loss": 0.1, "accuracy": 0.1}}},
                "at most one of loss, accuracy",
            ),
            ({"forget": {"kind": "curvy"}}, "forget.kind"),
        ],
    )
    def test_refused(self, written, content, word):
        with pytest.raises(ConfigError) as caught:
            load_config(written(LEAST | content))
        assert word in str(caught.value)
        assert caught.value.fix

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["stray"], "unrecognized arguments: stray"),
            (["-x", "3"], "unrecognized arguments: -x 3"),
            (["--", "x"], "unknown key '' in the command line"),
            (["--training", "3"], "'3'|\"3\""),
            (["--training.epochs"], "training.epochs: expected one argument"),
            (["--training.epochs", "1.5"], "training.epochs: '1.5'; expected a whole number"),
        ],
    )
    def test_flags(self, written, flags, words):
        with pytest.raises(ConfigError, match=words):
            load_config(written(), flags)

    @pytest.mark.parametrize(
        ("text", "key", "lines"),
        [
            ("name: b", "'name'", "1 and 4"),
            ("training: {epochs: 3, lr: 1, epochs: 3}", "'epochs'", "4 and 4"),
            ("training:\n  epochs: 3\n\n  epochs: 4", "'epochs'", "5 and 7"),
            (
                "model:\n  options:\n    - b: 1\n      b: 2",
                "'b'",
                "6 and 7",
            ),
            ("model:\n  options: {1: a, '1': b}", "'1'", "5 and 5"),
            ("model:\n  options: {1: a, true: b}", "True", "5 and 5"),
        ],
    )
    def test_a_key_twice(self, written, text, key, lines):
        path = written(f"name: a\nforget_sets:\n  - {{name: x, kind: random, count: 2}}\n{text}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert f"the key {key} twice, in lines {lines} of {path}" in str(caught.value)

    def test_a_merged_key_may_be_written_over(self, written):
        text = "model:\n  options:\n    <<: {width: 3, depth: 1}\n    width: 4\n"
        options = load_config(written(yaml.safe_dump(LEAST) + text)).model.options
        assert options == {"width": 4, "depth": 1}

    @pytest.mark.parametrize(
        "name", ["1e5", "-.5E+3", "2020-01-01", "null", "1", "yes", "1:30", "~"]
    )
    def test_text_that_looks_like_something_else_comes_back(self, written, name):
        config = load_config(written(), ["--name", name, f"--data.root={name}x"])
        assert config.name == name
        assert load_config(written(as_yaml(config))) == config

    def test_nothing_in_a_file_is_executed(self, written, tmp_path):
        with pytest.raises(ConfigError, match="valid YAML"):
            load_config(written(f"name: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]"))
        assert not (tmp_path / "made").exists()


class TestExitCodes:
    def test_overview(self, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main(["--help"])
        assert left.value.code == 0
        out = capsys.readouterr().out
        for name, about in cli.COMMANDS.items():
            assert f"  {name}" in out.split(f"{about.group}:")[1].split("\n\n")[0]
            assert f"  {about.example}\n" in out.split("examples:")[1]
        for code in (0, 1, cli.EXIT_ERROR, cli.EXIT_INTERRUPTED):
            assert f"\n  {code} " in out.split("exit codes:")[1]
        assert max(map(len, out.splitlines())) <= 120

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_help(self, name, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0
        out = capsys.readouterr().out
        about = cli.COMMANDS[name]
        assert out.startswith(f"usage: fisher-forget {name} ")
        assert all(word in out for word in (about.example, "exit codes:", "--debug"))
        assert ("--dry-run" in out) == (name in ("run", "sweep", "compare", "evaluate"))
        assert ("--KEY VALUE" in out) == about.configured

    @pytest.mark.parametrize("name", [n for n, about in cli.COMMANDS.items() if about.configured])
    def test_examples_parse(self, name, monkeypatch):
        """What the help shows is understood, up to the work itself."""
        seen = []
        monkeypatch.chdir(CONFIGS.parent)
        monkeypatch.setattr(
            cli, "load_config", lambda *a, **k: seen.append(load_config(*a, **k)) or seen[0]
        )
        for work in ("run.run", "run.redraw", "evaluate_run.evaluate_run", "compare.compare"):
            monkeypatch.setattr(f"fisher_forget.experiments.{work}", lambda config: [])
        found = lambda config, limit: ("report.html", {})  # noqa: E731
        monkeypatch.setattr("fisher_forget.experiments.audit_run.audit_run", found)
        arguments = shlex.split(cli.COMMANDS[name].example)[1:]
        if arguments[1].startswith("runs/"):
            arguments[1] = "configs/digits.yaml"
        assert cli.main(arguments) == 0
        assert seen[0].name

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["runn", "x.yaml"],
            ["run"],
            ["data", "stray"],
            ["init", "a.yaml", "--seeds", "3"],
            ["completion", "csh"],
        ],
    )
    def test_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == 2
        assert "usage: fisher-forget" in capsys.readouterr().err

    def test_mistake(self, written, capsys):
        assert cli.main(["run", str(written("nope: 1"))]) == cli.EXIT_ERROR == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("fisher-forget: Got the unknown key 'nope'")

    @pytest.mark.parametrize("command", ["evaluate", "plot"])
    def test_the_folder_of_a_comparison_is_named_as_such(self, command, tmp_path, capsys):
        (tmp_path / "comparison.json").write_text("{}")
        (tmp_path / "config.yaml").write_text("methods: [finetune]")
        assert cli.main([command, str(tmp_path)]) == cli.EXIT_ERROR
        error = capsys.readouterr().err
        assert "the folder of a comparison" in error
        assert f"{tmp_path}/comparison.html" in error

    def test_interrupted(self, monkeypatch, written, capsys):
        def interrupt(config):
            raise KeyboardInterrupt

        monkeypatch.setattr("fisher_forget.experiments.run.run", interrupt)
        assert cli.main(["run", str(written())]) == cli.EXIT_INTERRUPTED == 130
        assert "start it again" in capsys.readouterr().err

    def test_a_bug_is_not_a_mistake(self, monkeypatch, written):
        def fail(config):
            raise RuntimeError("a bug")

        monkeypatch.setattr("fisher_forget.experiments.run.run", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(["run", str(written())])

    def test_plot_of_a_run_that_was_never_made(self, written, tmp_path, capsys):
        assert cli.main(["plot", str(written()), "--out", str(tmp_path / "runs")]) == 2
        assert "metrics.json" in capsys.readouterr().err

    def test_as_a_program(self, written):
        """The installed entry point: message on stderr, nothing on stdout, no traceback."""
        program = Path(sys.executable).parent / "fisher-forget"
        command = (
            [str(program)] if program.exists() else [sys.executable, "-m", "fisher_forget.cli"]
        )
        done = subprocess.run(
            [*command, "run", str(written("nope: 1"))], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("fisher-forget: Got the unknown key 'nope'")
        assert "Traceback" not in done.stderr


class TestData:
    def test_says_what_is_there_and_how_to_get_the_rest(self, tmp_path, capsys):
        assert cli.main(["data", "--root", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        lines = {
            line.split()[0]: line.split()[1]
            for line in out.splitlines()
            if line.split()[1:2] in (["found"], ["missing"])
        }
        assert lines == {
            "digits": "found",
            "mnist": "missing",
            "cifar10": "missing",
            "breast_cancer": "found",
            "diabetes": "found",
        }
        for word in (
            "train-images-idx3-ubyte",
            "yann.lecun.com",
            str(tmp_path / "MNIST" / "raw"),
            "~kriz/cifar.html",
        ):
            assert word in out
        assert "FISHER_FORGET_DATA" in out

    def test_says_where(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "MNIST" / "raw").mkdir(parents=True)
        for name in MNIST_FILES:
            (tmp_path / "MNIST" / "raw" / f"{name}.gz").touch()
        monkeypatch.setenv("FISHER_FORGET_DATA", str(tmp_path))
        assert cli.main(["data"]) == 0
        assert f"in       {tmp_path / 'MNIST' / 'raw'}" in capsys.readouterr().out


class TestCompletion:
    """The scripts are complete and, where the shell is there, work in it."""

    @pytest.mark.parametrize("shell", cli.SHELLS)
    def test_knows_commands_and_keys(self, shell, capsys):
        assert cli.main(["completion", shell]) == 0
        out = capsys.readouterr().out
        for word in (
            *cli.COMMANDS,
            "training.epochs",
            "forget.structure",
            "ekfac",
            "trials",
            "dry-run",
        ):
            assert word in out

    @pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
    @pytest.mark.parametrize(
        ("words", "found"),
        [
            (["fisher-forget", "ev"], ["evaluate"]),
            (["fisher-forget", "run", "--training.ep"], ["--training.epochs"]),
            (["fisher-forget", "run", "--forget.structure", "ek"], ["ekfac"]),
            (["fisher-forget", "init", "--template", "te"], ["text"]),
            (["fisher-forget", "run", "some"], ["some.yaml"]),
        ],
        ids=" ".join,
    )
    def test_in_bash(self, words, found, tmp_path, capsys):
        cli.main(["completion", "bash"])
        (tmp_path / "some.yaml").touch()
        script = tmp_path / "script"
        function = re.search(r"complete .*-F (\S+) ", text := capsys.readouterr().out)[1]
        line = " ".join(map(shlex.quote, words))
        script.write_text(
            f"{text}\nCOMP_WORDS=({line}) COMP_CWORD={len(words) - 1}\n{function}\n"
            "printf '%s\\n' ${COMPREPLY[@]}"
        )
        done = subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.stdout.split() == found, done.stderr
