"""The example and the benchmark of unfair models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import bias as measured
from examples.bias import painted
from fisher_forget._util.files import read_json
from fisher_forget.experiments.config_file import load_config


def test_the_recipe_names_the_samples_that_are_suggested():
    """Nine in ten of them, wherever it runs."""
    config = load_config(painted.RECIPE, allow_code=True)
    chosen = config.forget_sets[1].indices
    assert len(chosen) == painted.COUNT == config.forget_sets[0].count
    assert len(np.intersect1d(chosen, painted.suggested())) > 0.9 * len(chosen)


def test_a_share_of_the_training_digits_is_painted_by_class():
    """Of 1,437 digits .6 and half of the others; the bounds have a false-alarm rate below .1 %."""
    fit, held_out, test = painted.painted(0.6, seed=0)
    by_class = [
        float((part.tensors[0][:, 1].flatten(1).any(1) == part.tensors[1].bool()).double().mean())
        for part in (fit, held_out, test)
    ]
    assert by_class[0] == pytest.approx(0.8, abs=0.04)
    assert by_class[1] == pytest.approx(0.5, abs=0.13)
    assert by_class[2] == 0
    images = test.tensors[0]
    assert images.shape[1:] == (3, 8, 8)
    assert not images[:, 2].any(), "no blue"
    assert not (images[:, 0].flatten(1).any(1) & images[:, 1].flatten(1).any(1)).any()


def test_the_parts_of_the_benchmark_have_no_sample_in_common():
    world = measured.painted(0.6, seed=0)
    sizes = [len(part) for part in (world.train, world.held_out, world.test)]
    assert sizes == [898, 449, 450]
    assert len(world.held_out_groups) == 449
    assert sorted(np.concatenate(measured.parts(100, 3))) == list(range(100))
    assert torch.equal(world.train.tensors[1], world.mended.tensors[1])
    changed = (world.train.tensors[0] != world.mended.tensors[0]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == world.bad.tolist()


def test_the_tables_of_the_page_are_those_that_were_measured():
    stored, page = read_json(measured.STORED), measured.PAGE.read_text(encoding="utf-8")
    assert set(stored) == set(measured.CASES)
    for name, table in measured.tables(measured.stored()).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        assert page.split(begin)[1].split(end)[0] == f"\n{table}\n\n"
