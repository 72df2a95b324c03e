"""What still holds forgotten samples is found and removed: searched for by the samples' bytes, by
their outputs' bytes, by index, and by attacks."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import blobs_data
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
        assert begun.details["samples"] == {"ours": ledger.hashed(LISTED)}
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
        assert first.details["samples"]["ours"] == Ledger(run).hashed(LISTED)


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
        assert {p.name for p in done.removed} == {"seed-7.safetensors", "outputs.safetensors"}
        assert len(list((tmp_path / "retrained").iterdir())) == 3
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
        assert main(["purge", str(tmp_path), "--yes"]) == 2
        assert "rebase" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("folder", "sets"),
        [("nowhere", []), ("file", []), (".", ["x"]), (".", "ours")],
    )
    def test_bad_input(self, tmp_path: Path, folder: str, sets: Any) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises((ConfigError, StorageError)):
            artefacts(tmp_path / folder, sets)


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
