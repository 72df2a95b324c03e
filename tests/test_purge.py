"""What still holds forgotten samples is found and removed: searched for by the samples' bytes, by
their outputs' bytes, by index, and by attacks."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import blobs_data
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget import (
    SISA,
    CheckpointKeeper,
    ConfigError,
    Ledger,
    RetrainedEnsemble,
    StorageError,
    TrainSettings,
    artefacts,
    forget,
    prepare,
    purge,
    train,
)
from fisher_forget._util import files
from fisher_forget.cli import main
from fisher_forget.experiments.datasets import load_dataset
from fisher_forget.ledger import new_keys, verify

pytestmark = pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")
LISTED = [3, 14, 159, 92, 65, 35]
SETTINGS = TrainSettings(epochs=4, lr=0.2, weight_decay=1e-3)
QUIET: dict[str, Any] = {"weight_decay": 1e-3, "progress": False}


def recipe(folder: Path, **changes: object) -> Path:
    content = {
        "name": "small",
        "data": {"name": "digits", "max_train": 200, "max_test": 60},
        "model": {"name": "mlp", "options": {"hidden": [8]}},
        "training": {"epochs": 6, "lr": 0.1, "weight_decay": 0.001},
        "forget_sets": [
            {"name": "ours", "kind": "indices", "indices": LISTED},
            {"name": "class 3", "kind": "class", "label": 3},
            {"name": "wrong", "kind": "mislabelled", "count": 5},
            {"name": "learnt", "kind": "memorised", "count": 5},
        ],
        "seeds": [0, 1],
        "retrained": 4,
        "out": str(folder / "runs"),
        "progress": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, evaluated, with a sweep's tables and what a kill left."""
    place = tmp_path_factory.mktemp("finished")
    path = recipe(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["run", str(path)]) == 0
        assert main(["evaluate", str(place / "runs" / "small")]) == 0
    folder = place / "runs" / "small"
    (folder / "ours" / ".outputs.safetensors.0a1b2c3d.tmp").write_bytes(b"half of it")
    (folder / "original" / ".tmpAbC123").write_bytes(b"half of it")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / "small"))


def inside(folder: Path, *needles: bytes) -> list[Path]:
    """Files that hold one of these bytes."""
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in every if any(n in path.read_bytes() for n in needles)]


def indices_in(folder: Path) -> list[Path]:
    """Texts with the listed indices one after the other, however they are written."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".yaml", ".json", ".html", ".md", ".txt", ".csv", ".jsonl"}:
            numbers = "".join(c if c.isdigit() else " " for c in path.read_text()).split()
            joined = f" {' '.join(numbers)} "
            if f" {' '.join(map(str, LISTED))} " in joined:
                found.append(path)
    return found


class TestRuns:
    def test_nothing_of_a_listed_set_is_left(self, run: Path) -> None:
        data = load_dataset("digits", max_train=200, max_test=60).train
        outputs = files.load_tensors(run / "ours" / "outputs.safetensors")[0]
        rows = outputs["original/forget"][0].numpy()
        needles = [row.tobytes() for row in rows] + [data[i][0].numpy().tobytes() for i in LISTED]
        assert len(inside(run, *needles)) >= 1
        assert len(indices_in(run)) == 4
        kept = sorted(
            p for p in (run / "ours").rglob("*.safetensors") if p.name != "outputs.safetensors"
        )
        assert len(kept) == 4 + 2
        done = purge(run, ["ours"])
        assert done.clean
        assert not inside(run, *needles)
        assert not indices_in(run)
        assert set(run.rglob("*.safetensors")) == set(kept), "retrained without these, or scrubbed"
        assert not list(run.rglob(".*"))
        assert [a.action for a in artefacts(run, ["ours"])] == ["salt"]
        assert purge(run, ["ours"]).removed == ()

    def test_no_model_is_left_that_was_trained_on_any_of_several_sets(self, run: Path) -> None:
        purge(run)
        assert not list(run.rglob("*.safetensors"))
        assert {p.name for p in run.glob("*.html")} == {"report.html", "evaluation.html"}

    def test_what_is_left_says_what_it_said(self, run: Path) -> None:
        before = json.loads((run / "metrics.json").read_text())
        pages = {p: p.read_text() for p in run.glob("*.html")}
        purge(run)
        after = json.loads((run / "metrics.json").read_text())
        for case in (*before["cases"], *after["cases"]):
            del case["fingerprint"]
        assert before["config"]["forget_sets"][0].pop("indices") == LISTED
        assert after["config"]["forget_sets"][0].pop("indices") == []
        assert before == after
        for path, text in pages.items():
            assert 0 < len(text) - len(path.read_text()) < 60
        assert main(["plot", str(run)]) == 0
        assert main(["ledger", str(run)]) == 0

    @pytest.mark.parametrize("command", ["run", "evaluate", "sweep", "compare"])
    def test_it_is_not_trained_again(
        self, run: Path, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        purge(run, ["ours"])
        for path in (run, recipe(tmp_path)) if command != "compare" else (recipe(tmp_path),):
            assert main([command, str(path)]) == 2
            assert "were purged on" in capsys.readouterr().err
        assert not (run / "original" / "seed-0.safetensors").exists()
        assert not indices_in(run)

    def test_the_ledger_tells_who_and_what(self, run: Path) -> None:
        done = purge(run, ["ours"])
        ledger = Ledger(run)
        begun, ended = (e for e in ledger.entries if e.event == "purged")
        assert begun.details["samples"] == ledger.hashed(sorted(LISTED))
        assert begun.details["files"] == ended.details["files"]
        told = {run / name for name in ended.details["files"]}
        assert told == {*done.removed, *done.rewritten}
        purge(run, ["ours"], salt=True)
        assert not (run / "ledger.salt").exists()
        assert artefacts(run, ["ours"]) == []
        assert verify(run) == []

    def test_of_several_runs_others_are_named_and_left(self, run: Path, finished: Path) -> None:
        other = run.parent / "other"
        shutil.copytree(finished, other)
        config = yaml.safe_load((other / "config.yaml").read_text())
        config["forget_sets"] = config["forget_sets"][1:]
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        done = purge(run.parent, ["ours"])
        others = [p for p in (*done.removed, *done.rewritten) if run not in p.parents]
        assert all(p.name.startswith(".") for p in others), "what kills left, and no more"
        assert {a.path.parts[-2] for a in done.unknown} >= {"original", "retrained"}
        with pytest.raises(ConfigError, match="nobody"):
            purge(run.parent, ["nobody"])

    @pytest.mark.parametrize("at", range(1, 40, 6))
    def test_killed_anywhere_it_goes_on(
        self, run: Path, at: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fisher_forget.purge import removal as module

        real, calls = module._carry_out, []

        def dies(*own: Any) -> None:
            calls.append(own)
            if len(calls) == at:
                raise KeyboardInterrupt
            real(*own)

        monkeypatch.setattr(module, "_carry_out", dies)
        with pytest.raises(KeyboardInterrupt):
            purge(run)
        monkeypatch.undo()
        assert main(["run", str(run)]) == 2, "from the first step on"
        purge(run)
        assert not list(run.rglob("*.safetensors"))
        assert not indices_in(run)
        (first, *_) = (e for e in Ledger(run).entries if e.event == "purged")
        assert first.details["samples"] == Ledger(run).hashed(sorted(LISTED))


def linear(data: TensorDataset, indices: Any = None, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Linear(data.tensors[0].shape[1], 3)
    return train(start, data, SETTINGS, seed=seed, indices=indices, progress=False)


class TestOthers:
    def test_a_prepared_model_is_left_until_it_is_rebased(self, tmp_path: Path) -> None:
        data = blobs_data(60)
        prepared = prepare(linear(data), data, folder=tmp_path, **QUIET)
        assert [a.action for a in artefacts(tmp_path)] == ["salt"], "nobody is forgotten yet"
        result = prepared.forget([11], progress=False)
        left = purge(tmp_path).left
        assert [a.action for a in left] == ["left", "salt", "left"]
        assert all("rebase" in a.fix for a in left if a.action == "left")
        again = prepare(linear(data), data, folder=tmp_path, **QUIET)
        assert again.requests == [[11]], "purge took nothing that is needed"
        again.rebase(again.redeliver(), progress=False)
        assert purge(tmp_path).clean
        rebased = prepare(_stored(tmp_path, result.model), data, folder=tmp_path, **QUIET)
        rebased.forget([12], progress=False)
        assert [a.action for a in purge(tmp_path).left].count("left") == 3, "the model as well"

    def test_sisa_is_clean_when_all_is_done(self, tmp_path: Path) -> None:
        data = blobs_data(60)

        def fit(model: nn.Module, dataset: Any, indices: Any, seed: int) -> nn.Module:
            return train(model, dataset, SETTINGS, seed=seed, indices=indices, progress=False)

        sisa = SISA(lambda: nn.Linear(data.tensors[0].shape[1], 3), fit, shards=2, folder=tmp_path)
        sisa.fit(data)
        sisa.forget([5])
        assert purge(tmp_path).clean
        Ledger(tmp_path).ask([7])
        left = purge(tmp_path).left
        assert {a.action for a in left} == {"left", "salt"}
        assert any("fit()" in a.fix for a in left)

    def test_an_ensemble_loses_its_originals_and_outputs(self, tmp_path: Path) -> None:
        data, gone = blobs_data(60), [4, 5, 6]
        template = linear(data)

        def fit() -> RetrainedEnsemble:
            return RetrainedEnsemble.fit(
                lambda indices, seed: linear(data, indices, seed),
                data,
                gone,
                template=template,
                seeds=range(3),
                original_seeds=[7],
                folder=tmp_path,
                fingerprint="linear",
                progress=False,
            )

        ensemble = fit()
        ensemble.outputs({"forget": TensorDataset(*(t[gone] for t in data.tensors))})
        done = purge(tmp_path)
        assert len(done.removed) == 1 + 3 + 1, "which of them are without others is not told"
        assert not list(tmp_path.rglob("*.safetensors"))
        (_, ended) = (e.details["files"] for e in Ledger(tmp_path).entries if e.event == "purged")
        assert len(ended) == 5
        with pytest.raises(StorageError, match="purged"):
            fit()

    def test_checkpoints_go_and_other_peoples_files_stay(self, tmp_path: Path) -> None:
        keeper = CheckpointKeeper(tmp_path / "kept", total_steps=4)
        for _ in range(4):
            keeper.step(nn.Linear(2, 2))
        foreign = {
            tmp_path / "model.safetensors": b"not one",
            tmp_path / "notes.csv": b"1,2",
            tmp_path / "shard-0-after-1.safetensors": b"",
            tmp_path / "data" / "config.yaml": b"a: [1",
        }
        for path, content in foreign.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        files.save_tensors(tmp_path / "theirs.safetensors", {"a": torch.zeros(2)}, {"seed": "1"})
        done = purge(tmp_path)
        assert {p.parent.name for p in done.removed} == {"kept"}
        assert len(done.removed) == 2
        assert all(path.read_bytes() == content for path, content in foreign.items())
        assert {a.path.name for a in done.unknown} >= {"notes.csv", "theirs.safetensors"}
        assert not list(tmp_path.rglob("ledger.*")), "no ledger where there is no run"

    def test_a_stored_result_holds_no_row_and_is_named(self, tmp_path: Path) -> None:
        data = blobs_data(60)
        result = forget(linear(data), data, [11], **QUIET)
        torch.save(result, tmp_path / "result.pt")
        (tmp_path / "result.pkl").write_bytes(pickle.dumps(result))
        torch.save(result.model.state_dict(), tmp_path / "model.pt")
        assert not inside(tmp_path, data.tensors[0][11].numpy().tobytes())
        found = {a.path.name: a.action for a in artefacts(tmp_path)}
        assert found == {"result.pt": "left", "result.pkl": "left", "model.pt": "look"}

    def test_links_lead_nowhere(self, run: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        target = outside / "seed-9.safetensors"
        files.save_tensors(target, {"a": torch.zeros(2)}, {"seed": "9", "fingerprint": "x"})
        (run / "original" / "seed-9.safetensors").symlink_to(target)
        (run / "linked").symlink_to(outside)
        done = purge(run)
        assert target.exists()
        assert {a.path.name for a in done.unknown} == {"seed-9.safetensors", "linked"}

    def test_a_signed_ledger_needs_its_key(self, run: Path, tmp_path: Path) -> None:
        public = new_keys(tmp_path / "officer.pem")
        Ledger(run, key=tmp_path / "officer.pem").record("opened")
        before = sorted(run.rglob("*"))
        with pytest.raises(ConfigError, match="key"):
            purge(run)
        assert [p for p in sorted(run.rglob("*")) if not p.name.startswith("ledger")] == [
            p for p in before if not p.name.startswith("ledger")
        ], "nothing is removed before"
        purge(run, key=tmp_path / "officer.pem")
        assert verify(run, public) == []

    def test_a_ledger_elsewhere_records_it_too(self, run: Path, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ours")
        done = purge(run.parent, ledger=ledger)
        ended = ledger.entries[-1].details
        assert len(ended["files"]) == len(done.removed) + len(done.rewritten)
        assert "small/original/seed-0.safetensors" in ended["files"]

    def test_a_recipe_with_indices_is_named(self, run: Path, tmp_path: Path) -> None:
        path = recipe(tmp_path)
        (left,) = (a for a in purge(tmp_path).left if a.action == "left")
        assert left.path == path
        assert not purge(tmp_path).clean


def _stored(folder: Path, like: nn.Module) -> nn.Module:
    (path,) = folder.glob("generation-*-model.safetensors")
    return files.load_model(path, like)


class TestCommands:
    def test_list_and_purge(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        every = sorted(p for p in run.rglob("*") if p.is_file())
        assert main(["artefacts", str(run), "--set", "ours"]) == 0
        listed = capsys.readouterr().out
        assert "original/seed-0.safetensors: an original model" in listed
        assert main(["purge", str(run), "--set", "ours"]) == 2
        out, err = capsys.readouterr()
        assert out == listed
        assert "--yes" in err
        assert sorted(p for p in run.rglob("*") if p.is_file()) == every
        assert main(["purge", str(run), "--set", "ours", "--salt", "--yes"]) == 0
        assert "removed" in capsys.readouterr().out
        assert main(["artefacts", str(run), "--set", "ours"]) == 0
        assert capsys.readouterr().out == "Nothing known here holds forgotten samples.\n"

    def test_what_is_left_is_an_error(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = blobs_data(60)
        prepare(linear(data), data, folder=tmp_path, **QUIET).forget([11], progress=False)
        assert main(["purge", str(tmp_path), "--yes"]) == 3
        assert "rebase" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("folder", "sets"),
        [("nowhere", []), ("file", []), (".", ["x"]), (".", "ours")],
    )
    def test_bad_input(self, tmp_path: Path, folder: str, sets: Any) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises((ConfigError, StorageError)):
            artefacts(tmp_path / folder, sets)


def _dies(*_: object) -> None:
    raise KeyboardInterrupt


class TestWhatARunVouchesFor:
    def retrained(self, run: Path) -> set[str]:
        return {path.name for path in (run / "ours" / "retrained").iterdir()}

    def test_models_of_another_list_go(self, run: Path) -> None:
        """A run with fewer samples before, in the same folder, left more of them."""
        tensors, notes = files.load_tensors(run / "ours" / "retrained" / "seed-1000.safetensors")
        other = notes | {"fingerprint": "0123456789abcdef", "seed": "1009"}
        files.save_tensors(run / "ours" / "retrained" / "seed-1009.safetensors", tensors, other)
        (run / "ours" / "seed-7").mkdir()
        files.save_tensors(run / "ours" / "seed-7" / "scrubbed.safetensors", tensors, {"seed": "7"})
        shutil.copytree(run / "ours" / "retrained", run / "renamed" / "retrained")
        assert purge(run, ["ours"]).clean
        assert self.retrained(run) == {f"seed-{s}.safetensors" for s in range(1000, 1004)}
        assert not (run / "ours" / "seed-7" / "scrubbed.safetensors").exists()
        assert not list((run / "renamed").rglob("*.safetensors"))

    @pytest.mark.parametrize("change", ["indices", "killed", "damaged"])
    def test_nothing_stays_of_a_run_that_did_not_finish(self, run: Path, change: str) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        if change == "indices":
            config["forget_sets"][0]["indices"] = [*LISTED, 7]
            (run / "config.yaml").write_text(yaml.safe_dump(config))
        if change == "killed":
            (run / "metrics.json").unlink()
        if change == "damaged":
            (run / "metrics.json").write_text("{")
        purge(run, ["ours"])
        assert not list(run.rglob("*.safetensors"))
        assert not indices_in(run), "neither the old list nor the new one"

    def test_what_equals_the_original_goes(self, run: Path) -> None:
        metrics = json.loads((run / "metrics.json").read_text())
        told = metrics["cases"][0]["runs"][0]["forget"]
        told["check"].append({"name": "step", "verdict": "wrong"})
        (run / "metrics.json").write_text(json.dumps(metrics))
        tensors = files.load_tensors(run / "original" / "seed-0.safetensors")[0]
        place = run / "ours" / "methods" / "ssd" / "seed-0.safetensors"
        place.parent.mkdir(parents=True)
        files.save_tensors(place, tensors, {"fingerprint": "0123456789abcdef"})
        purge(run, ["ours"])
        assert not place.exists()
        assert not (run / "ours" / "seed-0" / "scrubbed.safetensors").exists()
        assert (run / "ours" / "seed-1" / "scrubbed.safetensors").exists()

    def test_a_run_is_one_from_its_first_file_on(self, run: Path) -> None:
        """Killed while it trained on subsets, or the models of mislabelled samples."""
        for name in ("original", "subsets", "ours", "class-3", "learnt"):
            shutil.rmtree(run / name, ignore_errors=True)
        for path in [*run.glob("*.json"), *run.glob("*.html")]:
            path.unlink()
        assert list(run.rglob("*.safetensors"))
        assert purge(run).clean
        assert not list(run.rglob("*.safetensors"))
        assert not indices_in(run)
        assert main(["run", str(run)]) == 2

    def test_nothing_stays_where_the_data_are_others_now(self, run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["data"]["max_train"] = 150
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        purge(run, ["ours"])
        assert not list(run.rglob("*.safetensors"))

    @pytest.mark.parametrize("text", ['"14"', "0xE  # by hand", "14.0"])
    def test_lists_written_by_hand_go_whole(self, run: Path, text: str) -> None:
        content = (run / "config.yaml").read_text()
        assert "  - 14\n" in content
        (run / "config.yaml").write_text(content.replace("  - 14\n", f"  - {text}\n"))
        purge(run, ["ours"])
        after = yaml.safe_load((run / "config.yaml").read_text())
        assert after["forget_sets"][0]["indices"] == []
        assert main(["run", str(run)]) == 2

    def test_a_damaged_model_goes(self, run: Path) -> None:
        path = run / "ours" / "retrained" / "seed-1000.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert purge(run, ["ours"]).clean
        assert self.retrained(run) == {f"seed-{s}.safetensors" for s in range(1001, 1004)}

    @pytest.mark.parametrize(
        "change",
        [{"cases": [3]}, {"config": 3}, {"cases": [{"name": "ours", "runs": [3], "forget": 7}]}],
    )
    def test_strange_numbers_vouch_for_nothing(self, run: Path, change: dict[str, Any]) -> None:
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(metrics | change))
        purge(run, ["ours"])
        assert not list(run.rglob("scrubbed.safetensors"))

    def test_a_copy_of_a_configuration_is_a_recipe(self, run: Path, tmp_path: Path) -> None:
        project = tmp_path / "project"
        (project / "data").mkdir(parents=True)
        shutil.copy(run / "config.yaml", project / "config.yaml")
        (project / "metrics.json").write_text('{"indices": [14, 159]}')
        (project / "data" / "sweep.csv").write_text("secret")
        files.save_tensors(project / "data" / "outputs.safetensors", {"a": torch.zeros(1)}, {})
        before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
        done = purge(project)
        assert {p: p.read_bytes() for p in project.rglob("*") if p.is_file()} == before
        assert {a.path.name for a in (*done.left, *done.unknown)} == {p.name for p in before}

    def test_what_somebody_asked_for_is_gone_by_default(self, tmp_path: Path) -> None:
        asked: Any = [
            {"name": "ours", "kind": "indices", "indices": LISTED, "who": "ticket 1"},
            {"name": "class 3", "kind": "class", "label": 3},
        ]
        path = recipe(tmp_path, forget_sets=asked, seeds=[0], retrained=2)
        assert main(["run", str(path)]) == 0
        run = tmp_path / "runs" / "small"
        Ledger(run).serve("r-1", although="for the test")
        assert purge(run).clean
        assert (run / "ours" / "seed-0" / "scrubbed.safetensors").exists()
        assert not list((run / "class-3").rglob("*.safetensors"))

    def test_a_pending_request_is_carried_out_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: Any = [{"name": "ours", "kind": "indices", "indices": LISTED, "who": "ticket 1"}]
        path = recipe(tmp_path, forget_sets=asked, seeds=[0], retrained=2)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("fisher_forget.experiments.run"), "_scrub", _dies)
            assert main(["run", str(path)]) == 130
        run = tmp_path / "runs" / "small"
        done = purge(run)
        assert not done.clean
        assert not done.removed
        assert not done.rewritten
        assert all("r-1 is pending" in a.fix for a in done.left)
        assert main(["run", str(path)]) == 0
        assert purge(run).clean

    def test_its_notes_tell_nobody(self, run: Path) -> None:
        """A hash of a short list is guessed; so is the seed's salt gone."""
        marks = {
            files.read_metadata(path).get("fingerprint", "")
            for path in (run / "ours" / "retrained").iterdir()
        }
        purge(run, ["ours"], salt=True)
        assert len(marks) == 1
        assert not inside(run, *(mark.encode() for mark in marks))

    def test_lists_of_other_sets_lose_them(self, run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        more = dict(config["forget_sets"][0], name="more", indices=[1, 14, 5])
        config["forget_sets"].append(more)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        purge(run, ["ours"])
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert [s["indices"] for s in config["forget_sets"]] == [[], [], [], [], [1, 5]]

    def test_a_folder_without_its_configuration(self, run: Path) -> None:
        (run / "config.yaml").write_bytes(b"\xff")
        done = purge(run)
        assert not list(run.rglob("seed-100*.safetensors"))
        assert not done.clean
        assert {a.path.name for a in done.unknown} >= {"metrics.json", "report.html", "config.yaml"}
        assert {a.path.name for a in artefacts(run)} >= {"metrics.json", "report.html"}

    @pytest.mark.parametrize("mode", [0o600, 0o444])
    def test_texts_keep_their_bytes_and_modes(self, run: Path, mode: int) -> None:
        path = run / "metrics.json"
        content = path.read_bytes().replace(b"\n", b"\r\n") + b"\xff"
        path.write_bytes(content)
        path.chmod(mode)
        notes = run / "notes.txt"
        notes.write_text(f"indices: {LISTED}")
        done = purge(run, ["ours"])
        assert path.stat().st_mode & 0o777 == mode
        after = path.read_bytes()
        assert after.endswith(b"}\r\n\xff")
        assert not indices_in(run / "ours")
        assert b"159" not in after.split(b"cases")[0].split(b"indices")[1]
        assert notes.read_text() == f"indices: {LISTED}"
        assert [a.path for a in done.unknown] == [notes]


class TestStrangers:
    def test_folders_named_like_ours(self, tmp_path: Path) -> None:
        ours_too = {"seed": "3", "seconds": "1", "fingerprint": "abc", "format": "pt"}
        places = ["original/seed-0", "original/model", "retrained/seed-1", "outputs", "a/outputs"]
        for place in places:
            path = tmp_path / f"{place}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file({"a": torch.zeros(2)}, path, ours_too)
        (tmp_path / "original" / ".uv.deadbeef.tmp").write_text("")
        (tmp_path / ".tmpAb12Cd").write_text("")
        before = sorted(tmp_path.rglob("*"))
        done = purge(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before
        assert len(done.unknown) == len(places) + 2
        assert not done.clean

    def test_a_project_with_a_recipe(self, tmp_path: Path) -> None:
        recipe(tmp_path).rename(tmp_path / "config.yaml")
        (tmp_path / "metrics.json").write_text("{}")
        (tmp_path / "models").mkdir()
        model = tmp_path / "models" / "production.safetensors"
        files.save_tensors(model, {"a": torch.zeros(2)}, {"seed": "1", "fingerprint": "b"})
        text = (tmp_path / "config.yaml").read_text()
        done = purge(tmp_path)
        assert model.exists()
        assert (tmp_path / "config.yaml").read_text() == text
        assert [a.path.name for a in done.left] == ["config.yaml"]

    def test_other_sets_other_folders(self, run: Path, tmp_path: Path) -> None:
        keeper = CheckpointKeeper(tmp_path / "kept", total_steps=4)
        for _ in range(4):
            keeper.step(nn.Linear(2, 2))
        shutil.copytree(run / "original", tmp_path / "ensemble" / "original")
        done = purge(tmp_path, ["ours"])
        assert all(run in path.parents for path in (*done.removed, *done.rewritten))
        assert {a.path.parent.name for a in done.unknown} >= {"kept", "original"}

    @pytest.mark.parametrize("where", ["", None, 3, b"", "/", Path.home()])
    def test_nobody_means_all_of_it(self, where: Any) -> None:
        with pytest.raises(ConfigError):
            purge(where)

    def test_files_that_only_look_like_some(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.pt")
        os.mkfifo(tmp_path / "a.yaml")
        (tmp_path / "b.yaml").write_text("[" * 3000)
        (tmp_path / "c.yaml").write_text("forget_sets: [{name: a, indices: [.inf]}]")
        (tmp_path / "d.yaml").write_text("forget_sets: 3")
        (tmp_path / "requests.json").write_text('{"requests": []}')
        (tmp_path / "ledger.jsonl").write_text('{"account": 1}\n')
        (tmp_path / "ledger.salt").mkdir()
        torch.save({"a": torch.zeros(9)}, tmp_path / "e.pt")
        content = bytearray((tmp_path / "e.pt").read_bytes())
        rng = np.random.default_rng(0)
        for at in range(40):
            for place in rng.integers(0, len(content), 5):
                content[place] ^= 1 << int(rng.integers(8))
            (tmp_path / f"e{at}.pt").write_bytes(content)
        done = purge(tmp_path)
        assert not done.removed
        assert {a.path.name for a in done.left} == {"x.pt", "a.yaml", "ledger.jsonl"}
        assert "requests.json" in {a.path.name for a in done.unknown}

    def test_what_cannot_be_read_is_not_clean(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, closed = os.scandir, run / "original"

        def scandir(path: Any) -> Any:
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        done = purge(run)
        assert [(a.path, a.action) for a in done.left if a.action != "salt"] == [(closed, "left")]
        assert not done.clean

    def test_other_names_of_a_file_are_told(self, run: Path, tmp_path: Path) -> None:
        os.link(run / "original" / "seed-0.safetensors", tmp_path / "kept.safetensors")
        done = purge(run)
        (left,) = (a for a in done.left if a.action == "left")
        assert "hard link" in left.what
        assert not done.clean

    def test_a_ledger_that_leads_elsewhere(self, run: Path, tmp_path: Path) -> None:
        (run / "ledger.jsonl").symlink_to(tmp_path / "outside.jsonl")
        with pytest.raises(StorageError, match="a link"):
            purge(run)
        assert not (tmp_path / "outside.jsonl").exists()
        assert (run / "original" / "seed-0.safetensors").exists()

    def test_signed_and_unsigned_ones_in_one_tree(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, run.parent / "other"))
        key = tmp_path / "officer.pem"
        public = new_keys(key)
        Ledger(run, key=key).record("opened")
        purge(run.parent, key=key)
        assert verify(run, public) == []
        assert verify(other) == []

    def test_somebody_is_at_work_there(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.import_module("fisher_forget.purge.removal"), "WAIT", 0.1)
        code = f"""
from fisher_forget import Ledger
with Ledger({str(run)!r}).owned():
    print("owned", flush=True)
    input()
"""
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "owned\n"
            with pytest.raises(StorageError, match=f"process {other.pid}"):
                purge(run)
            other.communicate("\n")
        assert (run / "original" / "seed-0.safetensors").exists()


class TestBesideALedger:
    def test_only_the_present_sums_are_kept(self, tmp_path: Path) -> None:
        data = blobs_data(60)
        model = linear(data)
        prepared = prepare(model, data, folder=tmp_path, **QUIET)
        old = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
        prepared.rebase(prepared.forget([11], progress=False), progress=False)
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        files.save_tensors(tmp_path / "old-model.safetensors", {"a": torch.zeros(2)}, {})
        done = purge(tmp_path)
        assert {path.name for path in done.removed} == set(old)
        assert [a.path.name for a in done.unknown] == ["old-model.safetensors"]

    def test_a_name_is_of_runs_only(self, run: Path, tmp_path: Path) -> None:
        data = blobs_data(60)
        place = tmp_path / "prepared"
        prepared = prepare(linear(data), data, folder=place, **QUIET)
        old = {path.name: path.read_bytes() for path in place.glob("*.safetensors")}
        prepared.rebase(prepared.forget([11], progress=False), progress=False)
        for name, content in old.items():
            (place / name).write_bytes(content)
        done = purge(tmp_path, ["ours"], salt=True)
        assert all((place / name).exists() for name in old)
        assert (place / "ledger.salt").exists()
        assert not (run / "ledger.salt").exists()
        assert {a.path.name for a in done.unknown} >= set(old)

    def test_beside_a_rebase_it_waits_or_refuses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.import_module("fisher_forget.purge.removal"), "WAIT", 0.1)
        data = blobs_data(60)
        prepare(linear(data), data, folder=tmp_path, **QUIET)
        found: list[str] = []

        def tries() -> None:
            try:
                purge(tmp_path)
            except StorageError as error:
                found.append(str(error))

        with Ledger(tmp_path).owned():
            other = threading.Thread(target=tries)
            other.start()
            other.join()
        assert len(found) == 1
        assert "owned by" in found[0]

    def test_several_at_once(self, run: Path) -> None:
        with ThreadPoolExecutor(3) as pool:
            done = list(pool.map(lambda _: purge(run), range(3)))
        assert sum(bool(d.removed) for d in done) == 1
        assert not list(run.rglob("*.safetensors"))

    def test_a_salt_that_is_needed_stays(self, tmp_path: Path) -> None:
        data = blobs_data(60)
        prepared = prepare(linear(data), data, folder=tmp_path, **QUIET)
        prepared.forget([11], progress=False)
        purge(tmp_path, salt=True)
        again = prepare(linear(data), data, folder=tmp_path, **QUIET)
        assert again.requests == [[11]]
        again.rebase(again.redeliver(), progress=False)
        assert purge(tmp_path, salt=True).clean
        assert (tmp_path / "ledger.salt").exists()

    def test_an_ensemble_with_a_ledger(self, tmp_path: Path) -> None:
        shutil.copytree(_members(tmp_path), tmp_path / "e" / "retrained")
        files.save_tensors(
            tmp_path / "e" / "outputs.safetensors", {"a": torch.zeros(2)}, {"fingerprint": "1"}
        )
        Ledger(tmp_path / "e").record("opened")
        purge(tmp_path / "e")
        assert not list((tmp_path / "e").rglob("*.safetensors"))


def _members(folder: Path) -> Path:
    notes = {"seed": "0", "seconds": "1", "fingerprint": "1", "version": "1"}
    (folder / "members").mkdir()
    files.save_tensors(folder / "members" / "seed-0.safetensors", {"a": torch.zeros(2)}, notes)
    return folder / "members"


def test_what_was_deleted_cannot_be_recovered_from_a_purged_run(tmp_path: Path) -> None:
    """A (W - W') is the deleted sample, up to a factor, for a linear model: found from the original
    and the retrained or scrubbed models in a run, and from nothing that is left of it."""
    content = {
        "data": {"name": "breast_cancer"},
        "model": {"name": "mlp", "options": {"hidden": []}},
        "training": {"epochs": 300, "lr": 0.1, "batch_size": 500, "weight_decay": 0.1},
        "forget_sets": [{"name": "one", "kind": "indices", "indices": [216]}],
        "seeds": [0],
    }
    assert main(["run", str(recipe(tmp_path, **content))]) == 0
    run = tmp_path / "runs" / "small"
    x = load_dataset("breast_cancer").train.tensors[0].double()
    known = torch.cat([x[:216], x[217:]])
    known = torch.cat([known, torch.ones(len(known), 1, dtype=torch.float64)], 1)

    def sample(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
        """H (w - w') of the difference of two classes' rows, with the bias left out."""
        rows = []
        for model in (one, other):
            weight, bias = (model[f"1.{name}"].double() for name in ("weight", "bias"))
            rows.append(torch.cat([weight[1] - weight[0], (bias[1] - bias[0])[None]]))
        p = torch.sigmoid(known @ rows[1])
        hessian = known.T @ ((p * (1 - p))[:, None] * known) / len(known)
        return (2 * hessian @ (rows[0] - rows[1]) + 0.1 * (rows[0] - rows[1]))[:-1]

    def recovered() -> float:
        """Best cosine of what a pair of models in the folder gives with the deleted sample."""
        models = [files.load_tensors(path)[0] for path in sorted(run.rglob("s*.safetensors"))]
        found = [sample(*pair) for pair in itertools.permutations(models, 2)]
        return max(float(nn.functional.cosine_similarity(f, x[216], dim=0).abs()) for f in found)

    before = recovered()
    purge(run)
    after = recovered()
    assert before > 0.99, before
    assert after < 0.6, after
