"""What people see of a ledger: the page, the table, JSON, the command."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch
from browser import chromium, needs_chromium
from safetensors.torch import save_file
from test_ledger import read_only, ten_entries

from fisher_forget import FisherForgetWarning, StorageError
from fisher_forget.cli import main
from fisher_forget.ledger import Ledger, evidence, model_fingerprint, new_keys
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
    verified = {"signatures": False, "key": None, "wrong": [], "unproven": ""}
    assert told["verified"] == verified
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


def test_an_altered_entry_takes_nothing_else_with_it(folder, tmp_path):
    """The request is still told of, as the entry now says, and marked."""
    path = folder / LEDGER
    path.write_bytes(path.read_bytes().replace(b"ticket 1", b"ticket 8"))
    page, table, content = write_ledger(folder, tmp_path / "audit")
    assert pd.read_csv(table).who[0] == "ticket 8"
    told = json.loads(content.read_text())
    assert [r["altered"] for r in told["requests"]] == [True, False, False]
    text = page.read_text()
    assert "Requests: 3." in text
    assert "nobody asked for" not in text
    assert re.search(r'r-1 <span class="word small poor">altered', text)


def test_a_key_of_another_is_no_alteration(tmp_path):
    public, other = new_keys(tmp_path / "k"), new_keys(tmp_path / "other")
    ten_entries(tmp_path / "l", key=tmp_path / "k")
    text = write_ledger(tmp_path / "l", tmp_path / "audit", other)[0].read_text()
    assert "NOT as it was written" not in text
    assert "is not signed with the key given" in text
    assert fingerprint_by_hand(other) in text
    text = write_ledger(tmp_path / "l", tmp_path / "audit", public)[0].read_text()
    assert "is as it was written" in text
    assert fingerprint_by_hand(public) in text


def fingerprint_by_hand(public):
    """A PEM file is the DER in base64, between two lines."""
    return hashlib.sha256(b64decode("".join(public.read_text().splitlines()[1:-1]))).hexdigest()


def test_what_was_not_shown_is_counted(folder, tmp_path):
    text = write_ledger(folder, tmp_path / "audit")[0].read_text()
    assert "Done, but not shown to be forgotten: 1." in text.split("<h2>")[0]


def test_purges_are_told_apart(tmp_path):
    ledger = Ledger(tmp_path / "l")
    ledger.record("purged", step="begun", files={"a": "removed", "b": "rewritten"})
    ledger.record("purged", step="done", files={"a": "removed"})
    text = write_ledger(tmp_path / "l", tmp_path / "audit")[0].read_text()
    assert "a purge was begun, of 2 files" in text
    assert "a purge was done, of 1 file that" in text


def test_numbers_are_short(tmp_path):
    with Ledger(tmp_path / "l").request([1]) as evidence:
        evidence["noise"] = 0.0053570347618116
    text = write_ledger(tmp_path / "l", tmp_path / "audit")[0].read_text()
    assert "<dd>0.0054</dd>" in text
    assert "0.00535" not in text


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


LONG = "Aktenzeichen-" + "0" * 60 + " of the office that is responsible for the south"


@needs_chromium
def test_no_column_is_hidden(tmp_path):
    """On paper (A4 and Letter, 12 mm of margin) and on screens, with long names and a late one."""
    due = datetime.now(UTC) - timedelta(days=58)
    ledger = Ledger(tmp_path / "l")
    for _ in range(2):
        with pytest.warns(FisherForgetWarning), ledger.request([1], who=LONG, due=due) as evidence:
            evidence |= {"model_after": "0123456789abcdef", "forgotten": 1}
    ledger.serve("r-1")
    path = write_ledger(tmp_path / "l", tmp_path / "audit")[0]
    hidden = "(s => s.scrollWidth - s.clientWidth)(document.querySelector('.scroll'))"
    wide = "[...document.querySelectorAll('details')].every(d => d.open = true) && "
    wide += "document.querySelector('details dd').offsetWidth / document.body.offsetWidth"
    with chromium() as open_page:
        for width, media in ((390, "screen"), (768, "screen"), (1200, "screen"), (703, "print")):
            page = open_page(path.as_uri(), width)
            page.page.emulate_media(media=media)
            assert page.evaluate(hidden) <= 0, (width, media)
            assert page.overflow() <= 0
            assert page.evaluate(wide) > 0.5


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
        assert "Requests: 3. Not carried out yet: 1. Overdue: none. Done, but not shown" in shown
        assert "to be forgotten: 1. The record is intact (signatures not checked" in shown
        assert f"Seal of the last entry: {Ledger(folder).seal}" in shown
        assert (tmp_path / "out" / "ledger.html").exists()

    def test_serves(self, folder, capsys):
        Ledger(folder).done("r-3")
        assert main(["ledger", str(folder), "--serve", "r-3"]) == 0
        assert Ledger(folder).requests["r-3"].state == "served"

    def test_what_was_altered_is_named(self, folder, tmp_path, capsys):
        altered(folder)
        assert main(["ledger", str(folder), "--export", str(tmp_path / "out")]) == 3
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
        assert "on the command line --key" in capsys.readouterr().err
        assert (
            main(["ledger", str(tmp_path / "y"), "--serve", "r-3", "--key", str(tmp_path / "k")])
            == 0
        )
        assert main(["ledger", str(tmp_path / "y"), "--public-key", public]) == 0
        other = str(new_keys(tmp_path / "other"))
        assert main(["ledger", str(tmp_path / "y"), "--public-key", other]) == 3
        said = capsys.readouterr().err
        assert "not as it was written" not in said
        assert "not signed with this key" in said

    def test_whose_model(self, tmp_path, capsys):
        first, second, third = (torch.nn.Linear(2, 2) for _ in range(3))
        ledger = Ledger(tmp_path / "l")
        for name, before, after in ((1, first, second), (2, first, third)):
            with ledger.request([name]) as told:
                told |= evidence("m", before, after, retained=1, forgotten=1)
        ledger.ask([3])
        path = tmp_path / "model.safetensors"
        for model, says in (
            (first, "model before r-1, r-2, and may hold"),
            (second, "model after r-1. A later one was made for r-2: this one may hold"),
            (third, "model after r-2. None was made yet for r-3: it may hold"),
        ):
            save_file(model.state_dict(), path)
            assert main(["ledger", str(tmp_path / "l"), "--model", str(path)]) == 3
            shown = capsys.readouterr()
            assert says in shown.out
            assert model_fingerprint(model) in shown.out
            assert "which may hold samples asked for" in shown.err
        ledger.withdraw("r-3", "asked by mistake")
        assert main(["ledger", str(tmp_path / "l"), "--model", str(path)]) == 0
        ledger.record("rebased", mark="m", model=model_fingerprint(third))
        assert main(["ledger", str(tmp_path / "l"), "--model", str(path)]) == 0
        assert "It is without all samples asked for until" in capsys.readouterr().out
        save_file(torch.nn.Linear(2, 2).state_dict(), path)
        assert main(["ledger", str(tmp_path / "l"), "--model", str(path)]) == 3
        assert "expected a model on record" in capsys.readouterr().err

    def test_what_is_recorded(self, tmp_path, capsys):
        """Without the salt, which is not needed for that."""
        ledger = Ledger(tmp_path / "l", salt=tmp_path / "salt")
        for sample in range(2):
            ledger.ask([sample])
        ledger.done("r-1")
        (tmp_path / "salt").unlink()
        command = ["ledger", str(tmp_path / "l")]
        assert main([*command, "--serve", "r-1", "--told", "by mail"]) == 0
        assert main([*command, "--withdraw", "r-2", "--reason", "asked twice"]) == 0
        ledger.read()
        first, second = ledger.requests.values()
        assert (first.state, first.evidence) == ("served", {"told": "by mail"})
        assert (second.state, second.evidence) == ("withdrawn", {"reason": "asked twice"})
        for option in ("told", "although", "withdraw", "reason"):
            assert main([*command, f"--{option}", "x"]) == 2
            assert f"--{option} without --" in capsys.readouterr().err

    def test_a_file_that_is_no_such_key(self, folder, tmp_path, capsys):
        """In this package's words, whole, and the true reason."""
        public = new_keys(tmp_path / "k")
        text = public.read_text()
        for content, says in (
            ((tmp_path / "k").read_text(), "which holds a private key;"),
            ("no key", "which holds no key;"),
            (text[:40] + "?" + text[41:], "which holds a public key, damaged;"),
            (None, "No such file or directory;"),
        ):
            path = tmp_path / "given"
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content)
            assert main(["ledger", str(folder), "--public-key", str(path)]) == 2
            said = capsys.readouterr().err
            assert says in said
            assert "delimiters" not in said
            assert "http" not in said

    def test_matplotlib_is_not_needed(self, folder):
        """It takes a second, and warns of a home folder that is not there."""
        code = (
            f"from fisher_forget.cli import main; import sys; main(['ledger', {str(folder)!r}]); "
        )
        code += "sys.exit('matplotlib' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_no_ledger(self, tmp_path):
        with pytest.raises(StorageError, match="without a ledger"):
            write_ledger(tmp_path, tmp_path / "out")
        assert main(["ledger", str(tmp_path / "none")]) == 2
        assert not (tmp_path / "none").exists()
