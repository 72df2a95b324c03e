"""Lists of forgotten indices in the texts of a run: found, and taken out."""

from __future__ import annotations

import re
from collections.abc import Set

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
