"""A ledger shows every change, loses nothing to kills, and is written by one owner at a time."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch

from fisher_forget import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.ledger import Ledger, RequestLog, examine, new_keys, verify
from fisher_forget.ledger.entries import Entry, Head, parse
from fisher_forget.ledger.evidence import verdict
from fisher_forget.ledger.ledger import HEAD, LEDGER, SALT
from fisher_forget.ledger.owner import LOCK, OWNER, remove_orphans, saving
from fisher_forget.ledger.states import a_month_after

PROCESSES, REQUESTS = 3, 5


def ten_entries(folder: Path, **options: object) -> Ledger:
    """An opened ledger with three requests in all states."""
    ledger = Ledger(folder, **options)
    first = ledger.ask([3, 14], who="ticket 1").name
    ledger.begin(first)
    ledger.done(first, method="fisher-forget", noise=1.5)
    ledger.serve(first)
    second = ledger.ask(["user-7"]).name
    ledger.begin(second)
    ledger.withdraw(second, "asked twice")
    third = ledger.ask([15]).name
    ledger.begin(third)
    assert len(ledger.entries) == 10
    return ledger


def claimed(folder: Path, mark: str, samples: int, artefacts: tuple[str, ...] = ()) -> RequestLog:
    log = RequestLog(Ledger(folder), samples)
    log.claim(mark, [folder / name for name in artefacts])
    return log


class TestStates:
    def test_what_became_of_every_request(self, tmp_path):
        ledger = ten_entries(tmp_path)
        for reader in (ledger, Ledger(tmp_path)):
            states = {name: r.state for name, r in reader.requests.items()}
            assert states == {"r-1": "served", "r-2": "withdrawn", "r-3": "under way"}
            assert [r.name for r in reader.pending()] == ["r-3"]
            assert reader.requests["r-1"].evidence == {"method": "fisher-forget", "noise": 1.5}
            assert reader.requests["r-1"].who == "ticket 1"

    def test_no_state_is_skipped(self, tmp_path):
        ledger = ten_entries(tmp_path)
        wrong = {"serve": "r-3", "done": "r-1", "begin": "r-9"}
        for method, name in wrong.items():
            with pytest.raises(ConfigError, match="See which requests there are"):
                getattr(ledger, method)(name)
        assert len(Ledger(tmp_path).entries) == 10

    def test_a_request_is_due_within_a_month(self, tmp_path):
        ledger = Ledger(tmp_path)
        request = ledger.ask([1])
        assert abs(request.due - a_month_after(request.asked)) < timedelta(seconds=5)
        assert not request.overdue()
        late = request.due + timedelta(seconds=1)
        assert [r.name for r in ledger.overdue(late)] == ["r-1"]
        ledger.begin("r-1")
        ledger.done("r-1")
        assert ledger.overdue(late)  # until who asked has been told
        ledger.serve("r-1")
        assert not ledger.overdue(late)

    @pytest.mark.parametrize(
        ("day", "due"),
        [("2027-01-31", "2027-02-28"), ("2028-01-31", "2028-02-29"), ("2026-12-15", "2027-01-15")],
    )
    def test_a_month(self, day, due):
        assert a_month_after(datetime.fromisoformat(day)) == datetime.fromisoformat(due)

    def test_after_an_exception_or_a_kill_it_is_pending_and_due(self, tmp_path):
        ledger = Ledger(tmp_path)
        with pytest.raises(ZeroDivisionError), ledger.request([1]):
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), ledger.request([2]):
            raise KeyboardInterrupt
        with ledger.request([3]) as evidence:
            evidence["loss"] = float("nan")
        states = {n: r.state for n, r in Ledger(tmp_path).requests.items()}
        assert states == {"r-1": "failed", "r-2": "under way", "r-3": "done"}
        again = Ledger(tmp_path)
        assert [r.name for r in again.pending()] == ["r-1", "r-2"]
        assert [r.name for r in again.overdue(datetime(2030, 1, 1, tzinfo=UTC))] == [
            "r-1",
            "r-2",
            "r-3",
        ]
        again.done("r-1")
        again.withdraw("r-2", "asked by mistake")
        assert again.pending() == []
        assert Ledger(tmp_path).requests["r-3"].evidence == {"loss": None}


class TestDue:
    def test_a_time_is_asked_for(self, tmp_path):
        ledger = Ledger(tmp_path)
        beyond = datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))  # in UTC
        for bad in ("tomorrow", 3, datetime(2027, 1, 31).date(), beyond):
            with pytest.raises(ConfigError, match="the time"):
                ledger.ask([1], due=bad)
        assert not ledger.requests

    def test_without_a_zone_it_is_local_time(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TZ", "Asia/Tokyo")  # nine hours ahead, all year
        time.tzset()
        try:
            with Ledger(tmp_path).request([1], due=datetime(2030, 1, 31, 9)):
                pass
            request = Ledger(tmp_path).requests["r-1"]
            assert request.due == datetime(2030, 1, 31, 0, tzinfo=UTC)
            assert request.overdue(datetime(2030, 1, 31, 9, 1))
            assert not request.overdue(datetime(2030, 1, 31, 8, 59))
        finally:
            monkeypatch.undo()
            time.tzset()

    def test_one_that_is_over_is_recorded_with_a_warning(self, tmp_path):
        ledger, due = Ledger(tmp_path), datetime(2020, 1, 1, tzinfo=UTC)
        with pytest.warns(FisherForgetWarning, match="r-1 is overdue: it was due on 2020-01-01"):
            ledger.ask([1], due=due)
        request = ledger.requests["r-1"]
        assert request.overdue()
        assert request.late(due + timedelta(days=2)) == timedelta(days=2)
        ledger.done("r-1")
        ledger.serve("r-1")
        request = ledger.requests["r-1"]
        assert not request.overdue()
        assert request.late() == request.times["served"] - due

    def test_in_time_is_not_late(self, tmp_path):
        ledger = ten_entries(tmp_path)
        assert all(r.late() == timedelta(0) for r in ledger.requests.values())


class TestIds:
    def test_hashes_say_nothing_without_the_salt(self, tmp_path):
        one, two = Ledger(tmp_path / "a"), Ledger(tmp_path / "b")
        assert one.hashed([1, 2]) == one.hashed([1, 2]) != two.hashed([1, 2])
        assert b"ticket" not in (tmp_path / "a" / LEDGER).read_bytes()
        (tmp_path / "a" / SALT).unlink()
        with pytest.raises(StorageError, match="the salt of the ledger"):
            Ledger(tmp_path / "a").hashed([1])
        (tmp_path / "a" / SALT).write_bytes((tmp_path / "b" / SALT).read_bytes())
        with pytest.raises(StorageError, match="another salt"):
            Ledger(tmp_path / "a").hashed([1])

    def test_the_salt_is_its_owners_alone_and_may_lie_elsewhere(self, tmp_path):
        ledger = Ledger(tmp_path / "a", salt=tmp_path / "vault" / "salt")
        ledger.ask([1])
        assert not (tmp_path / "a" / SALT).exists()
        assert (tmp_path / "vault" / "salt").stat().st_mode & 0o077 == 0

    def test_numbers_and_words(self, tmp_path):
        ledger = Ledger(tmp_path)
        same = [42, np.int64(42), torch.tensor(42)]
        assert len(set(ledger.hashed(same))) == 1
        assert len(set(ledger.hashed([4, 2, "4", "2", "42", 42, "ß", "ss"]))) == 8
        for bad in (1.5, None, True, b"x", (1,)):
            with pytest.raises(ConfigError, match="an id of type"):
                ledger.hashed([bad])


class TestTampering:
    @pytest.mark.parametrize("signed", [False, True])
    def test_every_byte(self, tmp_path, signed):
        key = tmp_path / "key.pem"
        public = new_keys(key) if signed else None
        folder = tmp_path / "ledger"
        ten_entries(folder, key=key if signed else None)
        path = folder / LEDGER
        content = path.read_bytes()
        assert verify(folder, public) == []
        rng = np.random.default_rng(0)
        for at in range(len(content)):
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            assert verify(folder, public), f"byte {at} of {len(content)}"
            if not signed or at % 9 == 0:
                with pytest.raises(StorageError):
                    Ledger(folder)

    def test_every_byte_of_the_head(self, tmp_path):
        ten_entries(tmp_path)
        content = (tmp_path / HEAD).read_bytes()
        for at in range(len(content)):
            flipped = bytearray(content)
            flipped[at] ^= 2
            (tmp_path / HEAD).write_bytes(flipped)
            assert verify(tmp_path)
            with pytest.raises(StorageError):
                Ledger(tmp_path)

    def test_dropped_swapped_cut_off_and_appended(self, tmp_path):
        public = new_keys(tmp_path / "key.pem")
        folder = tmp_path / "ledger"
        ten_entries(folder, key=tmp_path / "key.pem")
        lines = (folder / LEDGER).read_bytes().splitlines(keepends=True)
        # one that follows, made by somebody without the private key
        last = parse(lines[-1][:-1])
        forged = type(last)(10, last.time, "done", "r-3", {}, last.seal, last.signature).line()
        twisted = {
            "dropped": lines[:4] + lines[5:],
            "first dropped": lines[1:],
            "swapped": [*lines[:4], lines[5], lines[4], *lines[6:]],
            "twice": [*lines[:4], lines[3], *lines[4:]],
            "cut off": lines[:-1],
            "cut off within": [*lines[:-1], lines[-1][:-9]],
            "empty": [],
            "appended": [*lines, forged],
        }
        for how, content in twisted.items():
            (folder / LEDGER).write_bytes(b"".join(content))
            assert verify(folder, public), how
            if how != "appended":  # which a killed owner leaves, too; a signature tells
                with pytest.raises(StorageError):
                    Ledger(folder)

    def test_who_has_no_private_key_cannot_write_it_anew(self, tmp_path):
        public = new_keys(tmp_path / "key.pem")
        ten_entries(tmp_path / "true", key=tmp_path / "key.pem")
        ten_entries(tmp_path / "other")
        new_keys(tmp_path / "own.pem")
        ten_entries(tmp_path / "third", key=tmp_path / "own.pem")
        assert verify(tmp_path / "true", public) == []
        for name, says in (
            ("other", "None of its entries is signed"),
            ("third", "is of the key given"),
        ):
            (unproven,) = verify(tmp_path / name, public)
            assert says in unproven
            assert examine(tmp_path / name, public).wrong == []
            assert verify(tmp_path / name) == []

    def test_a_signed_ledger_takes_no_entry_without_its_key(self, tmp_path):
        public = new_keys(tmp_path / "key.pem")
        new_keys(tmp_path / "other.pem")
        Ledger(tmp_path / "l", key=tmp_path / "key.pem").ask([1])
        Ledger(tmp_path / "plain").ask([1])
        with pytest.raises(ConfigError, match="no key for"):
            Ledger(tmp_path / "l").begin("r-1")
        with pytest.raises(ConfigError, match="another key for"):
            Ledger(tmp_path / "l", key=tmp_path / "other.pem")
        with pytest.raises(ConfigError, match="is not signed"):
            Ledger(tmp_path / "plain", key=tmp_path / "key.pem")
        Ledger(tmp_path / "l", key=tmp_path / "key.pem").begin("r-1")
        assert verify(tmp_path / "l", public) == []
        assert verify(tmp_path / "plain") == []

    def test_what_can_be_read_of_an_altered_one(self, tmp_path):
        ten_entries(tmp_path)
        path = tmp_path / LEDGER
        path.write_bytes(
            path.read_bytes().replace(b"ticket 1", b"ticket 8").replace(b"r-2", b"r-7")
        )
        reading = examine(tmp_path)
        assert len(reading.entries) == 6
        assert list(reading.requests) == ["r-1", "r-7", "r-3"]
        assert [r.name for r in reading.pending()] == ["r-3"]
        assert reading.requests["r-1"].who == "ticket 8"
        assert reading.altered == {"r-1", "r-7"}
        assert reading.wrong

    def test_a_request_whose_beginning_is_gone_is_said_once(self, tmp_path):
        """Nothing else is lost, and nothing is said of each of its entries."""
        ten_entries(tmp_path)
        path = tmp_path / LEDGER
        lines = path.read_bytes().splitlines(keepends=True)
        (at,) = (i for i, x in enumerate(lines) if b'"asked"' in x and b'"r-1"' in x)
        path.write_bytes(b"".join([*lines[:at], b"nothing\n", *lines[at + 1 :]]))
        reading = examine(tmp_path)
        assert reading.broken == ("r-1",)
        assert list(reading.requests) == ["r-2", "r-3"]
        assert reading.wrong[0] == f"Line {at + 1}: no entry of a ledger."
        assert sum("'r-1', whose beginning is not there" in w for w in reading.wrong) == 1
        assert len(reading.wrong) == 2

    @pytest.mark.parametrize("odd", [b'{"who":[]}', b"7", b"null", b'"x"'])
    def test_an_altered_line_of_any_kind(self, tmp_path, odd):
        """No line makes reading fail: whoever altered it was not careful."""
        ten_entries(tmp_path)
        path = tmp_path / LEDGER
        content = path.read_bytes()
        for name in (b"details", b"event", b"number", b"request", b"time", b"before"):
            pattern = rb'"%s":({.*?}|"[^"]*"|\d+)(?=[,}])' % name
            twisted = re.sub(pattern, b'"%s":%s' % (name, odd), content)
            assert twisted != content
            path.write_bytes(twisted)
            assert len(examine(tmp_path).wrong) > 1

    def test_entries_that_make_no_sense(self, tmp_path):
        """Whoever makes all hashes anew can write anything."""
        time_ = "2026-01-01T00:00:00+00:00"
        asked = {"who": "", "samples": ["a"], "due": time_}
        cases = {
            "of 'r-1', wh": ("done", time_, {}),
            "without who asked": ("asked", time_, asked | {"who": None}),
            "or for what": ("asked", time_, asked | {"samples": 3}),
            "the time 'soon'": ("asked", time_, asked | {"due": "soon"}),
            "the time 'now'": ("asked", "now", asked),
        }
        for at, (says, (event, when, details)) in enumerate(cases.items()):
            folder = tmp_path / str(at)
            folder.mkdir()
            entry = Entry(0, when, event, "r-1", details)
            (folder / LEDGER).write_bytes(entry.line())
            (folder / HEAD).write_bytes(Head(1, entry.seal).line())
            (wrong,) = verify(folder)
            assert says in wrong
            with pytest.raises(StorageError, match=says):
                _ = Ledger(folder).requests

    def test_an_earlier_state_is_known_by_a_hash_kept_elsewhere(self, tmp_path):
        ledger = Ledger(tmp_path)
        ledger.ask([1])
        before = {name: (tmp_path / name).read_bytes() for name in (LEDGER, HEAD)}
        ledger.begin("r-1")
        known = ledger.seal
        assert verify(tmp_path, known=known) == []
        for name, content in before.items():
            (tmp_path / name).write_bytes(content)
        assert verify(tmp_path) == []
        assert "the end is missing" in verify(tmp_path, known=known)[0]


class TestKills:
    def test_a_line_half_written(self, tmp_path):
        ten_entries(tmp_path)
        path = tmp_path / LEDGER
        content = path.read_bytes()
        for cut in (1, 50):
            path.write_bytes(content + content[:cut])
            assert len(Ledger(tmp_path).entries) == content.count(b"\n")
            Ledger(tmp_path).record("purged")
            assert verify(tmp_path) == []
            content = path.read_bytes()

    def test_between_line_and_head(self, tmp_path):
        ledger = Ledger(tmp_path)
        ledger.ask([1])
        head = (tmp_path / HEAD).read_bytes()
        ledger.begin("r-1")
        (tmp_path / HEAD).write_bytes(head)
        again = Ledger(tmp_path)
        assert again.requests["r-1"].state == "under way"
        again.done("r-1")
        assert verify(tmp_path) == []

    def test_no_space(self, tmp_path, monkeypatch):
        ledger = ten_entries(tmp_path)
        content = (tmp_path / LEDGER).read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match="No space left"):
                ledger.record("purged")
        assert (tmp_path / LEDGER).read_bytes() == content
        ledger.record("purged")
        assert verify(tmp_path) == []


PROGRAM = """
import sys
from fisher_forget.ledger import Ledger, RequestLog
folder, first = sys.argv[1], int(sys.argv[2])
log = RequestLog(Ledger(folder), 1000)
log.claim("mark", ())
for i in range(%d):
    with log.ledger.owned():
        log.ask([first + i])
        log.done()
    print(first + i, flush=True)
"""


class TestMisuse:
    def test_what_is_no_list_of_ids_is_refused(self, tmp_path):
        ledger = Ledger(tmp_path)
        for bad in ("customer 7", b"x", 3, None):
            with pytest.raises(ConfigError, match="Put it in a list"):
                ledger.ask(bad)
        for bad in (10**30, torch.ones(2)):
            with pytest.raises((ConfigError, StorageError)):
                ledger.ask([bad])
        with pytest.raises(ConfigError, match="text that can be written"):
            ledger.ask([1], who="\ud800")
        with pytest.raises(ConfigError, match="a request for no sample"):
            ledger.ask([])
        with pytest.raises(ConfigError, match="a request for no sample"), ledger.request(iter(())):
            pass
        assert not ledger.requests

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_a_ledger_is_not_copied(self, tmp_path, duplicate):
        with pytest.raises(StorageError, match=r"Open it again: Ledger\(folder\)"):
            duplicate(ten_entries(tmp_path))

    @pytest.mark.parametrize("wait", [None, -5, float("nan"), "3"])
    def test_a_wait_that_is_none(self, tmp_path, wait):
        with pytest.raises(ConfigError, match="wait="):
            Ledger(tmp_path, wait=wait)

    def test_evidence_of_any_name(self, tmp_path):
        ledger = Ledger(tmp_path)
        with ledger.request([1]) as evidence:
            evidence |= {"name": 1, "event": 2, "request": 3, 7: "seven"}
        assert ledger.requests["r-1"].evidence == {
            "name": 1,
            "event": 2,
            "request": 3,
            "7": "seven",
        }

    def test_a_folder_that_moves_away_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        ledger = Ledger("here")
        ledger.ask([1])
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        ledger.ask([2])
        assert len(Ledger(tmp_path / "here").requests) == 2
        (tmp_path / "here").rename(tmp_path / "gone")
        with pytest.raises(StorageError, match="no folder"):
            ledger.ask([3])
        (tmp_path / "here").mkdir()
        with pytest.raises(StorageError, match="without entries that were there before"):
            ledger.ask([3])

    def test_a_head_that_cannot_be_written_takes_the_entry_back(self, tmp_path, monkeypatch):
        ledger = ten_entries(tmp_path)
        with monkeypatch.context() as patched:

            def full(*_: object) -> None:
                raise StorageError("no space", "space", "Make some.")

            with ledger.owned():
                patched.setattr(Ledger, "_write_head", full)
                for _ in range(2):
                    with pytest.raises(StorageError, match="Nothing was recorded"):
                        ledger.record("purged")
        assert len(Ledger(tmp_path).entries) == 10
        ledger.record("purged")
        assert verify(tmp_path) == []

    @pytest.mark.parametrize("signed", [False, True])
    def test_many_requests_are_not_quadratic(self, tmp_path, monkeypatch, signed):
        """Nothing is read again that nobody else has written to."""
        if signed:
            new_keys(tmp_path / "k")
        ledger, reads = Ledger(tmp_path / "l", key=tmp_path / "k" if signed else None), []
        ledger.ask([0])
        whole = Path.read_bytes

        def counted(path: Path) -> bytes:
            if path.name == LEDGER:
                reads.append(path)
            return whole(path)

        monkeypatch.setattr(Path, "read_bytes", counted)
        for sample in range(1, 20):
            ledger.ask([sample])
        assert not reads


NOBODY = 65534


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A copy of a folder that this process may read and not write: root becomes somebody else."""
    place = Path(tempfile.mkdtemp())
    copied = place / "copy"
    shutil.copytree(folder, copied)
    place.chmod(0o755)
    for path in (*copied.iterdir(), copied):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.getuid() == 0
    if root:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield copied
    finally:
        if root:
            os.setresuid(0, 0, 0)
        copied.chmod(stat.S_IRWXU)
        shutil.rmtree(place)


class TestReadOnly:
    def test_can_be_read_and_not_written(self, tmp_path):
        ten_entries(tmp_path / "l")
        with read_only(tmp_path / "l") as folder:
            ledger = Ledger(folder)
            assert ledger.requests["r-1"].state == "served"
            assert ledger.hashed([3])[0] in ledger.requests["r-1"].samples
            assert verify(folder) == []
            writes = (
                lambda: ledger.ask([1]),
                lambda: ledger.done("r-3"),
                lambda: ledger.record("purged"),
            )
            for write in writes:
                with pytest.raises(StorageError, match=r"cannot be written: .*Permission denied"):
                    write()
            with pytest.raises(StorageError, match="a folder that can be made"):
                Ledger(folder / "new")
            assert len(Ledger(folder).entries) == 10

    def test_what_cannot_be_read(self, tmp_path):
        ten_entries(tmp_path)
        (tmp_path / LEDGER).unlink()
        (tmp_path / LEDGER).mkdir()
        with pytest.raises(StorageError, match="a file that can be read"):
            Ledger(tmp_path)


def finding(verdict: str, name: str = "unseen samples") -> dict[str, object]:
    return {"name": name, "verdict": verdict, "says": f"{name}: {verdict}"}


HARM = finding("wrong", "retained samples")


class TestVerdict:
    @pytest.mark.parametrize(
        ("told", "says"),
        [
            ({}, "not shown"),
            ({"exact": True}, "forgotten"),
            ({"exact": "yes"}, "not shown"),
            ({"self_check": [finding("fine")]}, "no trace found"),
            ({"model_before": "a", "model_after": "a"}, "NOT forgotten"),
            ({"model_before": "a", "model_after": "b"}, "not shown"),
            ({"self_check": [finding("fine"), finding("unknown")]}, "not shown"),
            ({"self_check": [finding("fine", "retained samples")]}, "not shown"),
            (
                {"self_check": [finding("fine"), finding("wrong", "retained samples")]},
                "others harmed",
            ),
            (
                {"self_check": [finding("wrong", "step"), finding("wrong", "retained samples")]},
                "NOT forgotten",
            ),
            ({"self_check": "fine"}, "not shown"),
            ({"self_check": [1, None]}, "not shown"),
            ({"self_check": [{"name": ["x"], "verdict": {"a": 1}}]}, "not shown"),
        ],
    )
    def test_words(self, told, says):
        assert verdict(told) == says

    @pytest.mark.parametrize("name", ["unseen samples", "retained samples"])
    def test_a_request_whose_check_says_no_is_served_with_a_reason_only(self, tmp_path, name):
        ledger = Ledger(tmp_path)
        with ledger.request([1]) as evidence:
            evidence["self_check"] = [finding("wrong", name)]
        for reason in ("", "  "):
            with pytest.raises(ConfigError, match=r"whose self-check says: .*although="):
                ledger.serve("r-1", although=reason)
        assert ledger.requests["r-1"].state == "done"
        ledger.serve("r-1", although="four retrained models say otherwise")
        served = Ledger(tmp_path).requests["r-1"]
        assert served.state == "served"
        assert served.evidence["although"] == "four retrained models say otherwise"
        assert served.verdict in ("NOT forgotten", "others harmed")

    def test_what_was_done_last_counts(self, tmp_path):
        ledger = Ledger(tmp_path)
        ledger.ask([1])
        ledger.fail("r-1", "no space")
        for told in ({"exact": True}, {"self_check": [finding("wrong")]}, {"note": 3}):
            ledger.done("r-1", **told)
            assert ledger.requests["r-1"].evidence == told
        assert ledger.requests["r-1"].verdict == "not shown"

    def test_a_better_model_takes_the_place_of_one_whose_check_says_no(self, tmp_path):
        log = claimed(tmp_path, "m", 10)
        for check in ("wrong", "fine", "unknown"):
            log.ask([3])
            log.done(self_check=[finding(check)])
        verdicts = [r.verdict for r in log.ledger.requests.values()]
        assert verdicts == ["no trace found", "no trace found", "not shown"]
        log.ledger.serve("r-1")


class TestOwners:
    def test_two_objects_of_a_folder_within_each_other(self, tmp_path):
        """A thread owns a folder through all of them, and each knows what the others wrote."""
        one, two = Ledger(tmp_path), Ledger(tmp_path / ".." / tmp_path.name, wait=5)
        begun = time.perf_counter()
        with one.owned():
            one.ask([1])
            with two.owned():
                two.ask([2])
                one.ask([3])
            two.begin("r-3")
            assert one.ask([4]).name == "r-4"
            assert one.term == two.term
        assert time.perf_counter() - begun < 4
        assert list(Ledger(tmp_path).requests) == ["r-1", "r-2", "r-3", "r-4"]
        assert verify(tmp_path) == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_forked_child_owns_nothing(self, tmp_path):
        ledger = Ledger(tmp_path, wait=0.05)
        with ledger.owned():
            child = os.fork()
            if not child:
                try:
                    Ledger(tmp_path, wait=0.05).ask([1])
                except StorageError as error:
                    os._exit(3 if "owned by process" in str(error) else 4)
                os._exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
            ledger.ask([2])
        assert list(Ledger(tmp_path).requests) == ["r-1"]

    def test_processes(self, tmp_path):
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM % REQUESTS, str(tmp_path), str(100 * k)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for k in range(PROCESSES)
        ]
        returned = [int(x) for run in runs for x in run.communicate(timeout=100)[0].split()]
        assert len(returned) == PROCESSES * REQUESTS
        log = claimed(tmp_path, "mark", 1000, ())
        assert sorted(i for r in log.requests() for i in r) == sorted(returned)
        assert verify(tmp_path) == []

    def test_threads(self, tmp_path):
        ledgers = [Ledger(tmp_path)] * 2 + [Ledger(tmp_path)]
        threads = [
            threading.Thread(target=lambda k=k, own=own: [own.ask([k, i]) for i in range(8)])
            for k, own in enumerate(ledgers)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert list(Ledger(tmp_path).requests) == [f"r-{n}" for n in range(1, 25)]
        assert verify(tmp_path) == []

    def test_an_owner_is_named(self, tmp_path):
        one, two = Ledger(tmp_path), Ledger(tmp_path, wait=0.05)
        with one.owned():
            done: list[str] = []

            def other() -> None:
                try:
                    two.ask([1])
                except StorageError as error:
                    done.append(str(error))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert f"owned by process {os.getpid()} on " in done[0]
        two.ask([1])
        assert (tmp_path / LOCK).exists()

    def test_workers_of_an_owner_before_save_nothing(self, tmp_path):
        one, two = Ledger(tmp_path), Ledger(tmp_path)
        with one.owned():
            with saving(tmp_path, one.term):
                pass
            old = one.term
        with saving(tmp_path, old):  # nobody else has come
            pass
        refused = pytest.raises(StorageError, match="another owner by now")
        with two.owned(), refused, saving(tmp_path, old):
            pass

    def test_folders_of_the_dead_are_removed(self, tmp_path):
        dead = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_output=True,
            text=True,
            check=True,
        )
        for name in ("ours", "dead", "elsewhere", "strange"):
            with Ledger(tmp_path / name).owned():
                pass
        for name, changes in (
            ("dead", {"process": int(dead.stdout)}),
            ("elsewhere", {"process": int(dead.stdout), "host": "another"}),
        ):
            path = tmp_path / name / OWNER
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (tmp_path / "strange" / OWNER).write_text("[]")
        remove_orphans(tmp_path.iterdir())
        assert {p.name for p in tmp_path.iterdir()} == {"ours", "elsewhere", "strange"}


class TestFolders:
    def test_old_requests_come_along(self, tmp_path):
        old = {"format": 1, "mark": "m", "requests": [[3, 8], [5]]}
        (tmp_path / "requests.json").write_text(json.dumps(old))
        (tmp_path / "sums.bin").touch()
        log = claimed(tmp_path, "m", 10, ("sums.bin",))
        assert log.requests() == [[3, 8], [5]]
        assert not (tmp_path / "requests.json").exists()
        assert claimed(tmp_path, "m", 10, ("sums.bin",)).requests() == [[3, 8], [5]]

    @pytest.mark.parametrize(
        "content", ["", "[]", "null", "{", '{"format": 2, "mark": "m", "requests": []}']
    )
    def test_damaged_old_requests_are_refused(self, tmp_path, content):
        (tmp_path / "requests.json").write_text(content)
        with pytest.raises(StorageError):
            claimed(tmp_path, "m", 10, ("sums.bin",))
        assert not (tmp_path / LEDGER).exists()

    def test_a_folder_with_artefacts_alone_is_refused(self, tmp_path):
        (tmp_path / "sums.bin").touch()
        with pytest.raises(StorageError, match="ask for every deletion again"):
            claimed(tmp_path, "m", 10, ("sums.bin",))

    def test_samples_that_are_not_there(self, tmp_path):
        log = claimed(tmp_path, "m", 10, ())
        log.ask([9])
        fewer = RequestLog(Ledger(tmp_path), 9)
        with pytest.raises(StorageError, match="1 samples not among these"):
            fewer.requests()

    def test_leftovers_are_swept(self, tmp_path):
        left = [".sums.bin.0a1b2c3d.tmp", ".tmpAb12xY"]
        kept = [".tmp", "notes.tmp", ".tmpfile", ".hidden"]
        for name in left + kept:
            (tmp_path / name).touch()
        claimed(tmp_path, "m", 10, ())
        assert not any((tmp_path / name).exists() for name in left)
        assert all((tmp_path / name).exists() for name in kept)


def kills(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], object]) -> Iterator[int]:
    """Do some work that is killed at its first fsync, at its second, ..., until it is not."""
    real = os.fsync
    for at in range(1, 300):
        calls: list[int] = []

        def killed(handle: int, at: int = at, calls: list[int] = calls) -> None:
            calls.append(handle)
            if len(calls) == at:
                raise KeyboardInterrupt
            real(handle)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", killed)
            try:
                work(at)
            except KeyboardInterrupt:
                pass
            else:
                return
        yield at


class TestBeginnings:
    def test_a_kill_at_the_first_start(self, tmp_path, monkeypatch):
        """Salt, entry, head: whichever is the last that was written."""
        at = 0
        for at in kills(monkeypatch, lambda at: claimed(tmp_path / str(at), "m", 10)):
            assert claimed(tmp_path / str(at), "m", 10).requests() == []
            assert verify(tmp_path / str(at)) == []
        assert at > 5

    def test_a_kill_while_old_requests_come_along(self, tmp_path, monkeypatch):
        def work(at: int) -> None:
            (tmp_path / str(at)).mkdir()
            old = {"format": 1, "mark": "m", "requests": [[3, 8], [5], [1]]}
            (tmp_path / str(at) / "requests.json").write_text(json.dumps(old))
            claimed(tmp_path / str(at), "m", 10)

        at = 0
        for at in kills(monkeypatch, work):
            log = claimed(tmp_path / str(at), "m", 10)
            assert log.requests() == [[3, 8], [5], [1]]
            assert log.ledger.pending() == []
            assert not (tmp_path / str(at) / "requests.json").exists()
        assert at > 20

    @pytest.mark.parametrize("requests", ["null", "[[3.0]]", '[["a"]]', "[[99]]", "[[-1]]", "[3]"])
    def test_old_requests_that_are_none(self, tmp_path, requests):
        text = f'{{"format": 1, "mark": "m", "requests": {requests}}}'
        for _ in range(2):
            (tmp_path / "requests.json").write_text(text)
            with pytest.raises(StorageError, match="damaged"):
                claimed(tmp_path, "m", 10)


class TestKeys:
    def test_files(self, tmp_path):
        public = new_keys(tmp_path / "k")
        assert (tmp_path / "k").stat().st_mode & 0o077 == 0
        with pytest.raises(StorageError, match="which exists"):
            new_keys(tmp_path / "k")
        for bad in (public, tmp_path / "none"):
            with pytest.raises(StorageError, match="private key"):
                Ledger(tmp_path / "a", key=bad)
        with pytest.raises(StorageError, match="public key"):
            verify(tmp_path / "a", tmp_path / "k")
        assert verify(tmp_path / "a") == [f"{tmp_path / 'a' / LEDGER}: there is no ledger."]


class TestReceived:
    def test_the_month_begins_when_it_came_in(self, tmp_path):
        came = datetime.now(UTC) - timedelta(days=40)
        ledger = Ledger(tmp_path)
        with pytest.warns(FisherForgetWarning, match="overdue"):
            request = ledger.ask([1], received=came)
        assert request.times["received"] == came
        assert request.due == a_month_after(came)
        assert list(request.times) == ["received", "asked"]
        assert Ledger(tmp_path).requests["r-1"].times == request.times

    @pytest.mark.parametrize("when", ["yesterday", 3, datetime.now(UTC) + timedelta(days=1)])
    def test_what_is_no_such_time(self, tmp_path, when):
        with pytest.raises(ConfigError):
            Ledger(tmp_path).ask([1], received=when)
        assert Ledger(tmp_path).requests == {}
