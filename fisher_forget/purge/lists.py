"""Lists of forgotten indices in the texts of a run: found, and taken out."""

from __future__ import annotations

import re
from pathlib import Path

from fisher_forget.purge.runs import Run

# behind the key `indices`, in JSON, Python or HTML on one line, or in YAML and JSON on a line each
LIST = re.compile(
    r"(\bindices\b(?:&#39;|&#34;|&quot;|['\"])?\s*:)((?:\s*\[[\d\s,]*\])|(?:\s*-\s+\d+\b)+)"
)


def holds_lists(path: Path, run: Run) -> bool:
    """Whether a text names by index who is to be gone."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return without_lists(text, run) != text


def without_lists(text: str, run: Run) -> str:
    """A text of YAML, JSON or HTML with empty lists in the place of those of the forget sets that
    are to be gone."""
    gone = list(run.lists.values())

    def emptied(found: re.Match[str]) -> str:
        indices = [int(digits) for digits in re.findall(r"\d+", found[2])]
        return f"{found[1]} []" if indices in gone else found[0]

    return LIST.sub(emptied, text)
