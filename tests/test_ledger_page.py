"""What people see of a ledger: the page, the table, JSON, the command."""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from browser import chromium, needs_chromium
from test_ledger import read_only, ten_entries

from fisher_forget import FisherForgetWarning, StorageError
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
    assert read.check[:1].tolist() == ["not shown"]
    assert told["seal"] == Ledger(folder).seal
    assert read.samples.tolist() == [2, 1, 1]
    assert read.served.notna().tolist() == [True, False, False]
    assert read.done.str.endswith(" UTC").tolist()[0]
    text = page.read_text()
    assert "Not carried out yet: 1. Overdue: none." in text
    assert "no public key was given" in text
    assert Ledger(folder).seal in text
    late = Ledger(folder).requests["r-3"].due + timedelta(days=1)
    assert ledger_table(Ledger(folder), late).late.tolist() == ["", "", "overdue by 1 day"]


def altered(folder):
    path = folder / LEDGER
    path.write_bytes(path.read_bytes().replace(b"asked twice", b"asked thrice"))


def failed_check(folder):
    ledger = Ledger(folder)
    says = "The forgotten samples are better known than unseen ones, so not forgotten"
    check = {"name": "unseen samples", "verdict": "wrong", "says": says, "value": 0.1}
    with ledger.request([1], who="ticket 5") as evidence:
        evidence |= {"forgotten": 7, "self_check": [check]}
    return ledger


def test_an_altered_one_is_written_and_says_so_first(folder, tmp_path):
    altered(folder)
    page, _, content = write_ledger(folder, tmp_path / "audit")
    text = page.read_text()
    assert "This record is NOT as it was written." in text
    assert text.index("NOT as it was written") < text.index("Line 8: altered")
    assert text.index("Line 8: altered") < text.index("Requests: 3.")
    assert "names the one before it" not in text
    told = json.loads(content.read_text())
    assert told["verified"]["wrong"]
    assert len(told["entries"]) == 9


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"{}\n[]\n", b"\xff\n"])
def test_nothing_that_can_be_read(folder, tmp_path, content):
    (folder / LEDGER).write_bytes(content)
    text = write_ledger(folder, tmp_path / "audit")[0].read_text()
    assert "This record is NOT as it was written." in text
    assert "No request can be read." in text


def test_a_seal_that_is_missing(folder, tmp_path):
    text = write_ledger(folder, tmp_path / "audit", known="0" * 64)[0].read_text()
    assert "This record is NOT as it was written." in text


def test_what_the_check_said_is_at_the_top_and_in_its_own_words(tmp_path):
    ledger = failed_check(tmp_path / "l")
    ledger.record("rebased", mark="m")
    assert ledger_table(ledger).check.tolist() == ["NOT forgotten"]
    text = write_ledger(tmp_path / "l", tmp_path / "audit")[0].read_text()
    assert "check says &#34;NOT forgotten&#34;: r-1" in text.split("<h2>")[0]
    assert "<dd>NO. The forgotten samples are better known than unseen ones" in text
    assert "{&#39;name" not in text
    assert "those of earlier requests included</dt><dd>7</dd>" in text
    assert "became the start of all later requests" in text


def test_who_was_served_late(tmp_path):
    ledger = Ledger(tmp_path / "l")
    due = datetime.now(UTC) - timedelta(days=3, hours=2)
    for _ in range(2):
        with pytest.warns(FisherForgetWarning, match="is overdue"), ledger.request([1], due=due):
            pass
    ledger.serve("r-1")
    assert ledger_table(ledger).late.tolist() == ["served 3 days late", "overdue by 3 days"]
    assert "served 3 days late" in write_ledger(tmp_path / "l", tmp_path / "audit")[0].read_text()


def test_a_read_only_copy_is_exported(folder, tmp_path):
    out = Path(tempfile.mkdtemp())
    out.chmod(0o777)
    with read_only(folder) as copied:
        page = write_ledger(copied, out)[0]
    assert "Requests: 3." in page.read_text()
    shutil.rmtree(out)


@needs_chromium
def test_nothing_is_closed_in_print(folder, tmp_path):
    path = write_ledger(folder, tmp_path / "audit")[0]
    opened = "[...document.querySelectorAll('details')].map(d => d.open)"
    with chromium() as open_page:
        page = open_page(path.as_uri(), 1280)
        assert not any(page.evaluate(opened))
        page.page.pdf()
        assert len(page.evaluate(opened)) == 4
        assert all(page.evaluate(opened))


def test_words_of_strangers_are_shown_as_words(tmp_path):
    ledger = Ledger(tmp_path / "x")
    ledger.ask([1], who="<script>alert(1)</script>")
    page = write_ledger(tmp_path / "x", tmp_path / "audit")[0].read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_characters_that_are_none(tmp_path, capsys):
    """Neither do they reach a terminal as commands, nor is a file not written for them."""
    ledger = Ledger(tmp_path / "x")
    ledger.ask([1], who="\x1b[2J\nr-9 served")
    ledger.fail("r-1", "no file \udcff")
    page, table, content = write_ledger(tmp_path / "x", tmp_path / "audit")
    assert json.loads(content.read_text())["requests"][0]["evidence"]["reason"] == "no file \udcff"
    assert pd.read_csv(table).who.tolist() == ["\\x1b[2J\\nr-9 served"]
    assert "no file \\udcff" in page.read_text()
    assert main(["ledger", str(tmp_path / "x")]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("odd", [{"a": [1, {"b": None}]}, [], [[1], [2]], None, "0" * 64, 1.5])
@pytest.mark.parametrize("name", ["self_check", "forgotten", "samples", "x<y>"])
def test_evidence_of_any_kind(tmp_path, name, odd):
    with Ledger(tmp_path / "x").request([1]) as evidence:
        evidence[name] = odd
    assert "not shown" in write_ledger(tmp_path / "x", tmp_path / "audit")[0].read_text()


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
        assert "Requests: 3. Not carried out yet: 1. Overdue: none. The record is intact" in shown
        assert f"Seal of the last entry: {Ledger(folder).seal}" in shown
        assert (tmp_path / "out" / "ledger.html").exists()

    def test_serves(self, folder, capsys):
        Ledger(folder).done("r-3")
        assert main(["ledger", str(folder), "--serve", "r-3"]) == 0
        assert Ledger(folder).requests["r-3"].state == "served"

    def test_what_was_altered_is_named(self, folder, tmp_path, capsys):
        altered(folder)
        assert main(["ledger", str(folder), "--export", str(tmp_path / "out")]) == 2
        assert "Line 8: altered" in capsys.readouterr().err
        assert "Line 8: altered" in (tmp_path / "out" / "ledger.html").read_text()

    def test_a_check_that_says_no(self, tmp_path, capsys):
        failed_check(tmp_path / "l")
        assert main(["ledger", str(tmp_path / "l")]) == 0
        assert 'Whose own check says "NOT forgotten": r-1.' in capsys.readouterr().out
        serve = ["ledger", str(tmp_path / "l"), "--serve", "r-1"]
        assert main(serve) == 2
        assert "says: NOT forgotten" in capsys.readouterr().err
        assert main([*serve, "--although", "retrained models say otherwise"]) == 0
        assert Ledger(tmp_path / "l").requests["r-1"].state == "served"

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
