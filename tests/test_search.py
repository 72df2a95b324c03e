"""Settings that a comparison tries: defaults first, equally many for all, the same each time."""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import pytest

from fisher_forget import ConfigError
from fisher_forget.baselines import METHODS, Range
from fisher_forget.experiments.outcomes import Trial
from fisher_forget.experiments.search import needs_optuna, search


def made(grid: Any, **defaults: Any) -> Any:
    """A method with a grid and defaults."""
    return type("Method", (), {"name": "m", "grid": grid, **defaults})


def tried(method: Any, trials: int, judged: Any = None, **options: Any) -> list[dict[str, Any]]:
    """The settings of all trials; `judged` says (damage, memory) of a setting."""

    def attempt(settings: dict[str, Any]) -> Trial:
        return Trial(settings, *(judged(settings) if judged else (0.0, 50.0)))

    return [trial.settings for trial in search(method, trials, attempt, **options)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("trials", [1, 2, 8])
class TestEveryMethod:
    def test_as_many_trials_as_all_others_the_defaults_first(self, name: str, trials: int) -> None:
        method = METHODS[name]
        found = tried(method, trials)
        assert found[0] == {}
        assert len({repr(one) for one in found}) == len(found)
        assert found == tried(method, trials)
        if any(isinstance(values, Range) for values in method.grid.values()):
            assert len(found) == trials
        else:
            size = math.prod(len(values) for values in method.grid.values())  # type: ignore[arg-type]
            assert len(found) == min(trials, max(size, 1))
        for one in found[1:]:
            assert one.keys() == method.grid.keys()
            assert all(one[key] in values for key, values in method.grid.items())
            method(**one)

    def test_the_defaults_are_in_the_space(self, name: str, trials: int) -> None:
        method = METHODS[name]
        for key, values in method.grid.items():
            if isinstance(values, Range):
                assert getattr(method(), key) in values


class TestLists:
    def test_the_whole_grid_in_the_end(self) -> None:
        found = tried(made({"a": (1, 2), "b": (3, 4, 5)}, a=1, b=4), 100)
        assert {(t.get("a", 1), t.get("b", 4)) for t in found} == {
            (a, b) for a in (1, 2) for b in (3, 4, 5)
        }
        assert len(found) == 6

    def test_values_of_any_type_and_defaults_outside(self) -> None:
        assert tried(made({"a": ((1, 2), None, "x")}, a=0), 9)[0] == {}
        assert len(tried(made({"a": ((1, 2), None, "x")}, a=0), 9)) == 4
        mixed = made({"a": ((1, 2), None), "b": Range(1.0, 2.0)}, a=None, b=1.5)
        assert {str(t["a"]) for t in tried(mixed, 9)[1:]} == {"(1, 2)", "None"}

    def test_need_no_optuna(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert len(tried(made({"a": (1, 2)}, a=1), 9)) == 2
        assert not needs_optuna([{"a": (1, 2)}, {}])
        with pytest.raises(ConfigError, match=r"pip install 'fisher-forget\[compare\]'"):
            needs_optuna([{"a": (1, 2)}, {"b": Range(1.0, 2.0)}])


class TestRanges:
    def test_fields_that_are_fixed_are_left_alone(self) -> None:
        method = made({"a": Range(1.0, 2.0), "b": (1, 2)}, a=1.5, b=1)
        assert all("a" not in one for one in tried(method, 9, fixed=["a"]))
        assert len(tried(method, 9, fixed=["a"])) == 2
        assert tried(method, 9, fixed=["a", "b"]) == [{}]

    def test_logarithms_are_uniform(self) -> None:
        """Kolmogorov-Smirnov over the half that is random; level .001."""
        from scipy.stats import kstest

        found = tried(made({"a": Range(1e-6, 1e2)}, a=1.0), 401)[1:201]
        share = [(math.log10(t["a"]) + 6) / 8 for t in found]
        assert kstest(share, "uniform").pvalue > 0.001

    def test_whole_numbers_come_once_each(self) -> None:
        found = tried(made({"k": Range(1, 5, whole=True)}, k=3), 20)
        assert sorted(t.get("k", 3) for t in found) == [1, 2, 3, 4, 5]
        assert all(type(t["k"]) is int for t in found[1:])

    def test_defaults_outside_the_space_are_tried_first_all_the_same(self) -> None:
        found = tried(made({"a": Range(1.0, 2.0)}, a=7.0), 5)
        assert found[0] == {}
        assert all(1 <= t["a"] <= 2 for t in found[1:])

    def test_what_is_good_is_followed(self) -> None:
        """The second half comes closer to the best decade of six than the first, which is random:
        over twenty names, one-sided, p < .01 by a sign test at 15 of 20."""
        closer = 0
        for number in range(20):
            method = made({"a": Range(1e-6, 1.0)}, a=1e-6)
            method.name = f"m{number}"

            def judged(settings: dict[str, Any]) -> tuple[float, float]:
                return 0.0, min(100.0, 20 * abs(math.log10(settings.get("a", 1e-6)) + 3))

            far = [judged(t)[1] for t in tried(method, 16, judged)[1:]]
            closer += sum(far[7:]) / len(far[7:]) < sum(far[:7]) / 7
        assert closer >= 15

    def test_failed_trials_count_and_are_no_model(self) -> None:
        def attempt(settings: dict[str, Any]) -> Trial:
            return Trial(settings, error="diverged")

        found = search(made({"a": Range(1.0, 2.0)}, a=1.5), 6, attempt)
        assert len(found) == 6

    def test_nothing_global_changes(self) -> None:
        import random

        import numpy as np
        import optuna
        import torch

        def state() -> tuple[Any, ...]:
            levels = (optuna.logging.get_verbosity(), logging.getLogger().level)
            drawn = (np.random.get_state(legacy=False), torch.get_rng_state())  # noqa: NPY002
            return random.getstate(), str(drawn), levels

        before = state()
        tried(made({"a": Range(1.0, 2.0)}, a=1.5), 8)
        assert state() == before

    def test_says_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        tried(made({"a": Range(1.0, 2.0)}, a=1.5), 4)
        assert capfd.readouterr() == ("", "")


class TestRule:
    """Least memory of the settings that cost at most two points, else least damage."""

    @pytest.mark.parametrize(
        ("better", "worse"),
        [
            ((0.0, 95.2), (86.7, 0.0)),  # a constant predictor remembers nothing
            ((2.0, 50.0), (2.1, 0.0)),
            ((2.0, 10.0), (0.0, 10.1)),
            ((0.5, 10.0), (1.0, 10.0)),  # equal memory: less damage
            ((3.0, 90.0), (3.1, 0.0)),
            ((3.0, 10.0), (3.0, 20.0)),  # equal damage: less memory
        ],
    )
    def test_by_hand(self, better: tuple[float, float], worse: tuple[float, float]) -> None:
        assert Trial({}, *better).rank < Trial({}, *worse).rank
        assert Trial({}, *better).objective <= Trial({}, *worse).objective
        assert Trial({}, *worse).rank < Trial({}, error="no").rank
        assert Trial({}, *worse).objective < Trial({}, error="no").objective

    def test_the_number_for_the_estimator_is_in_the_order_of_the_rule(self) -> None:
        grid = [Trial({}, d / 2, m * 10.0) for d in range(201) for m in range(11)]
        grid.sort(key=lambda t: t.rank)
        numbers = [t.objective for t in grid]
        assert numbers == sorted(numbers)
        assert all(math.isfinite(n) for n in numbers)
