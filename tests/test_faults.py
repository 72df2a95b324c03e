"""Faults that are put into training data on purpose, and what the test samples show of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fisher_forget import ConfigError, DataError, load_dataset
from fisher_forget.data.samples import samples
from fisher_forget.experiments.cases import parts
from fisher_forget.experiments.config import DataSettings, ForgetSet, RunConfig, to_plain
from fisher_forget.experiments.config_file import load_config
from fisher_forget.experiments.datasets import DataBundle
from fisher_forget.experiments.faults import Fault
from fisher_forget.experiments.forget_sets import choose
from fisher_forget.experiments.tuning import Judge

KINDS = (Fault("trigger", 0.1), Fault("swap", 0.4), Fault("labels", 0.1))


@pytest.fixture(scope="module")
def clean() -> DataBundle:
    return load_dataset("digits")


def changed(before: TensorDataset, after: TensorDataset) -> list[int]:
    """Samples whose input or label is another one."""
    (x, y), (u, v) = before.tensors, after.tensors
    return (((x != u).flatten(1).any(1)) | (y != v)).nonzero()[:, 0].tolist()


class TestPut:
    @pytest.mark.parametrize("fault", KINDS, ids=lambda fault: fault.kind)
    def test_the_samples_named_are_those_that_changed(
        self, clean: DataBundle, fault: Fault
    ) -> None:
        kept = clean.train.tensors[0].clone(), clean.train.tensors[1].clone()
        bad = clean.with_fault(fault)
        assert bad.injected is not None
        assert changed(clean.train, bad.train) == bad.injected.samples.tolist()
        assert all(map(torch.equal, kept, clean.train.tensors))
        again, other = clean.with_fault(fault), clean.with_fault(replace(fault, seed=1))
        assert all(map(torch.equal, bad.train.tensors, again.train.tensors))
        assert changed(clean.train, other.train) != changed(clean.train, bad.train)

    def test_the_trigger_is_a_bright_corner_and_one_label(self, clean: DataBundle) -> None:
        bad = clean.with_fault(Fault("trigger", 0.1, label=7, size=2))
        assert bad.injected is not None
        rows = bad.injected.samples
        x, y = bad.train.tensors
        before = clean.train.tensors[0]
        assert len(rows) == int(0.1 * len(y))
        assert set(y[rows].tolist()) == {7}
        assert 7 not in clean.train.tensors[1][rows].tolist()
        assert bool((x[rows][:, 0, 6:, 6:] == before.max()).all())
        assert torch.equal(x[rows][:, 0, :6], before[rows][:, 0, :6])

    def test_swapped_labels_are_those_of_the_other_class(self, clean: DataBundle) -> None:
        bad = clean.with_fault(Fault("swap", 0.4, classes=(2, 9)))
        assert bad.injected is not None
        rows, y, true = bad.injected.samples, bad.train.tensors[1], clean.train.tensors[1]
        assert torch.equal(bad.train.tensors[0], clean.train.tensors[0])
        assert {(a, b) for a, b in zip(true[rows].tolist(), y[rows].tolist(), strict=True)} == {
            (2, 9),
            (9, 2),
        }
        assert len(rows) == int(0.4 * int(((true == 2) | (true == 9)).sum()))

    def test_random_labels_are_uniform_over_the_others(self) -> None:
        y = torch.zeros(40_000, dtype=torch.long)
        data, found = Fault("labels", 0.9).put(TensorDataset(torch.zeros(len(y), 1), y), 10)
        counts = np.bincount(data.tensors[1][found.samples], minlength=10)
        expected = len(found.samples) / 9
        # chi-squared with 8 degrees of freedom is above 26.1 once in 1,000 times; the seed is fixed
        assert counts[0] == 0
        assert ((counts[1:] - expected) ** 2 / expected).sum() < 26.1

    def test_named_inputs_can_be_mislabelled_and_have_no_corner(self) -> None:
        words = samples({"ids": torch.ones(20, 4)}, torch.arange(20) % 2)
        data, found = Fault("swap", 0.5, classes=(0, 1)).put(words, 2)
        assert len(found.samples) == 10
        assert isinstance(data[0][0], dict)
        with pytest.raises(DataError, match="named inputs"):
            Fault("trigger", 0.5).put(words, 2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"share": 0.0}, "share"),
            ({"share": 1.0}, "share"),
            ({"share": float("nan")}, "share"),
            ({"size": 0}, "size"),
            ({"seed": -1}, "seed"),
            ({"classes": (3, 3)}, "classes"),
            ({"classes": (3,)}, "classes"),
        ],
    )
    def test_what_no_data_could_have(self, wrong: dict[str, Any], says: str) -> None:
        values: dict[str, Any] = {"kind": "swap", "share": 0.1} | wrong
        with pytest.raises(ConfigError, match=says):
            Fault(**values)

    @pytest.mark.parametrize(
        ("fault", "error", "says"),
        [
            (Fault("trigger", 0.1, size=9), DataError, "no larger than the image"),
            (Fault("trigger", 0.1, label=10), ConfigError, "class 10"),
            (Fault("trigger", 0.95), ConfigError, "1 to 1,295 samples"),
            (Fault("swap", 0.1, classes=(3, 12)), ConfigError, "class 12"),
            (Fault("labels", 1e-5), ConfigError, "0 of 1,437"),
        ],
    )
    def test_what_these_data_cannot_have(
        self, clean: DataBundle, fault: Fault, error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=says):
            clean.with_fault(fault)

    def test_regression_and_rows_without_a_corner(self) -> None:
        with pytest.raises(DataError, match="without classes"):
            load_dataset("diabetes").with_fault(Fault("labels", 0.1))
        with pytest.raises(DataError, match="height"):
            load_dataset("breast_cancer").with_fault(Fault("trigger", 0.1))


class TestInjected:
    def test_the_known_part(self, clean: DataBundle) -> None:
        injected = clean.with_fault(KINDS[0]).injected
        assert injected is not None
        few, all_of = injected.known(0.1), injected.known(1.0)
        assert len(few) == round(0.1 * len(all_of))
        assert set(few) < set(injected.samples)
        assert np.array_equal(all_of, injected.samples)
        assert not np.array_equal(few, injected.known(0.1, seed=1))
        assert len(injected.known(1e-9)) == 1
        for gamma in (0.0, 1.1, float("nan")):
            with pytest.raises(ConfigError, match="gamma"):
                injected.known(gamma)

    def test_test_samples_keep_their_true_labels(self, clean: DataBundle) -> None:
        x, y = clean.test.tensors
        trigger, swap, labels = (clean.with_fault(fault).injected for fault in KINDS)
        assert trigger is not None
        assert swap is not None
        assert labels is not None
        images, true = trigger.affected(clean.test).tensors
        assert torch.equal(true, y[y != 0])
        assert bool((images[..., -3:, -3:] == clean.train.tensors[0].max()).all())
        assert torch.equal(images[..., :-3], x[y != 0][..., :-3])
        assert set(swap.affected(clean.test).tensors[1].tolist()) == {3, 5}
        assert len(labels.affected(clean.test)) == len(y)
        with pytest.raises(DataError, match="no test sample"):
            trigger.affected(TensorDataset(x[y == 0], y[y == 0]))


class TestRecipes:
    def test_a_recipe_puts_it_in_and_forgets_what_is_known(self, tmp_path: Any) -> None:
        path = tmp_path / "poison.yaml"
        path.write_text(
            "name: poison\n"
            "data: {name: digits, fault: {kind: swap, share: 0.3, classes: [3, 5]}}\n"
            "forget_sets: [{name: half, kind: fault, gamma: 0.5}]\n"
        )
        config = load_config(path)
        data = config.data.load()
        assert data.injected is not None
        forget = choose(config.forget_sets[0], data, memorised=NotImplemented)
        assert set(forget) < set(data.injected.samples)
        assert to_plain(config)["data"]["fault"]["classes"] == [3, 5]
        assert set(parts(data, forget)["test, faulty"].tensors[1].tolist()) == {3, 5}

    def test_a_fault_is_needed_and_so_is_gamma(self, clean: DataBundle) -> None:
        for data, gamma, says in (
            (clean, 0.5, "without a fault"),
            (clean.with_fault(KINDS[0]), None, "without gamma"),
        ):
            with pytest.raises(ConfigError, match=says):
                choose(ForgetSet("x", "fault", gamma=gamma), data, memorised=NotImplemented)

    def test_no_fault_is_no_part(self) -> None:
        config = RunConfig("x", [ForgetSet("some", "random", count=3)], DataSettings("digits"))
        assert "test, faulty" not in parts(config.data.load(), np.arange(3))

    def test_settings_are_judged_by_the_wrong_labels_that_are_left(self, clean: DataBundle) -> None:
        zero = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        with torch.no_grad():
            zero[1].weight.zero_()
            zero[1].bias.copy_(torch.eye(10)[0])
        data = clean.with_fault(KINDS[0])
        forget = choose(ForgetSet("x", "fault", gamma=0.5), data, memorised=NotImplemented)
        judge = Judge.of(zero, data, forget, ForgetSet("x", "fault", gamma=0.5), clean.test)
        assert judge(zero).memory == 100
