"""What people see of a ledger: the page, the table, JSON, the command."""

from __future__ import annotations

import json
from datetime import timedelta

import pandas as pd
import pytest
from browser import chromium, needs_chromium
from test_ledger import ten_entries

from fisher_forget import StorageError
from fisher_forget.cli import main
from fisher_forget.ledger import Ledger, new_keys
from fisher_forget.ledger.ledger import LEDGER
from fisher_forget.report.pages.ledger import ledger_table, write_ledger


@pytest.fixture
def folder(tmp_path):
    ten_entries(tmp_path / "ledger")
    return tmp_path / "ledger"


def test_all_three_say_the_same(folder, tmp_path):
    page, table, content = write_ledger(folder, tmp_path / "audit")
    told = json.loads(content.read_text())
    assert [r["state"] for r in told["requests"]] == ["served", "withdrawn", "under way"]
    assert told["verified"] == {"signatures": False, "wrong": []}
    assert len(told["entries"]) == 10
    read = pd.read_csv(table)
    assert read.state.tolist() == ["served", "withdrawn", "under way"]
    assert read.samples.tolist() == [2, 1, 1]
    assert read.served.notna().tolist() == [True, False, False]
    assert read.done.str.endswith(" UTC").tolist()[0]
    text = page.read_text()
    assert "Not carried out yet: 1. Overdue: none." in text
    assert "no public key was given" in text
    late = Ledger(folder).requests["r-3"].due + timedelta(days=1)
    assert ledger_table(Ledger(folder), late).overdue.tolist() == [False, False, True]


def test_words_of_strangers_are_shown_as_words(tmp_path):
    ledger = Ledger(tmp_path / "x")
    ledger.ask([1], who="<script>alert(1)</script>")
    page = write_ledger(tmp_path / "x", tmp_path / "audit")[0].read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@needs_chromium
def test_the_page_asks_for_nothing(folder, tmp_path):
    path = write_ledger(folder, tmp_path / "audit")[0]
    with chromium() as open_page:
        for width in (390, 1280):
            page = open_page(path.as_uri(), width)
            assert [r for r in page.requests if not r.startswith("data:")] == []
            assert page.errors == []
            assert page.overflow() <= 0


class TestCommand:
    def test_shows_and_exports(self, folder, tmp_path, capsys):
        assert main(["ledger", str(folder), "--export", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert "3 requests, 1 not carried out, 0 overdue; the record is intact" in shown
        assert (tmp_path / "out" / "ledger.html").exists()

    def test_serves(self, folder, capsys):
        Ledger(folder).done("r-3")
        assert main(["ledger", str(folder), "--serve", "r-3"]) == 0
        assert Ledger(folder).requests["r-3"].state == "served"

    def test_what_was_altered_is_named(self, folder, capsys):
        path = folder / LEDGER
        path.write_bytes(path.read_bytes().replace(b"asked twice", b"asked thrice"))
        assert main(["ledger", str(folder)]) == 2
        assert "Line 8: altered" in capsys.readouterr().err

    def test_signatures(self, tmp_path, capsys):
        assert main(["ledger", str(tmp_path / "x"), "--new-key", str(tmp_path / "k")]) == 2
        assert "no ledger" in capsys.readouterr().err
        ten_entries(tmp_path / "y", key=tmp_path / "k")
        public = str(tmp_path / "k.pub")
        Ledger(tmp_path / "y", key=tmp_path / "k").done("r-3")
        assert main(["ledger", str(tmp_path / "y"), "--serve", "r-3"]) == 2
        assert "with the private key that it was begun with" in capsys.readouterr().err
        assert (
            main(["ledger", str(tmp_path / "y"), "--serve", "r-3", "--key", str(tmp_path / "k")])
            == 0
        )
        assert main(["ledger", str(tmp_path / "y"), "--public-key", public]) == 0
        other = str(new_keys(tmp_path / "other"))
        assert main(["ledger", str(tmp_path / "y"), "--public-key", other]) == 2

    def test_no_ledger(self, tmp_path):
        with pytest.raises(StorageError, match="without a ledger"):
            write_ledger(tmp_path, tmp_path / "out")
        assert main(["ledger", str(tmp_path / "none")]) == 2
        assert not (tmp_path / "none").exists()
