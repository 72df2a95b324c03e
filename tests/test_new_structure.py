"""A new structure is one file: an operator, what accumulates it, and a spec in the registry.

The scaled identity (tr B / d) I stands for it. This file has all that it needs; everything else is
the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import oracle
import pytest
import torch
from laws import DRAWS, SEED, obeys, truth
from small_models import prepared
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fisher_forget import CurvatureError, estimate_curvature
from fisher_forget.curvature import (
    Curvature,
    load_curvature,
    merged,
    save_curvature,
    support_table,
    with_prior,
    without,
)
from fisher_forget.curvature import cost as costs
from fisher_forget.curvature.checks import check_undamped, checked_damping
from fisher_forget.curvature.operator import BlockDiagonal, Stored, not_sums
from fisher_forget.curvature.passes import Accumulator, Walk
from fisher_forget.curvature.record import Record
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.data.split import resolve_split
from fisher_forget.params import Params, flatten, map_params, scale, size, zeros_like


@dataclass(frozen=True, kw_only=True)
class ScaledIdentity(Curvature):
    """factor I."""

    factor: float
    like: Params
    tau: float = 0.0
    stored_as: ClassVar[str] = "identity"

    def power(self, v: Mapping[str, Tensor], p: float) -> Params:
        return scale({name: v[name] for name in self.like}, (self.factor + self.tau) ** p)

    def damped(self, tau: float) -> Self:
        return replace(self, tau=self.tau + checked_damping(tau))

    def diagonal(self) -> Params:
        return map_params(lambda x: torch.full_like(x, self.factor + self.tau), self.like)

    def trace(self) -> float:
        return size(self.like) * (self.factor + self.tau)

    def logdet(self) -> float:
        return size(self.like) * math.log(self.factor + self.tau)

    def combined(self, other: Curvature, x: float, y: float) -> Curvature:
        check_undamped(self.tau, other.tau)
        if not isinstance(other, ScaledIdentity):
            raise not_sums(self, other)
        return replace(self, factor=x * self.factor + y * other.factor)

    def pack(self) -> Stored:
        settings = {"factor": self.factor, "tau": self.tau}
        return Stored(self.stored_as, settings).with_params("like", self.like, "like")

    @classmethod
    def unpack(cls, stored: Stored, parts: Sequence[Curvature], model: nn.Module) -> Curvature:
        settings: dict[str, Any] = {key: stored.settings[key] for key in ("factor", "tau")}
        return cls(like=stored.params("like", "like"), **settings)


class IdentitySum(Accumulator):
    """Sum of squares of all per-sample gradients."""

    def __init__(self, like: Params) -> None:
        self.like, self.sum = like, 0.0

    def add(
        self, record: Record, column: Tensor, grads: Sequence[Tensor | None], last: bool
    ) -> None:
        self.sum += float(record.squared_norms(column, grads).sum())

    def result(self, count: float) -> ScaledIdentity:
        return ScaledIdentity(factor=self.sum / count / size(self.like), like=self.like)


def estimated(walk: Walk) -> tuple[Curvature, float]:
    return walk.estimate(IdentitySum(walk.like()))


def predicted(walk: Walk) -> costs.CostEstimate:
    return costs.of_columns(walk, lambda: IdentitySum(walk.like()))


REASON = "The trace of a Hessian may be negative; use kind='exact'."
IDENTITY = StructureSpec(
    "identity",
    (ScaledIdentity,),
    estimated,
    predicted,
    refused={"hessian": REASON},
    additive=True,
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRUCTURES, "identity", IDENTITY)


def identity(model: nn.Module, data: Any, **options: Any) -> ScaledIdentity:
    found = estimate_curvature(model, data, structure="identity", **options)
    assert isinstance(found, ScaledIdentity)
    return found


@pytest.mark.parametrize("kind", ["exact", "sketch", "sampled", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "residual", "sequence"])
def test_it_obeys_the_laws_of_every_curvature(name: str, kind: Any) -> None:
    model, data = prepared(name)
    matrix = truth(model, data, kind)
    found = identity(model, data, kind=kind, draws=DRAWS, seed=SEED)
    assert found.info is not None
    assert (found.info.kind, found.info.structure) == (kind, "identity")
    damped = (float(matrix.trace()) / len(matrix) + 0.03) * torch.eye(len(matrix))
    obeys(found.damped(0.03), damped.double(), oracle.start(model))


def test_neither_batch_size_nor_memory_matters() -> None:
    model, data = prepared("residual")
    factors = [
        identity(model, DataLoader(data, batch_size=size), memory=memory, kind="sketch").factor
        for size, memory in ((64, None), (2, None), (3, 1))
    ]
    assert factors == pytest.approx([factors[0]] * 3, rel=1e-10)


def test_it_adds_up_and_takes_away() -> None:
    model, data = prepared("mlp")
    split = resolve_split(data, [0, 3, 4])
    whole, retained, forgotten = (
        identity(model, split, part=part) for part in ("all", "retain", "forget")
    )
    assert merged(retained, forgotten).trace() == pytest.approx(whole.trace())
    assert without(whole, forgotten).trace() == pytest.approx(retained.trace())
    with pytest.raises(CurvatureError, match="Add first"):
        merged(retained.damped(0.1), forgotten)
    bare = replace(estimate_curvature(model, split, structure="diagonal"), info=whole.info)
    with pytest.raises(CurvatureError, match="no sums over samples"):
        merged(retained, bare)


def test_it_is_stored(tmp_path: Path) -> None:
    model, data = prepared("mlp")
    split = resolve_split(data, [], allow_empty=True)
    mix = {"0.*": "identity", "*": "ekfac"}
    for structure in ("identity", mix):
        found = estimate_curvature(model, split, structure=structure).damped(0.3)
        save_curvature(tmp_path / "c", found, model, split)
        again = load_curvature(tmp_path / "c", model, split)
        assert again.info == found.info
        assert again.tau == 0.3
        assert torch.allclose(flatten(again.diagonal()), flatten(found.diagonal()), rtol=1e-14)


def test_it_takes_a_prior_that_it_can_hold() -> None:
    model, data = prepared("mlp")
    found = identity(model, data)
    names = list(found.zeros())
    moved = with_prior(found, dict.fromkeys(names, 0.2))
    assert moved.trace() == pytest.approx(found.damped(0.2).trace())
    with pytest.raises(CurvatureError, match="differ within a ScaledIdentity"):
        with_prior(found, {names[0]: 0.2})


def test_it_is_a_block_of_a_mixture() -> None:
    model, data = prepared("mlp")
    found = estimate_curvature(model, data, structure={"0.*": "identity", "*": "dense"})
    assert isinstance(found, BlockDiagonal)
    assert [type(part).__name__ for _, part in found.parts] == ["ScaledIdentity", "Dense"]


def test_its_cost_is_predicted() -> None:
    model, data = prepared("mlp")
    forecast = estimate_curvature(model, data, structure="identity", dry_run=True)
    assert forecast.bytes_result == identity(model, data).nbytes()
    assert (forecast.samples, forecast.passes, forecast.columns) == (9, 1, 3)


def test_what_it_cannot_hold_is_refused_and_said_in_the_table() -> None:
    model, data = prepared("mlp")
    with pytest.raises(CurvatureError, match="trace of a Hessian may be negative"):
        identity(model, data, kind="hessian")
    header = support_table().splitlines()[0].split("|")[1:-1]
    assert [cell.strip() for cell in header] == ["kind", *STRUCTURES]
    assert "identity" in STRUCTURES
    assert REASON in support_table()


def test_an_unknown_one_is_refused_with_the_names() -> None:
    model, data = prepared("mlp")
    with pytest.raises(CurvatureError, match="'matrix_free', 'identity'"):
        estimate_curvature(model, data, structure="cubic")


def test_its_zero_vector_has_its_parameters() -> None:
    model, data = prepared("mlp")
    zeros, like = identity(model, data).zeros(), oracle.start(model)
    assert zeros.keys() == like.keys()
    assert torch.equal(flatten(zeros), flatten(zeros_like(like)))
