"""Batches are read through one loader a call, and no worker outlives it."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import threading
import warnings
from contextvars import Context
from functools import partial

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from fisher_forget import METHODS, estimate_curvature, forget, prepare
from fisher_forget._util.calls import one_call
from fisher_forget.data.reader import Reader
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import DataError, FisherForgetWarning, NumericalError
from fisher_forget.evaluate.predictions import predict

N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
PLAIN = {"drift": True, "steps": 1, "damping": 0.1, "noise": None, "progress": False}


class Samples(Dataset):
    """Samples that are no tensors in memory; one of them may be broken."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index == self.broken:
            raise KeyError(f"sample {index} cannot be read")
        return X[index], Y[index]


def noted(folder, worker):
    (folder / f"{os.getpid()}").touch()


@pytest.fixture
def model():
    return seeded(lambda: nn.Linear(4, 3))


@pytest.fixture
def loader(tmp_path):
    """Makes a loader with two workers, whose starts the folder holds."""

    def make(data=None, **options):
        start = partial(noted, tmp_path)
        data = Samples() if data is None else data
        return DataLoader(data, batch_size=5, num_workers=2, worker_init_fn=start, **options)

    return make


def workers_alive():
    """The loaders' processes; joblib's stay for later tests."""
    return [p for p in multiprocessing.active_children() if "Loky" not in type(p).__name__]


def targets(batches):
    return [int(y) for batch in batches for y in batch.targets]


class TestWorkers:
    @pytest.mark.parametrize(
        "options", [{}, {"persistent_workers": True}, {"prefetch_factor": 1, "timeout": 60}]
    )
    def test_they_start_once_a_call(self, loader, model, tmp_path, options):
        found = forget(model, loader(**options), [0, 1], **PLAIN)
        assert len(list(tmp_path.iterdir())) == 2
        assert not workers_alive()
        expected = forget(model, DataLoader(Samples(), batch_size=5), [0, 1], **PLAIN)
        assert torch.equal(found.model.weight, expected.model.weight)

    @pytest.mark.parametrize(
        "call",
        [
            lambda model, loader: estimate_curvature(model, loader, structure="dense"),
            lambda model, loader: prepare(model, loader, progress=False, **PLAIN_OPTIONS),
            lambda model, loader: METHODS["finetune"](epochs=2).unlearn(
                model, resolve_split(loader, [0])
            ),
            lambda model, loader: METHODS["fisher-forget"](**PLAIN_OPTIONS).unlearn(
                model, resolve_split(loader, [0])
            ),
            lambda model, loader: predict(model, resolve_split(loader, [0])),
            lambda model, loader: resolve_split(loader, [0]).fingerprint(),
        ],
    )
    def test_whatever_the_call(self, loader, model, tmp_path, call):
        call(model, loader())
        assert len(list(tmp_path.iterdir())) == 2
        assert not workers_alive()

    @pytest.mark.parametrize(
        ("data", "error"), [("broken", DataError), ("not a number", NumericalError)]
    )
    def test_none_outlives_a_call_that_fails(self, loader, model, data, error):
        nan = Made(lambda i: (X[i] * (torch.nan if i == 17 else 1), Y[i]))
        with pytest.raises(error) as caught:  # whose traceback holds the pass
            forget(model, loader(nan if data == "not a number" else Samples(17)), [0, 1], **PLAIN)
        assert caught.value.got
        assert not workers_alive()

    def test_outside_of_a_call_a_pass_has_its_own(self, loader):
        split = resolve_split(loader(), [0])
        for _ in range(2):
            assert targets(split.batches("all")) == Y.tolist()
            assert not workers_alive()

    def test_splits_of_the_same_data_share_them(self, loader, tmp_path):
        with one_call():
            split = resolve_split(loader(), [0])
            for part in (split, split.forgetting([5, 6]), split.subset(np.array([3, 4]))):
                list(part.batches("retain"))
        assert len(list(tmp_path.iterdir())) == 2


PLAIN_OPTIONS = {name: value for name, value in PLAIN.items() if name != "progress"}


@pytest.mark.parametrize("workers", [0, 2])
class TestPasses:
    @pytest.fixture
    def split(self, workers):
        return resolve_split(DataLoader(Samples(), batch_size=5, num_workers=workers), [0, 7])

    def test_one_within_another(self, split):
        with one_call():
            for outer in split.batches("all"):
                assert targets(split.batches("forget")) == [0, 1]
                assert len(outer) in (5, 3)
            pairs = zip(*[split.batches("all")] * 2, strict=False)  # of one and the same pass
            assert targets(batch for pair in pairs for batch in pair) == Y[:20].tolist()

    def test_one_that_was_left_in_the_middle(self, split):
        with one_call():
            next(split.batches("all"))
            held = split.batches("retain")
            next(held)
            assert targets(split.batches("all")) == Y.tolist()
            assert targets(held) == Y[split.retain][5:].tolist()

    def test_given_lots(self, split):
        plan = [np.array([3]), np.array([7, 2, 9]), np.array([0, 1])]
        with one_call():
            found = list(split.read(plan))
        for rows, batch in zip(plan, found, strict=True):
            assert torch.equal(batch.args[0], X[rows])

    def test_the_global_random_state_is_left_alone(self, split):
        state = torch.get_rng_state()
        with one_call():
            targets(split.batches("all")), targets(split.batches("retain"))
        assert torch.equal(torch.get_rng_state(), state)

    def test_threads(self, split):
        found = {}

        def read(name):
            with one_call():
                found[name] = [targets(split.batches("all")) for _ in range(3)]

        threads = [threading.Thread(target=read, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: [Y.tolist()] * 3 for name in range(3)}
        assert not workers_alive()

    def test_a_call_leaves_the_passes_of_other_threads_alone(self, split):
        elsewhere = Context()
        with one_call():
            list(split.batches("all"))
            held = elsewhere.run(split.batches, "all")
            first = elsewhere.run(next, held)
        assert targets([first, *elsewhere.run(list, held)]) == Y.tolist()

    def test_copies(self, split):
        with one_call():
            list(split.batches("forget"))
            for twin in (pickle.loads(pickle.dumps(split)), copy.deepcopy(split)):
                assert targets(twin.batches("all")) == Y.tolist()


class Made(Samples):
    def __init__(self, make):
        self.make = make

    def __getitem__(self, index):
        return self.make(index)


def mixed(rows):
    """MixUp: each sample with another."""
    x, y = default_collate(rows)
    order = torch.randperm(len(x))
    return 0.7 * x + 0.3 * x[order], y


def masked(rows):
    """Hides tokens, as for a masked language model."""
    x, y = default_collate(rows)
    return torch.where(torch.rand_like(x) < 0.15, 0, x), y


class TestRandomData:
    @pytest.mark.parametrize("collate", [mixed, masked])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_collate_functions(self, collate, workers):
        split = resolve_split(
            DataLoader(Samples(), batch_size=16, collate_fn=collate, num_workers=workers), [0]
        )
        with one_call(), pytest.warns(FisherForgetWarning, match="differs between two reads"):
            list(split.batches("all"))

    @pytest.mark.parametrize(
        "make",
        [
            lambda i: (X[i] + torch.rand(4), Y[i]),
            lambda i: (X[i].flip(0) if random.random() < 0.5 else X[i], Y[i]),
            lambda i: (X[i], (Y[i] + (np.random.rand() < 0.2)) % 3),  # noqa: NPY002
        ],
    )
    def test_data_sets(self, make):
        with pytest.warns(FisherForgetWarning, match="differs between two reads"):
            list(resolve_split(DataLoader(Made(make), batch_size=16), [0]).batches("all"))

    def test_it_is_said_once(self):
        split = resolve_split(DataLoader(Samples(), batch_size=16, collate_fn=mixed), [0])
        with pytest.warns(FisherForgetWarning) as told:
            list(split.batches("all")), list(split.forgetting([3]).batches("retain"))
        assert len(told) == 1

    def test_broken_data_are_not_random(self):
        list(resolve_split(Made(lambda i: (X[i] * torch.nan, Y[i])), [0]).batches("all"))


class Read(Samples):
    """Notes which samples are read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return X[index], Y[index]


class TestWhatIsRead:
    def test_nothing_to_resolve(self):
        data = Read()
        resolve_split(data, [0])
        assert data.read == []

    def test_a_batch_twice_and_then_what_is_asked_for(self):
        data = Read()
        list(resolve_split(DataLoader(data, batch_size=5), [0]).batches(np.array([9, 8])))
        assert data.read == [1, 2, 3, 4, 5] * 2 + [1, 2] + [9, 8]


def shared_mask(rows):
    """Token ids and a causal mask [T, T], the same for all."""
    x, y = default_collate(rows)
    return {"x": x, "mask": torch.ones(4, 4).tril(), "labels": y}


class TestSharedTensors:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, N])
    @pytest.mark.parametrize("total", [2, 3, N])
    def test_whatever_the_size_of_the_batch(self, batch_size, total):
        data = [(X[i], Y[i]) for i in range(total)]
        loader = DataLoader(data, batch_size=batch_size, collate_fn=shared_mask)
        split = resolve_split(loader, [1])
        for part in ("retain", "forget", "all"):
            for batch in split.batches(part):
                assert batch.dims()[1] == {"x": 0, "mask": None}
                assert next(batch.chunks(1)).kwargs["mask"].shape == (4, 4)

    def test_added_by_unpack(self):
        prototypes = torch.eye(3, 4)
        unpack = lambda batch: ((batch[0], prototypes), batch[1])  # noqa: E731
        for batch in resolve_split(
            DataLoader(TensorDataset(X, Y), batch_size=3), [0], unpack=unpack
        ).batches("all"):
            assert batch.dims()[0] == (0, None)

    @pytest.mark.parametrize("batch_size", [1, 2, 4, N])
    def test_a_model_with_a_mask_for_all(self, batch_size):
        """The trace of the curvature is that of every sample alone."""

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x, mask):
                return self.layer(x @ mask)

        model = seeded(Masked)
        loader = DataLoader(Samples(), batch_size=batch_size, collate_fn=shared_mask)
        mask = torch.ones(4, 4).tril()
        plain = TensorDataset(X @ mask, Y)
        for structure in ("dense", "diagonal"):
            expected = estimate_curvature(model.layer, plain, structure=structure).trace()
            found = estimate_curvature(model, loader, structure=structure).trace()
            assert found == pytest.approx(expected, rel=1e-5)


class TestWhatCannotBeRead:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_broken_sample(self, workers):
        split = resolve_split(
            DataLoader(Samples(broken=17), batch_size=5, num_workers=workers), [0]
        )
        with one_call(), pytest.raises(DataError, match=r"KeyError .*\[15, .*sample 17") as caught:
            list(split.batches("all"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "make",
        [
            lambda i: (torch.zeros(i + 1), 0),
            lambda i: (None, 0),
            lambda i: (object(), 0),
        ],
    )
    def test_what_torch_does_not_collate(self, make):
        with pytest.raises(DataError, match="collate_fn="):
            list(resolve_split(Made(make), [0]).batches("all"))

    def test_samples_that_the_collate_function_drops(self):
        collate = lambda rows: default_collate([row for row in rows if row[1] != 2])  # noqa: E731
        split = resolve_split(DataLoader(Samples(), batch_size=5, collate_fn=collate), [0])
        with pytest.raises(DataError, match=r"targets .* samples"):
            list(split.batches("all"))


class TestWeightsOfSamples:
    """(inputs, targets, a number a sample)"""

    def warned(self, *further, unpack=None):
        x, y = torch.randn(9, 2), torch.arange(9)
        split = resolve_split(TensorDataset(x, y, *further), [0], unpack=unpack)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert sum(len(batch) for batch in split.batches("all")) == 9
        return [w for w in caught if "another objective" in str(w.message)]

    @pytest.mark.parametrize("shape", [(9,), (9, 1)])
    def test_are_warned_of_once(self, shape):
        assert len(self.warned(torch.rand(shape))) == 1
        assert not self.warned(torch.rand(shape), unpack=lambda batch: batch[:2])

    @pytest.mark.parametrize("further", [(), (torch.rand(9, 4),), (torch.ones(9),)])
    def test_are_none(self, further):
        assert not self.warned(*further)


def test_a_reader_takes_its_base_from_the_split() -> None:
    split = Split(Samples(), np.arange(5), np.arange(5, 7))
    assert isinstance(split.reader, Reader)
    assert split.reader.base is split.base
