"""Curvatures add up over samples, can be taken away again, and survive the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import prepared
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fisher_forget import CurvatureError, StorageError, estimate_curvature
from fisher_forget.curvature import load_curvature, merged, save_curvature, with_prior, without
from fisher_forget.curvature.kinds import RANDOM
from fisher_forget.curvature.operator import Curvature
from fisher_forget.data.split import resolve_split
from fisher_forget.params import flatten, randn_like

SUMS = ["diagonal", "dense", "ekfac", {"head*": "ekfac", "*": "diagonal"}]


def same(a: Curvature, b: Curvature, tolerance: float = 1e-9) -> bool:
    v = randn_like(a.diagonal(), torch.Generator().manual_seed(0))
    x, y = (flatten(c.damped(0.1).power(v, -0.5)) for c in (a, b))
    return float((x - y).norm() / y.norm()) < tolerance


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", SUMS, ids=str)
@pytest.mark.parametrize("name", ["residual", "sequence"])
def test_parts_add_up_and_can_be_taken_away(name: str, structure: object, kind: str) -> None:
    if name == "sequence" and isinstance(structure, dict):
        structure = {"mlp*": "ekfac", "*": "diagonal"}
    model, data = prepared(name)
    split = resolve_split(
        data, [0, 2]
    )  # in the sequence model these have different numbers of scored positions
    whole = estimate_curvature(model, split, structure=structure, kind=kind, part="all")
    basis = whole if structure != "diagonal" and structure != "dense" else None
    parts = {
        part: estimate_curvature(
            model, split, structure=structure, kind=kind, part=part, basis=basis
        )
        for part in ("retain", "forget")
    }
    assert same(merged(parts["retain"], parts["forget"]), whole)
    assert same(without(whole, parts["forget"]), parts["retain"])
    assert without(whole, parts["forget"]).info == parts["retain"].info


class Walked(Dataset):
    """A data set whose samples have no place in memory: read by worker processes, too."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(x[index] for x in self.tensors)


class TestRandomKinds:
    """What a part takes away is what the whole holds: columns belong to samples."""

    @pytest.mark.parametrize("structure", SUMS, ids=str)
    @pytest.mark.parametrize("kind", RANDOM)
    @pytest.mark.parametrize("name", ["residual", "sequence"])
    def test_a_downdate_is_exact(self, name: str, kind: str, structure: object) -> None:
        if name == "sequence" and isinstance(structure, dict):
            structure = {"mlp*": "ekfac", "*": "diagonal"}
        model, data = prepared(name)
        options = {"structure": structure, "kind": kind, "draws": 2, "seed": 5}
        split = resolve_split(DataLoader(data, batch_size=3), [0, 2])
        whole = estimate_curvature(model, split, part="all", memory=1, **options)
        if structure != "diagonal" and structure != "dense":
            options["basis"] = whole
        split = resolve_split(DataLoader(data, batch_size=2), [0, 2])
        retain, forget = (
            estimate_curvature(model, split, part=part, **options) for part in ("retain", "forget")
        )
        assert same(without(whole, forget), retain)
        assert same(merged(forget, retain), whole)
        assert without(whole, forget).info == retain.info

    @pytest.mark.parametrize("structure", ["diagonal", "ekfac", "dense"])
    @pytest.mark.parametrize("kind", RANDOM)
    def test_after_nine_samples_of_ten(self, kind: str, structure: str) -> None:
        """In float32, read by two workers and in other batches: no eigenvalue below rounding."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 6, generator=generator)
        y = torch.randint(0, 3, (200,), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
            )
        order = torch.randperm(200, generator=generator).tolist()
        options = {"structure": structure, "kind": kind}
        whole = estimate_curvature(model, TensorDataset(x, y), **options)
        if structure == "ekfac":
            options["basis"] = whole
        walked = Walked(x, y)
        parts = [
            estimate_curvature(model, loader, **options)
            for loader in (
                DataLoader(Subset(walked, order[:180]), batch_size=7, num_workers=2),
                Subset(TensorDataset(x, y), order[180:]),
            )
        ]
        left = without(whole, parts[0])
        eigenvalues = torch.cat([s.flatten() for s in held(left)])
        assert float(eigenvalues.min()) > -1e-5 * float(eigenvalues.max())
        assert same(left, parts[1], 1e-4)

    def test_columns_drawn_otherwise_are_refused(self) -> None:
        model, data = prepared("residual")
        split = resolve_split(data, [0, 1])
        options = {"structure": "diagonal", "kind": "sketch"}
        whole = estimate_curvature(model, split, part="all", **options)
        for change in ({"seed": 1}, {"draws": 2}):
            part = estimate_curvature(model, split, part="forget", **options, **change)
            with pytest.raises(CurvatureError, match="same seed and draws"):
                without(whole, part)
            both = merged(whole, part)  # of other machines: as good as of one
            with pytest.raises(CurvatureError, match="same seed and draws"):
                without(both, part)


def held(curvature: Curvature) -> list[torch.Tensor]:
    """Eigenvalues as they are held, rounding and all."""
    blocks = getattr(curvature, "parts", ((None, curvature),))
    return [s for _, block in blocks for s in block.eigenvalues.values()]


def test_refusals() -> None:
    model, data = prepared("residual")
    split = resolve_split(data, [0, 1])
    diagonal = estimate_curvature(model, split, structure="diagonal")
    ekfac = estimate_curvature(model, split)
    other = estimate_curvature(model, split, part="forget")
    with pytest.raises(CurvatureError, match="same kind and structure"):
        merged(diagonal, ekfac)
    with pytest.raises(CurvatureError, match="basis=first"):
        merged(ekfac, other)
    with pytest.raises(CurvatureError, match="undamped"):
        merged(diagonal.damped(0.1), diagonal)
    with pytest.raises(CurvatureError, match="proper part"):
        without(diagonal, diagonal)
    low = estimate_curvature(model, split, structure="low_rank", rank=3)
    with pytest.raises(CurvatureError, match="no sums over samples"):
        merged(low, low)
    with pytest.raises(CurvatureError, match="basis="):
        estimate_curvature(model, split, basis=diagonal)


class TestDisk:
    @pytest.mark.parametrize("structure", [*SUMS, "low_rank"], ids=str)
    def test_round_trip(self, structure: object, tmp_path: Path) -> None:
        model, data = prepared("residual")
        split = resolve_split(data, [0])
        curvature = estimate_curvature(model, split, structure=structure).damped(0.3)
        save_curvature(tmp_path / "c.safetensors", curvature, model, split)
        again = load_curvature(tmp_path / "c.safetensors", model, split)
        assert again.info == curvature.info
        assert same(again, curvature, 1e-13)
        assert again.logdet() == curvature.logdet()

    def test_another_model_or_other_data_are_refused(self, tmp_path: Path) -> None:
        model, data = prepared("residual")
        split = resolve_split(data, [0])
        path = tmp_path / "c.safetensors"
        save_curvature(path, estimate_curvature(model, split), model, split)
        with pytest.raises(StorageError, match="made for data"):
            load_curvature(path, model, resolve_split(data, [1]))
        with torch.no_grad():
            model.head.bias[0] += 1e-6
        with pytest.raises(StorageError, match="made for model"):
            load_curvature(path, model, split)

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        model, data = prepared("mlp")
        split = resolve_split(data, [0])
        path = tmp_path / "c.safetensors"
        save_curvature(path, estimate_curvature(model, split), model, split)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))
        with pytest.raises(StorageError, match="another checksum"):
            load_curvature(path, model, split)

    def test_matrix_free_has_nothing_to_store(self, tmp_path: Path) -> None:
        model, data = prepared("mlp")
        split = resolve_split(data, [0])
        operator = estimate_curvature(model, split, structure="matrix_free")
        with pytest.raises(CurvatureError, match="matrix-free"):
            save_curvature(tmp_path / "c.safetensors", operator, model, split)


def test_float32_sums_do_not_drift() -> None:
    """200,000 samples of a tiny model in float32, against the exact mean of the 1,000 distinct
    ones in float64. Batches added up in float32 would be 13e-6 off, the trace 4e-6."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(1000, 3, generator=generator),
        torch.randint(0, 3, (1000,), generator=generator),
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3).eval()
    data = torch.utils.data.TensorDataset(x, y)
    split = resolve_split(torch.utils.data.DataLoader(data, batch_size=50), [], allow_empty=True)
    repeated = np.tile(np.arange(1000), 200)
    exact = flatten(estimate_curvature(model.double(), split, structure="diagonal").diagonal())
    model.float()
    for structure in ("diagonal", "ekfac"):
        found = estimate_curvature(model, split, structure=structure, part=repeated)
        assert found.info.count == 200_000
        assert found.trace() == pytest.approx(float(exact.sum()), rel=1e-6)
        if structure == "diagonal":
            assert torch.allclose(flatten(found.diagonal()).double(), exact, rtol=3e-6)


class TestPrior:
    def precision(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            n: torch.rand(p.shape, generator=generator, dtype=p.dtype)
            for n, p in model.named_parameters()
        }

    @pytest.mark.parametrize("structure", ["diagonal", "dense"])
    def test_adds_to_the_diagonal_exactly(self, structure: str) -> None:
        model, data = prepared("residual")
        curvature = estimate_curvature(model, data, structure=structure).damped(0.2)
        precision = self.precision(model)
        found = with_prior(curvature, precision)
        v = randn_like(curvature.diagonal(), torch.Generator().manual_seed(1))
        expected = flatten(curvature.power(v, 1.0)) + flatten(precision) * flatten(v)
        assert torch.allclose(flatten(found.power(v, 1.0)), expected, rtol=1e-9, atol=1e-12)

    def test_decay_on_some_layers_of_an_ekfac(self) -> None:
        model, data = prepared("residual")
        curvature = estimate_curvature(model, data)
        found = with_prior(
            curvature, {"head.weight": 0.3, "head.bias": 0.3, "norm.weight": torch.full((4,), 0.1)}
        )
        difference = {n: d - curvature.diagonal()[n] for n, d in found.diagonal().items()}
        for name, value in difference.items():
            expected = {"head.weight": 0.3, "head.bias": 0.3, "norm.weight": 0.1}.get(name, 0.0)
            assert torch.allclose(value, torch.full_like(value, expected), atol=1e-12)

    def test_equal_precisions_are_weight_decay(self) -> None:
        model, data = prepared("mlp")
        for structure in ("diagonal", "dense", "ekfac"):
            curvature = estimate_curvature(model, data, structure=structure)
            assert same(
                with_prior(curvature, dict.fromkeys(curvature.diagonal(), 0.7)),
                curvature.damped(0.7),
            )

    def test_refusals(self) -> None:
        model, data = prepared("mlp")
        curvature = estimate_curvature(model, data)
        with pytest.raises(CurvatureError, match="differ within"):
            with_prior(curvature, {"0.weight": 0.3})
        with pytest.raises(CurvatureError, match="nope"):
            with_prior(curvature, {"nope": 0.3})
        with pytest.raises(CurvatureError, match="negative"):
            with_prior(curvature, {"0.weight": -0.3})
