"""Kills and rivals lose no request: a few trials of what benchmarks/reliability.py tries often."""

from __future__ import annotations

import os
import random

import pytest

from benchmarks import reliability
from benchmarks.reliability import prepared_asks, sisa_asks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this machine")


@pytest.mark.parametrize("asks", [prepared_asks, sisa_asks])
@pytest.mark.parametrize("rivals", [1, 2])
def test_kills(asks, rivals):
    found = reliability.kills(asks, 3, random.Random(rivals), rivals=rivals)
    assert found.pop("kills") == 3
    assert found.pop("returned") >= 0
    assert set(found.values()) == {0}


@pytest.mark.parametrize("asks", [prepared_asks, sisa_asks])
def test_rivals(asks):
    assert reliability.rivals(asks, 1) == (15, 15)


def test_sisa_that_was_killed_is_exact():
    assert reliability.exact(2)
