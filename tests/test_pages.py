"""Both pages in a real browser, made from a small model that is really trained, forgotten and
retrained."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
from browser import OpenPage, chromium, needs_chromium

from fisher_forget.cli import main
from fisher_forget.report.plots.hover import SVG, explain, explain_all, titled

PAGES = ("report.html", "evaluation.html")
WIDTHS = (390, 1280)
CONFIG = """
name: pages
data: {name: digits, max_train: 300, max_test: 120}
model: {name: mlp, options: {hidden: [16]}}
training: {epochs: 100, batch_size: 50, lr: 0.1, weight_decay: 0.005}
forget_sets:
  - {name: class 3, kind: class, label: 3}
  - {name: 20 random samples, kind: random, count: 20}
seeds: [0, 1]
noise_seed: 0
retrained: 5
progress: false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    config = place / "config.yaml"
    config.write_text(CONFIG + f"out: {place}\n")
    assert main(["run", str(config)]) == 0
    assert main(["evaluate", str(place / "pages")]) == 0
    return place / "pages"


@pytest.fixture(scope="module")
def open_page() -> Iterator[OpenPage]:
    with chromium() as opener:
        yield opener


@needs_chromium
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
class TestPages:
    def test_fits_its_window_without_errors_or_requests(self, folder, open_page, name, width):
        page = open_page((folder / name).as_uri(), width)
        assert page.errors == []
        assert [r for r in page.requests if not r.startswith("data:")] == []
        assert page.evaluate("innerWidth") == width
        assert page.overflow() <= 0

    def test_shows_the_answer_before_anything_else(self, folder, open_page, name, width):
        page = open_page((folder / name).as_uri(), width)
        heights = page.evaluate(
            "['.card .word', '.card .lead', '.card .value', '.plate svg', 'table', 'summary',"
            " 'pre'].map(s => document.querySelector(s).getBoundingClientRect().top)"
        )
        word, lead, value, plot, table, more, again = heights
        assert word < lead < value < table < more < again
        assert word < plot < table
        assert (
            len(
                page.evaluate(
                    "[...document.querySelector('.card').querySelectorAll('.value')].map(n => 1)"
                )
            )
            == 3
        )
        text = page.evaluate("document.body.textContent")
        for words in (
            "An estimate, not a certificate",
            "approximate",
            "training.weight_decay",
            "processor",
        ):
            assert words in text
        assert re.fullmatch(
            r"fisher-forget (run|evaluate) \S*/pages\S*",
            page.evaluate("document.querySelector('pre').textContent"),
        )

    def test_tables_sort_by_a_click(self, folder, open_page, name, width):
        page = open_page((folder / name).as_uri(), width)
        rows = "[...document.querySelector('table').tBodies[0].rows]"
        column = rows + ".map(r => r.cells[%d].textContent.trim())"
        at = 1 if name == "report.html" else 2  # samples; the retrained value
        before = page.evaluate(column % at)
        click = f"document.querySelectorAll('table th button')[{at}].click()"
        page.evaluate(click)
        up = page.evaluate(column % at)
        page.evaluate(click)
        number = [float(cell.replace(",", "")) if cell != "–" else float("-inf") for cell in up]
        assert sorted(up) == sorted(before)
        assert number == sorted(number)
        assert page.evaluate(column % at)[0] == up[-1]

    def test_marks_say_what_they_are(self, folder, open_page, name, width):
        page = open_page((folder / name).as_uri(), width)
        # Each mark's words, and whether the pointer at its middle meets it or another with words.
        marks = page.evaluate("""
            [...document.querySelectorAll('.plate use')].filter(m => m.querySelector('title'))
            .map(m => {
                m.scrollIntoView({block: 'center', inline: 'center'})
                const box = m.getBoundingClientRect()
                const x = box.x + box.width / 2, y = box.y + box.height / 2
                const hit = document.elementFromPoint(x, y)
                const titled = hit === m || hit?.querySelector?.('title') != null
                return [m.querySelector('title').textContent, titled]
            })
        """)
        metrics = json.loads((folder / "metrics.json").read_text())
        if name == "report.html":
            scores = metrics["cases"][0]["summary"]["forget"]["kl_scrubbed"]["mean"]
            assert f"scrubbed\nforgotten data\nKL(retrained ‖ model) (nats): {scores:.3g}" in [
                title for title, _ in marks
            ]
        else:
            rows = json.loads((folder / "evaluation.json").read_text())["class 3"]["scores"]
            row = next(
                r
                for r in rows
                if (r["metric"], r["part"], r["method"]) == ("kl", "forget", "fisher-forget")
            )
            assert any(
                t.startswith(f"fisher-forget\nkl, forget: {row['value']:.3g} nats\nretrained")
                for t, _ in marks
            )
        assert sum(hit for _, hit in marks) > 0.9 * len(marks)  # the pointer reaches them


@needs_chromium
def test_the_browser_sees_errors_and_requests(open_page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name='viewport' content='width=device-width'><body style='width: 500px'>"
        "<img src='http://127.0.0.1:9/missing.png'>"
        "<script>console.warn('careful'); undefinedFunction()</script>"
    )
    page = open_page(bad.as_uri(), 390)
    assert {"careful", "undefinedFunction is not defined"} <= set(page.errors)
    assert page.requests == ["http://127.0.0.1:9/missing.png"]
    assert page.overflow() > 0


class TestTitles:
    def saved(self, figure) -> list[str]:
        explain_all(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg")
        plt.close(figure)
        return [
            e.text
            for e in ElementTree.fromstring(titled(buffer.getvalue())).iter(f"{{{SVG}}}title")
        ]

    def test_legend_and_axes_give_the_words(self):
        figure, ax = plt.subplots()
        ax.plot([1.5, 2.5], [0, 1], "o", color="red", label="ours")
        ax.plot([3.5], [1], "o", color="red")  # of the same look: the same series
        ax.errorbar([1.5], [0], xerr=[0.1], fmt="none", capsize=2)
        ax.plot([1, 2], [0, 1])  # a line without markers
        ax.set(xlabel="KL\n(nats)", yticks=[0, 1], yticklabels=["forget", "retain"])
        assert self.saved(figure) == [
            "ours\nforget\nKL (nats): 1.5",
            "ours\nretain\nKL (nats): 2.5",
            "ours\nretain\nKL (nats): 3.5",
        ]

    def test_own_words_win(self):
        figure, ax = plt.subplots()
        explain(ax.scatter([1, 2], [3, 4]), ["<one>", "two & more"])
        assert self.saved(figure) == ["<one>", "two & more"]

    def test_no_title_rather_than_a_wrong_one(self):
        figure, ax = plt.subplots()
        ax.plot([1, 0, 3], [1, 2, 3], "o", label="on a logarithmic axis, which has no 0")
        ax.set_xscale("log", nonpositive="mask")
        assert self.saved(figure) == []
