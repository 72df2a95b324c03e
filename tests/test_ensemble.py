from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fisher_forget._util.files import read_metadata
from fisher_forget.errors import ConfigError, FisherForgetWarning, StorageError
from fisher_forget.evaluate.ensemble import train_members
from fisher_forget.experiments.training import TrainSettings, train

TEMPLATE = nn.Linear(3, 2)


def fit(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, generator=generator), torch.arange(12) % 2)
    template = nn.Linear(3, 2)
    nn.init.constant_(template.weight, 0.1)
    nn.init.zeros_(template.bias)
    return train(template, data, TrainSettings(epochs=2, batch_size=4), seed=seed, progress=False)


class Recorder:
    """`fit`, with a list of the seeds it was called with, and an error at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.fail_at = fail_at

    def __call__(self, seed: int) -> nn.Module:
        if seed == self.fail_at:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        return fit(seed)


def run(train_fn, seeds=(0, 1, 2), **options):
    given = {"fingerprint": "of all that stand for fit", "progress": False} | options
    return train_members(train_fn, seeds, template=TEMPLATE, **given)


def same(a, b) -> bool:
    pairs = zip(a.models, b.models, strict=True)
    return all(
        torch.equal(x, y)
        for m, n in pairs
        for x, y in zip(m.parameters(), n.parameters(), strict=True)
    )


class TestMembers:
    def test_are_what_was_trained_in_the_order_of_the_seeds(self):
        ensemble = run(fit, (7, 3))
        assert ensemble.seeds == (7, 3)
        for seed, model in zip((7, 3), ensemble.models, strict=True):
            assert torch.equal(model.weight, fit(seed).weight)
            assert not model.training
        assert all(seconds > 0 for seconds in ensemble.seconds)

    def test_template_is_untouched(self):
        before = TEMPLATE.weight.clone()
        run(fit)
        assert torch.equal(TEMPLATE.weight, before)
        assert TEMPLATE.training

    def test_threads_are_left_alone(self):
        seen = []
        before = torch.get_num_threads()
        run(lambda seed: seen.append(torch.get_num_threads()) or fit(seed))
        assert seen == [before] * 3
        assert torch.get_num_threads() == before

    def test_workers_give_what_this_process_gives(self, tmp_path):
        here = run(fit)
        parent = os.getpid()

        def elsewhere(seed: int) -> nn.Module:
            assert os.getpid() != parent
            assert torch.get_num_threads() == 1
            return fit(seed)

        workers = run(elsewhere, jobs=2, folder=tmp_path)
        assert workers.seeds == (0, 1, 2)
        for a, b in zip(here.models, workers.models, strict=True):
            torch.testing.assert_close(a.weight, b.weight)
        assert same(
            workers, run(Recorder(fail_at=0), folder=tmp_path)
        )  # each worker has stored its own
        # a single one that is left is trained here, in one thread as the others were
        before = torch.get_num_threads()
        (tmp_path / "seed-1.safetensors").unlink()
        assert same(workers, run(fit, jobs=2, folder=tmp_path))
        assert torch.get_num_threads() == before

    def test_progress_shows_what_is_done(self, capsys):
        train_members(fit, (0, 1), template=TEMPLATE, description="oracles")
        assert "oracles" in capsys.readouterr().err
        run(fit)
        assert capsys.readouterr().err == ""


class TestCache:
    def test_a_killed_run_resumes(self, tmp_path):
        killed = Recorder(fail_at=1)
        with pytest.raises(KeyboardInterrupt):
            run(killed, folder=tmp_path)
        assert killed.seeds == [0]
        resumed = Recorder()
        ensemble = run(resumed, folder=tmp_path)
        assert resumed.seeds == [1, 2]
        assert same(ensemble, run(fit))

    def test_a_finished_run_trains_nothing(self, tmp_path):
        first = run(fit, folder=tmp_path / "deep" / "folder", fingerprint="a")
        again = Recorder()
        second = run(again, folder=tmp_path / "deep" / "folder", fingerprint="a")
        assert again.seeds == []
        assert same(first, second)
        assert first.seconds == second.seconds

    def test_metadata_say_what_it_is(self, tmp_path):
        run(fit, (4,), folder=tmp_path, fingerprint="a")
        found = read_metadata(tmp_path / "seed-4.safetensors")
        assert found.keys() == {"fingerprint", "seed", "seconds", "version"}
        assert (found["fingerprint"], found["seed"]) == ("a", "4")

    def test_more_seeds_train_only_the_new_ones(self, tmp_path):
        run(fit, (0, 1), folder=tmp_path)
        more = Recorder()
        run(more, (1, 5, 0), folder=tmp_path)
        assert more.seeds == [5]

    def test_another_fingerprint_is_trained_anew(self, tmp_path):
        run(fit, folder=tmp_path, fingerprint="a")
        anew = Recorder()
        with pytest.warns(FisherForgetWarning, match="fingerprint='a'"):
            run(anew, folder=tmp_path, fingerprint="b")
        assert anew.seeds == [0, 1, 2]
        after = Recorder()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(after, folder=tmp_path, fingerprint="b")
        assert after.seeds == []

    @pytest.mark.parametrize("damage", ["cut", "empty", "renamed", "flipped"])
    def test_a_damaged_file_is_trained_anew(self, tmp_path, damage):
        first = run(fit, folder=tmp_path)
        path = tmp_path / "seed-1.safetensors"
        content = path.read_bytes()
        wrong = {
            "cut": content[:-5],
            "empty": b"",
            "renamed": (tmp_path / "seed-2.safetensors").read_bytes(),
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        }
        path.write_bytes(wrong[damage])
        anew = Recorder()
        with pytest.warns(FisherForgetWarning, match=r"seeds \[1\]"):
            second = run(anew, folder=tmp_path)
        assert anew.seeds == [1]
        assert same(first, second)
        assert same(first, run(Recorder(fail_at=1), folder=tmp_path))


class TestRefusals:
    @pytest.mark.parametrize(
        ("seeds", "jobs", "words"),
        [
            ((), 1, "at least one seed, each once"),
            ((1, 1), 1, "at least one seed, each once"),
            ((0,), 0, "jobs=0"),
        ],
    )
    def test_arguments(self, seeds, jobs, words):
        with pytest.raises(ConfigError, match=words):
            run(fit, seeds, jobs=jobs)

    def test_another_architecture(self):
        with pytest.raises(StorageError, match="differ from the model's"):
            run(lambda seed: nn.Linear(4, 2))

    def test_a_folder_that_cannot_be_made_before_anything_is_trained(self, tmp_path):
        (tmp_path / "file").touch()
        recorder = Recorder()
        with pytest.raises(StorageError, match="folder"):
            run(recorder, folder=tmp_path / "file" / "below")
        assert recorder.seeds == []


def test_members_of_a_dask_cluster_are_those_of_this_process() -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None
    ):
        far = train_members(
            fit, [0, 1, 2], template=TEMPLATE, jobs=2, backend="dask", progress=False
        )
    here = train_members(fit, [0, 1, 2], template=TEMPLATE, progress=False)
    assert far.seeds == here.seeds
    for a, b in zip(far.models, here.models, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
