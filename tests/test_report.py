from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest
import torch
from made_up import CLASS_3, RANDOM, make_case, make_metrics, make_sweep
from matplotlib.axes import Axes

from fisher_forget._util.markdown import markdown_table
from fisher_forget._util.numbers import number, percent, plus_minus
from fisher_forget.errors import DataError, StorageError
from fisher_forget.evaluate import closeness as evaluate
from fisher_forget.evaluate.gap import Gap
from fisher_forget.likelihood import Bernoulli, Categorical, Gaussian
from fisher_forget.report import plots, tables
from fisher_forget.report.pages.html import write_report
from fisher_forget.report.schema import METRICS_SCHEMA_PATH, load_schema
from fisher_forget.unlearn.forget import forget


@pytest.fixture
def metrics() -> dict[str, Any]:
    return make_metrics(make_case("class 3", CLASS_3), make_case("random 100", RANDOM, seeds=1))


@pytest.fixture
def case(metrics: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = metrics["cases"][0]
    return found


# the schema


def test_the_schema_accepts_a_run_and_is_itself_valid(metrics):
    jsonschema.Draft202012Validator.check_schema(load_schema())
    jsonschema.validate(metrics, load_schema())
    assert json.loads(METRICS_SCHEMA_PATH.read_text()) == load_schema()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 1),
        (("cases",), []),
        (("cases", 0, "forgotten"), -1),
        (("cases", 0, "members"), 1),
        (("cases", 0, "summary", "forget", "floor", "mean"), "0.55"),
        (("cases", 0, "runs", 0, "evaluation", "parts", "test", "unheard_of"), 1.0),
        (("cases", 0, "runs", 0, "forget", "noise", "scale"), -1.0),
        (("environment", "torch"), None),
    ],
)
def test_the_schema_rejects_what_is_wrong(metrics, path, value):
    place = metrics
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(metrics, load_schema())


def test_the_schema_knows_every_score_and_describes_every_field():
    schema = load_schema()
    fields = {f.name for f in dataclasses.fields(evaluate.PartScores)}
    assert (
        set(schema["$defs"]["part"]["properties"])
        == fields
        == set(schema["$defs"]["part"]["required"])
    )
    assert set(schema["$defs"]["part_summary"]["properties"]) == {*evaluate.MEANS, "gap"}
    assert set(schema["$defs"]["gap"]["properties"]) == {f.name for f in dataclasses.fields(Gap)}

    def undescribed(node: Any, path: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        found = []
        for name, field in node.get("properties", {}).items():
            found += [f"{path}/{name}"] if "description" not in field else []
            found += undescribed(field, f"{path}/{name}")
        return (
            found
            + undescribed(node.get("items"), path)
            + undescribed(node.get("additionalProperties"), path)
        )

    assert undescribed(schema, "") == []
    assert [p for name, node in schema["$defs"].items() for p in undescribed(node, name)] == []


def test_the_schema_accepts_the_summary_that_forget_writes(metrics):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    torch.manual_seed(0)
    result = forget(
        torch.nn.Linear(3, 2).eval(),
        torch.utils.data.DataLoader(data),
        [0, 5],
        drift=True,
        progress=False,
    )
    summary = json.loads(json.dumps(result.summary()), parse_constant=lambda _: None)
    metrics["cases"][0]["runs"][0]["forget"] = summary
    jsonschema.validate(metrics, load_schema())
    assert "ekfac" in str(tables.runs_table(metrics["cases"][0]).iloc[0])


# tables


def test_the_table_holds_each_part_with_its_spread(case):
    frame = tables.case_table(case)
    assert frame["part"].tolist() == [
        "forgotten data",
        "retained data",
        "test data",
        "test, retained classes",
    ]
    forgotten = frame.iloc[0]
    assert forgotten["samples"] == "146"
    # over the seeds: 1.2 * (0.95, 1, 1.05); the floor over the members: 10 % of it
    assert forgotten["KL scrubbed (nats)"] == "1.20 ± 0.06"
    assert forgotten["floor (nats)"] == "0.55 ± 0.06"
    assert forgotten["gap closed"] == "94 % (93 to 97)"
    assert forgotten["accuracy scrubbed (%)"] == "2.1 ± 0.0"
    assert forgotten["accuracy retrained (%)"] == "0.0 ± 0.4"


def test_one_seed_shows_the_spread_over_retrained_models():
    case = make_case(
        "one", CLASS_3, seeds=1
    )  # scrubbed 1.2 * 0.95, its spread over members 20 % of that
    assert tables.case_table(case)["KL scrubbed (nats)"][0] == "1.14 ± 0.23"
    assert "over the 5 retrained models" in tables.spread_note(case)


def test_an_undefined_gap_is_said_to_be_so(metrics):
    case = metrics["cases"][1]
    assert tables.case_table(case)["gap closed"].tolist()[0] == tables.UNDEFINED
    assert "not told apart from retrained models (p = 0.64)" in tables.sentence(case)
    assert tables.conclusion(case).word == "no clear gap"
    assert tables.UNDEFINED in tables.console(metrics)


@pytest.mark.parametrize(
    ("members", "p_original", "why"),
    [
        (5, 0.01, "too small to say which share"),
        (5, 0.3, "not told apart from retrained models (p = 0.30)"),
        (2, None, "takes 3 retrained models to tell"),
    ],
)
def test_why_there_is_no_gap(case, members, p_original, why):
    case["members"] = members
    case["summary"]["forget"]["gap"] |= {"closed": None, "p_original": p_original}
    assert why in tables.sentence(case)
    assert why in tables.conclusion(case).reason


def test_a_share_of_a_gap_is_never_shown_without_its_interval(case, tmp_path):
    for value, low, high in ((1.96, 1.2, 3.1), (-2.5, -4.0, -1.0), (0.998, 0.99, 1.01)):
        case["summary"]["forget"]["gap"]["closed"] = {"value": value, "low": low, "high": high}
        shown = f"{percent(value)} % ({percent(low)} to {percent(high)})"
        assert tables.case_table(case)["gap closed"][0] == shown
        assert shown in tables.console({"cases": [case]})
        text = _Page(write_report(make_metrics(case), {}, tmp_path)).text
        assert shown in text
        assert f"95 %: {percent(low)} to {percent(high)}" in text


@pytest.mark.parametrize(
    ("scrubbed", "kept", "word", "said"),
    [
        (
            0.58,
            0.969,
            "matches retraining",
            "99 % of the gap is closed (95 % interval 99 to 101 %)",
        ),
        (0.4, 0.969, "matches retraining", "101 % of the gap is closed (95 % interval"),
        (1.2, 0.969, "close", "94 % of the gap is closed (95 % interval 93 to 97 %)."),
        (4.0, 0.969, "partly closed", "71 % of the gap is closed (95 % interval"),
        (9.0, 0.969, "hardly closed", "28 % of the gap is closed (95 % interval"),
        # not told from standing still
        (
            14.0,
            0.969,
            "hardly closed",
            "rose from 12.3 to 14.0 nats; two retrained models differ by 0.55: the gap grew by "
            "14 % (95 % interval -9 to 35 %).",
        ),
        (40.0, 0.969, "worse", "the gap grew by 236 % (95 % interval 168 to 296 %)."),
        (1.2, 0.9, "costly", "94 % of the gap is closed (95 % interval"),
    ],
)
def test_the_verdict_follows_from_the_numbers(scrubbed, kept, word, said):
    numbers = copy.deepcopy(CLASS_3)
    numbers["forget"] = (12.3, scrubbed, *CLASS_3["forget"][2:])
    numbers["test, retained classes"] = (*CLASS_3["test, retained classes"][:4], kept, 0.969)
    case = make_case("class 3", numbers)
    assert tables.conclusion(case).word == word
    assert said in tables.sentence(case)
    lost = tables.cost(case)
    assert (lost is not None) == (word == "costly")
    assert (
        lost is None
        or "6.9 points below the retrained models on the test, retained classes" in lost
    )


def test_it_is_worse_only_where_the_rise_is_told_from_none(case):
    """Student's paired interval, by hand; without a gap the rise alone decides."""
    case["summary"]["forget"]["gap"] |= {"closed": None, "p_original": 0.09, "p_scrubbed": 0.03}
    before = [0.021, 0.018, 0.025, 0.02, 0.016]
    for rises, word in (
        ([1e-3, 9e-4, 1.1e-3, 1e-3, 8e-4], "worse"),
        ([1e-3, -9e-4, 1.1e-3, 1e-3, -8e-4], "no clear gap"),
        ([-1e-3, -9e-4, -1.1e-3, -1e-3, -8e-4], "no clear gap"),
    ):
        for run in case["runs"]:
            run["evaluation"]["parts"]["forget"] |= {
                "original_each": before,
                "scrubbed_each": [x + y for x, y in zip(before, rises, strict=True)],
            }
        found = tables.growth(case, "forget")
        mean, std = statistics.mean(rises), statistics.stdev(rises)
        half = 2.7764 * std / math.sqrt(5)  # Student's, 4 degrees of freedom
        assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-4)
        assert tables.conclusion(case).word == word
        console = " ".join(tables.console({"cases": [case]}).split())
        assert ("the change is 9.6e-04 (95 % interval 8.2e-04 to 0.0011)" in console) == (
            word == "worse"
        )


def test_both_answers_are_beside_each_other(case):
    told = case["summary"]["forget"]["gap"]
    for run in case["runs"]:  # as JSON holds what is not finite
        run["evaluation"]["parts"]["forget"]["original_each"] = [None] * 5
    assert math.isnan(tables.growth(case, "forget").low)
    for p, said in ((0.004, "can still be told from"), (0.4, "cannot be told from")):
        told["p_scrubbed"] = p
        sentence = f"The scrubbed models {said} retrained ones (KL 2.18 times the floor, p = "
        assert str(tables.likeness(case)).startswith(sentence)
        assert sentence in " ".join(tables.console({"cases": [case]}).split())
    told["p_scrubbed"] = None
    assert tables.likeness(case) is None


def test_rounding_errors_match_retraining(case):
    """The floor of a convex problem is smaller still."""
    case["summary"]["forget"]["kl_scrubbed"]["mean"] = 2.4e-10
    case["summary"]["forget"]["floor"]["mean"] = 1e-13
    closed = {"value": 1 - 1e-8, "low": 1 - 2e-8, "high": 1 - 1e-9}
    case["summary"]["forget"]["gap"] |= {"closed": closed, "p_scrubbed": 0.0}
    assert tables.conclusion(case).word == "matches retraining"
    assert "below 1e-09 nats" in str(tables.likeness(case))
    assert "> 99.9 % of the gap is closed" in tables.sentence(case)


def test_a_squared_error_is_not_a_percentage_and_small_is_good():
    numbers = {"forget": (1.0, 0.2, 0.1, 0.5, 2.0, 2.1), "test": (0.3, 0.2, 0.1, 1.0, 1.5, 1.0)}
    case = make_case("houses", numbers, score=Gaussian.score)
    assert "squared error scrubbed" in tables.case_table(case).columns
    assert "0.50 above the retrained models on the test data" in str(tables.cost(case))
    assert "%" not in plots.plot_scores(case).get_xlabel()


def test_missing_numbers_are_dashes(metrics, tmp_path):
    summary = metrics["cases"][0]["summary"]["forget"]
    for key in ("kl_scrubbed", "score_scrubbed"):
        summary[key] = {"mean": None, "std": None, "n": 3}
    summary["gap"] = {"closed": None, "p_original": None, "p_scrubbed": None}
    assert tables.conclusion(metrics["cases"][0]).word == "not measured"
    row = tables.case_table(metrics["cases"][0]).iloc[0]
    assert row["KL scrubbed (nats)"] == row["accuracy scrubbed (%)"] == "–"
    assert row["gap closed"] == tables.UNDEFINED
    assert "nan" not in tables.console(metrics)
    text = _Page(write_report(metrics, {}, tmp_path)).text
    assert re.search(r"\b(nan|None)\b", text) is None
    plots.plot_parts(metrics["cases"][0])


def test_a_case_without_a_score_is_refused(case):
    del case["summary"]["forget"]["floor"]
    with pytest.raises(DataError, match="summary / forget / floor"):
        tables.case_table(case)


def test_markdown_escapes_and_aligns():
    frame = pd.DataFrame({"part": ["a|b", None], "KL": ["1.0\n± 0.1", float("nan")]})
    lines = markdown_table(frame, frame.itertuples(index=False)).splitlines()
    assert lines[1] == "| :--- | --------: |"
    assert lines[2] == "| a\\|b | 1.0 ± 0.1 |"
    assert lines[3] == "| –    |         – |"
    assert len({len(line) for line in lines}) == 1


def test_an_older_file_is_drawn_and_its_tables_say_what_to_do(case):
    del case["score_unit"], case["score_higher_is_better"]
    for part in case["summary"].values():
        del part["gap"]
        part["gap_closed"] = {"mean": 1.96, "std": None, "n": 1}
    plots.plot_parts(case)
    plots.plot_scores(case)
    with pytest.raises(DataError, match=r"summary / forget / gap.*Run the configuration again"):
        tables.console({"cases": [case]})


@pytest.mark.parametrize(
    ("likelihood", "shares", "console", "page"),
    [
        (
            Categorical(),
            (0.953, 0.972),
            ("accuracy (%)", " 95.3 "),
            ("95.3 %", "retrained 97.2 ± 0.4 %"),
        ),
        (
            Bernoulli(),
            (0.953, 0.972),
            ("label accuracy (%)", " 95.3 "),
            ("95.3 %", "retrained 97.2 ± 0.4 %"),
        ),
        (Gaussian(), (1.152, 0.97), ("squared error\n", " 1.15 "), ("1.15", "retrained 0.97")),
    ],
)
def test_a_score_is_shown_in_the_unit_of_its_likelihood(
    likelihood, shares, console, page, tmp_path
):
    scrubbed, retrained = shares
    numbers = dict.fromkeys(("forget", "test"), (12.3, 1.2, 0.55, retrained, scrubbed, retrained))
    metrics = make_metrics(make_case("labels", numbers, score=likelihood.score))
    jsonschema.validate(metrics, load_schema())
    for words in console:
        assert words in tables.console(metrics) + "\n"
    text = " ".join(_Page(write_report(metrics, {}, tmp_path)).text.split())
    for words in page:
        assert words in text
    assert ("%" in likelihood.score.title()) == ("%" in page[0])
    assert "0.95" not in text
    assert "115" not in text


def test_the_console_fits_a_terminal(metrics):
    long = make_case("a case whose name " + "goes on and on " * 12, CLASS_3)
    summary = long["summary"]
    long["summary"] = {
        f"{part} {'and much more ' * 4 if part != 'forget' else ''}".strip(): summary[part]
        for part in summary
    }
    for scale in (1e-6, 1e6):
        wide = make_case(
            "wide",
            {p: (*(scale * v for v in values[:3]), *values[3:]) for p, values in CLASS_3.items()},
        )
        text = tables.console(make_metrics(*metrics["cases"], long, wide))
        assert max(map(len, text.splitlines())) <= 100
    assert "class 3: close." in text
    row = r"forget +12\.3 +1\.20 ± 0\.06 +0\.55 +94 % \(93 to 97\) +100\.0 +2\.1 +0\.0"
    assert re.search(row, text)
    assert tables.CAVEAT in text


# the page


class _Page(HTMLParser):
    """What a browser would read: text, references and ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}:
                self.references.append(str(value))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def figures(case, tmp_path) -> dict[str, Path]:
    drawn: dict[str, Axes] = {
        "KL": plots.plot_parts(case),
        "scores": plots.plot_scores(case),
        "trade-off": plots.plot_tradeoff(make_sweep()),
    }
    return {
        f"class 3: {kind}": plots.save_figure(ax.figure, tmp_path / kind)[1]
        for kind, ax in drawn.items()
    }


def test_the_page_asks_for_nothing_over_a_network(metrics, figures, tmp_path):
    page = _Page(write_report(metrics, figures, tmp_path / "new"))
    assert all(r.startswith("#") or r == "data:," for r in page.references)
    assert re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//", page.source) is None
    assert re.search(r"url\(\s*[\"']?(?!#)|@import", page.source) is None
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'<> ]+", page.source)) <= namespaces
    assert "default-src 'none'" in page.source
    script = re.search(r"<script>(.*)</script>", page.source, re.DOTALL)
    assert script is not None
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page.source  # or tables would not sort


def test_the_page_gives_the_answer_first_and_then_everything_else(metrics, figures, tmp_path):
    page = _Page(write_report(metrics, figures, tmp_path))
    text = page.text
    order = [
        "94 % of the gap is closed",
        "An estimate, not a certificate",
        "1.20 ± 0.06",
        "no (ε, δ) guarantee",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    for words in (
        "fell from 12.3 to 1.20 nats",
        "0.55 ± 0.06",
        "96.6",
        "training.weight_decay",
        "0.0005",
        "64, 64",
    ):
        assert words in text
    assert metrics["command"] in text
    assert "1 March 2026, 12:00 UTC" in text
    assert page.tags.count("svg") == 3
    answer, first, second = (
        text.index("94 % of the gap"),
        text.index("class 3, part by"),
        text.index("random 100, part by"),
    )
    assert (
        "light dots are single draws" in text[answer:first]
    )  # the trade-off stands in the answer, the rest below
    assert "The green bar is the floor" in text[first:second]
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page.source)) | {
        r[1:] for r in page.references if r.startswith("#")
    }
    assert used <= set(page.ids)


def test_the_page_is_the_same_for_the_same_numbers(metrics, figures, tmp_path):
    first = write_report(metrics, figures, tmp_path).read_bytes()
    assert write_report(metrics, figures, tmp_path).read_bytes() == first


def test_names_cannot_become_markup(metrics, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    metrics["cases"][0]["name"] = metrics["name"] = metrics["config"]["data"]["name"] = evil
    page = _Page(write_report(metrics, {}, tmp_path))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.text.count(evil) >= 3


def test_a_hostile_figure_is_disarmed_and_a_broken_one_refused(metrics, tmp_path):
    bad = tmp_path / "bad.svg"
    bad.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'onload="x()"><style>@import url(https://e.org/a.css); *{fill:red}</style>'
        '<script>x()</script><image href="https://e.org/b"/>'
        '<rect id="r" style="fill: url(https://e.org/c)" clip-path="url(#r)"/>'
        '<use xlink:href="https://e.org/d"/></svg>'
    )
    page = _Page(write_report(metrics, {"A figure of mine": bad}, tmp_path))
    assert "e.org" not in page.source
    assert "onload" not in page.source
    assert page.tags.count("script") == 1
    assert 'clip-path="url(#f0-r)"' in page.source
    assert "#f0-svg *{fill:red}" in page.source
    assert "A figure of mine" in page.text
    bad.write_text("not an SVG file")
    with pytest.raises(StorageError, match="an SVG file"):
        write_report(metrics, {"x": bad}, tmp_path)
    with pytest.raises(StorageError, match="missing"):
        write_report(metrics, {"x": tmp_path / "missing.svg"}, tmp_path)


def test_numbers_of_no_size_are_readable():
    assert number(math.inf) == "∞"
    assert plus_minus(3e-5, 1e-5) == "3.0e-05 ± 1e-05"
    assert plus_minus(0.0, 0.25) == "0.00 ± 0.25"
