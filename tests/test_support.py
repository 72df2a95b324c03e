"""The tables of what is supported and refused are what the package does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import refused_table, supported_table

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "your-model.md"


@pytest.mark.parametrize("table", [supported_table, refused_table])
def test_the_page_has_the_table(table: object) -> None:
    assert callable(table)
    assert table() in PAGE.read_text(), "run python tests/support.py, and paste what it prints"
