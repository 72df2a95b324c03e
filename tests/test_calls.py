"""The rows of `make bench` for whole calls."""

import pytest

from benchmarks import bench, calls
from fisher_forget.experiments.config_file import load_config


def test_shares_are_of_a_retraining():
    found = {"samples": 1437, "epochs": 30, "retraining_s": 20.0, "forget_s": 5.0}
    found |= {"prepare_s": 2.0, "prepared_s": {"1": 0.1, "100": 0.25}}
    text = bench.call("digits", found)
    assert "1,437 samples, 30 epochs of training in 20 s: forget 25 %" in text
    assert "prepared in 10 %, requests of 1: 0.5 %, 100: 1.25 %" in text
    failed = bench.call("mnist", {"fails": "DataError: no MNIST"})
    assert failed == "mnist: fails: DataError: no MNIST"


@pytest.mark.filterwarnings("ignore::fisher_forget.errors.FisherForgetWarning")  # hardly trained
def test_all_is_measured_in_one_run(monkeypatch):
    monkeypatch.setattr(calls, "TRAINED", {"digits": 1})
    monkeypatch.setattr(calls, "REQUESTS", (5, 10_000))
    found = calls.measure("digits", quick=True)
    assert found["samples"] == 359
    assert found["epochs"] == 30
    assert list(found["prepared_s"]) == [5]  # half of the samples are retained at least
    seconds = [found[k] for k in ("retraining_s", "forget_s", "prepare_s")]
    assert min(*seconds, *found["prepared_s"].values()) > 0
    assert calls.timed(divmod, 7, 2)[0] == (3, 1)


@pytest.mark.parametrize("recipe", bench.RECIPES)
def test_every_recipe_can_be_measured(recipe):
    config = load_config(calls.CONFIGS / f"{recipe}.yaml")
    assert 1 <= calls.TRAINED[recipe] < config.training.epochs
