"""A whole run, from the command line to the report, in small; and that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pandas as pd
import pytest
import yaml

from fisher_forget import Ledger
from fisher_forget._util.files import fingerprint, load_tensors
from fisher_forget.cli import main
from fisher_forget.experiments import cases
from fisher_forget.report.schema import load_schema
from fisher_forget.sweep import SweepTable

ROOT = Path(__file__).parent.parent
SCRUBBED = "scrubbed.safetensors"


def write(folder: Path, **changes: object) -> str:
    content = {
        "name": "small",
        "data": {"name": "digits", "max_train": 200, "max_test": 60},
        "model": {"name": "mlp", "options": {"hidden": [16]}},
        "training": {"epochs": 25, "lr": 0.1, "weight_decay": 0.001},
        "forget_sets": [
            {"name": "class 3", "kind": "class", "label": 3},
            {"name": "ten", "kind": "random", "count": 10},
        ],
        "seeds": [0, 1],
        "retrained": 2,
        "out": str(folder),
        "progress": False,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return str(path)


@pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")
class TestRun:
    def test_writes_everything(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", write(tmp_path)]) == 0
        folder = tmp_path / "small"
        assert f"Report: {folder / 'report.html'}" in capsys.readouterr().out
        metrics = json.loads((folder / "metrics.json").read_text())
        jsonschema.validate(metrics, load_schema())
        forgotten = metrics["cases"][0]
        assert forgotten["runs"][0]["forget"]["forgotten"] == forgotten["forgotten"] > 0
        assert set(forgotten["summary"]) == {"forget", "retain", "test", "test, retained classes"}
        assert set(metrics["cases"][1]["summary"]) == {"forget", "retain", "test"}
        for name in (
            "kl.png",
            "kl.svg",
            "scores.png",
            "seed-0/scrubbed.safetensors",
            "seed-1/result.txt",
        ):
            assert (folder / "class-3" / name).stat().st_size > 0
        resolved = yaml.safe_load((folder / "config.yaml").read_text())
        assert resolved["training"]["batch_size"] == 64  # defaults are written out

    def test_is_reproducible_from_its_resolved_configuration(self, tmp_path: Path) -> None:
        main(["run", write(tmp_path, noise_seed=3)])
        first = json.loads((tmp_path / "small" / "metrics.json").read_text())
        main(["run", str(tmp_path / "small" / "config.yaml"), "--out", str(tmp_path / "again")])
        second = json.loads((tmp_path / "again" / "small" / "metrics.json").read_text())
        for a, b in zip(first["cases"], second["cases"], strict=True):
            assert a["summary"] == b["summary"]
            assert not any(run["forget"]["noise"]["secret"] for run in a["runs"])
            assert all("NOT secret" in text for text in self.printed(tmp_path))

    def test_its_noise_is_secret_and_fresh(self, tmp_path: Path) -> None:
        weights = []
        for out in ("one", "two"):
            main(["run", write(tmp_path, out=str(tmp_path / out), seeds=[0])])
            folder = tmp_path / out / "small"
            metrics = json.loads((folder / "metrics.json").read_text())
            runs = [run for case in metrics["cases"] for run in case["runs"]]
            assert all(run["forget"]["noise"]["secret"] for run in runs)
            weights.append([(folder / run["folder"] / SCRUBBED).read_bytes() for run in runs])
        assert not any(a == b for a, b in zip(*weights, strict=True))

    @staticmethod
    def printed(folder: Path) -> list[str]:
        return [path.read_text() for path in folder.rglob("result.txt")]

    def test_a_killed_run_goes_on_and_trains_only_what_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path)
        trained: list[int] = []
        limit = 3
        train_one = cases.train_one

        def counted(config: object, data: object, rows: object, seed: int) -> object:
            if len(trained) == limit:
                raise KeyboardInterrupt
            trained.append(seed)
            return train_one(config, data, rows, seed)

        monkeypatch.setattr(cases, "train_one", counted)
        assert main(["run", path]) == 130
        assert "start it again" in capsys.readouterr().err
        limit = 100
        assert main(["run", path]) == 0
        # none twice: two forget sets share two seeds
        assert sorted(trained) == [0, 1, 1000, 1000, 1001, 1001]

    def test_sweep_and_plot(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(
            tmp_path, scales=[1e-3, 1e-1], draws=2, seeds=[0], forget={"noise": {"accuracy": 0.05}}
        )
        assert main(["sweep", path]) == 0
        metrics = json.loads((tmp_path / "small" / "metrics.json").read_text())
        jsonschema.validate(metrics, load_schema())
        noise = metrics["cases"][0]["runs"][0]["forget"]["noise"]
        assert noise["drop"] <= noise["target"]["accuracy"] == 0.05
        place = tmp_path / "small" / "class-3"
        table = SweepTable.load(place / "sweep.parquet")
        assert table.frontier()["draws"].tolist() == [
            1,
            2,
            2,
        ]  # without noise there is nothing to draw
        assert len(pd.read_csv(place / "sweep.csv")) == len(table.to_pandas()) == 5
        assert (tmp_path / "small" / "report.html").read_text().count(
            "<svg"
        ) == 8  # four figures a forget set
        before = (place / "tradeoff.svg").read_bytes()
        (place / "tradeoff.svg").unlink()
        capsys.readouterr()
        assert main(["plot", path]) == 0
        assert str(place / "tradeoff.svg") in capsys.readouterr().out
        assert (place / "tradeoff.svg").read_bytes() == before

    @pytest.mark.parametrize("used", ["false", "true"])
    def test_folders_of_version_0_1_are_read(self, tmp_path: Path, used: str) -> None:
        """Their configuration names `reference_variant`, which compare does today."""
        assert main(["run", write(tmp_path, seeds=[0])]) == 0
        stored = tmp_path / "small" / "config.yaml"
        stored.write_text(stored.read_text() + f"reference_variant: {used}\n")
        assert main(["plot", str(tmp_path / "small")]) == 0

    def test_the_public_code_is_a_matter_of_compare(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["run", write(tmp_path, reference_variant=True)]) == 2
        message = capsys.readouterr().err
        assert "'reference_variant'" in message
        assert "compare has it" in message
        assert "golatkar-code" in message
        assert not (tmp_path / "small").exists()

    def test_plot_needs_a_finished_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plot", write(tmp_path)]) == 2
        assert "metrics.json" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")
class TestOnRecord:
    SETS: ClassVar[Any] = [
        {"name": "ours", "kind": "indices", "indices": [3, 14], "who": "ticket 1"},
        {"name": "class 3", "kind": "class", "label": 3},
    ]

    def requests(self, folder: Path) -> dict[str, Any]:
        return Ledger(folder / "small").requests

    def test_what_somebody_asked_for(self, tmp_path: Path) -> None:
        path = write(tmp_path, forget_sets=self.SETS)
        assert main(["run", path]) == 0
        ledger = Ledger(tmp_path / "small")
        (request,) = ledger.requests.values()
        assert request.who == "ticket 1"
        assert set(request.samples) == set(ledger.hashed([3, 14]))
        told = request.evidence
        runs = json.loads((tmp_path / "small" / "metrics.json").read_text())["cases"][0]["runs"]
        kls = [run["evaluation"]["parts"]["forget"]["kl_scrubbed"] for run in runs]
        assert told["KL on the forgotten (nats)"] == pytest.approx(kls)
        assert told["forgotten"] == 2
        for seed, after in zip((0, 1), told["model_after"], strict=True):
            state = load_tensors(tmp_path / "small" / "ours" / f"seed-{seed}" / SCRUBBED)[0]
            assert after == fingerprint(state)

    def test_killed_it_is_pending_and_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path, forget_sets=self.SETS)

        def dies(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cases, "train_one", dies)
            assert main(["run", path]) == 130
        (request,) = self.requests(tmp_path).values()
        assert request.state == "under way"
        assert main(["run", path]) == 0
        assert [r.state for r in self.requests(tmp_path).values()] == ["done"]
        assert main(["run", path]) == 0, "a better model may take its place"
        assert [r.state for r in self.requests(tmp_path).values()] == ["done"]

    def test_what_is_in_use_is_not_overwritten(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write(tmp_path, forget_sets=self.SETS)
        main(["run", path])
        scrubbed = tmp_path / "small" / "ours" / "seed-0" / SCRUBBED
        before = scrubbed.read_bytes()
        Ledger(tmp_path / "small").serve("r-1", although="for the test")
        assert main(["run", path]) == 2
        assert "was served with its present model" in capsys.readouterr().err
        assert scrubbed.read_bytes() == before

    def test_nobody_asks_for_what_chance_chose(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sets = [{"name": "ten", "kind": "random", "count": 10, "who": "ticket 2"}]
        assert main(["run", write(tmp_path, forget_sets=sets)]) == 2
        assert "who asked for ['ten']" in capsys.readouterr().err
