"""Deletion requests from prepared sums: the same result as from the start, accumulated, kept on
disk."""

from __future__ import annotations

import copy
import importlib
import json
import math
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import blobs_data
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fisher_forget import (
    ConfigError,
    DataError,
    FisherForgetWarning,
    ForgetOptions,
    Limits,
    NumericalError,
    SplitError,
    StorageError,
    forget,
    newton_step,
    prepare,
)
from fisher_forget import params as P
from fisher_forget._util.files import load_tensors, plain
from fisher_forget.data.fingerprint import SAMPLES
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.ledger import Ledger, RequestLog, model_fingerprint
from fisher_forget.ledger.states import a_month_after
from fisher_forget.unlearn import self_check
from fisher_forget.unlearn.data_sums import load_data_sums
from fisher_forget.unlearn.newton import flow
from fisher_forget.unlearn.options import PRECONDITIONER_SAMPLES

WD = 0.01
# by name, because the package exports the functions of the same names
PREPARE, FORGET, SNAPSHOT = (
    importlib.import_module(f"fisher_forget.unlearn.{name}")
    for name in ("prepare", "forget", "snapshot")
)
QUIET = {"noise": None, "drift": False}


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(240, 1, 6, 6, generator=g)
    return TensorDataset(
        x, (x[:, 0, :3].sum((1, 2)) > x[:, 0, 3:].sum((1, 2))).long() + (x[:, 0, 0, 0] > 1).long()
    )


@pytest.fixture(scope="module")
def model(data: TensorDataset) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )
    return train(
        net, data, TrainSettings(epochs=200, lr=0.05, weight_decay=WD), seed=0, progress=False
    )


def weights(model: nn.Module) -> P.Params:
    return P.detached(dict(model.named_parameters()))


def distance(a: nn.Module, b: nn.Module, start: nn.Module) -> float:
    """Difference of two results over the length of the step."""
    step = P.add(weights(a), weights(start), -1)
    return P.norm(P.add(weights(a), weights(b), -1)) / P.norm(step)


@pytest.mark.parametrize("structure", ["diagonal", "dense", "ekfac", "low_rank"])
def test_literal_step_equals_the_one_off_call(
    model: nn.Module, data: TensorDataset, structure: str
) -> None:
    """Inverting the curvature itself: sums less a part are the sums of the rest; EKFAC keeps its
    old eigenbasis."""
    idx = list(range(0, 30, 3))
    options = {"steps": 1, "damping": 0.1, "solver": "direct", **QUIET}
    shared = {"structure": structure, "weight_decay": WD, "max_samples": None, "progress": False}
    prepared = prepare(model, data, **shared).forget(idx, **options)
    plain = forget(model, data, idx, **shared, **options)
    tolerance = {"ekfac": 0.1, "low_rank": 1e-3}.get(structure, 1e-4)
    assert distance(plain.model, prepared.model, model) <= tolerance


def test_the_flow_is_the_same(model: nn.Module, data: TensorDataset) -> None:
    """Preconditioned by another basis, the flow ends at the same place up to the solver's
    tolerance."""
    idx = list(range(12))
    prepared = prepare(model, data, weight_decay=WD, progress=False).forget(idx, **QUIET)
    plain = forget(model, data, idx, weight_decay=WD, progress=False, **QUIET)
    assert [s.damping for s in plain.newton.path] == [s.damping for s in prepared.newton.path]
    assert distance(plain.model, prepared.model, model) <= 0.1


def test_requests_accumulate_in_any_order(model: nn.Module, data: TensorDataset) -> None:
    def request(*sets: list[int]) -> nn.Module:
        prepared = prepare(model, data, structure="diagonal", weight_decay=WD, progress=False)
        return [prepared.forget(s, **QUIET) for s in sets][-1].model

    a, b = [1, 5, 9], [2, 5, 77]
    once = request([1, 2, 5, 9, 77])
    for other in (request(a, b), request(b, a)):
        assert all(
            torch.equal(x, y) for x, y in zip(once.parameters(), other.parameters(), strict=True)
        )


def test_its_cost_grows_with_the_forget_set_only(
    model: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: a literal step reads the forget set a few times, and a fixed number of
    others."""

    class Counting(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            Counting.reads += 1
            return super().__getitem__(index)

    shown = 8
    monkeypatch.setattr(self_check, "ANSWERS", shown)
    # the working set tells the gradient where the step has led
    monkeypatch.setattr(flow, "POOL", 2)
    monkeypatch.setattr(FORGET, "newton_step", partial(newton_step, working_set=shown))
    prepared = prepare(
        model,
        Counting(*data.tensors),
        structure="diagonal",
        weight_decay=WD,
        max_samples=None,
        progress=False,
    )
    assert Counting.reads >= 2 * len(data)
    for few in ([3, 4], [10, 11, 12, 13]):
        Counting.reads = 0
        prepared.forget(few, steps=1, damping=0.1, solver="direct", **QUIET)
        probes = 2 * SAMPLES  # of the hashes by which forgotten samples are known again
        assert Counting.reads <= 7 * len(prepared.forgotten) + 9 * shown + probes


class TestOnDisk:
    def test_a_second_process_goes_on(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        first = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        literal = {"steps": 1, "damping": 0.1, "solver": "direct", **QUIET}
        first.forget([3, 8], **literal)
        again = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.forgotten.tolist() == [3, 8]
        later, straight = again.forget([5], **literal), first.forget([5], **literal)
        assert distance(straight.model, later.model, model) <= 1e-5
        assert again.requests == [[3, 8], [5]]

    def test_nothing_is_computed_twice(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        monkeypatch.setattr(SNAPSHOT, "take_data_sums", None)
        monkeypatch.setattr(PREPARE, "curvature_of", None)
        prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)

    def test_a_killed_call_goes_on(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(SNAPSHOT, "take_data_sums", killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert (tmp_path / "curvature.safetensors").exists()
        found = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        whole = prepare(model, data, weight_decay=WD, progress=False)
        for name, value in whole.made.sums.total.sums.items():
            assert torch.equal(found.made.sums.total.sums[name], value)

    def test_a_killed_request_is_not_lost(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        with monkeypatch.context() as patched:
            patched.setattr(PREPARE, "scrub", killed)
            with pytest.raises(KeyboardInterrupt):
                prepared.forget([4], **QUIET)
        assert prepared.pending == ["r-1"]
        with pytest.warns(FisherForgetWarning, match=r"not done: 1 \(r-1\)\. A run was killed"):
            again = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.forgotten.tolist() == [4]
        result = again.redeliver(**QUIET)
        assert again.pending == []
        once = prepare(model, data, weight_decay=WD, progress=False).forget([4], **QUIET)
        assert distance(result.model, once.model, model) < 1e-5

    def test_a_request_that_ends_in_an_error_is_pending(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)

        def fails(*args: object, **kwargs: object) -> None:
            raise NumericalError("nan", "numbers", "None.")

        with monkeypatch.context() as patched:
            patched.setattr(PREPARE, "scrub", fails)
            with pytest.raises(NumericalError):
                prepared.forget([4], **QUIET)
        with pytest.warns(FisherForgetWarning, match="not done"):
            again = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert prepared.pending == again.pending == ["r-1"]
        (request,) = again.log.ledger.requests.values()
        assert request.state == "failed"
        assert "NumericalError" in request.evidence["reason"]
        assert again.forget([7], **QUIET).split.forget.tolist() == [4, 7]
        assert again.pending == []

    def test_a_request_that_is_withdrawn_is_retained_again(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.forget([4], **QUIET)

        def fails(*args: object, **kwargs: object) -> None:
            raise NumericalError("nan", "numbers", "None.")

        with monkeypatch.context() as patched:
            patched.setattr(PREPARE, "scrub", fails)
            with pytest.raises(NumericalError):
                prepared.forget([9], **QUIET)
        assert prepared.redeliver(**QUIET).split.forget.tolist() == [4, 9]
        with monkeypatch.context() as patched:
            patched.setattr(PREPARE, "scrub", fails)
            with pytest.raises(NumericalError):
                prepared.forget([12], **QUIET)
        prepared.log.ledger.withdraw("r-3", "asked by mistake")
        result = prepared.redeliver(**QUIET)
        assert result.split.forget.tolist() == [4, 9]
        assert 12 in result.split.retain

    def test_the_ledger_has_the_evidence_of_the_result(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.forget([4], **QUIET)
        result = prepared.forget([3, 7], **QUIET)
        assert prepared.log is not None
        first, second = prepared.log.ledger.requests.values()
        assert second.evidence == json.loads(json.dumps(plain(result.evidence(model))))
        assert second.evidence["model_before"] == first.evidence["model_before"]
        assert second.evidence["model_before"] == model_fingerprint(model)
        assert second.evidence["model_after"] == model_fingerprint(result.model)
        assert (second.evidence["retained"], second.evidence["forgotten"]) == (len(data) - 3, 3)
        assert second.verdict == "not shown"  # nothing to compare with

    def test_a_result_whose_check_says_no_is_not_served_until_a_better_one_is_there(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        limits = Limits(rise=math.inf)
        prepared = prepare(
            model, data, weight_decay=WD, folder=tmp_path, limits=limits, progress=False
        )
        assert prepared.log is not None
        ledger = prepared.log.ledger
        with pytest.warns(FisherForgetWarning, match="suffered"):
            prepared.forget([4], steps=1, damping=1e-6, solver="direct", **(QUIET | {"noise": 5.0}))
        assert ledger.requests["r-1"].verdict == "others harmed"
        with pytest.raises(ConfigError, match="others harmed"):
            ledger.serve("r-1")
        prepared.redeliver(**QUIET)
        assert ledger.requests["r-1"].verdict == "not shown"
        ledger.serve("r-1")

    def test_who_asks_for_the_same_is_recorded_too(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.forget([3], who="a", **QUIET)
        prepared.forget([3, 4], who="b", **QUIET)
        counts = {r.who: len(r.samples) for r in prepared.log.ledger.requests.values()}
        assert counts == {"a": 1, "b": 2}
        assert prepared.requests == [[3], [3, 4]]
        again = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.requests == [[3], [3, 4]]
        assert again.forgotten.tolist() == [3, 4]
        assert again.forget([4, 5], **QUIET).split.forget.tolist() == [3, 4, 5]

    def test_two_owners_of_a_folder_know_each_others_requests(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        one, two = (
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False) for _ in range(2)
        )
        one.forget([4], **QUIET)
        result = two.forget([7], **QUIET)
        assert result.split.forget.tolist() == [4, 7]
        assert one.redeliver(**QUIET).split.forget.tolist() == [4, 7]
        assert one.requests == two.requests == [[4], [7]]

    def test_without_its_ledger_a_folder_is_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False).forget([4], **QUIET)
        (tmp_path / "ledger.jsonl").unlink()
        with pytest.raises(StorageError, match=r"0 entries, where ledger.head tells of \d"):
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        (tmp_path / "ledger.head").unlink()
        with pytest.raises(StorageError, match="no ledger of who was forgotten"):
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)

    def test_another_model_data_or_option_is_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        other = P.load(model, P.map_params(lambda p: p + 0.1, weights(model))).eval()
        fewer = TensorDataset(*(t[:-1] for t in data.tensors))
        for bad in ((other, data, WD), (model, fewer, WD), (model, data, 2 * WD)):
            with pytest.raises(
                StorageError, match=r"made for (another model|other data|other options)"
            ):
                prepare(bad[0], bad[1], weight_decay=bad[2], folder=tmp_path, progress=False)

    def test_a_damaged_file_is_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        path = tmp_path / "snapshot.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 0xFF
        path.write_bytes(bytes(content))
        assert prepared.log is not None
        with pytest.raises(StorageError, match="checksum"):
            load_data_sums(path, prepared.objective, "any", prepared.split)


@pytest.mark.parametrize("structure", ["ekfac", "diagonal", "low_rank"])
def test_all_samples_that_the_curvature_is_of_may_go(structure: str) -> None:
    """It is estimated anew of who is left, where most of its samples are gone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(PRECONDITIONER_SAMPLES + 60, 3, generator=g)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    net = nn.Linear(3, 2).eval()
    never = Limits(1.0, 1.0)
    prepared = prepare(net, data, structure=structure, limits=never, progress=False)
    gone = prepared.made.sampled[:-3]
    result = prepared.forget(gone, noise=None)
    assert result.curvature.info.count == len(x) - len(gone)
    direct = forget(net, data, gone, structure=structure, noise=None, progress=False)
    assert distance(result.model, direct.model, net) < 1e-3
    prepared.forget(prepared.made.sampled[-3:], noise=None)


def test_bad_requests(model: nn.Module, data: TensorDataset) -> None:
    shared = {"structure": "diagonal", "weight_decay": WD, "progress": False}
    prepared = prepare(model, data, limits=Limits(1.0, 1.0), **shared)
    for bad, match in (
        ([], "empty"),
        ([240], "index 240"),
        ([-1], "negative"),
        ([1, 1], "repeats"),
    ):
        with pytest.raises(SplitError, match=match):
            prepared.forget(bad, **QUIET)
    with pytest.warns(FisherForgetWarning, match="are still recognised"):
        prepared.forget(range(239), steps=1, damping=1.0, solver="direct", **QUIET)
    with pytest.raises(SplitError, match="no retained sample"):
        prepared.forget([239], **QUIET)


@pytest.fixture(scope="module")
def many() -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(PRECONDITIONER_SAMPLES + 500, 4, generator=g)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


class TestDefaultsMeanTheSame:
    """Above `PRECONDITIONER_SAMPLES` the curvature is an estimate on some samples."""

    def test_same_kind_and_samples(self, many: TensorDataset) -> None:
        net = nn.Linear(4, 3).eval()
        idx = [3, 5, 8]
        once = forget(net, many, idx, drift=True, noise=None, progress=False)
        prepared = prepare(net, many, progress=False)
        again = prepared.forget(idx, drift=True, noise=None)
        assert prepared.made.curvature.info.kind == once.curvature.info.kind == "sketch"
        assert again.curvature.info.kind == "sketch"
        assert len(prepared.made.sampled) == PRECONDITIONER_SAMPLES == once.curvature.info.count
        retained, kind = ForgetOptions().curvature_plan(once.split)
        assert kind == "sketch"
        assert len(set(prepared.made.sampled) - set(retained)) <= len(idx)

    @pytest.mark.parametrize(
        ("options", "kind", "count"),
        [
            ({"kind": "exact"}, "exact", PRECONDITIONER_SAMPLES),
            ({"max_samples": 700}, "exact", 700),
            ({"max_samples": None}, "exact", PRECONDITIONER_SAMPLES + 497),
            ({"solver": "direct"}, "exact", PRECONDITIONER_SAMPLES + 497),
        ],
        ids=str,
    )
    def test_an_option_means_the_same(
        self, many: TensorDataset, options: dict[str, Any], kind: str, count: int
    ) -> None:
        net = nn.Linear(4, 3).eval()
        quiet = {"steps": 1, "damping": 1.0, "noise": None, "drift": True}
        once = forget(net, many, [3, 5, 8], progress=False, **quiet, **options)
        again = prepare(net, many, progress=False, **quiet, **options).forget([3, 5, 8])
        for result in (once, again):
            assert result.curvature.info.kind == kind
            # of the samples on which the curvature was prepared, three may be gone
            assert count - 3 <= result.curvature.info.count <= count


def test_an_option_of_the_sums_is_no_option_of_a_request(
    model: nn.Module, data: TensorDataset
) -> None:
    prepared = prepare(model, data, weight_decay=WD, noise=None, progress=False)
    with pytest.raises(ConfigError, match="weight_decay"):
        prepared.forget([3], weight_decay=0.5)
    assert prepared.forget([3], drift=True).noise is None  # the default that prepare was given


@pytest.mark.parametrize(
    ("made", "reopened"),
    [
        ({}, {"solver": "direct"}),
        ({"solver": "direct"}, {}),
        ({"structure": "dense", "solver": "cg"}, {"structure": "dense"}),
    ],
    ids=str,
)
def test_a_folder_is_refused_where_the_solver_asks_for_the_curvature_of_other_samples(
    many: TensorDataset, tmp_path: Path, made: dict[str, Any], reopened: dict[str, Any]
) -> None:
    net = nn.Linear(4, 3).eval()
    prepare(net, many, folder=tmp_path, progress=False, **made)
    prepare(net, many, folder=tmp_path, progress=False, **made)
    with pytest.raises(StorageError, match="other options"):
        prepare(net, many, folder=tmp_path, progress=False, **reopened)


def test_a_solver_that_needs_no_other_samples_keeps_the_folder(
    many: TensorDataset, tmp_path: Path
) -> None:
    net = nn.Linear(4, 3).eval()
    prepare(net, many, folder=tmp_path, progress=False)
    again = prepare(net, many, folder=tmp_path, solver="cg", progress=False)
    assert again.made.curvature.info.count == len(again.made.sampled)


class TestRows:
    def test_a_forgotten_row_that_changes_is_refused(
        self, model: nn.Module, data: TensorDataset
    ) -> None:
        """Its part is taken away from the sums by reading it again."""
        x, y = (t.clone() for t in data.tensors)
        prepared = prepare(model, TensorDataset(x, y), weight_decay=WD, progress=False)
        prepared.forget([3], **QUIET)
        x[3] = 0
        with pytest.raises(DataError, match=r"changed since, such as \[3\].*rebase"):
            prepared.forget([4], **QUIET)
        x[3] = data.tensors[0][3]
        assert prepared.forget([4], **QUIET).split.forget.tolist() == [3, 4]

    @pytest.mark.parametrize("row", [0, 7, 113])
    def test_any_row_that_changes_is_other_data(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, row: int
    ) -> None:
        x, y = (t.clone() for t in data.tensors)
        prepare(model, TensorDataset(x, y), weight_decay=WD, folder=tmp_path, progress=False)
        x[row, 0] += 1e-3
        with pytest.raises(StorageError, match="other data"):
            prepare(model, TensorDataset(x, y), weight_decay=WD, folder=tmp_path, progress=False)


class Reads(Dataset):
    """Which samples are read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.read = data, set()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read.add(index)
        return self.data[index]


class TestNamedData:
    """A name stands for a look at every sample, and the ledger says so."""

    def test_reopening_reads_a_few_samples(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        for name, fewest, most in (("blobs", 0, len(data) / 2), ("", len(data), len(data))):
            folder = tmp_path / f"folder {name}"
            for again in (False, True):
                rows = Reads(data)
                loader = DataLoader(rows, batch_size=8)
                ledger = Ledger(folder, data=name)
                prepared = prepare(model, loader, weight_decay=WD, folder=ledger, progress=False)
                if again:
                    assert fewest <= len(rows.read) <= most
                    assert prepared.forgotten.tolist() == [3]
                else:
                    prepared.forget([3], **QUIET)
        opened = Ledger(tmp_path / "folder blobs").entries[0].details
        assert opened["data"] == "blobs"
        assert opened["samples_looked_at"] == SAMPLES
        assert "data" not in Ledger(tmp_path / "folder ").entries[0].details

    def test_other_names_and_what_was_looked_at_are_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        options = {"weight_decay": WD, "progress": False}
        prepare(model, data, folder=Ledger(tmp_path, data="blobs"), **options)
        with pytest.raises(StorageError, match=r"by the name 'blobs'.*data='blobs'"):
            prepare(model, data, folder=tmp_path, **options)
        with pytest.raises(StorageError, match="opened by the name 'other'"):
            prepare(model, data, folder=Ledger(tmp_path, data="other"), **options)
        x, y = (t.clone() for t in data.tensors)
        x[0] += 1e-3  # one of those that are looked at
        with pytest.raises(StorageError, match="other data"):
            prepare(model, TensorDataset(x, y), folder=Ledger(tmp_path, data="blobs"), **options)
        prepare(model, data, folder=tmp_path / "whole", **options)
        with pytest.raises(StorageError, match=r"by every sample.*give no name"):
            prepare(model, data, folder=Ledger(tmp_path / "whole", data="blobs"), **options)

    def test_a_forgotten_row_that_changes_is_still_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        x, y = (t.clone() for t in data.tensors)
        ledger = Ledger(tmp_path, data="blobs")
        prepared = prepare(
            model, TensorDataset(x, y), weight_decay=WD, folder=ledger, progress=False
        )
        prepared.forget([3], **QUIET)
        x[3] = 0
        with pytest.raises(DataError, match="changed since"):
            prepared.forget([4], **QUIET)
        x[3] = data.tensors[0][3]
        rebased = prepared.rebase(prepared.forget([4], **QUIET), progress=False)
        x[[3, 4]] = math.nan
        again = prepare(
            rebased.model, TensorDataset(x, y), weight_decay=WD, folder=ledger, progress=False
        )
        assert again.forget([9], **QUIET).split.forget.tolist() == [9]


def recovered(gradient: P.Params) -> torch.Tensor:
    """A sample from the gradient of its loss in a linear model: a row of the weights' is that of
    the bias times the sample."""
    row = int(gradient["bias"].abs().argmax())
    return gradient["weight"][row] / gradient["bias"][row]


def ledger_evidence(folder: Path, name: str) -> dict[str, Any]:
    return Ledger(folder).requests[name].evidence


class TestRebase:
    ALONE = 11

    def linear(self, data: TensorDataset) -> nn.Module:
        settings = TrainSettings(epochs=30, batch_size=40, lr=0.2, weight_decay=WD)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            start = nn.Linear(data.tensors[0].shape[1], 3)
        return train(start, data, settings, seed=0, progress=False)

    def attack(self, folder: Path, model: nn.Module, data: TensorDataset) -> float:
        """What whoever has the folder, the model and all other samples learns of one: the largest
        difference to the sample, over that of another one."""
        sums = [load_tensors(p)[0] for p in folder.glob("*snapshot.safetensors")]
        assert len(sums) == 1
        total = {n: sums[0][f"gradient/{n}"] for n in ("weight", "bias")}
        x, y = (torch.cat([t[: self.ALONE], t[self.ALONE + 1 :]]) for t in data.tensors)
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        grads = torch.autograd.grad(loss, [model.weight, model.bias])
        theirs = dict(zip(("weight", "bias"), grads, strict=True))
        found = recovered({n: total[n] - theirs[n] for n in total})
        truth, other = data.tensors[0][self.ALONE], data.tensors[0][self.ALONE + 1]
        wrong = float((found - truth).norm() / (truth - other).norm())
        return math.inf if math.isnan(wrong) else wrong  # nothing is left of it at all

    def test_the_forgotten_are_in_nothing_any_more(self, tmp_path: Path) -> None:
        data = blobs_data(60)
        model = self.linear(data)
        prepared = prepare(model, data, folder=tmp_path, progress=False)
        result = prepared.forget([self.ALONE], progress=False)
        assert self.attack(tmp_path, model, data) < 1e-3
        rebased = prepared.rebase(result, progress=False)
        assert self.attack(tmp_path, result.model, data) > 0.3
        assert rebased.requests == []
        row = data.tensors[0][self.ALONE].numpy().tobytes()
        assert not any(row in p.read_bytes() for p in tmp_path.iterdir() if p.is_file())
        (sums,) = tmp_path.glob("*snapshot.safetensors")
        stored = load_tensors(sums)[0]
        assert "samples" not in stored  # who is missing from a list was forgotten
        assert len(stored["spread"]) == 59
        assert {p.name for p in tmp_path.glob("*.safetensors")} == {
            "generation-1-snapshot.safetensors",
            "generation-1-curvature.safetensors",
            "generation-1-model.safetensors",
        }

    def test_after_a_restart_its_model_will_do(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"weight_decay": WD, "folder": tmp_path, "progress": False}
        served = prepare(model, data, **options).forget([3], **QUIET).model
        again = prepare(model, data, **options)
        with pytest.raises(ConfigError, match="a model; expected the last one"):
            again.rebase(model, progress=False)
        rebased = again.rebase(served, progress=False)
        assert rebased.requests == []
        ledger = Ledger(tmp_path)
        (told,) = (e.details for e in ledger.entries if e.event == "rebased")
        assert told["of"]["model"] == ledger.requests["r-1"].evidence["model_after"]
        later = rebased.forget([5], **QUIET)
        assert ledger_evidence(tmp_path, "r-2")["model_before"] == told["of"]["model"]
        assert later.split.forget.tolist() == [5]

    def test_what_is_delivered_again_is_on_record(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {"weight_decay": WD, "folder": tmp_path, "progress": False}
        prepared = prepare(model, data, **options)
        prepared.forget([3], **QUIET)
        prepared.forget([4], **QUIET)
        first = prepared.redeliver(noise=1e-4, progress=False)
        after = first.evidence(model)["model_after"]
        assert {ledger_evidence(tmp_path, r)["model_after"] for r in ("r-1", "r-2")} == {after}
        for name in ("r-1", "r-2"):
            Ledger(tmp_path).serve(name, although="for the test")
        last = prepared.redeliver(noise=1e-4, progress=False)
        told = Ledger(tmp_path).entries[-1]
        assert told.event == "delivered"
        assert told.details["model_after"] == last.evidence(model)["model_after"] != after
        assert ledger_evidence(tmp_path, "r-1")["model_after"] == after
        prepared.rebase(last, progress=False)

    @pytest.mark.parametrize("change", ["model", "data", "options"])
    def test_an_error_says_what_differs(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, change: str
    ) -> None:
        own: dict[str, Any] = {"weight_decay": WD, "folder": tmp_path, "progress": False}
        prepare(model, data, **own)
        x, y = data.tensors
        others = {"model": "another model", "data": "other data", "options": "other options"}
        twin = copy.deepcopy(model)
        with torch.no_grad():
            next(twin.parameters()).add_(1e-3 * (change == "model"))
        given = TensorDataset(x + (change == "data"), y)
        with pytest.raises(StorageError, match=f"made for {others[change]};"):
            prepare(twin, given, **own | ({"weight_decay": 0.5} if change == "options" else {}))

    def test_when_it_came_in(self, model: nn.Module, data: TensorDataset, tmp_path: Path) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        came = datetime.now(UTC) - timedelta(days=21)
        prepared.forget([3], received=came, **QUIET)
        (request,) = Ledger(tmp_path).requests.values()
        assert request.times["received"] == came < request.asked
        assert request.due == a_month_after(came)

    def test_rows_may_be_erased_then(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        x, y = (t.clone() for t in data.tensors)
        own = TensorDataset(x, y)
        prepared = prepare(model, own, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.forget([3, 8], **QUIET)
        result = prepared.forget([9], **QUIET)
        rebased = prepared.rebase(result, progress=False)
        straight = rebased.forget([5], **QUIET)
        assert straight.split.forget.tolist() == [5]
        assert not {3, 8, 9} & set(straight.split.retain.tolist())
        x[[3, 8, 9]], y[[3, 8, 9]] = float("nan"), 0
        again = prepare(result.model, own, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.requests == [[5]]
        later, alike = again.forget([6], **QUIET), rebased.forget([6], **QUIET)
        assert alike.split.forget.tolist() == [5, 6]
        assert distance(later.model, alike.model, result.model) < 1e-4
        (tmp_path / "ledger.salt").unlink()
        with pytest.raises(
            StorageError,
            match=r"3 of whose \d+ samples were erased: nobody can tell which .*Subset",
        ):
            prepare(result.model, own, weight_decay=WD, folder=tmp_path, progress=False)

    def test_without_the_salt_a_subset_says_who_is_left(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        result = prepared.forget([3], **QUIET)
        prepared.rebase(result, progress=False)
        (tmp_path / "ledger.salt").unlink()
        left = Subset(data, [i for i in range(len(data)) if i != 3])
        again = prepare(result.model, left, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.requests == []
        others = Subset(data, [i for i in range(len(data)) if i != 4])
        for wrong in (data, others):  # whoever is erased is among the first, or may be
            with pytest.raises(StorageError, match="nobody can tell which without its salt"):
                prepare(result.model, wrong, weight_decay=WD, folder=tmp_path, progress=False)

    def test_what_came_before_takes_no_requests(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        one, two = (
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False) for _ in range(2)
        )
        first = one.forget([3], **QUIET)
        last = one.forget([4], **QUIET)
        with pytest.raises(ConfigError, match="the last one, without all 2"):
            one.rebase(first, progress=False)
        one.rebase(last, progress=False)
        for old in (one, two):
            with pytest.raises(ConfigError, match="from before a rebase"):
                old.forget([5], **QUIET)
        with pytest.raises(
            StorageError, match=r"rebased: its model is .*generation-1-model.safetensors"
        ):
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)

    def test_a_kill_before_the_ledger_says_so_leaves_the_old(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        result = prepared.forget([3], **QUIET)

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(RequestLog, "rebase", killed)
            with pytest.raises(KeyboardInterrupt):
                prepared.rebase(result, progress=False)
        assert (tmp_path / "generation-1-model.safetensors").exists()
        again = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.requests == [[3]]
        assert not (tmp_path / "generation-1-model.safetensors").exists()

    def test_without_a_folder(self, model: nn.Module, data: TensorDataset) -> None:
        prepared = prepare(model, data, weight_decay=WD, progress=False)
        rebased = prepared.rebase(prepared.forget([3], **QUIET), progress=False)
        assert rebased.forget([4], **QUIET).split.forget.tolist() == [4]
        with pytest.raises(ConfigError, match="from before a rebase"):
            prepared.forget([5], **QUIET)


class TestErased:
    def test_naming_one_again_changes_nothing(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        rebased = prepared.rebase(prepared.forget([3], **QUIET), progress=False)
        with pytest.raises(SplitError, match=r"erased before: \[3\].*in the ledger, as done"):
            rebased.forget([3], who="again", **QUIET)
        alone = rebased.forget([3, 7], **QUIET)
        assert alone.split.forget.tolist() == [7]
        states = [(r.who, len(r.samples), r.state) for r in rebased.log.ledger.requests.values()]
        assert states == [("", 1, "done"), ("again", 1, "done"), ("", 2, "done")]
        new = rebased.model
        again = prepare(new, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.forgotten.tolist() == [7]
        alike = rebased.redeliver(**QUIET)
        assert distance(alone.model, alike.model, rebased.model) < 1e-6

    def test_samples_outside_the_loader_are_refused(
        self, model: nn.Module, data: TensorDataset
    ) -> None:
        left = Subset(data, list(range(100)))
        prepared = prepare(model, left, weight_decay=WD, progress=False)
        with pytest.raises(SplitError, match=r"not prepared with, such as \[101\]"):
            prepared.forget([5, 101], **QUIET)

    def test_erased_rows_may_raise(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        class Rows(Dataset):
            gone: frozenset[int] = frozenset()

            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
                if index in self.gone:
                    raise KeyError(index)
                return data[index]

        rows = Rows()
        prepared = prepare(model, rows, weight_decay=WD, folder=tmp_path, progress=False)
        result = prepared.forget([0, 3], **QUIET)
        rebased = prepared.rebase(result, progress=False)
        rows.gone = frozenset({0, 3})
        assert rebased.forget([7], **QUIET).split.forget.tolist() == [7]
        again = prepare(result.model, rows, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.requests == [[7]]

    def test_a_row_that_changed_before_its_first_request(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        x, y = (t.clone() for t in data.tensors)
        own = TensorDataset(x, y)
        prepared = prepare(model, own, weight_decay=WD, folder=tmp_path, progress=False)
        x[3] = 0
        with pytest.raises(DataError, match=r"changed since, such as \[3\]"):
            prepared.forget([3], **QUIET)

    def test_files_of_the_users_stay(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        own = [tmp_path / "model.safetensors", tmp_path / "7-model.safetensors"]
        for path in own:
            path.touch()
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.rebase(prepared.forget([3], **QUIET), progress=False)
        assert all(path.exists() for path in own)

    def test_without_its_ledger_a_rebased_folder_is_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        prepared = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        prepared.rebase(prepared.forget([3], **QUIET), progress=False)
        for name in ("ledger.jsonl", "ledger.head"):
            (tmp_path / name).unlink()
        with pytest.raises(StorageError, match="no ledger of who was forgotten"):
            prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert (tmp_path / "generation-1-model.safetensors").exists()


class TestLimits:
    def test_warns_then_refuses(self, model: nn.Module, data: TensorDataset) -> None:
        limits = Limits(warn=0.1, refuse=0.2)
        prepared = prepare(model, data, weight_decay=WD, limits=limits, progress=False)
        tenth = len(data) // 10
        prepared.forget(range(tenth), **QUIET)
        with pytest.warns(FisherForgetWarning, match=r"more than 10 %: the result may be far"):
            last = prepared.forget([tenth], **QUIET)
        with pytest.raises(ConfigError, match=r"expected at most 20 %. Train a new model"):
            prepared.forget(range(3 * tenth), **QUIET)
        assert len(prepared.forgotten) == tenth + 1
        rebased = prepared.rebase(last, progress=False)
        with pytest.raises(ConfigError, match="at most 20 %"):  # what went before counts
            rebased.forget(range(tenth + 1, 2 * tenth + 1), **QUIET)

    def test_a_result_that_costs_too_much_is_refused(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        limits = Limits(rise=1e-3)
        options: dict[str, Any] = {"weight_decay": WD, "limits": limits, "folder": tmp_path}
        prepared = prepare(model, data, progress=False, **options)
        large: dict[str, Any] = {"noise": 1.0, "progress": False}
        with pytest.raises(NumericalError, match=r"rose from .* a rise of at most 0\.001"):
            prepared.forget([3], **large)
        assert len(prepared.pending) == 1, "it is due still"
        prepared.redeliver(noise=None, progress=False)
        assert prepared.pending == []

    def test_a_failed_check_is_refused_where_it_is_to_be_heeded(
        self, model: nn.Module, data: TensorDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        says = "31 % are still recognised."
        wrong = self_check.SelfCheck(
            (self_check.Finding("absent classes", 0.31, 0, "wrong", says),)
        )
        monkeypatch.setattr(FORGET, "self_check", lambda *_, **__: wrong)
        prepared = prepare(model, data, weight_decay=WD, progress=False)
        with pytest.warns(FisherForgetWarning, match="31 %"):
            prepared.forget([3], **QUIET)
        limits = Limits(failed="refused")
        strict = prepare(model, data, weight_decay=WD, limits=limits, progress=False)
        with pytest.raises(NumericalError, match="31 %"):
            strict.forget([3], **QUIET)

    @pytest.mark.parametrize("change", [{"rise": 0.0}, {"rise": math.nan}, {"failed": "no"}])
    def test_what_are_no_costs(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            Limits(**change)

    def test_after_a_restart_what_was_erased_counts(
        self, model: nn.Module, data: TensorDataset, tmp_path: Path
    ) -> None:
        one = prepare(model, data, weight_decay=WD, folder=tmp_path, progress=False)
        result = one.forget([1, 2, 3], **QUIET)
        one.rebase(result, progress=False)
        again = prepare(result.model, data, weight_decay=WD, folder=tmp_path, progress=False)
        assert again.erased == 3

    @pytest.mark.parametrize("values", [(0.5, 0.2), (-0.1, 0.2), (0.1, 1.1), (math.nan, 0.5)])
    def test_what_are_no_limits(self, values: tuple[float, float]) -> None:
        with pytest.raises(ConfigError, match="warn <= refuse"):
            Limits(*values)
