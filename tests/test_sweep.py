"""Sweeps: every cell is what `forget` would give, nothing is computed twice, and a killed sweep
goes on."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WEIGHT_DECAY, seeded, small_net
from scipy import stats
from scipy.special import log_softmax, rel_entr
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fisher_forget import ConfigError, NoiseTarget, Reference, StorageError, forget, sweep
from fisher_forget.baselines.finetune import FineTune
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import FisherForgetWarning
from fisher_forget.experiments.config import SweepConfig
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.likelihood.base import ACCURACY, SQUARED_ERROR, Score
from fisher_forget.sweep import SweepTable
from fisher_forget.sweep.scorer import Scorer
from fisher_forget.sweep.table import pareto

ROOT = Path(__file__).parent.parent
FORGET = [0, 3, 6, 9]
GRID: dict[str, Any] = {"noise": [0.05, 0.4], "structure": ["diagonal", "ekfac"], "seed": [0, 5]}


@pytest.fixture(scope="module")
def reference(trained: nn.Module, blobs: TensorDataset) -> Reference:
    keep = np.setdiff1d(np.arange(len(blobs)), FORGET)
    settings = TrainSettings(epochs=100, batch_size=56, lr=0.3, weight_decay=WEIGHT_DECAY)
    retrained = [
        train(seeded(small_net, seed), blobs, settings, seed=seed, indices=keep, progress=False)
        for seed in (1, 2, 3)
    ]
    parts = {"forget": Subset(blobs, FORGET), "retain": Subset(blobs, keep.tolist()), "test": blobs}
    return Reference(trained, retrained, parts)


@pytest.fixture
def swept(
    trained: nn.Module, blobs: TensorDataset, reference: Reference
) -> Callable[..., SweepTable]:
    def call(grid: dict[str, Any], **options: Any) -> SweepTable:
        given = {"reference": reference, "weight_decay": WEIGHT_DECAY, "progress": False} | options
        return sweep(trained, DataLoader(blobs, batch_size=16), FORGET, grid, **given)

    return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the real work is done."""
    calls = {"estimate_curvature": 0, "newton_step": 0, "outputs": 0}

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*args, **options)

        return call

    for room, name in (("problem", "estimate_curvature"), ("forget", "newton_step")):
        module = sys.modules[f"fisher_forget.unlearn.{room}"]
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    monkeypatch.setattr(Reference, "outputs", counting("outputs", Reference.outputs))
    return calls


@pytest.mark.filterwarnings("ignore:The given weight_decay")
def test_weight_decay_by_patterns_is_an_axis(
    swept: Callable[..., SweepTable], tmp_path: Path
) -> None:
    decays = [{"*bias": 0.0, "*": 0.1}, WEIGHT_DECAY]
    file = tmp_path / "sweep.parquet"
    table = swept({"weight_decay": decays, "damping": [0.1], "steps": [1]}, file=file).to_pandas()
    assert table["weight_decay"].map(str).nunique() == 2
    again = swept({"weight_decay": decays, "damping": [0.1], "steps": [1]}, file=file).to_pandas()
    assert list(again["weight_decay"].map(str)) == list(table["weight_decay"].map(str))


def scores(reference: Reference, model: nn.Module) -> dict[str, float]:
    """kl, score and loss of each part by SciPy and torch."""
    found = {}
    for part, outputs in reference.outputs(model).items():
        y = reference.targets[part]
        q = log_softmax(outputs.double().numpy(), 1)
        p = [log_softmax(member[part].double().numpy(), 1) for member in reference.retrained]
        found[f"kl_{part}"] = float(
            np.mean([rel_entr(np.exp(a), np.exp(q)).sum(1).mean() for a in p])
        )
        found[f"score_{part}"] = float((outputs.argmax(1) == y).double().mean())
        found[f"loss_{part}"] = float(nn.functional.cross_entropy(outputs, y))
    return found


class TestCells:
    def test_each_is_what_forget_gives(self, swept, trained, blobs, reference) -> None:
        frame = swept(GRID).to_pandas()
        assert len(frame) == 2 * (1 + 2 * 2)  # the Newton step without noise has no draws
        for row in frame.to_dict("records"):
            result = forget(
                trained,
                DataLoader(blobs, batch_size=16),
                FORGET,
                weight_decay=WEIGHT_DECAY,
                structure=row["structure"],
                noise=None,
                progress=False,
            )
            generator = torch.Generator().manual_seed(row["seed"])
            model = result.with_noise(row["noise"], generator=generator)
            for name, value in scores(reference, model).items():
                assert row[name] == pytest.approx(value, rel=1e-5), name
            assert row["scale"] == row["noise"]
            lost = row["loss_retain"] > scores(reference, trained)["loss_retain"] + 1.0
            assert row["status"] == ("ruined" if lost else "done")
            expected = result.information(row["noise"]) if row["noise"] else math.inf
            assert row["information"] == pytest.approx(expected)

    def test_the_gap_is_that_of_closeness(self, trained, blobs) -> None:
        nets = [seeded(small_net, seed) for seed in range(5)]  # untrained, and so alike
        reference = Reference(trained, nets, dict.fromkeys(("forget", "retain", "test"), blobs))
        half = seeded(small_net, 9)
        with torch.no_grad():
            for p, other in zip(half.parameters(), trained.parameters(), strict=True):
                p.lerp_(other, 0.5)
        closed = reference.closeness(half).parts["forget"].gap.closed
        assert closed is not None
        row = Scorer.of(reference, None).row(reference.outputs(half))
        found = [row[name] for name in ("gap_closed", "gap_low", "gap_high")]
        assert found == pytest.approx([closed.value, closed.low, closed.high])
        assert closed.low < closed.value < closed.high

    def test_a_noise_target_finds_the_scale_that_forget_finds(
        self, swept, trained, blobs, reference
    ) -> None:
        target = NoiseTarget(loss=0.05)
        frame = swept({"noise": ["auto", target, 0.1]}).to_pandas().set_index("noise")
        for noise, word in (("auto", "auto"), (target, "loss 0.05")):
            generator = torch.Generator().manual_seed(0)
            options = {"weight_decay": WEIGHT_DECAY, "generator": generator, "progress": False}
            result = forget(trained, blobs, FORGET, noise=noise, **options)
            assert frame.loc[word, "scale"] == pytest.approx(
                result.noise.scale, rel=1e-3
            )  # both searched, to 2 %
            assert frame.loc[word, "loss_test"] == pytest.approx(
                scores(reference, result.model)["loss_test"], rel=1e-4
            )
        assert frame.loc["0.1", "scale"] == 0.1

    def test_newton_options_share_one_curvature(
        self, swept, counted, trained, blobs, reference
    ) -> None:
        grid = {
            "damping": [0.1, 0.01],
            "steps": [1, 2],
            "noise": [0.05],
            "exponent": [0.25, 0.5],
            "seed": range(3),
        }
        frame = swept(grid).to_pandas()
        assert (counted["estimate_curvature"], counted["newton_step"]) == (1, 4)
        assert counted["outputs"] == len(frame) == 4 * 2 * (1 + 3)
        row = frame[
            (frame["damping"] == 0.01) & (frame["steps"] == 2) & (frame["noise"] == 0)
        ].iloc[0]
        alone = forget(
            trained,
            blobs,
            FORGET,
            weight_decay=WEIGHT_DECAY,
            damping=0.01,
            steps=2,
            noise=None,
            progress=False,
        )
        for name, value in scores(reference, alone.model).items():
            assert row[name] == pytest.approx(value, rel=1e-4)

    def test_each_structure_needs_its_own(self, swept, counted) -> None:
        swept(GRID)
        assert (counted["estimate_curvature"], counted["newton_step"]) == (2, 2)

    def test_axes_cross_the_methods_that_have_them(self, swept, trained, blobs, reference) -> None:
        grid = {
            "method": ["fisher-forget", "finetune", "neggrad"],
            "noise": [0.1],
            "lr": [0.01, 0.1],
            "seed": [4],
        }
        frame = swept(grid, epochs=2).to_pandas()
        assert frame["method"].value_counts().to_dict() == {
            "fisher-forget": 2,
            "finetune": 2,
            "neggrad": 2,
        }
        assert frame[frame["method"] == "finetune"]["noise"].isna().all()
        assert frame[frame["method"] == "fisher-forget"]["lr"].isna().all()
        tuned = FineTune(epochs=2, lr=0.1, weight_decay=WEIGHT_DECAY, seed=4).unlearn(
            trained, resolve_split(blobs, FORGET)
        )
        row = frame[(frame["method"] == "finetune") & (frame["lr"] == 0.1)].iloc[0]
        for name, value in scores(reference, tuned.model).items():
            assert row[name] == pytest.approx(value, rel=1e-4)

    def test_nothing_given_is_changed(
        self, swept, trained, untouched: Callable[..., AbstractContextManager]
    ) -> None:
        with untouched(trained):
            swept({"noise": [0.1], "method": ["fisher-forget", "finetune"]})

    @pytest.mark.parametrize(
        ("grid", "words"),
        [
            ({"nois": [0.1]}, "'noise'"),
            ({"lr": [0.1]}, "the option 'lr'"),
            ({"method": ["magic"]}, "magic"),
            ({"noise": []}, "one value at least"),
            ({"noise": 0.1}, "one value at least"),
            ({"noise": [-1.0]}, "noise=-1.0"),
            ({"steps": [0]}, "steps=0"),
        ],
    )
    def test_refusals_come_before_any_work(self, swept, counted, grid, words) -> None:
        with pytest.raises(ConfigError, match=words):
            swept(grid)
        assert counted["estimate_curvature"] == counted["outputs"] == 0

    def test_other_refusals(self, swept, trained, blobs) -> None:
        with pytest.raises(ConfigError, match="dampin"):
            swept({"noise": [0.1]}, dampin=0.1)
        with pytest.raises(ConfigError, match="jobs=0"):
            swept({"noise": [0.1]}, jobs=0)
        without = Reference(trained, [trained, trained], {"forget": blobs})
        with pytest.raises(ConfigError, match="retain"):
            swept({"noise": [0.1]}, reference=without)


class TestRuin:
    SCALES = (0.1, 30.0, 100.0, 300.0)

    def test_what_is_hopeless_is_not_run(self, swept, counted) -> None:
        table = swept({"noise": self.SCALES, "exponent": [0.25], "seed": range(2)})
        status = table.frame.groupby("noise")["status"].agg(list)
        assert status[0.1] == ["done"] * 2
        assert status[30.0] == ["ruined"] * 2
        assert status[100.0] == status[300.0] == ["skipped"] * 2
        assert counted["outputs"] == 1 + 2 + 2
        loss = table.frame.groupby("noise")["loss_retain"].min()
        bound = table.marks["original"]["loss_retain"] + 1.0
        assert loss[0.1] < bound < loss[30.0]
        assert math.isnan(loss[100.0])
        assert table.frontier()["noise"].tolist() == [0.0, 0.1, 30.0]
        assert (
            "2 raised the retained loss by more than 1 nats: ruined; 4 with more noise were skipped"
            in str(table)
        )

    def test_one_draw_that_survives_lets_the_next_scale_run(self, swept) -> None:
        """The bound lies between the losses of the two draws of a scale."""
        grid = {"noise": [1.0, 2.0], "seed": range(2)}
        every = swept(grid, ruin=None).frame
        rise = every["loss_retain"] - swept(grid, ruin=None).marks["original"]["loss_retain"]
        first = sorted(rise[every["noise"] == 1.0])
        table = swept(grid, ruin=sum(first) / 2).frame
        assert sorted(table[table["noise"] == 1.0]["status"]) == ["done", "ruined"]
        assert "skipped" not in set(table["status"])

    def test_none_runs_them_all(self, swept) -> None:
        assert set(swept({"noise": self.SCALES}, ruin=None).frame["status"]) == {"done"}

    def test_outputs_that_overflow_are_ruined(self, swept) -> None:
        frame = swept({"noise": [0.1, 1e38]}, ruin=None).frame.set_index("noise")
        assert frame.loc[1e38, "status"] == "ruined"
        assert math.isnan(frame.loc[1e38, "kl_forget"])


class TestFile:
    def test_there_and_back_with_units(self, swept, tmp_path: Path) -> None:
        table = swept(
            {"damping": ["auto", 0.1], "steps": [1], "noise": [0.1]}, file=tmp_path / "t.parquet"
        )
        again = SweepTable.load(tmp_path / "t.parquet")
        pd.testing.assert_frame_equal(again.to_pandas(), table.to_pandas())
        assert (again.axes, again.marks, again.score, again.ruin) == (
            table.axes,
            table.marks,
            table.score,
            table.ruin,
        )
        plain = pd.read_parquet(tmp_path / "t.parquet")  # as anybody would read it
        assert plain["damping"].tolist() == ["auto", "auto", "0.1", "0.1"]
        units = plain.attrs["units"]
        assert {units[name] for name in ("kl_forget", "loss_retain", "information")} == {"nats"}
        assert (units["seconds"], units["scale"], units["damping"], units["status"]) == (
            "s",
            "1",
            "",
            "",
        )
        assert set(units) == set(plain)

    def test_a_killed_sweep_goes_on(
        self, swept, counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = swept(GRID).to_pandas().drop(columns="seconds")
        file = tmp_path / "t.parquet"
        outputs = Reference.outputs

        def killed(self: Reference, model: nn.Module) -> Any:
            if file.exists() and len(pd.read_parquet(file)) == 7:
                raise KeyboardInterrupt
            return outputs(self, model)

        with monkeypatch.context() as patched:
            patched.setattr(Reference, "outputs", killed)
            with pytest.raises(KeyboardInterrupt):
                swept(GRID, file=file)
        for name in counted:
            counted[name] = 0
        resumed = swept(GRID, file=file).to_pandas().drop(columns="seconds")
        assert counted == {
            "estimate_curvature": 1,
            "newton_step": 1,
            "outputs": 3,
        }  # one structure was finished
        pd.testing.assert_frame_equal(resumed, whole, rtol=1e-6)
        swept(GRID, file=file)
        assert counted["estimate_curvature"] == 1  # nothing is left to do

    def test_a_larger_grid_keeps_what_is_there(self, swept, counted, tmp_path: Path) -> None:
        file = tmp_path / "t.parquet"
        swept({"noise": [0.1, 30.0, 300.0]}, file=file)
        table = swept({"noise": [0.1, 0.2, 30.0, 300.0]}, file=file)
        assert counted["outputs"] == 3 + 1  # 300 is still skipped
        assert table.frame["status"].tolist() == ["done", "done", "done", "ruined", "skipped"]

    def test_what_was_skipped_is_decided_again(self, swept, tmp_path: Path) -> None:
        file = tmp_path / "t.parquet"
        assert swept({"noise": [30.0, 300.0]}, file=file).frame["status"].tolist() == [
            "done",
            "ruined",
            "skipped",
        ]
        assert swept({"noise": [300.0]}, file=file).frame["status"].tolist() == ["done", "ruined"]

    def test_another_model_or_a_damaged_file_starts_anew(
        self, swept, blobs, tmp_path: Path
    ) -> None:
        file = tmp_path / "t.parquet"
        first = swept({"noise": [0.1]}, file=file)
        with pytest.warns(FisherForgetWarning, match="another model"):
            swept({"noise": [0.1]}, file=file, seed=1)
        file.write_bytes(b"not a table")
        with pytest.raises(StorageError, match="Parquet file of a sweep"):
            SweepTable.load(file)
        with pytest.warns(FisherForgetWarning, match="written anew"):
            again = swept({"noise": [0.1]}, file=file)
        pd.testing.assert_frame_equal(
            again.frame.drop(columns="seconds"), first.frame.drop(columns="seconds")
        )

    def test_two_workers_give_what_one_gives(self, swept, tmp_path: Path) -> None:
        grid = GRID | {"method": ["fisher-forget", "finetune"]}
        one = swept(grid).to_pandas().drop(columns="seconds")
        two = swept(grid, jobs=2, file=tmp_path / "t.parquet").to_pandas().drop(columns="seconds")
        pd.testing.assert_frame_equal(one, two, rtol=1e-4)
        assert len(pd.read_parquet(tmp_path / "t.parquet")) == len(one)


class TestTable:
    def test_marks(self, swept, reference, trained) -> None:
        marks = swept({"noise": [0.1]}).marks
        members = [scores_of(reference, m) for m in reference.retrained]
        for name, value in scores(reference, trained).items():
            assert marks["original"][name] == pytest.approx(value, rel=1e-5)
        for name in ("score_test", "loss_retain"):
            values = [m[name] for m in members]
            assert marks["retrained"][name] == pytest.approx(np.mean(values), rel=1e-5)
            assert marks["retrained_std"][name] == pytest.approx(np.std(values, ddof=1), rel=1e-4)
        floor = reference.closeness(trained).parts["forget"]
        assert marks["retrained"]["kl_forget"] == pytest.approx(floor.floor)
        assert marks["retrained_std"]["kl_forget"] == pytest.approx(floor.floor_std)

    def test_frontier(self, swept) -> None:
        table = swept(GRID | {"seed": range(4), "exponent": [0.25, 0.5]})
        rows, frontier = table.to_pandas(), table.frontier()
        settings = itertools.product(("diagonal", "ekfac"), (0.25, 0.5), (0.0, 0.05, 0.4))
        keys = frontier[["structure", "exponent", "noise"]].itertuples(index=False)
        assert sorted(tuple(k) for k in keys) == sorted(settings)
        for entry in frontier.to_dict("records"):
            same = [rows[name] == entry[name] for name in ("structure", "exponent", "noise")]
            draws = rows[np.logical_and.reduce(same)]
            assert entry["draws"] == len(draws) == (4 if entry["noise"] else 1)
            for name in ("kl_forget", "score_test", "loss_retain"):
                values = draws[name].to_numpy()
                assert entry[name] == pytest.approx(values.mean())
                ends = entry[f"{name}_low"], entry[f"{name}_high"]
                if len(values) == 1:
                    assert np.isnan(ends).all()
                elif values.std():
                    error = values.std(ddof=1) / 2
                    assert ends == pytest.approx(stats.t.interval(0.95, 3, values.mean(), error))
        points = frontier[["kl_forget", "score_test"]].to_numpy()
        beaten = [any(dominates(q, p) for q in points) for p in points]
        assert frontier["pareto"].tolist() == [not b for b in beaten]

    def test_the_best_keeps_the_score(self) -> None:
        rows = [
            (0.0, 0.9, 0.99),
            (0.1, 0.4, 0.985),
            (0.2, 0.31, 0.984),
            (0.3, 0.3, 0.97),
            (0.4, 2.0, 0.5),
        ]
        table = made_up(rows, floor=0.35, target=0.99)
        assert table.best()["noise"] == 0.2  # 0.4 is above the floor, 0.3 costs too much
        assert table.best(cost=0.02)["noise"] == 0.2  # both lie below the floor: the better score
        assert table.best(cost=0.001)["noise"] == 0.0
        assert (
            made_up(rows, floor=0.35, target=1.2).best()["noise"] == 0.0
        )  # all cost too much: the cheapest
        errors = [(noise, kl, 1 - score) for noise, kl, score in rows]
        assert (
            made_up(errors, floor=0.35, target=0.015, score=SQUARED_ERROR).best(0.1)["noise"] == 0.2
        )

    def test_the_front(self) -> None:
        rng = np.random.default_rng(0)
        kl, score = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
        kl[3], score[7] = np.nan, np.nan
        found = pareto(kl, score)
        for i in range(40):
            others = [j for j in range(40) if dominates((kl[j], score[j]), (kl[i], score[i]))]
            assert found[i] == (not others and np.isfinite([kl[i], score[i]]).all())

    def test_reads_well(self, swept) -> None:
        table = swept({"noise": [0.1], "method": ["fisher-forget", "finetune"], "seed": range(2)})
        text, page = str(table), table._repr_html_()
        assert max(map(len, text.splitlines())) <= 200
        for words in ("KL forget (nats)", "gap closed", "Pareto", "finetune", "–"):
            assert words in text
            assert words in page
        assert "nan" not in text.lower()
        assert page.count("<tr") == 1 + 3

    def test_test_data_of_retained_classes_is_where_costs_show(
        self, swept, trained, blobs, reference
    ) -> None:
        keep = torch.utils.data.Subset(blobs, [i for i in range(len(blobs)) if i % 3])
        parts = {
            "forget": Subset(blobs, FORGET),
            "retain": blobs,
            "test": blobs,
            "test, retained classes": keep,
        }
        table = swept(
            {"noise": [0.1]}, reference=Reference(trained, [seeded(small_net, 1), trained], parts)
        )
        assert table.kept == "test_retained_classes"
        assert table.marks["original"]["score_test_retained_classes"] == pytest.approx(
            float(
                (trained(blobs.tensors[0]).argmax(1) == blobs.tensors[1])[np.arange(60) % 3 > 0]
                .double()
                .mean()
            )
        )


def scores_of(reference: Reference, outputs: Any) -> dict[str, float]:
    found = {}
    for part, y in reference.targets.items():
        found[f"score_{part}"] = float((outputs[part].argmax(1) == y).double().mean())
        found[f"loss_{part}"] = float(nn.functional.cross_entropy(outputs[part], y))
    return found


def dominates(q: Any, p: Any) -> bool:
    return bool(q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1]))


def made_up(
    rows: list[tuple[float, float, float]], floor: float, target: float, score: Score = ACCURACY
) -> SweepTable:
    frame = pd.DataFrame(rows, columns=["noise", "kl_forget", "score_test"])
    frame = frame.assign(
        method="fisher-forget", seed=0, status="done", scale=frame["noise"], loss_retain=0.0
    )
    frame = frame.assign(information=1.0, gap_closed=0.5, seconds=1.0)
    marks = {"retrained": {"kl_forget": floor, "score_test": target}}
    return SweepTable(frame, ("method", "noise"), marks, score)


class TestConfiguration:
    def test_a_grid_in_a_file_and_on_the_command_line(self) -> None:
        config = load_config(
            ROOT / "configs/digits_sweep.yaml",
            ["--scales", "[0.1, 0.2]", "--draws", "2"],
            SweepConfig,
        )
        assert isinstance(config, SweepConfig)
        assert config.axes == {
            "noise": [0.1, 0.2],
            "seed": [0, 1],
            "structure": ["ekfac", "diagonal"],
        }
        grid = '{"method": ["finetune"], "lr": [0.01]}'
        other = load_config(ROOT / "configs/digits_sweep.yaml", ["--grid", grid], SweepConfig)
        assert isinstance(other, SweepConfig)
        assert other.axes == {"seed": [0, 1, 2, 3, 4], "method": ["finetune"], "lr": [0.01]}

    def test_a_grid_that_cannot_be_is_refused_before_anything_is_trained(self) -> None:
        for grid, words in (
            ('{"structur": ["ekfac"]}', "'structure'"),
            ('{"steps": [0]}', "steps=0"),
        ):
            with pytest.raises(ConfigError, match=words):
                load_config(ROOT / "configs/digits_sweep.yaml", ["--grid", grid], SweepConfig)
