"""Checkpoints are kept where they help, whole, and read without running code."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fisher_forget import CheckpointKeeper, ConfigError, StorageError, list_checkpoints
from fisher_forget._util import files
from fisher_forget.rewind.checkpoints import POINTS, Checkpoint, checkpoints_of


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(x, other[name]) for name, x in a.state_dict().items())


def run(folder, steps, model, **options):
    """A training whose step k sets the first bias to k."""
    keeper = CheckpointKeeper(folder, steps, **options)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model[0].bias.fill_(step)
        keeper.step(model)


class TestKeeping:
    def test_weights_and_points_of_its_steps(self, tmp_path):
        model = net()
        run(tmp_path, 40, model)
        kept = list_checkpoints(tmp_path)
        assert [one.point for one in kept] == [0.5, 0.75, 0.9]
        for one, step in zip(kept, (20, 30, 36), strict=True):
            read = one.model(net(1))
            assert torch.equal(read[0].bias, torch.full((4,), float(step)))
            assert torch.equal(read[2].weight, model[2].weight)
            assert not read.training

    @pytest.mark.parametrize(("steps", "points"), [(2, [0.5]), (3, [2 / 3]), (1, [])])
    def test_short_trainings(self, tmp_path, steps, points):
        run(tmp_path, steps, net())
        assert [one.point for one in list_checkpoints(tmp_path)] == pytest.approx(points)

    def test_no_more_is_left_than_the_points_say(self, tmp_path):
        """So that rewinding by .1, .25 or .5 finds its checkpoint, whatever the number of steps."""
        for total in (*range(2, 40), 101, 150, 1175):
            marks = CheckpointKeeper(tmp_path / str(total), total)._marks
            for point in POINTS:
                mark = min(m for m in marks if m >= point * total - 1e-6 or m == total - 1)
                assert mark - point * total < 1

    def test_goes_on_after_an_interruption(self, tmp_path):
        model = net()
        keeper = CheckpointKeeper(tmp_path, 8)
        for step in range(1, 5):
            keeper.step(model, step)
        again = CheckpointKeeper(tmp_path, 8)
        for step in range(5, 9):
            again.step(model, step)
        assert [one.point for one in list_checkpoints(tmp_path)] == [0.5, 0.75, 7 / 8]

    @pytest.mark.parametrize("steps", [8, 16])
    def test_another_training_is_not_mixed_in(self, tmp_path, steps):
        run(tmp_path, 8, net())
        keeper = CheckpointKeeper(tmp_path, steps)
        with pytest.raises(StorageError, match="another training"):
            keeper.step(net())

    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        def killed(tensors, path, metadata):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 2, net())
        assert list_checkpoints(tmp_path) == ()

    @pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile])
    def test_wrappers_do_not_show(self, tmp_path, wrapped):
        model = net()
        CheckpointKeeper(tmp_path, 1000, points=(0.001,)).step(wrapped(model))
        assert same(list_checkpoints(tmp_path)[0].model(net(1)), model)

    @pytest.mark.parametrize("steps", [0, 2.5, True, "10"])
    def test_steps(self, tmp_path, steps):
        with pytest.raises(ConfigError, match="total_steps"):
            CheckpointKeeper(tmp_path, steps)

    @pytest.mark.parametrize("points", [(), (0.0,), (1.0,), (float("nan"),), ("a",)])
    def test_points(self, tmp_path, points):
        with pytest.raises(ConfigError, match="points"):
            CheckpointKeeper(tmp_path, 10, points)


class TestListing:
    def test_no_folder(self, tmp_path):
        with pytest.raises(StorageError, match="no folder"):
            list_checkpoints(tmp_path / "none")

    def test_other_files_do_not_count(self, tmp_path):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        assert list_checkpoints(tmp_path) == ()

    def test_two_trainings(self, tmp_path):
        run(tmp_path / "a", 8, net())
        run(tmp_path / "b", 16, net())
        for path in (tmp_path / "b").iterdir():
            path.rename(tmp_path / "a" / path.name)
        with pytest.raises(StorageError, match="trainings of"):
            list_checkpoints(tmp_path / "a")

    def test_damage(self, tmp_path):
        run(tmp_path, 2, net())
        (file,) = tmp_path.iterdir()
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        (one,) = list_checkpoints(tmp_path)
        with pytest.raises(StorageError, match="checksum"):
            one.model(net())


class TestReading:
    @pytest.mark.parametrize(
        "saved",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
            lambda state: {"model": {f"module.{name}": x for name, x in state.items()}},
            lambda state: {"state_dict": {f"net.{name}": x for name, x in state.items()}},
        ],
    )
    def test_files_of_training_scripts(self, tmp_path, saved):
        model = net()
        torch.save(saved(model.state_dict()), tmp_path / "epoch.pt")
        (one,) = checkpoints_of({0.75: tmp_path / "epoch.pt"})
        assert same(one.model(net(1)), model)
        assert one.rest == 0.25

    def test_a_tensor_saved_once_for_two_names(self, tmp_path):
        model = Tied()
        save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "model.safetensors")
        read = Checkpoint(0.5, tmp_path / "model.safetensors").model(Tied())
        assert torch.equal(read.head.weight, model.embed.weight)
        assert read.head.weight is read.embed.weight

    def test_code_is_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (tmp_path / "ran").touch, ()

        with open(tmp_path / "trap.pt", "wb") as file:
            pickle.dump(Trap(), file)
        torch.save({"state_dict": net().state_dict(), "x": Trap()}, tmp_path / "zip.pt")
        (tmp_path / "ran").unlink(missing_ok=True)
        for name in ("trap.pt", "zip.pt"):
            with pytest.raises(StorageError, match="needs no code"):
                Checkpoint(0.5, tmp_path / name).model(net())
        assert not (tmp_path / "ran").exists()

    def test_state_dict_stays_the_users(self):
        given = {name: x.clone() for name, x in net().state_dict().items()}
        before = {name: x.clone() for name, x in given.items()}
        (one,) = checkpoints_of({0.5: given})
        with torch.no_grad():
            for p in one.model(net(1)).parameters():
                p.add_(1)
        assert all(torch.equal(x, before[name]) for name, x in given.items())

    def test_another_model(self):
        with pytest.raises(StorageError, match="differ"):
            Checkpoint(0.5, {"weight": torch.zeros(1)}).model(net())

    @pytest.mark.parametrize("content", [3, [torch.zeros(1)], {"epoch": 3}, {}])
    def test_no_weights(self, tmp_path, content):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(StorageError, match="without a state dict"):
            Checkpoint(0.5, tmp_path / "x.pt").model(net())

    def test_no_file(self, tmp_path):
        with pytest.raises(StorageError, match="no file"):
            Checkpoint(0.5, tmp_path / "x.pt").model(net())

    @pytest.mark.parametrize(
        "given",
        [{}, [], ["epoch.pt"], 3, None, {1.0: "x.pt"}, {-0.1: "x.pt"}, {"a": "b"}, {0.5: 3}],
    )
    def test_what_is_none(self, given):
        with pytest.raises(ConfigError):
            checkpoints_of(given)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ConfigError, match="no checkpoint"):
            checkpoints_of(tmp_path)
