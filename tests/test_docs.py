"""The documentation does what it says: its code runs, its commands are accepted, its links lead
somewhere."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml
from browser import chromium, needs_chromium

from benchmarks import bias, compliance, levels, poison, suggest
from benchmarks.attacks import tables as attacks
from benchmarks.overlearning import tables as overlearning
from benchmarks.parts import placed
from fisher_forget._util.files import read_json
from fisher_forget.baselines import METHODS, Range
from fisher_forget.cli import main
from fisher_forget.experiments.config import CompareConfig, RunConfig, SweepConfig
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.import_path import GROUPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "yaml", "toml", "text"}
# A fenced block; or a comment that the reader does not see, which sets up what a block needs.
_BLOCK = re.compile(
    r"^```(?P<language>\S*)\n(?P<code>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$", re.M | re.S
)
KINDS: dict[str, type[RunConfig]] = {"sweep": SweepConfig, "compare": CompareConfig}


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        hidden = found["hidden"] is not None
        yield Block(
            "python" if hidden else found["language"],
            found["hidden" if hidden else "code"],
            text.count("\n", 0, found.start()) + 1,
        )


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def having(language: str) -> list[Path]:
    return [page for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.mark.parametrize("page", having("python"), ids=named)
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.language == "python":
            source = (
                "\n" * block.line + block.code
            )  # so that a traceback names the line of the page
            exec(compile(source, str(page), "exec", dont_inherit=True), names)
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_has_a_language_that_is_checked(page):
    fences = re.findall(r"^\s*```.*$", page.read_text(encoding="utf-8"), re.M)
    assert len(fences) == 2 * len(
        [b for b in _BLOCK.finditer(page.read_text(encoding="utf-8")) if b["hidden"] is None]
    )
    assert {b.language for b in blocks(page)} <= LANGUAGES


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                yield line.partition(" #")[0].strip()


@pytest.fixture(scope="module")
def offered() -> set[str]:
    """The commands that `fisher-forget --help` names."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"^ {2,}([a-z]+)\b", told.getvalue(), re.M))


@pytest.mark.parametrize("page", having("sh"), ids=named)
def test_commands_are_accepted(page, offered):
    for command in filter(None, commands(page)):
        program, *rest = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", w)]
        if program == "make":
            subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
        elif program == "fisher-forget":
            assert not rest or rest[0] in offered or rest[0] == "--help", command
            readable(rest)
        elif program == "source":
            assert rest == [".venv/bin/activate"], command  # what `make install` makes
        else:
            assert program in ("pip", "git", "cd"), command


def readable(words: list[str]) -> None:
    """Refuse a recipe that is not there, and keys and values that its configuration does not
    take."""
    if len(words) > 1 and words[1].startswith(("configs/", "examples/")):
        allow, plain = "--allow-code" in words, ("--dry-run", "--debug", "--allow-code")
        keys = [word for word in words[2:] if word not in plain]
        load_config(ROOT / words[1], keys, KINDS.get(words[0], RunConfig), allow_code=allow)


@pytest.mark.parametrize("page", having("yaml"), ids=named)
def test_configurations_are_accepted(page, tmp_path):
    for index, block in enumerate(b for b in blocks(page) if b.language == "yaml"):
        content = yaml.safe_load(block.code)
        kind = (
            SweepConfig
            if {"grid", "scales"} & set(content)
            else CompareConfig
            if "methods" in content
            else RunConfig
        )
        path = tmp_path / f"{index}.yaml"
        path.write_text(block.code)
        load_config(path, [], kind, allow_code=True)


@pytest.mark.parametrize("page", having("toml"), ids=named)
def test_entry_points_are_of_groups_that_are_looked_in(page):
    for block in (b for b in blocks(page) if b.language == "toml"):
        declared = tomllib.loads(block.code)["project"]["entry-points"]
        assert set(declared) <= set(GROUPS.values())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page):
    prose = re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_recipes_of_the_documentation_are_all_there_are():
    """Every recipe is described on the page of the command line."""
    text = (ROOT / "docs" / "how-to" / "command-line.md").read_text()
    assert [c.name for c in (ROOT / "configs").glob("*.yaml") if f"`{c.name}`" not in text] == []


def test_every_method_has_a_row_with_what_a_comparison_may_choose():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    methods, deviations = (
        [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        for part in page.split("## Deviations")
    )
    table = {row[0].strip("`"): row[2] for row in methods}
    for name, method in METHODS.items():
        choices = "; ".join(
            f"{key}: {values if isinstance(values, Range) else ', '.join(map(str, values))}"
            for key, values in method.grid.items()
        )
        assert table[name] == (choices or "nothing to choose")
    # what differs is no choice: the two tables have columns of their own
    assert all(len(row) == 4 for row in deviations)
    assert not {row[2] for row in methods[1:]} & {row[2] for row in deviations}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does; a warning is an error."""
    place = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(place),
    ]
    built = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    return place


@needs_chromium
def test_the_site_opens_from_files_with_its_formulas_and_no_network(site):
    with chromium() as open_page:
        for name, width in itertools.product(
            ("index", "concepts", "noise", "closeness", "api/curvature"), (390, 1280)
        ):
            page = open_page((site / f"{name}.html").as_uri(), width)
            assert page.errors == []
            assert [r for r in page.requests if not r.startswith(("file:", "data:"))] == []
            assert page.overflow() <= 0, (name, width)
            sizes = page.evaluate(
                "[...document.querySelectorAll('.formula svg')].map(s => s.getBoundingClientRect())"
                ".map(box => Math.min(box.width, box.height))"
            )
            source = (ROOT / "docs" / f"{name}.md").read_text()
            assert len(sizes) == len(re.findall(r"(?s)\$\$.*?\$\$|(?<!\$)\$[^$]+\$", source))
            assert all(size > 3 for size in sizes)  # pixels
            assert page.evaluate("document.querySelectorAll('.arithmatex').length") == 0


@pytest.fixture(scope="module")
def rooms() -> list[tuple[str, list[str]]]:
    """(room, names of its files) of each row of the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| *(.*?) *\| .+ \|$", text, re.M)
    return [(room, re.findall(r"`(\w+)`", names)) for room, names in rows]


class TestRooms:
    """That table has all files of the package, from the lowest layer up."""

    def test_every_file_is_named_once(self, rooms: list[tuple[str, list[str]]]) -> None:
        listed = [
            f"{room}{name}.py" if name else room for room, names in rooms for name in names or [""]
        ]
        package = ROOT / "fisher_forget"
        files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
        assert sorted(listed) == sorted(name for name in files if not name.endswith("__init__.py"))

    def test_rooms_stand_in_the_order_of_the_contract(
        self, rooms: list[tuple[str, list[str]]]
    ) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
        heights = {
            room: height
            for height, layer in enumerate(reversed(layers))
            for room in layer.split(" | ")
        }
        order = [room.removesuffix(".py").split("/")[0] for room, _ in rooms]
        assert set(order) == set(heights)
        assert [heights[room] for room in order] == sorted(heights[room] for room in order)


class TestOneSource:
    """The README states it; the other pages repeat it."""

    def text(self, name: str) -> str:
        return (ROOT / name).read_text(encoding="utf-8")

    def test_how_long_the_demo_takes(self) -> None:
        (duration,) = re.findall(r"and (about .+?) on two CPU cores", self.text("README.md"))
        assert re.search(rf"^demo:.*\({duration}\)$", self.text("Makefile"), re.M)
        row = f"| `digits.yaml` | handwritten digits, a class and some samples | {duration} |"
        assert row in self.text("docs/how-to/command-line.md")

    def test_how_close_the_demo_comes(self) -> None:
        def rows(name: str, first: str) -> dict[str, list[str]]:
            """Forget set -> KLs, floor, gap closed."""
            cells = [re.split(r" *\| *", line)[1:] for line in self.text(name).splitlines()]
            return {
                re.sub(r"^digits, | \(.*\)$", "", row[0]): row[1:5]
                for row in cells
                if len(row) > 5 and row[0].startswith(first) and ": " not in row[0]
            }

        results = rows("docs/results.md", "digits, ")
        readme = {name: row for name, row in rows("README.md", "").items() if name in results}
        assert len(readme) == 2
        assert readme == results

    def test_how_many_methods_there_are(self) -> None:
        published = METHODS.keys() - {"fisher-forget", "retrain", "sisa", "other-label"}
        ones = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        count = {20 + i: f"twenty-{word}" for i, word in enumerate(ones, 1)}[len(published)]
        assert f"holds {count} published methods and SISA" in self.text("README.md")


def test_the_table_of_error_rates_is_that_of_the_stored_numbers():
    """And in it no family is far from its level: 5 % and three standard errors of 1,000 worlds."""
    report = read_json(levels.STORED)
    text = levels.PAGE.read_text(encoding="utf-8")
    assert text.split(levels.BEGIN)[1].split(levels.END)[0] == f"\n{levels.table(report)}\n"
    assert len(report["designs"]) == len(levels.MODELS) * len(levels.RUNS)
    for design in report["designs"].values():
        for name, share in design["retrained"].items():
            assert share < 0.05 + 3 * (0.05 * 0.95 / report["worlds"]) ** 0.5 + 0.01, name
        assert design["original"][levels.TOGETHER] > 0.9


@pytest.mark.parametrize(
    ("module", "tables"),
    [
        (bias, lambda report: bias.tables(bias.stored())),
        (compliance, lambda report: {"requests": compliance.table(report)}),
        (poison, poison.tables),
        (suggest, dict),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_tables_are_those_of_the_stored_numbers(module, tables):
    text = module.PAGE.read_text(encoding="utf-8")
    assert placed(text, tables(read_json(module.STORED))) == text


def test_the_tables_of_overlearning_are_those_of_the_stored_numbers():
    """And of a random attribute nothing is found but in one interval of twenty (in four or more
    with a chance of 2 %), while the task's own label is found."""
    report = read_json(overlearning.STORED)
    text = overlearning.PAGE.read_text(encoding="utf-8")
    assert placed(text, overlearning.tables(report)) == text
    layers = [case["layers"] for case in report.values()]
    random = [x["gain"] for known in layers for x in known["control: random attribute"]["layers"]]
    assert sum(x["low"] > 0 for x in random) < 4
    for known in layers:
        last = known["control: the task's label"]["layers"][-1]
        assert last["gain"]["low"] > 0.15
        assert last["accuracy"] > 0.75


def test_the_tables_of_attacks_are_those_of_the_stored_numbers():
    """And nothing is found where nothing was deleted."""
    report = read_json(attacks.STORED)
    text = attacks.PAGE.read_text(encoding="utf-8")
    assert set(report) == set(attacks.PARTS)
    tables = {part: attacks.tables(part, found) for part, found in report.items()}
    assert placed(text, tables) == text
    controls = [
        f for case in report["classical"]["cases"].values() for f in case["nothing deleted"]
    ]
    controls += report["requests"]["methods"]["control: trained on the same data"]
    controls += [report[part]["control: nothing deleted"] for part in ("inversion", "mnist")]
    controls += [f for name, f in report["shadow"].items() if name.startswith("control")]
    assert len(controls) == 21
    assert not any(finding["leaks"] for finding in controls)
