"""SISA: what a checkpoint has read, equality with training from scratch, cost, kills, storage,
aggregation."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fisher_forget._util.files import load_tensors
from fisher_forget.baselines.sisa import partition
from fisher_forget.baselines.sisa.aggregate import Aggregate
from fisher_forget.baselines.sisa.ensemble import SISA
from fisher_forget.baselines.sisa.shards import initial_model, slice_seed
from fisher_forget.errors import (
    ConfigError,
    FisherForgetError,
    ModelError,
    SplitError,
    StorageError,
)
from fisher_forget.experiments.training import TrainSettings, train
from fisher_forget.ledger import Ledger, model_fingerprint

COUNT = 24
SETTINGS = TrainSettings(epochs=2, batch_size=4, lr=0.1)


def build() -> nn.Module:
    return small_net()


def fit(model: nn.Module, dataset: Dataset, indices: np.ndarray, seed: int) -> nn.Module:
    return train(model, dataset, SETTINGS, seed=seed, indices=indices, progress=False)


def untrained(model: nn.Module, dataset: Dataset, indices: np.ndarray, seed: int) -> nn.Module:
    return model


class Killed(Exception):
    """Stands for a kill within a training call."""


class KilledAfter:
    """`fit`, which is killed when it has returned `calls` times."""

    def __init__(self, calls: float = math.inf) -> None:
        self.calls, self.indices = calls, []

    def __call__(self, model, dataset, indices, seed):
        if len(self.indices) == self.calls:
            raise Killed
        self.indices.append(indices)
        return fit(model, dataset, indices, seed)


def make(train_fn=fit, *, shards=3, slices=2, **options) -> SISA:
    return SISA(build, train_fn, shards=shards, slices=slices, **options)


def bits(model: nn.Module) -> bytes:
    return state_bits(model.state_dict())


def state_bits(state: dict[str, torch.Tensor]) -> bytes:
    return b"".join(value.numpy().tobytes() for _, value in sorted(state.items()))


def members(sisa: SISA) -> list[bytes]:
    return [bits(member) for member in sisa.module().members]


def from_scratch(data: TensorDataset, sisa: SISA, gone: set[int], seed: int = 0) -> list[bytes]:
    """What the paper prescribes, written as loops: every shard trained slice by slice on what is
    left."""
    models = []
    for shard, slices in enumerate(sisa.cut):
        model = initial_model(build, seed, shard)
        seen: list[int] = []
        for number, piece in enumerate(slices):
            seen += [int(i) for i in piece if int(i) not in gone]
            if seen:
                model = fit(
                    model, data, np.array(sorted(seen)), slice_seed(seed, shard, number + 1)
                )
        if seen:
            models.append(bits(model))
    return models


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    return blobs_data(COUNT)


class TestExactness:
    def test_one_slice_is_training_each_shard_without_the_sample(self, data):
        sisa = make(slices=1)
        sisa.fit(data)
        before = members(sisa)
        sisa.forget([5])
        hit = next(number for number, shard in enumerate(sisa.cut) if 5 in shard[0])
        rest = np.array([i for i in sisa.cut[hit][0] if i != 5])
        alone = fit(initial_model(build, 0, hit), data, rest, slice_seed(0, hit, 1))
        after = members(sisa)
        assert after[hit] == bits(alone)
        assert after[hit] != before[hit]
        assert [m for n, m in enumerate(after) if n != hit] == [
            m for n, m in enumerate(before) if n != hit
        ]

    @pytest.mark.parametrize("gone", [(), (0,), (3, 17, 18, 4, 9)])
    def test_slices_are_training_from_scratch_on_what_is_left(self, data, gone):
        sisa = make(slices=3)
        sisa.fit(data)
        if gone:
            sisa.forget(gone)
        assert members(sisa) == from_scratch(data, sisa, set(gone))

    def test_requests_in_any_order_or_together(self, data):
        together = make()
        together.fit(data)
        together.forget([2, 11, 20, 21])
        for order in ([2, 11, 20, 21], [21, 2, 20, 11], [20, 21, 11, 2]):
            one_by_one = make()
            one_by_one.fit(data)
            for index in order:
                one_by_one.forget([index])
            assert members(one_by_one) == members(together)
            assert one_by_one.forgotten.tolist() == [2, 11, 20, 21]

    def test_a_second_request_does_not_bring_back_the_first(self, data):
        sisa = make()
        sisa.fit(data)
        sisa.forget([1])
        sisa.forget([1, 8])
        assert sisa.forgotten.tolist() == [1, 8]
        assert sisa.requests == [[1], [1, 8]]
        assert members(sisa) == from_scratch(data, sisa, {1, 8})

    def test_an_emptied_slice_and_an_emptied_shard(self, data):
        sisa = make(slices=2)
        sisa.fit(data)
        first_slice, shard = sisa.cut[0][0].tolist(), np.concatenate(sisa.cut[2]).tolist()
        sisa.forget(first_slice)
        assert members(sisa) == from_scratch(data, sisa, set(first_slice))
        sisa.forget(shard)
        assert len(members(sisa)) == 2  # a model that was trained on nothing has no vote
        assert members(sisa) == from_scratch(data, sisa, {*first_slice, *shard})

    def test_workers_give_the_bits_of_this_process_whatever_its_threads(self, data):
        parent = os.getpid()

        def checked(elsewhere, *args):
            assert (os.getpid() != parent) == elsewhere
            assert torch.get_num_threads() == 1
            return fit(*args)

        here, workers = (make(partial(checked, jobs > 1), shards=2, jobs=jobs) for jobs in (1, 2))
        with_threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            for sisa in (here, workers):
                sisa.fit(data)
                sisa.forget([4, 5, 6, 7])
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(with_threads)
        assert members(here) == members(workers)

    def test_randomness_of_the_users_functions_is_that_of_the_slice(self, data):
        def noisy(model, dataset, indices, seed):
            with torch.no_grad():
                model[0].weight.add_(torch.randn(6, 4) + np.random.rand() + random.random())  # noqa: NPY002
            return model

        first, second = make(noisy), make(noisy)
        first.fit(data)
        torch.randn(3)
        np.random.rand()  # noqa: NPY002
        random.random()
        second.fit(data)
        assert members(first) == members(second)
        assert len(set(members(first))) == 3

    def test_every_slice_has_a_seed_of_its_own(self):
        seeds = [
            slice_seed(*numbers) for numbers in itertools.product(range(3), range(4), range(5))
        ]
        assert len(set(seeds)) == len(seeds)

    def test_only_what_is_in_state_dict_carries_over(self, data):
        """Or a model would depend on whether its training went on or began at a checkpoint."""
        found = []

        def messy(model, dataset, indices, seed):
            found.append((model.training, len(model._forward_hooks), model[0].weight.requires_grad))
            model.train()
            model.register_forward_hook(lambda *_: None)
            model[0].weight.requires_grad_(False)
            return model

        sisa = make(messy)
        sisa.fit(data)
        sisa.forget([0, 1, 2])
        assert len(found) > 6
        assert set(found) == {(False, 0, True)}

    def test_what_no_checkpoint_holds_is_built_shard_by_shard(self, data):
        class Projected(nn.Linear):
            def __init__(self):
                super().__init__(4, 3)
                self.register_buffer("projection", torch.randn(4, 4), persistent=False)

            def forward(self, inputs):
                return super().forward(inputs @ self.projection)

        seen = {}

        def remember(model, dataset, indices, seed):
            seen[seed] = model.projection.clone()
            return model

        sisa = SISA(Projected, remember, shards=3)
        sisa.fit(data)
        for shard, member in enumerate(sisa.module().members):
            assert torch.equal(member.projection, seen[slice_seed(0, shard, 1)])
        assert not torch.equal(seen[slice_seed(0, 0, 1)], seen[slice_seed(0, 1, 1)])

    def test_seed_changes_cut_and_weights(self, data):
        first, second = make(), make(seed=1)
        first.fit(data)
        second.fit(data)
        assert first.cut[0][0].tolist() != second.cut[0][0].tolist()
        assert not set(members(first)) & set(members(second))

    def test_nothing_of_the_user_changes(self, data, untouched):
        given = seeded(small_net)
        before = [t.clone() for t in data.tensors]
        with untouched(given):
            sisa = SISA(
                lambda: given, fit, shards=2
            )  # what build returns is copied before it is trained
            sisa.fit(data)
            sisa.forget([1])
            sisa.module()
        assert all(torch.equal(a, b) for a, b in zip(before, data.tensors, strict=True))


class Recording(Dataset):
    """Remembers which samples were read since it was last asked."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.read = data, set()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.read.add(int(index))
        return self.data[index]


class Provenance:
    """A training function that knows of every state of weights which samples were read on the way
    to it."""

    def __init__(self) -> None:
        self.of: dict[bytes, frozenset[int]] = {}

    def __call__(self, model, dataset, indices, seed):
        inherited = self.of.get(bits(model), frozenset())
        dataset.read.clear()
        x, y = zip(*(dataset[int(i)] for i in indices), strict=True)
        trained = train(
            model,
            TensorDataset(torch.stack(x), torch.stack(y)),
            SETTINGS,
            seed=seed,
            progress=False,
        )
        self.of[bits(trained)] = inherited | frozenset(dataset.read)
        return trained


class TestReads:
    @pytest.mark.parametrize("budget", [None, 9000])
    def test_no_surviving_checkpoint_has_read_a_forgotten_sample(self, data, tmp_path, budget):
        recording, provenance = Recording(data), Provenance()
        sisa = make(provenance, slices=4, folder=tmp_path, budget=budget)
        sisa.fit(recording)
        gone: set[int] = set()
        for request in ([7], [0, 1, 2], [7, 23], [12]):
            sisa.forget(request)
            gone |= set(request)
            kept = [state_bits(load_tensors(path)[0]) for path in tmp_path.glob("*.safetensors")]
            assert len(kept) == sum(map(len, sisa.kept)) >= 3
            assert all(provenance.of[state] and not provenance.of[state] & gone for state in kept)
            final = [provenance.of[state] for state in members(sisa)]
            assert (
                frozenset().union(*final) == set(range(COUNT)) - gone
            )  # and nothing else was dropped
            assert sum(map(len, final)) == COUNT - len(gone)  # no shard has read another's samples

    def test_fit_and_forget_themselves_read_nothing(self, data):
        recording = Recording(data)
        sisa = make(untrained)
        sisa.fit(recording)
        sisa.forget([3])
        sisa.module()
        assert recording.read == set()


def fit_erasable(model, dataset, indices, seed):
    return fit(model, dataset.data, indices, seed)


class Erasable(Dataset):
    """Samples of which some may be gone."""

    def __init__(self, data):
        self.data, self.gone = data, set()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index in self.gone:
            raise KeyError(index)
        return self.data[index]


class TestData:
    """Without a name data are known by every retained sample."""

    def other(self, data, row):
        x, y = (t.clone() for t in data.tensors)
        x[row] += 1e-3
        return TensorDataset(x, y)

    @pytest.mark.parametrize("row", [0, 11, COUNT - 1, slice(None)])
    def test_other_data_of_the_same_length_are_refused(self, data, tmp_path, row):
        make(fit, folder=tmp_path).fit(data)
        there = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
        with pytest.raises(StorageError, match="trained on other samples than those of shard"):
            make(KilledAfter(0), folder=tmp_path).fit(self.other(data, row))
        assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == there
        assert make(KilledAfter(0), folder=tmp_path).fit(data).calls == 0

    def test_a_forgotten_sample_may_be_erased(self, data, tmp_path):
        rows = Erasable(data)
        sisa = make(fit_erasable, folder=tmp_path)
        sisa.fit(rows)
        sisa.forget([7])
        rows.gone = {7}
        again = make(fit_erasable, folder=tmp_path)
        assert again.fit(rows).calls == 0
        again.forget([12])
        assert again.fit(rows).calls == 0
        assert members(again) == from_scratch(data, again, {7, 12})
        zeroed = TensorDataset(*(t.clone() for t in data.tensors))
        zeroed.tensors[0][[7, 12]] = 0
        assert make(fit, folder=tmp_path).fit(zeroed).calls == 0

    def test_a_name_stands_for_it(self, data, tmp_path):
        recording = Recording(data)
        make(untrained, folder=tmp_path, fingerprint="blobs").fit(recording)
        make(untrained, folder=tmp_path, fingerprint="blobs").fit(recording)
        sisa = make(untrained, folder=Ledger(tmp_path, data="blobs"))
        sisa.fit(recording)
        sisa.copy(tmp_path / "twin")
        with pytest.raises(StorageError, match="known by the name 'blobs'"):
            make(untrained, folder=tmp_path / "twin").fit(recording)
        assert Ledger(tmp_path).entries[0].details["data"] == "blobs"
        assert recording.read == set()

    def test_checkpoints_that_do_not_tell_do_so_from_now_on(self, data, tmp_path):
        first = make(fit)
        first.fit(data)
        first.copy(tmp_path)
        with pytest.raises(StorageError, match="trained on other samples"):
            make(fit, folder=tmp_path).fit(self.other(data, 5))

    def test_one_that_is_withdrawn_is_known_again(self, data, tmp_path):
        train_fn = KilledAfter()
        sisa = make(train_fn, folder=tmp_path)
        sisa.fit(data)
        train_fn.calls = len(train_fn.indices)
        with pytest.raises(Killed):
            sisa.forget([7])
        again = make(fit, folder=tmp_path)
        again.train = KilledAfter(0)
        with pytest.raises(Killed):
            again.fit(data)
        again._state.log.ledger.withdraw("r-1", "asked by mistake")
        again.train = fit
        again.fit(data)
        assert again.forgotten.tolist() == []
        assert make(KilledAfter(0), folder=tmp_path).fit(data).calls == 0


class TestEvidence:
    def test_says_what_was_trained_and_both_models(self, data, tmp_path):
        sisa = make(fit, shards=3, slices=2, folder=tmp_path)
        whole = sisa.fit(data)
        assert whole.share == 1
        before = model_fingerprint(sisa.module())
        sisa.forget([7], who="ticket 1")
        gone = int(next(i for i in sisa.cut[2][1] if i != 7))
        work = sisa.forget([gone, 7], who="ticket 2")
        requests = Ledger(tmp_path).requests
        first, second = (requests[name].evidence for name in ("r-1", "r-2"))
        assert first["model_before"] == before
        assert first["model_after"] == second["model_before"]
        assert second["model_after"] == model_fingerprint(sisa.module()) != before
        assert (second["retained"], second["forgotten"]) == (COUNT - 2, 2)
        assert (first["method"], first["exact"]) == ("sisa", True)
        assert second["shards_trained"] == list(work.shards)
        # shards of 8 samples in two slices: the first slice, then both, are 4 + 8 samples
        assert sum(whole.shards) == 3
        assert whole.points == 3 * (4 + 8)
        assert second["share_of_training"] == work.share
        left = [[len(set(part) - {7, gone}) for part in parts] for parts in sisa.cut]
        assert work.share == work.points / sum(2 * one + two for one, two in left)
        assert all(r.verdict == "forgotten" for r in requests.values())

    def test_of_a_request_that_was_killed(self, data, tmp_path):
        train_fn = KilledAfter()
        sisa = make(train_fn, folder=tmp_path)
        sisa.fit(data)
        before = model_fingerprint(sisa.module())
        train_fn.calls = len(train_fn.indices)
        with pytest.raises(Killed):
            sisa.forget([7])
        with pytest.raises(Killed):  # the ensemble that both were asked of is gone by now
            sisa.forget([8])
        again = make(fit, folder=tmp_path)
        again.fit(data)
        requests = Ledger(tmp_path).requests.values()
        assert len(requests) == 2
        for request in requests:
            assert request.evidence["model_before"] == before
            assert request.evidence["model_after"] == model_fingerprint(again.module()) != before


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_one_that_is_fitted_has_one_owner(data, duplicate):
    sisa = make(untrained)
    if duplicate is not pickle.dumps:
        duplicate(sisa)
    sisa.fit(data)
    with pytest.raises(StorageError, match=r"Call copy\(\), pickle module\(\)"):
        duplicate(sisa)


class TestWork:
    def test_only_what_is_hit_is_trained_from_the_slice_hit(self, data):
        seen = KilledAfter()
        sisa = make(seen, shards=2, slices=3)  # shards of 12, slices of 4
        work = sisa.fit(data)
        assert (work.shards, work.first_slices, work.calls, work.points) == (
            (0, 1),
            (0, 0),
            6,
            2 * (4 + 8 + 12),
        )
        seen.indices.clear()
        work = sisa.forget([int(sisa.cut[1][1][0])])
        assert (work.shards, work.first_slices, work.calls, work.points) == ((1,), (1,), 2, 7 + 11)
        assert [len(i) for i in seen.indices] == [7, 11]
        assert all(np.array_equal(i, np.sort(i)) for i in seen.indices)
        assert work.seconds > 0
        assert sisa.fit(data).calls == 0
        assert sisa.forget([int(sisa.cut[1][1][0])]).calls == 0  # it is forgotten already

    def test_the_first_of_several_slices_counts(self, data):
        sisa = make(untrained, shards=2, slices=4)
        sisa.fit(data)
        work = sisa.forget([int(sisa.cut[0][3][0]), int(sisa.cut[0][1][0]), int(sisa.cut[1][2][0])])
        assert (work.shards, work.first_slices) == ((0, 1), (1, 2))
        assert work.points == (5 + 8 + 10) + (8 + 11)  # slices of 3

    def test_progress_is_shown(self, data, capsys):
        make(untrained, progress=True).fit(data)
        assert "shards" in capsys.readouterr().err


class TestCost:
    def idle(self, samples: int, **options) -> SISA:
        """Fitted, with a model that costs nothing to train."""
        sisa = SISA(lambda: nn.Linear(1, 2), untrained, **options)
        sisa.fit(TensorDataset(torch.zeros(samples, 1), torch.zeros(samples, dtype=torch.int64)))
        return sisa

    def test_closed_forms(self):
        """By hand: two shards of two, two requests. The first retrains 1 point; the second hits its
        shard, with chance 1/3, and retrains none, or the other, and retrains 1."""
        assert partition.expected_points_sequential(4, 2, 2) == pytest.approx(1 + 2 / 3)
        assert partition.expected_points_batch(4, 2, 2) == pytest.approx(2 / 3 * 2)
        assert partition.expected_points_batch(100, 1, 3) == 97
        assert partition.expected_points_sequential(1, 1, 1) == 0
        assert partition.epochs_per_slice(20, 4) == 8
        assert partition.epochs_per_slice(7, 1) == 7
        assert partition.slicing_fraction(1) == 1

    def test_all_requests_together_leave_nothing(self):
        for samples, shards in ((60, 5), (61, 7), (5, 9)):
            assert partition.expected_points_batch(samples, shards, samples) == pytest.approx(0)
            # every pair of a shard is retrained once, by the request that takes its first sample
            sizes = [len(part) for part in np.array_split(np.arange(samples), shards)]
            pairs = sum(math.comb(size, 2) for size in sizes)
            found = partition.expected_points_sequential(samples, shards, samples)
            assert found == pytest.approx(pairs)

    @pytest.mark.parametrize("slices", [1, 2, 5, 16])
    def test_passes_are_constant_and_the_fraction_is_the_mean_over_slices(self, slices):
        each = partition.epochs_per_slice(12, slices)
        assert sum(r / slices * each for r in range(1, slices + 1)) == pytest.approx(12)
        costs = [
            sum(r / slices * each for r in range(first, slices + 1))
            for first in range(1, slices + 1)
        ]
        assert np.mean(costs) / 12 == pytest.approx(partition.slicing_fraction(slices))

    @pytest.mark.parametrize(("samples", "shards", "requests"), [(7, 3, 3), (6, 2, 4), (5, 2, 5)])
    def test_retrained_points_of_all_orders_of_samples(self, samples, shards, requests):
        """Exact: the mean over every order of different samples, of shards of unequal sizes."""
        shard_of = [i % shards for i in range(samples)]
        one_by_one, together = [], []
        for order in itertools.permutations(range(samples), requests):
            left, count = set(range(samples)), 0
            for i in order:
                left.remove(i)
                count += sum(shard_of[j] == shard_of[i] for j in left)
            one_by_one.append(count)
            hit = {shard_of[i] for i in order}
            together.append(sum(shard_of[j] in hit for j in left))
        for counts, formula in (
            (one_by_one, partition.expected_points_sequential),
            (together, partition.expected_points_batch),
        ):
            assert np.mean(counts) == pytest.approx(formula(samples, shards, requests), rel=1e-12)

    @pytest.mark.parametrize("together", [False, True])
    def test_an_ensemble_retrains_as_many_points(self, together):
        """Exact: every order of two of five samples."""
        counts = []
        for order in itertools.permutations(range(5), 2):
            sisa = self.idle(5, shards=2)
            batches = [order] if together else [[i] for i in order]
            counts.append(sum(sisa.forget(batch).points for batch in batches))
        formula = (
            partition.expected_points_batch if together else partition.expected_points_sequential
        )
        assert np.mean(counts) == pytest.approx(formula(5, 2, 2), rel=1e-12)

    def test_slices_save_what_the_fraction_says(self):
        """Exact: over every sample of a shard, each call of e_r epochs has one sample fewer than
        the formula counts."""
        size, slices, epochs = 12, 4, 10
        passes = []
        for index in range(size):
            sisa = self.idle(size, shards=1, slices=slices)
            passes.append(sisa.forget([index]).points * partition.epochs_per_slice(epochs, slices))
        expected = partition.slicing_fraction(slices) * size * epochs - epochs
        assert np.mean(passes) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("words", "call"),
        [
            ("shards=0", lambda: partition.expected_points_sequential(10, 0, 1)),
            ("11 requests for 10", lambda: partition.expected_points_sequential(10, 2, 11)),
            ("requests=0", lambda: partition.expected_points_batch(10, 2, 0)),
            ("epochs=0", lambda: partition.epochs_per_slice(0, 2)),
            ("epochs=nan", lambda: partition.epochs_per_slice(math.nan, 2)),
            ("slices=True", lambda: partition.slicing_fraction(True)),
            ("room=0", lambda: partition.kept_checkpoints(3, 0)),
            (
                "exponent=2",
                lambda: partition.by_deletion_probability([0.5, 0.1], 1, 1, 0, exponent=2),
            ),
        ],
    )
    def test_refusals(self, words, call):
        with pytest.raises(ConfigError, match=words):
            call()


class TestKill:
    SHARDS, SLICES, REQUEST = 2, 2, (3, 4)

    def start(self, train_fn, folder) -> SISA:
        return make(train_fn, shards=self.SHARDS, slices=self.SLICES, folder=folder)

    @pytest.mark.parametrize("calls", range(4))
    def test_in_training(self, data, tmp_path, calls):
        with pytest.raises(Killed):
            self.start(KilledAfter(calls), tmp_path).fit(data)
        resumed = self.start(fit, tmp_path)
        assert resumed.fit(data).calls == 4 - calls  # nothing that was finished is trained again
        assert members(resumed) == from_scratch(data, resumed, set())

    def test_in_a_request(self, data, tmp_path):
        whole = self.start(fit, tmp_path / "whole")
        whole.fit(data)
        needed = whole.forget(self.REQUEST).calls
        assert needed >= 2
        for calls in range(needed):
            train_fn = KilledAfter()
            killed = self.start(train_fn, tmp_path / str(calls))
            killed.fit(data)
            train_fn.calls = len(train_fn.indices) + calls
            with pytest.raises(Killed):
                killed.forget(self.REQUEST)
            with pytest.raises(ModelError, match="Call fit again"):
                killed.module()
            resumed = self.start(fit, tmp_path / str(calls))
            assert resumed.fit(data).calls == needed - calls
            assert resumed.requests == [list(self.REQUEST)]
            assert members(resumed) == members(whole)

    def test_the_same_object_goes_on_too(self, data):
        train_fn = KilledAfter(3)
        sisa = make(train_fn, shards=2)
        with pytest.raises(Killed):
            sisa.fit(data)
        train_fn.calls = math.inf
        assert sisa.fit(data).calls == 1
        assert members(sisa) == from_scratch(data, sisa, set())

    def test_between_recording_and_removing(self, data, tmp_path):
        sisa = self.start(fit, tmp_path)
        sisa.fit(data)
        sisa._state.log.ask(self.REQUEST)
        resumed = self.start(fit, tmp_path)
        resumed.fit(data)
        assert resumed.requests == [list(self.REQUEST)]
        assert members(resumed) == from_scratch(data, resumed, set(self.REQUEST))

    def test_in_a_write(self, data, tmp_path):
        self.start(fit, tmp_path).fit(data)
        finished = tmp_path / "shard-1-after-2.safetensors"
        finished.write_bytes(finished.read_bytes()[:-3])
        left_over = tmp_path / ".shard-1-after-2.safetensors.0a1b2c3d.tmp"
        left_over.touch()
        resumed = self.start(fit, tmp_path)
        assert resumed.fit(data).calls == 1
        assert not left_over.exists()
        assert members(resumed) == from_scratch(data, resumed, set())

    def test_requests_outlive_the_object(self, data, tmp_path):
        first = self.start(fit, tmp_path)
        first.fit(data)
        first.forget([1])
        second = self.start(fit, tmp_path)
        assert second.fit(data).calls == 0
        second.forget([2])
        third = self.start(fit, tmp_path)
        assert third.fit(data).calls == 0
        assert third.forgotten.tolist() == second.forgotten.tolist() == [1, 2]
        assert members(third) == members(second) == from_scratch(data, second, {1, 2})

    def test_a_stale_checkpoint_is_removed_before_training(self, data, tmp_path):
        sisa = make(fit, shards=1, slices=3, folder=tmp_path)
        sisa.fit(data)
        there = []
        sisa.train = lambda *args: (
            there.append({p.name for p in tmp_path.glob("*.safetensors")}) or fit(*args)
        )
        sisa.forget([int(sisa.cut[0][1][0])])
        assert there[0] == {"shard-0-after-1.safetensors"}


class TestBudget:
    @pytest.mark.parametrize(
        ("slices", "room", "kept"),
        [(4, 4, {1, 2, 3, 4}), (4, 2, {2, 4}), (5, 1, {5}), (3, 9, {1, 2, 3})],
    )
    def test_kept_evenly(self, slices, room, kept):
        assert partition.kept_checkpoints(slices, room) == kept

    def test_gaps_differ_by_one_slice_at_most(self):
        for slices, room in itertools.product(range(1, 20), range(1, 20)):
            kept = sorted(partition.kept_checkpoints(slices, room))
            assert len(kept) == min(slices, room)
            gaps = np.diff([0, *kept])
            assert gaps.max() - gaps.min() <= 1
            assert kept[-1] == slices

    def test_bytes_are_bounded_at_all_times_and_results_are_the_same(self, data, tmp_path):
        free = make(slices=4, shards=2, folder=tmp_path / "free")
        free.fit(data)
        size = {p.stat().st_size for p in (tmp_path / "free").glob("*.safetensors")}
        assert len(size) == 1  # so that a budget can be kept exactly
        budget = 5 * size.pop() + 10
        folder, most = tmp_path / "bound", []

        def watched(*args):
            most.append(sum(p.stat().st_size for p in folder.glob("*.safetensors")))
            return fit(*args)

        bound = make(watched, slices=4, shards=2, folder=folder, budget=budget)
        for sisa in (free, bound):
            if sisa is bound:
                sisa.fit(data)
            sisa.forget([0, 9])
        assert max(most) <= budget
        assert sorted(p.name for p in folder.glob("*.safetensors")) == [
            f"shard-{shard}-after-{done}.safetensors"
            for shard, done in ((0, 2), (0, 3), (0, 4), (1, 2), (1, 4))
        ]
        assert members(free) == members(bound)

    def test_training_starts_from_the_last_one_kept(self, data, tmp_path):
        make(untrained, folder=tmp_path).fit(data)
        size = next(tmp_path.glob("*.safetensors")).stat().st_size
        two = make(untrained, shards=1, slices=4, budget=2 * size)
        two.fit(data)
        assert two.forget([int(two.cut[0][3][0])]).first_slices == (2,)
        assert two.forget([int(two.cut[0][1][0])]).first_slices == (0,)
        one = make(untrained, shards=1, slices=4, budget=size)
        one.fit(data)
        assert one.forget([int(one.cut[0][3][0])]).first_slices == (0,)
        folder = tmp_path / "refused"
        with pytest.raises(
            ConfigError, match=rf"at least {3 * size}: one checkpoint of {size} bytes"
        ):
            make(untrained, shards=3, budget=3 * size - 1, folder=folder).fit(data)
        assert list(folder.glob("*.safetensors")) == []

    def test_a_smaller_budget_later_removes_what_is_too_much(self, data, tmp_path):
        make(shards=1, slices=4, folder=tmp_path).fit(data)
        size = next(tmp_path.glob("*.safetensors")).stat().st_size
        assert make(shards=1, slices=4, folder=tmp_path, budget=size).fit(data).calls == 0
        assert [p.name for p in tmp_path.glob("*.safetensors")] == ["shard-0-after-4.safetensors"]

    def test_a_temporary_folder_vanishes(self, data):
        sisa = make(untrained)
        sisa.fit(data)
        folder = sisa.checkpoints
        assert folder.exists()
        del sisa
        assert not folder.exists()


def flat(cut) -> list[int]:
    return sorted(int(i) for shard in cut for piece in shard for i in piece)


class TestCuts:
    @pytest.mark.parametrize("sizes", [(24, 3, 2), (25, 4, 3), (7, 7, 1), (6, 2, 3)])
    def test_every_sample_once(self, sizes):
        samples, shards, slices = sizes
        rng = np.random.default_rng(0)
        for cut in (
            partition.uniform(samples, shards, slices, 0),
            partition.balanced(rng.integers(0, 3, samples), shards, slices, 0),
            partition.by_deletion_probability(rng.random(samples) ** 8, shards, slices, 0),
        ):
            assert flat(cut) == list(range(samples))
            assert [len(shard) for shard in cut] == [slices] * shards
            assert all(
                len(piece) and np.array_equal(piece, np.sort(piece))
                for shard in cut
                for piece in shard
            )

    def test_uniform_sizes_and_chance(self):
        cuts = [partition.uniform(23, 4, 2, seed) for seed in range(400)]
        for cut in cuts:
            sizes = [sum(map(len, shard)) for shard in cut]
            assert max(sizes) - min(sizes) <= 1
            assert all(abs(len(a) - len(b)) <= 1 for a, b in cut)
        # sample 0 is in the first shard, of 6 samples, with chance 6/23; |z| < 4.4: false alarm
        # 1e-5
        hits = sum(0 in np.concatenate(cut[0]) for cut in cuts)
        assert abs(hits - 400 * 6 / 23) < 4.4 * math.sqrt(400 * 6 / 23 * 17 / 23)

    def test_balanced_by_class_and_size(self):
        labels = np.repeat(["a", "b", "c"], [31, 9, 13])
        cut = partition.balanced(labels, 4, 3, seed=5)
        shards = [np.concatenate(shard) for shard in cut]
        for groups in (shards, *cut):
            assert max(map(len, groups)) - min(map(len, groups)) <= 1
            for name in "abc":
                counts = [Counter(labels[group])[name] for group in groups]
                assert max(counts) - min(counts) <= 1
        assert flat(cut) != np.concatenate(shards).tolist()
        assert not np.array_equal(
            shards[0], np.concatenate(partition.balanced(labels, 4, 3, seed=6)[0])
        )

    def test_likely_deletions_are_together_and_last(self):
        chances = np.array([0.1] * 12 + [0.6] * 4)[np.random.default_rng(1).permutation(16)]
        cut = partition.by_deletion_probability(chances, 3, 2, seed=0, exponent=1)
        shards = [np.concatenate(shard) for shard in cut]
        # the total of 3.6 is cut at 1.2 and 2.4: twelve unlikely samples, then two and two likely
        # ones
        assert [len(shard) for shard in shards] == [12, 2, 2]
        assert [chances[shard].sum() for shard in shards] == pytest.approx([1.2] * 3)
        # roots: 12 of 0.316 and 4 of 0.775, 6.89 in all, cut at 2.30 (7.3 samples) and 4.60 (12 and
        # 1.04 samples)
        assert [
            sum(map(len, shard)) for shard in partition.by_deletion_probability(chances, 3, 2, 0)
        ] == [7, 6, 3]
        assert [
            sum(map(len, s))
            for s in partition.by_deletion_probability(chances, 4, 2, 0, exponent=0)
        ] == [4] * 4
        two = partition.by_deletion_probability(np.array([0.9, 0.0, 0.1, 0.2]), 1, 2, seed=0)
        assert [piece.tolist() for piece in two[0]] == [[1, 2], [0, 3]]
        equal = partition.by_deletion_probability(np.full(30, 0.1), 3, 1, seed=0)
        assert [len(shard[0]) for shard in equal] == [10, 10, 10]
        one = partition.by_deletion_probability(np.eye(8)[0], 3, 2, seed=0)
        assert all(len(piece) for shard in one for piece in shard)
        assert 0 in one[2][1]

    def test_knowing_who_deletes_saves_work(self):
        shards = 20
        chances = np.exp(np.random.default_rng(0).normal(-4, 1.5, 2000)).clip(max=1)

        def points(cut):
            """Of one request on average: it hits a shard with the chance of its probabilities in
            the total."""
            parts = [np.concatenate(shard) for shard in cut]
            return sum(chances[part].sum() * len(part) for part in parts) / chances.sum()

        def aware(exponent):
            return points(partition.by_deletion_probability(chances, shards, 1, 0, exponent))

        assert aware(0.5) == pytest.approx(
            np.sqrt(chances).sum() ** 2 / (shards * chances.sum()), rel=0.02
        )
        assert aware(0.5) < min(aware(0.35), aware(0.65))
        for same in (aware(0), aware(1), points(partition.uniform(2000, shards, 1, 0))):
            assert same == pytest.approx(2000 / shards, rel=0.01)

    def test_sisa_uses_labels_and_probabilities(self, data):
        labels = data.tensors[1].numpy()
        by_class = make(untrained, labels=labels, seed=4)
        by_class.fit(data)
        assert all(
            (np.bincount(labels[piece]) >= 1).all() for shard in by_class.cut for piece in shard
        )
        assert [p.tolist() for p in by_class.cut[1]] == [
            p.tolist() for p in partition.balanced(labels, 3, 2, 4)[1]
        ]
        chances = np.linspace(0, 1, COUNT)
        aware = make(untrained, probabilities=chances)
        aware.fit(data)
        assert COUNT - 1 in aware.cut[2][1]
        assert len(np.concatenate(aware.cut[0])) > len(np.concatenate(aware.cut[2]))


class Fixed(nn.Module):
    """Gives the same probabilities for every input."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(
            torch.tensor(probabilities).log() + 0.7
        )  # a shift does not matter

    def forward(self, inputs):
        return self.logits.expand(len(inputs), -1)


class TestAggregate:
    MEMBERS = (Fixed(0.6, 0.3, 0.1), Fixed(0.1, 0.2, 0.7), Fixed(0.1, 0.5, 0.4))

    def probabilities(self, counts, aggregation, members=MEMBERS):
        out = Aggregate(members, counts, aggregation)(torch.zeros(2, 1))
        assert out.shape == (2, 3)
        assert torch.equal(out[0], out[1])
        return out[0].exp().tolist()

    def test_mean_by_hand(self):
        assert self.probabilities([1, 1, 1], "mean") == pytest.approx(
            [0.8 / 3, 1 / 3, 0.4], abs=1e-6
        )
        assert self.probabilities([2, 1, 5], "mean") == pytest.approx(
            [1.8 / 8, 3.3 / 8, 2.9 / 8], abs=1e-6
        )

    def test_vote_by_hand(self):
        three = (*self.MEMBERS[:2], Fixed(0.4, 0.3, 0.3))
        # votes 2, 0, 1, and one that is divided as the mean is: (1.1, 0.8, 1.1) / 3
        expected = [(2 + 1.1 / 3) / 4, 0.8 / 3 / 4, (1 + 1.1 / 3) / 4]
        assert self.probabilities([1, 1, 1], "vote", three) == pytest.approx(expected, abs=1e-6)
        # counts 1, 4, 2: votes 3, 0, 4, mean (0.6 + 0.4 + 0.8, 0.3 + 0.8 + 0.6, 0.1 + 2.8 + 0.6) /
        # 7
        expected = [(3 + 1.8 / 7) / 8, 1.7 / 7 / 8, (4 + 3.5 / 7) / 8]
        assert self.probabilities([1, 4, 2], "vote", three) == pytest.approx(expected, abs=1e-6)

    def test_the_mean_decides_a_tie_but_no_majority(self):
        tie = self.probabilities([1, 1], "vote", (Fixed(0.51, 0.49, 1e-9), Fixed(0.05, 0.95, 1e-9)))
        assert int(np.argmax(tie)) == 1
        members = (Fixed(0.51, 0.49, 1e-9), Fixed(0.51, 0.49, 1e-9), Fixed(1e-9, 1.0, 1e-9))
        assert int(np.argmax(self.probabilities([1, 1, 1], "mean", members))) == 1
        assert int(np.argmax(self.probabilities([1, 1, 1], "vote", members))) == 0

    def test_votes_against_a_count_of_them(self):
        generator = torch.Generator().manual_seed(0)
        models = [seeded(lambda: nn.Linear(4, 5), seed) for seed in range(6)]
        inputs = 3 * torch.randn(200, 4, generator=generator)
        counts = [3, 1, 4, 1, 5, 2]
        out = Aggregate(models, counts, "vote")(inputs)
        choices = np.stack([model(inputs).argmax(-1).numpy() for model in models])
        for row, sample in enumerate(choices.T):
            votes = np.bincount(sample, counts, minlength=5)
            assert votes[int(out[row].argmax())] == votes.max()
        torch.testing.assert_close(out.exp().sum(-1), torch.ones(200))

    def test_extreme_logits_stay_finite_and_carry_gradients(self):
        model = nn.Linear(1, 3)
        nn.init.constant_(model.weight, 0.0)
        with torch.no_grad():
            model.bias.copy_(torch.tensor([500.0, 0.0, -500.0]))
        for aggregation in ("mean", "vote"):
            module = Aggregate([model, model], [1, 1], aggregation)
            out = module(torch.zeros(1, 1))
            assert torch.isfinite(out).all()
            out[0, 2].backward()
            assert torch.isfinite(model.bias.grad).all()

    def test_leading_dimensions_and_outputs_with_logits(self):
        class Wrapped(nn.Module):
            def forward(self, inputs):
                out = type("Out", (), {})()
                out.logits = inputs
                return out

        inputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        out = Aggregate([Wrapped(), Wrapped()], [1, 1])(inputs)
        torch.testing.assert_close(out, torch.log_softmax(inputs, -1))

    @pytest.mark.parametrize(
        ("count", "counts", "kind", "words"),
        [
            (0, [], "mean", "at least one member"),
            (2, [1], "mean", r"2 members with the counts \[1\]"),
            (1, [0], "vote", "whole number of at least 1"),
            (1, [1], "median", "aggregation='median'"),
        ],
    )
    def test_refusals(self, count, counts, kind, words):
        with pytest.raises(ConfigError, match=words):
            Aggregate([nn.Linear(1, 2)] * count, counts, kind)

    def test_of_a_fitted_sisa(self, data):
        sisa = make(shards=2)
        sisa.fit(data)
        sisa.forget(np.concatenate(sisa.cut[0])[:5])
        inputs = data.tensors[0]
        module = sisa.module()
        assert not module.training
        stacked = torch.stack([member(inputs).softmax(-1) for member in module.members])
        torch.testing.assert_close(module(inputs), stacked.mean(0).log())
        weighted = (7 * stacked[0] + 12 * stacked[1]) / 19
        torch.testing.assert_close(sisa.module(weighted=True)(inputs), weighted.log())
        assert torch.equal(sisa.predict(inputs, batch_size=5), module(inputs).argmax(-1))
        votes = sisa.module(aggregation="vote")(inputs).argmax(-1)
        assert torch.equal(sisa.predict(inputs, aggregation="vote"), votes)
        assert float((sisa.predict(inputs) == data.tensors[1]).float().mean()) > 0.6
        before = bits(module)
        sisa.forget([int(sisa.cut[1][0][0])])
        assert bits(module) == before != bits(sisa.module())


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"shards": 0}, "shards=0"),
            ({"shards": 2.0}, r"shards=2\.0"),
            ({"slices": 0}, "slices=0"),
            ({"jobs": 0}, "jobs=0"),
            ({"seed": -1}, "seed=-1"),
            (
                {"labels": np.zeros(COUNT, dtype=int), "probabilities": np.ones(COUNT)},
                "both labels and probabilities",
            ),
        ],
    )
    def test_options(self, options, words):
        with pytest.raises(ConfigError, match=words):
            make(**options)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"shards": COUNT + 1, "slices": 1}, "at least one sample in every slice"),
            ({"shards": 5, "slices": 5}, "at least one sample in every slice"),
            ({"labels": np.zeros(COUNT - 1, dtype=int)}, r"labels of shape \(23,\)"),
            ({"labels": np.zeros(COUNT)}, "labels.*dtype float64"),
            ({"labels": np.zeros(COUNT, dtype=int), "shards": 13}, "13 shards of 2 slices"),
            ({"probabilities": np.zeros(COUNT)}, "all zero"),
            ({"probabilities": np.full(COUNT, 1.5)}, r"not all in \[0, 1\]"),
            ({"probabilities": np.full(COUNT, np.nan)}, r"not all in \[0, 1\]"),
            ({"probabilities": np.ones(3)}, r"probabilities of shape \(3,\)"),
            ({"budget": 100}, "budget=100 bytes"),
        ],
    )
    def test_data(self, data, options, words):
        train_fn = KilledAfter(0)
        with pytest.raises(ConfigError, match=words):
            make(train_fn, **options).fit(data)
        assert train_fn.indices == []

    @pytest.mark.parametrize(
        ("request_", "words"),
        [
            ([], "an empty forget_idx"),
            ([COUNT], "the index 24"),
            ([-1], "negative index -1"),
            ([1, 1], "repeats"),
            (range(COUNT), "names every sample"),
            ([0.5], "dtype float64"),
            (3, "of type int"),
        ],
    )
    def test_requests(self, data, request_, words):
        sisa = make(untrained)
        sisa.fit(data)
        with pytest.raises(SplitError, match=words):
            sisa.forget(request_)
        assert sisa.requests == []

    def test_forgetting_the_last_sample(self, data):
        sisa = make(untrained)
        sisa.fit(data)
        sisa.forget(range(1, COUNT))
        with pytest.raises(SplitError, match="no retained sample"):
            sisa.forget([0])
        assert len(sisa.module().members) == 1

    def test_before_fit(self):
        sisa = make()
        for call in (
            lambda: sisa.forget([1]),
            sisa.module,
            lambda: sisa.predict(torch.zeros(1, 4)),
            lambda: sisa.cut,
        ):
            with pytest.raises(ModelError, match="fit"):
                call()

    def test_another_data_set(self, data):
        sisa = make(untrained)
        sisa.fit(data)
        with pytest.raises(SplitError, match="another data set"):
            sisa.fit(blobs_data(COUNT, seed=1))
        with pytest.raises(SplitError, match="without length"):
            make(untrained).fit(iter(()))

    @pytest.mark.parametrize(
        "options", [{"seed": 1}, {"slices": 1}, {"shards": 2}, {"fingerprint": "b"}]
    )
    def test_a_folder_of_another_run(self, data, tmp_path, options):
        make(untrained, folder=tmp_path).fit(data)
        with pytest.raises(StorageError, match="Name another folder"):
            make(untrained, folder=tmp_path, **options).fit(data)

    def test_checkpoints_without_a_record_of_who_was_forgotten_are_refused(self, data, tmp_path):
        make(untrained, folder=tmp_path).fit(data)
        (tmp_path / "ledger.jsonl").unlink()
        (tmp_path / "ledger.head").unlink()
        with pytest.raises(StorageError, match="no ledger of who was forgotten"):
            make(untrained, folder=tmp_path).fit(data)

    def test_files_of_others_stay(self, data, tmp_path):
        from safetensors.torch import save_file

        foreign = ["shard-00001-of-00002.safetensors", "shard-9-after-1.safetensors"]
        for name in foreign:
            save_file({"w": torch.ones(3)}, tmp_path / name, metadata={"format": "pt"})
        sisa = make(fit)
        twin = SISA(sisa.build, fit, shards=sisa.shards, slices=sisa.slices)
        twin.fit(data)
        for name in foreign:
            save_file({"w": torch.ones(3)}, twin.checkpoints / name, metadata={"format": "pt"})
        twin.forget([1, 5])
        assert all((twin.checkpoints / name).exists() for name in foreign)

    def test_two_owners_of_a_folder_know_each_others_requests(self, data, tmp_path):
        one, two = (make(fit, folder=tmp_path) for _ in range(2))
        one.fit(data)
        two.fit(data)
        one.forget([1])
        two.forget([5])
        one.fit(data)
        assert one.forgotten.tolist() == two.forgotten.tolist() == [1, 5]
        assert members(one) == members(two) == from_scratch(data, one, {1, 5})

    def test_a_folder_of_another_model(self, data, tmp_path):
        make(untrained, folder=tmp_path).fit(data)
        with pytest.raises(StorageError, match="Name another folder"):
            SISA(lambda: nn.Linear(4, 3), untrained, shards=3, slices=2, folder=tmp_path).fit(data)

    def test_a_training_function_that_returns_another_model(self, data):
        with pytest.raises(StorageError, match="differ from the model's"):
            make(lambda *_: nn.Linear(4, 3)).fit(data)

    def test_an_error_of_the_training_function_comes_through(self, data):
        def broken(*_):
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine") as caught:
            make(broken).fit(data)
        assert not isinstance(caught.value, FisherForgetError)
