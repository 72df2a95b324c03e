"""Where the descriptions of metrics.json and evaluation.json are, and how to read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EVALUATION_SCHEMA_PATH = Path(__file__).parent / "templates" / "evaluation.schema.json"
METRICS_SCHEMA_PATH = Path(__file__).parent / "templates" / "metrics.schema.json"


def load_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of metrics.json: every field with its meaning and unit.

    Example:
        >>> load_schema()["properties"]["schema"]["const"]
        2
    """
    schema: dict[str, Any] = json.loads(METRICS_SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


def evaluation_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of each table in evaluation.json.

    Example:
        >>> evaluation_schema()["properties"]["schema"]["const"]
        2
    """
    schema: dict[str, Any] = json.loads(EVALUATION_SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema
