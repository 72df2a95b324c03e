"""Modules of version 0.1: whoever imports one learns where it is now."""

from __future__ import annotations

import importlib
import re

import pytest

from fisher_forget._util.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_the_message_gives_a_module_that_is_there(name: str) -> None:
    with pytest.raises(
        ModuleNotFoundError, match=re.escape(f"is fisher_forget.{MOVED[name]} since")
    ):
        importlib.import_module(f"fisher_forget.{name}")
    importlib.import_module(f"fisher_forget.{MOVED[name]}")


def test_from_the_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fisher_forget\.unlearn\.newton\.step since"):
        from fisher_forget import newton  # noqa: F401


def test_other_names_are_as_unknown_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'fisher_forget\.nothing'"):
        importlib.import_module("fisher_forget.nothing")
    assert importlib.util.find_spec("fisher_forget.nothing") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from fisher_forget.data.split import resolve", "resolve_split"),
        ("from fisher_forget.likelihood import resolve", "resolve_likelihood"),
        ("from fisher_forget import paper_forget", "golatkar-paper"),
        ("from fisher_forget.config import load_config", "experiments.config_file"),
        ("from fisher_forget.newton import newton_step", "Problem.of"),
    ],
)
def test_names_that_went_elsewhere(old: str, new: str) -> None:
    with pytest.raises(ImportError, match=re.escape(new)):
        exec(old)
