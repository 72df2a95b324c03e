from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fisher_forget._util import files
from fisher_forget._util.files import (
    ensure_folder,
    fingerprint,
    load_model,
    load_tensors,
    read_metadata,
    save_model,
    save_tensors,
    write_json,
)
from fisher_forget.errors import StorageError


@dataclasses.dataclass(frozen=True)
class Setting:
    rate: float
    sizes: tuple[int, ...] = (1, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.register_buffer("seen", torch.arange(4))

    def forward(self, x):
        return self.decode(self.encode(x))


class TestTensors:
    def test_everything_comes_back(self, tmp_path):
        base = torch.randn(4, 6)
        given = {
            "transposed": base.T,
            "shared": base,
            "slice": base[:, ::2],
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 2),
            "half": base.bfloat16(),
            "mask": base > 0,
            "leaf": nn.Parameter(base.double()),
        }
        save_tensors(tmp_path / "a.safetensors", given, {"who": "ü", "n": "1"})
        found, metadata = load_tensors(tmp_path / "a.safetensors")
        assert metadata == read_metadata(tmp_path / "a.safetensors") == {"who": "ü", "n": "1"}
        assert found.keys() == given.keys()
        for name, value in given.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value.detach())

    def test_only_the_file_is_left(self, tmp_path):
        save_tensors(tmp_path / "a", {"x": torch.ones(2)}, {})
        save_tensors(tmp_path / "a", {"x": torch.zeros(2)}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert load_tensors(tmp_path / "a")[0]["x"].tolist() == [0, 0]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        save_tensors(tmp_path / "a", {"x": torch.ones(2)}, {})

        def cut(tensors, path, metadata):
            Path(path).write_bytes(b"half of")
            raise OSError("no space left")

        monkeypatch.setattr(files, "save_file", cut)
        with pytest.raises(StorageError, match="no space left"):
            save_tensors(tmp_path / "a", {"x": torch.zeros(2)}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert load_tensors(tmp_path / "a")[0]["x"].tolist() == [1, 1]

    @pytest.mark.parametrize("damage", ["empty", "cut", "header", "payload"])
    def test_damage_is_found_wherever_it_is(self, tmp_path, damage):
        path = tmp_path / "a"
        save_tensors(path, {"x": torch.randn(8)}, {})
        content = path.read_bytes()
        wrong = {"empty": b"", "cut": content[:-3], "header": content[:9] + b"\xff" + content[10:]}
        wrong["payload"] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        path.write_bytes(wrong[damage])
        with pytest.raises(StorageError, match="undamaged"):
            load_tensors(path)

    def test_missing_file_or_folder(self, tmp_path):
        with pytest.raises(StorageError, match="no file"):
            load_tensors(tmp_path / "a")
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="can be written"):
            save_tensors(tmp_path / "file" / "a", {"x": torch.ones(1)}, {})


class TestModel:
    def test_weights_and_buffers_come_back(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model(torch.randn(8, 3))
        save_model(tmp_path / "m", model, {"kind": "a"})
        template = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        before = {name: value.clone() for name, value in template.state_dict().items()}
        loaded = load_model(tmp_path / "m", template, {"kind": "a"})
        assert all(
            torch.equal(value, loaded.state_dict()[name])
            for name, value in model.state_dict().items()
        )
        assert all(
            torch.equal(value, template.state_dict()[name]) for name, value in before.items()
        )
        assert not loaded.training
        assert template.training

    def test_tied_weights_stay_tied(self, tmp_path):
        model = Tied()
        save_model(tmp_path / "m", model, {})
        loaded = load_model(tmp_path / "m", Tied())
        assert loaded.decode.weight is loaded.encode.weight
        assert torch.equal(loaded.decode.weight, model.decode.weight)

    @pytest.mark.parametrize(
        "other",
        [
            nn.Linear(3, 5),
            nn.Linear(3, 4, bias=False),
            nn.Linear(3, 4).double(),
            nn.Sequential(nn.Linear(3, 4)),
        ],
    )
    def test_another_model_is_refused(self, tmp_path, other):
        save_model(tmp_path / "m", nn.Linear(3, 4), {})
        with pytest.raises(StorageError, match="differ from the model's"):
            load_model(tmp_path / "m", other)

    @pytest.mark.parametrize("expect", [{"seed": "2"}, {"other": "1"}])
    def test_other_metadata_are_refused(self, tmp_path, expect):
        save_model(tmp_path / "m", nn.Linear(3, 4), {"seed": "1"})
        with pytest.raises(StorageError, match=next(iter(expect))):
            load_model(tmp_path / "m", nn.Linear(3, 4), expect)

    def test_state_that_is_no_tensor_is_refused(self, tmp_path):
        class Odd(nn.Linear):
            def get_extra_state(self):
                return {"callback": print}

        with pytest.raises(StorageError, match="_extra_state"):
            save_model(tmp_path / "m", Odd(2, 2), {})


class TestJson:
    def test_plain_values(self, tmp_path):
        given = {
            "setting": Setting(0.5),
            "bad": [math.nan, -math.inf, np.float32("nan"), torch.tensor([1.0, math.inf])],
            "numbers": [np.int64(3), np.arange(2), torch.ones(1, 2), True, None],
            3: tmp_path,
        }
        write_json(tmp_path / "a.json", given)
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
            "setting": {"rate": 0.5, "sizes": [1, 2]},
            "bad": [None, None, None, [1.0, None]],
            "numbers": [3, [0, 1], [[1.0, 1.0]], True, None],
            "3": str(tmp_path),
        }

    def test_other_objects_are_refused_and_nothing_is_written(self, tmp_path):
        with pytest.raises(StorageError, match="Linear"):
            write_json(tmp_path / "a.json", {"model": nn.Linear(1, 1)})
        assert not list(tmp_path.iterdir())


class TestFolder:
    def test_is_made_and_returned(self, tmp_path):
        assert ensure_folder(tmp_path / "a" / "b").is_dir()
        assert ensure_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"

    def test_below_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "folder"):
            with pytest.raises(StorageError, match="file"):
                ensure_folder(path)


class TestFingerprint:
    def test_is_the_same_for_the_same(self):
        def parts():
            return [
                1,
                "a",
                None,
                Setting(0.1),
                {"b": 2, "a": [1.5]},
                np.arange(3),
                torch.ones(2),
                {3, 1},
                Path("x"),
                fingerprint,
            ]

        assert fingerprint(*parts()) == fingerprint(*parts())
        assert len(fingerprint()) == 16
        int(fingerprint("x"), 16)

    def test_frozen_value(self):
        # stored files are found by it: a change here means that every cache is trained anew
        assert fingerprint("digits", 3, {"lr": 0.1}) == "9f8838ae24db4313"

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("ab", "c"), ("a", "bc")),
            ((1,), (1.0,)),
            ((1,), ("1",)),
            ((True,), (1,)),
            (([1, 2], 3), ([1], 2, 3)),
            ((Setting(0.1),), (Setting(0.2),)),
            (({"a": 1},), ({"a": 2},)),
            ((torch.zeros(2, 3),), (torch.zeros(3, 2),)),
            ((torch.zeros(2),), (torch.zeros(2, dtype=torch.float64),)),
            ((np.zeros(2),), (np.array([0.0, 1e-300]),)),
            ((torch.tensor([0.0, 1.0]).bfloat16(),), (torch.tensor([0.0, 1.01]).bfloat16(),)),
            ((nn.ReLU,), (nn.Tanh,)),
        ],
    )
    def test_tells_apart(self, one, other):
        assert fingerprint(*one) != fingerprint(*other)

    def test_order_of_a_mapping_and_layout_do_not_matter(self):
        assert fingerprint({"a": 1, "b": 2}) == fingerprint(OrderedDict(b=2, a=1))
        assert fingerprint((1, 2)) == fingerprint([1, 2])
        x = torch.randn(3, 4)
        assert fingerprint(x.T) == fingerprint(x.T.contiguous())
        assert fingerprint(np.float64(0.5)) == fingerprint(0.5)

    def test_a_model_is_its_weights(self):
        model = nn.Linear(2, 2)
        before = fingerprint(model)
        assert before == fingerprint(model)
        with torch.no_grad():
            model.bias[0] += 1
        assert fingerprint(model) != before

    def test_what_differs_in_every_run_is_refused(self):
        for part in (object(), lambda x: x, {"key": [object()]}):
            with pytest.raises(StorageError, match="differs in every run"):
                fingerprint(part)


WRITERS = """
import resource, signal, sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch

from fisher_forget._util import files
from fisher_forget.errors import StorageError
from fisher_forget.experiments.config import ForgetSet, RunConfig
from fisher_forget.experiments.config_file import write_config
from fisher_forget.report.pages.html import write_html
from fisher_forget.report.plots.style import save_figure

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
config = RunConfig("a", [ForgetSet("b", "indices", indices=list(range(2000)))])
figure, frame = plt.figure(), pd.DataFrame({"a": range(9999)})
figure.add_subplot().plot([1, 2])
writers = {
    "a.json": lambda path: files.write_json(path, list(range(9999))),
    "a.md": lambda path: files.write_text(path, "word " * 9999),
    "a.html": lambda path: write_html(path, "word " * 9999),
    "a.png": lambda path: save_figure(figure, path.with_suffix("")),
    "a.svg": lambda path: save_figure(figure, path.with_suffix("")),
    "a.yaml": lambda path: write_config(path, config),
    "a.parquet": lambda path: files.write_file(path, frame.to_parquet),
    "a.safetensors": lambda path: files.save_tensors(path, {"a": torch.zeros(9999)}, {}),
}
# a file beyond the limit cannot grow, as on a disk that is full
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for kind, old in (("new", None), ("old", b"what was there")):
    for name, write in writers.items():
        place = folder / kind / name.replace(".", "-")
        place.mkdir(parents=True)
        if old is not None:
            (place / name).write_bytes(old)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(place / name)
            raise SystemExit(f"{name} was written")
        except StorageError:
            pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("limit", [0, 100])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", WRITERS, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    left = [path for path in (tmp_path / "old").rglob("*") if path.is_file()]
    assert len(left) == 8
    assert {path.read_bytes() for path in left} == {b"what was there"}
