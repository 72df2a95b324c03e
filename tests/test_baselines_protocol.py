"""What all methods have in common."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from conftest import seeded, small_net
from torch import nn

from fisher_forget.baselines import METHODS, Unlearned, Unlearner
from fisher_forget.data.split import Split, resolve_split


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_satisfies_the_protocol_with_its_defaults(self, name):
        method = METHODS[name]()
        assert isinstance(method, Unlearner)
        assert method.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.seed = 3

    def test_grid_names_fields_and_its_values_are_accepted(self, name):
        kind = METHODS[name]
        for key, values in kind.grid.items():
            assert key in {f.name for f in dataclasses.fields(kind)}
            assert len(set(values)) == len(values) >= 2
            for value in values:
                assert getattr(kind(**{key: value}), key) == value

    def test_the_file_says_where_it_comes_from(self, name):
        import sys

        text = sys.modules[METHODS[name].__module__].__doc__
        assert name in ("fisher-forget", "retrain") or "arXiv" in text or "doi" in text


def test_a_method_of_ones_own(blobs):
    @dataclasses.dataclass(frozen=True)
    class Shrink:
        name: ClassVar[str] = "shrink"
        grid: ClassVar[dict] = {"by": (0.5, 0.9)}
        by: float = 0.5
        seed: int = 0

        def unlearn(self, model: nn.Module, split: Split) -> Unlearned:
            twin = small_net()
            twin.load_state_dict(
                {key: self.by * value for key, value in model.state_dict().items()}
            )
            return Unlearned(twin.eval(), 0.0, 0.0)

    assert isinstance(Shrink(), Unlearner)
    net = seeded(small_net)
    found = Shrink().unlearn(net, resolve_split(blobs, [0])).model
    assert torch.equal(found[0].weight, 0.5 * net[0].weight)
