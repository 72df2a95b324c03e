"""A recipe or a run's folder from someone else: it runs no code, and writes nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from fisher_forget._util import files
from fisher_forget.cli import main
from fisher_forget.errors import ConfigError, StorageError
from fisher_forget.experiments.config import CompareConfig, RunConfig, SweepConfig
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.import_path import current_folder_last
from fisher_forget.experiments.run_folder import run_folder

ROOT = Path(__file__).parent.parent
LEAST = {"name": "least", "forget_sets": [{"name": "some", "kind": "random", "count": 2}]}
# writes a file wherever it is imported, made or called
TRAP = """
    import pathlib
    mark = lambda: pathlib.Path(__file__).with_name("mark").write_text("ran")
    mark()
    class Thing:
        def __init__(self, *args, **kwargs): mark()
        def unlearn(self, model, split): mark()
    def thing(*args, **kwargs): mark()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with a trap in it, which commands are started in, and whose modules are found."""
    (tmp_path / "trap.py").write_text(textwrap.dedent(TRAP))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("FISHER_FORGET_ALLOW_CODE", raising=False)
    yield tmp_path
    sys.modules.pop("trap", None)


def recipe(folder: Path, **content: object) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(LEAST | content))
    return str(folder / "recipe.yaml")


def untouched(folder: Path) -> bool:
    return not (folder / "mark").exists() and "trap" not in sys.modules


PATHS = [
    "trap:thing",
    "os:system",
    "subprocess:run",
    "builtins:eval",
    "builtins:exec.__self__.exec",
    "fisher_forget._util.files:write_file",
    "fisher_forget.experiments.models:cnn",
    "trap:",
    ":thing",
    "trap:Thing.__init__.__globals__",
    "./trap:thing",
    "digits:",
]
COMMANDS = [
    ["run"],
    ["run", "--dry-run"],
    ["sweep"],
    ["sweep", "--dry-run"],
    ["compare"],
    ["compare", "--dry-run"],
    ["evaluate"],
    ["evaluate", "--dry-run"],
    ["plot"],
]


class TestImportPaths:
    @pytest.mark.parametrize("name", PATHS)
    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_are_refused_by_every_command(self, place, command, name, capsys):
        named = {"name": name, "options": {"command": "touch mark", "args": "touch mark"}}
        for key in ("data", "model"):
            path = recipe(place, **{key: named})
            assert main([command[0], path, *command[1:]]) == 2
            said = capsys.readouterr().err
            assert repr(name) in said
            assert "--allow-code" in said
            assert "FISHER_FORGET_ALLOW_CODE=1" in said
        assert untouched(place)
        assert not (place / "runs").exists()

    @pytest.mark.parametrize(
        "command", [["evaluate"], ["plot"], ["run"], ["evaluate", "--dry-run"]]
    )
    def test_are_refused_in_the_folder_of_a_run(self, place, command, capsys):
        (place / "given").mkdir()
        content = LEAST | {"model": "trap:thing"}
        (place / "given" / "config.yaml").write_text(yaml.safe_dump(content))
        (place / "given" / "metrics.json").write_text("{}")
        assert main([command[0], "given", *command[1:]]) == 2
        assert "--allow-code" in capsys.readouterr().err
        assert untouched(place)

    @pytest.mark.parametrize("command", [["compare"], ["compare", "--dry-run"]])
    def test_are_refused_as_methods(self, place, command, capsys):
        path = recipe(place, methods=["finetune", "trap:Thing"])
        assert main([command[0], path, *command[1:]]) == 2
        assert "'trap:Thing' as a method" in capsys.readouterr().err
        assert untouched(place)

    @pytest.mark.parametrize(
        "flags",
        [
            ["--data", "trap:thing"],
            ["--model.name", "trap:thing"],
            ["--model={name: 'trap:thing'}"],
        ],
    )
    def test_are_refused_as_flags(self, place, flags, capsys):
        assert main(["run", recipe(place), *flags]) == 2
        assert "--allow-code" in capsys.readouterr().err
        assert untouched(place)

    @pytest.mark.parametrize("content", [{"allow_code": True}, {"allow-code": True}])
    def test_no_file_allows_itself(self, place, content):
        with pytest.raises(ConfigError, match="unknown key"):
            load_config(recipe(place, model="trap:thing", **content))
        assert untouched(place)

    # a full-width colon, a ratio sign, a colon of another script, and dots
    @pytest.mark.parametrize(
        "name", ["trap\uff1athing", "trap\u2236thing", "trap\u0589thing", "trap.thing"]
    )
    def test_look_alikes_are_unknown_names(self, place, name, capsys):
        assert main(["run", recipe(place, model=name), "--dry-run"]) == 2
        assert "Got the model" in capsys.readouterr().err
        assert untouched(place)

    def test_run_where_they_are_allowed(self, place, monkeypatch):
        path = recipe(place, model="trap:thing")
        assert load_config(path, allow_code=True).model.name == "trap:thing"
        for value, allowed in (("1", True), ("0", False), ("", False), ("yes", False)):
            monkeypatch.setenv("FISHER_FORGET_ALLOW_CODE", value)
            if allowed:
                load_config(path)
            else:
                with pytest.raises(ConfigError, match="--allow-code"):
                    load_config(path)
        assert untouched(place)  # a configuration is read, and no more
        assert main(["run", path, "--allow-code", "--dry-run"]) == 2  # it makes no model
        assert not untouched(place)


# what typed parsers of configurations import: paths with dots, and class_path
SPECS = [
    "trap.Thing",
    "trap.thing",
    {"class_path": "trap.Thing"},
    {"class_path": "trap.Thing", "init_args": {}},
    {"class_path": "trap.Thing", "dict_kwargs": {"a": 1}},
    {"a": {"class_path": "trap.Thing"}},
    [{"class_path": "trap.Thing"}],
    "{class_path: trap.Thing}",
]
KEYS = [
    *("data", "data.options", "data.options.a", "model", "model.options", "training", "forget"),
    *("forget.likelihood", "forget.noise", "forget.training", "forget.weight_decay"),
    *("forget.subset", "forget_sets", "likelihood", "grid", "grid.noise", "options", "options.ntk"),
    *("methods", "seeds", "name", "training.lr"),
]


@pytest.mark.parametrize("key", KEYS)
def test_no_value_is_imported(place, key):
    for kind in (RunConfig, SweepConfig, CompareConfig):
        for spec in SPECS:
            content: object = spec
            for part in reversed(key.split(".")):
                content = {part: content}
            flag = f"--{key}={yaml.safe_dump(spec, default_flow_style=True)}"
            for path, flags in ((recipe(place, **content), []), (recipe(place), [flag])):
                try:
                    load_config(path, flags, kind)
                except ConfigError as error:
                    assert error.fix  # noqa: PT017 - some are values like any other
            assert untouched(place), (key, spec)


LAUGHS = ["&a0 [x, x, x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]


@pytest.mark.parametrize(
    "options",
    [
        "&a {b: *a}",
        "{a: &a [*a]}",
        f"{{a: {'[' * 900}{']' * 900}}}",
        f"{{a: [{', '.join(LAUGHS)}]}}",
    ],
    ids=["itself", "a list in itself", "deep", "aliases of aliases"],
)
def test_no_file_outgrows_the_memory(place, options):
    (place / "recipe.yaml").write_text(yaml.safe_dump(LEAST) + f"model: {{options: {options}}}\n")
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="nests more than 50 deep or holds more"):
        load_config(place / "recipe.yaml")
    assert time.perf_counter() - start < 10


def in_a_process(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """`fisher-forget` as its script starts it: without the current folder on the path."""
    command = [sys.executable, "-P", "-m", "fisher_forget", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [variables.pop("also", "")])])
    env = os.environ | {"PYTHONPATH": path} | variables
    env.pop("FISHER_FORGET_ALLOW_CODE", None)
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120
    )


MINE = """
    import pathlib, torch
    import helper
    def build(): return torch.nn.Sequential(torch.nn.Flatten(), helper.layer())
"""


class TestCurrentFolder:
    @pytest.fixture
    def own(self, tmp_path):
        for name in ("numpy", "yaml", "torch", "sklearn", "matplotlib", "joblib", "pandas"):
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(TRAP))
        (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
        (tmp_path / "helper.py").write_text(
            "import torch\ndef layer(): return torch.nn.Linear(64, 10)\n"
        )
        recipe(tmp_path, model="mine:build", data={"name": "digits", "max_train": 100})
        return tmp_path

    def test_is_not_looked_in_without_leave_and_shadows_nothing_with_it(self, own):
        refused = in_a_process(own, "run", "recipe.yaml", "--dry-run")
        assert refused.returncode == 2
        assert "--allow-code" in refused.stderr
        done = in_a_process(own, "run", "recipe.yaml", "--dry-run", "--allow-code")
        assert done.returncode == 0, done.stderr
        assert "mine:build, 650 parameters" in done.stdout
        assert not (own / "mark").exists()

    def test_comes_last_and_goes_again(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        with current_folder_last():
            assert sys.path == [*before, str(tmp_path)]
        assert sys.path == before


PLUGIN = """
    import torch
    def load():
        x = torch.randn(60, 4)
        return (x, torch.arange(60) % 3), (x[:30], torch.arange(30) % 3)
    def build(width=3): return torch.nn.Linear(4, width)
"""


class TestPlugins:
    @pytest.fixture
    def site(self, tmp_path):
        """site(name, **groups): a folder with an installed package, as pip leaves it."""
        folder = tmp_path / "site"

        def install(name: str, **groups: str) -> Path:
            about = folder / f"{name}-1.0.dist-info"
            about.mkdir(parents=True)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (about / "RECORD").write_text("")
            lines = [f"[fisher_forget.{group}]\n{text}\n" for group, text in groups.items()]
            (about / "entry_points.txt").write_text("\n".join(lines))
            (folder / f"{name}.py").write_text(textwrap.dedent(PLUGIN))
            return folder

        return install

    def test_are_found_by_their_plain_names(self, tmp_path, site):
        folder = site("plug", data="flowers = plug:load", models="tiny = plug:build")
        path = recipe(tmp_path, data="flowers", model={"name": "tiny", "options": {"width": 3}})
        done = in_a_process(tmp_path, "run", path, "--dry-run", also=str(folder))
        assert done.returncode == 0, done.stderr
        assert "tiny, 15 parameters" in done.stdout

    def test_stand_behind_the_packages_own_and_are_named(self, tmp_path, site, monkeypatch):
        from fisher_forget.experiments.datasets import load_dataset
        from fisher_forget.experiments.models import build_model

        folder = site(
            "plugs", data="digits = plugs:load\nflowers = plugs:load", models="a = plugs:x"
        )
        monkeypatch.syspath_prepend(folder)
        assert len(load_dataset("digits", max_train=50).classes) == 10
        assert load_dataset("flowers").classes == ("0", "1", "2")
        with pytest.raises(ConfigError, match=r"one of .*'flowers'.*Did you mean 'flowers'"):
            load_dataset("flower")
        with pytest.raises(ConfigError, match="'plugs:x' of the plug-in 'a', but no 'x' in it"):
            build_model("a", (4,), 3, seed=0)

    def test_of_two_packages_must_agree(self, site, monkeypatch):
        from fisher_forget.experiments.models import build_model

        site("one", models="same = one:build")
        monkeypatch.syspath_prepend(site("two", models="same = two:build"))
        with pytest.raises(ConfigError, match=r"of two packages: .*Uninstall one"):
            build_model("same", (4,), 3, seed=0)


class TestPathsInFiles:
    """What a file says stays within its folder."""

    @pytest.mark.parametrize(
        "said", ["/{outside}/x", "../outside/x", "some/../../outside/x", "link/x"]
    )
    def test_plot_writes_nowhere_else(self, place, said, capsys):
        outside, folder = place / "outside", place / "given"
        for path in (outside, folder):
            path.mkdir()
        if said.startswith("link"):
            (folder / "link").symlink_to(outside)
        (folder / "config.yaml").write_text(yaml.safe_dump(LEAST))
        said = said.replace("/{outside}", str(outside))
        files.write_json(folder / "metrics.json", {"cases": [{"runs": [{"folder": said}]}]})
        assert main(["plot", "given"]) == 2
        assert "outside the run's folder" in capsys.readouterr().err
        assert not list(outside.iterdir())

    @pytest.mark.parametrize(
        "metrics",
        [{}, [], {"cases": 3}, {"cases": [{"runs": []}]}, {"cases": [{"runs": [{"folder": 5}]}]}],
    )
    def test_plot_of_numbers_that_no_run_wrote(self, place, metrics, capsys):
        (place / "given").mkdir()
        (place / "given" / "config.yaml").write_text(yaml.safe_dump(LEAST))
        files.write_json(place / "given" / "metrics.json", metrics)
        assert main(["plot", "given"]) == 2
        assert "what a finished run wrote" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["run", "evaluate", "plot", "compare", "sweep"])
    def test_no_link_leads_out(self, place, command, capsys):
        outside, folder = place / "outside", place / "given"
        for path in (outside, folder):
            path.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(LEAST))
        (folder / "some").symlink_to(outside)
        assert (
            main([command, "given", *(["--methods", "[finetune]"] if command == "compare" else [])])
            == 2
        )
        assert "outside the run's folder" in capsys.readouterr().err
        assert not list(outside.iterdir())

    def test_links_within_are_links(self, tmp_path):
        config = load_config(recipe(tmp_path), ["--out", str(tmp_path)])
        folder = tmp_path / "least"
        folder.mkdir()
        (folder / "a").symlink_to(folder / "b")  # to nothing, but within
        assert run_folder(config) == folder
        (folder / "round").symlink_to(folder / "round")
        with pytest.raises(StorageError, match="round"):
            run_folder(config)

    def test_results_go_where_the_user_says(self, place, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        away = place / "away"
        away.mkdir()
        for out in (str(elsewhere), "..", "a/../../b"):
            with pytest.raises(ConfigError, match="Say so yourself: --out"):
                load_config(recipe(place, out=out))
        (place / "link").symlink_to(elsewhere)
        with pytest.raises(ConfigError, match="Say so yourself"):
            load_config(recipe(place, out="link"))
        for out in ("runs", ".", str(place / "a"), str(away)):
            load_config(recipe(place, out=out))
            load_config(recipe(away, out=out))
        assert load_config(recipe(place), ["--out", str(elsewhere)]).out == str(elsewhere)
        # what a run wrote down there is read again
        (elsewhere / "least").mkdir()
        written = elsewhere / "least" / "config.yaml"
        written.write_text(yaml.safe_dump(LEAST | {"out": str(elsewhere)}))
        assert load_config(written).out == str(elsewhere)
