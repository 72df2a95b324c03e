"""A thousand damaged files and wrong values: an exception of the package, or what was there before;
nothing raw, nothing silent.

Everything comes from fixed seeds, so that a failure is found again.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import blobs_data, seeded, small_net
from torch.utils.data import TensorDataset

from fisher_forget import SISA, ForgetOptions, Ledger, forget, prepare
from fisher_forget.curvature import load_curvature, save_curvature
from fisher_forget.errors import FisherForgetError
from fisher_forget.experiments.config_file import load_config
from fisher_forget.ledger.owner import LOCK, OWNER, SAVING
from fisher_forget.unlearn.prepare import Prepared

DATA = blobs_data(60)
FREE = {LOCK, OWNER, SAVING}  # say nothing that anything depends on
CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
QUIET = {"weight_decay": 0.01, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files come to harm."""
    if not content:
        return b"x"
    at = rng.randrange(len(content))
    how = rng.randrange(6)
    if how == 0:  # a bit
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if how == 1:  # cut off
        return content[:at]
    if how == 2:  # a hole
        return content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :]
    if how == 3:  # twice
        return content[:at] + content[at // 2 : at] + content[at:]
    if how == 4:  # a byte less
        return content[:at] + content[at + 1 :]
    return content + bytes(rng.randrange(1, 9))  # more


def test_the_folder_of_a_prepared_model(tmp_path: Path) -> None:
    model, rng = seeded(small_net), random.Random(0)

    def opened(folder: Path) -> Prepared:
        return prepare(model, DATA, folder=folder, structure="diagonal", **QUIET)

    whole = tmp_path / "whole"
    first = opened(whole)
    first.forget([3, 8], steps=1, damping=1.0)
    names = sorted(p.name for p in whole.iterdir() if p.name not in FREE)
    for trial in range(160):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        path = folder / rng.choice(names)
        before = path.read_bytes()
        after = damaged(before, rng) if trial % 8 else b""
        path.write_bytes(after) if trial % 16 else path.unlink()
        try:
            found = opened(folder)
        except FisherForgetError:
            continue
        finally:
            shutil.rmtree(folder)
        assert found.requests == [[3, 8]], (trial, path.name)
        for name, value in first.made.sums.total.sums.items():
            assert torch.equal(found.made.sums.total.sums[name], value), (trial, path.name)


def test_the_folder_of_sisa(tmp_path: Path) -> None:
    def fit(model: Any, data: TensorDataset, indices: Any, seed: int) -> Any:
        with torch.no_grad():
            for p in model.parameters():
                p += float(indices.sum()) / 1000
        return model

    def opened(folder: Path) -> SISA:
        sisa = SISA(lambda: seeded(small_net), fit, shards=2, slices=2, folder=folder)
        sisa.fit(DATA)
        return sisa

    def bits(sisa: SISA) -> list[bytes]:
        return [p.detach().numpy().tobytes() for m in sisa.module().members for p in m.parameters()]

    whole, rng = tmp_path / "whole", random.Random(1)
    first = opened(whole)
    first.forget([5])
    names = sorted(p.name for p in whole.iterdir() if p.name not in FREE)
    for trial in range(160):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        path = folder / rng.choice(names)
        path.write_bytes(damaged(path.read_bytes(), rng)) if trial % 16 else path.unlink()
        try:
            found = opened(folder)
            same = bits(found) == bits(first)  # reads the checkpoints
        except FisherForgetError:
            continue
        assert found.requests == [[5]], (trial, path.name)
        assert same, (trial, path.name)


def test_a_stored_curvature(tmp_path: Path) -> None:
    from fisher_forget import estimate_curvature, resolve_split

    model, split, rng = seeded(small_net), resolve_split(DATA, [1]), random.Random(2)
    curvature = estimate_curvature(model, split, structure="ekfac")
    path = tmp_path / "c.safetensors"
    save_curvature(path, curvature, model, split)
    content, diagonal = path.read_bytes(), curvature.diagonal()
    for trial in range(200):
        path.write_bytes(damaged(content, rng))
        try:
            found = load_curvature(path, model, split)
        except FisherForgetError:
            continue
        assert all(torch.equal(found.diagonal()[n], v) for n, v in diagonal.items()), trial


def test_a_ledger(tmp_path: Path) -> None:
    rng = random.Random(3)
    ledger = Ledger(tmp_path / "whole")
    for sample in range(3):
        with ledger.request([sample], who=f"ticket {sample}"):
            pass
    states = {n: (r.state, r.samples) for n, r in ledger.requests.items()}
    for trial in range(150):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / rng.choice(("ledger.jsonl", "ledger.head", "ledger.salt"))
        path.write_bytes(damaged(path.read_bytes(), rng))
        try:
            found = Ledger(folder)
            found.hashed([1])
        except FisherForgetError:
            continue
        assert {n: (r.state, r.samples) for n, r in found.requests.items()} == states, trial


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_recipes(path: Path, tmp_path: Path) -> None:
    """Read, or refused by name; what is read is what it says."""
    content, rng = path.read_bytes(), random.Random(path.stem)
    words = [b"null", b"-1", b"1e999", b"[]", b"{}", b"'", b"\xff", b"yes", b"&a", b"*a", b"\t"]
    for _ in range(30):
        changed = damaged(content, rng)
        if rng.random() < 0.5:
            lines = content.split(b"\n")
            at = rng.randrange(len(lines))
            key, colon, _ = lines[at].partition(b":")
            lines[at] = key + colon + b" " + rng.choice(words)
            changed = b"\n".join(lines)
        (tmp_path / "c.yaml").write_bytes(changed)
        try:
            load_config(tmp_path / "c.yaml")
        except FisherForgetError:
            continue


VALUES: tuple[Any, ...] = (
    None, -1, 0, 1, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "auto", "no such",
    True, [], {}, (), [1, "a"], {"a": 1}, b"x", object(), torch.ones(2), lambda: 1, 10**30,
)  # fmt: skip


def test_options() -> None:
    rng = random.Random(4)
    names = sorted(ForgetOptions.__dataclass_fields__)
    for name in names:
        for value in VALUES:
            try:
                ForgetOptions(**{name: value})
            except FisherForgetError:
                continue
    model = seeded(small_net)
    for _ in range(40):
        options = {rng.choice(names): rng.choice(VALUES) for _ in range(2)}
        try:
            result = forget(model, DATA, [1], progress=False, **options)
        except FisherForgetError:
            continue
        assert all(bool(p.isfinite().all()) for p in result.model.parameters()), options


def test_indices() -> None:
    model, rng = seeded(small_net), random.Random(5)
    for _ in range(60):
        idx = rng.choice(
            (*VALUES, [rng.randrange(-70, 70) for _ in range(rng.randrange(4))], range(-3, 3))
        )
        try:
            result = forget(model, DATA, idx, steps=1, damping=1.0, noise=None, **QUIET)
        except FisherForgetError:
            continue
        assert 1 <= len(result.split.forget) < len(DATA)
