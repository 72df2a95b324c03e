"""The benchmark of poison: its cells and tables."""

from __future__ import annotations

import numpy as np

from benchmarks import poison
from fisher_forget._util.files import read_json


def test_the_tables_of_the_page_are_those_that_were_measured() -> None:
    page, made = poison.PAGE.read_text("utf-8"), poison.tables(read_json(poison.STORED))
    assert "digits corrected" in made
    for name, table in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        assert page.split(begin)[1].split(end)[0] == f"\n{table}\n\n"


def test_no_choice_is_made_on_what_is_reported() -> None:
    """Settings come from another network and fault, known and validation samples."""
    assert poison.TUNED_ON not in poison.SEEDS
    tuned = poison.World(poison.SETUPS["digits"], "trigger", poison.TUNED_ON)
    images = {row.tobytes() for row in tuned.data.test.tensors[0].numpy()}
    assert not images & {row.tobytes() for row in tuned.validation.tensors[0].numpy()}


def test_the_stored_numbers_say_what_the_page_says() -> None:
    """On digits a trigger is undone from a tenth of it, as by retraining without all of it, and by
    no method without what was found."""
    cells = read_json(poison.STORED)["cells"]

    def mean(row: str, gamma: float, fault: str = "trigger") -> float:
        found = poison.values(cells, "digits", fault, gamma, row, "corrected")
        assert len(found) == len(poison.SEEDS)
        return float(np.mean(found))

    whole = mean(poison.WHOLE, 0.0)
    for gamma in (0.1, 0.5):
        assert mean("other-label + found", gamma) > whole - 10
    for row in ("other-label", "fisher-forget", "ssd", "scrub", "finetune", "retrain"):
        assert mean(row, 0.1) < whole - 30


def test_a_cell_without_a_seed_is_empty() -> None:
    assert poison.table({}, "digits", "clean") == ""
    assert poison.shown([]) == ""
    assert poison.shown([50.0, 60.0, 70.0]) == "60 (50 to 70)"
    assert poison.shown([50.0, 60.0]) == "55 (50 to 60, 2 of 3)"
    assert poison.shown([50.0]) == "50 (1 of 3)"
