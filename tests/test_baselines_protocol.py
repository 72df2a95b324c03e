"""What all methods have in common."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from conftest import seeded, small_net
from torch import nn

from fisher_forget.baselines import METHODS, SgdMethod, Unlearned, Unlearner
from fisher_forget.baselines.protocol import Range, settings_of
from fisher_forget.data.split import Split, resolve_split
from fisher_forget.errors import ConfigError


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
            ends = (values.low, values.high) if isinstance(values, Range) else values
            assert len(set(ends)) == len(ends) >= 2
            for value in ends:
                assert getattr(kind(**{key: value}), key) == value

    def test_the_file_says_where_it_comes_from(self, name):
        import sys

        text = sys.modules[METHODS[name].__module__].__doc__
        assert name in ("fisher-forget", "retrain") or "arXiv" in text or "doi" in text

    def test_its_settings_are_those_that_it_takes(self, name):
        kind = METHODS[name]
        settings = settings_of(kind)
        assert {"seed", *kind.grid} <= settings.keys()
        assert kind(**settings) == kind()


class TestRange:
    def test_holds_its_ends_and_what_lies_between(self):
        for value, inside in ((0.1, True), (1.0, True), (2, True), (10.0, True), (0.09, False)):
            assert (value in Range(0.1, 10.0)) is inside
        assert 2.5 not in Range(1, 3, whole=True)
        assert "much" not in Range(1, 3)

    @pytest.mark.parametrize(
        ("ends", "options"),
        [
            ((1.0, 1.0), {}),
            ((2.0, 1.0), {}),
            ((0.0, 1.0), {}),
            ((-1.0, 1.0), {}),
            ((math.nan, 1.0), {}),
            ((1.0, math.inf), {}),
            (("a", "b"), {}),
            ((0.5, 2.0), {"whole": True}),
        ],
    )
    def test_ends_that_make_no_range_are_refused(self, ends, options):
        with pytest.raises(ConfigError, match="Correct its ends"):
            Range(*ends, **options)

    def test_zero_may_be_an_end_without_log(self):
        assert 0 in Range(0, 1, log=False)

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            (Range(1e-5, 0.1), "1e-05 to 0.1"),
            (Range(1, 10, whole=True), "whole, 1 to 10"),
            (Range(0.1, 1.0, log=False), "0.1 to 1, linear"),
        ],
    )
    def test_reads_as_people_write_it(self, values, text):
        assert str(values) == text


def test_no_settings_of_a_class_that_says_none():
    assert settings_of(object) == {}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("ssd", "alpha", "much"), ("finetune", "lr", True), ("scrub", "gamma", math.nan)],
)
def test_what_is_no_number_is_refused_with_the_name_of_the_method(name, setting, value):
    with pytest.raises(ConfigError, match=f"{setting}={value!r}.*{name!r}"):
        METHODS[name](**{setting: value})


def test_a_method_that_trains_is_what_it_trains_on(blobs):
    """Two losses in turn, each by its own step of SGD."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Turns(SgdMethod):
        name = "turns"
        grid: ClassVar[dict] = {}

        def losses(self, training):
            down = training.over(training.split.retain, training.mean_loss)
            up = training.over(training.split.forget, lambda m, b: -training.mean_loss(m, b))
            return lambda number, rng: [*down(number, rng), *up(number, rng)]

    net, split = seeded(small_net), resolve_split(blobs, [0, 5])
    done = Turns(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=100).unlearn(
        net, split
    )
    x, y = blobs.tensors
    twin = seeded(small_net)
    for rows, sign in ((split.retain, 1), (split.forget, -1)):
        loss = sign * nn.functional.cross_entropy(twin(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), gradients, strict=True):
                p -= 0.1 * g
    for p, q in zip(done.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert done.passes == 60 / 58
    assert Turns().prepare(net, split) == (Turns(), net)
    assert Turns().template(net) is net


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
