"""Lists of forgotten indices in the texts of a run: found, and taken out."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

import yaml

# behind the key `indices`, in JSON, Python or HTML on one line, or in YAML and JSON on a line each
LIST = re.compile(
    rb"(\bindices\b(?:&#39;|&#34;|&quot;|['\"])?\s*:)((?:\s*\[[\d\s,]*\])|(?:\s*-\s+\d+\b)+)"
)
FINGERPRINT = re.compile(rb'("fingerprint":\s*)"[0-9a-f]+"')


def without_lists(content: bytes, gone: Set[int]) -> bytes:
    """YAML, JSON or HTML whose lists of indices lack those that are gone, and whose fingerprints
    say nothing: with the data, one of a short list tells who is in it."""

    def rest(found: re.Match[bytes]) -> bytes:
        indices = [int(digits) for digits in re.findall(rb"\d+", found[2])]
        left = [i for i in indices if i not in gone]
        return found[0] if left == indices else found[1] + f" {left}".encode()

    return FINGERPRINT.sub(rb'\1"purged"', LIST.sub(rest, content))


def recipe_without(content: dict[str, Any], gone: Set[int]) -> bytes:
    """A configuration whose lists lack those that are gone, as YAML, however they were written."""
    sets = [
        {**s, "indices": [i for i in map(int, s.get("indices") or []) if i not in gone]}
        for s in content["forget_sets"]
    ]
    whole = content | {"forget_sets": sets}
    text: str = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    return text.encode()
