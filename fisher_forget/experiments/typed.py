"""Plain values, as a YAML file has them, made into the dataclasses of a schema.

Nothing is imported or called for a value but the dataclasses that the schema itself names, so that
a file from someone else is data and no more.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

import yaml

from fisher_forget.errors import ConfigError

S = TypeVar("S")
MERGE = "tag:yaml.org,2002:merge"  # the key <<
WORDS = {
    int: "a whole number (int)",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's plain values, where 1e-4 is a number (YAML 1.2) and a date is text.

    A key that a mapping has twice is refused; YAML's own readers take the last one.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for at, _ in getattr(node, "value", ()):
            if at.tag == MERGE:  # what it brings stands behind the keys that are written out
                continue
            key, line = self.construct_object(at, deep=True), at.start_mark.line + 1
            # 1 and true are one key to Python, 1 and "1" to JSON
            names: set[Hashable] = {key if isinstance(key, str) else json.dumps(key, default=str)}
            names |= {key} if isinstance(key, Hashable) else set()
            before = [lines[name] for name in names if name in lines]
            if before:
                place = f"lines {before[0]} and {line} of {at.start_mark.name}"
                got = f"the key {key!r} twice, in {place}"
                raise ConfigError(got, "each key once", "Remove one of them.")
            lines |= dict.fromkeys(names, line)
        return typing.cast(dict[Any, Any], super().construct_mapping(node, deep))


Loader.yaml_implicit_resolvers = {  # its own, not those of every SafeLoader
    first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes what `Loader` reads: text that it would take for a number is quoted."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"),
        list("-+.0123456789"),
    )


def build(schema: type[S], content: Mapping[str, Any], place: str, above: str = "") -> S:
    """The dataclass that keys and values describe.

    Args:
        schema: A dataclass of plain values, lists, mappings, choices and further dataclasses.
        content: Keys, which are known to be its own, and values.
        place: Where they are from, in messages.
        above: Key of the section with a dot behind it, in messages.

    Raises:
        ConfigError: A value of another type, or a key that is missing; or what the dataclass itself
            refuses.

    Example:
        >>> from fisher_forget.experiments.config import ModelSettings
        >>> build(ModelSettings, {"name": "cnn", "options": {"width": 8}}, "here")
        ModelSettings(name='cnn', options={'width': 8})
    """
    hints = typing.get_type_hints(schema)
    if unknown := [key for key in content if key not in hints]:
        got = f"{place} with the keys {unknown} at {above.rstrip('.')!r}"
        raise ConfigError(got, f"some of {sorted(hints)}", "Correct them.")
    needed = [f.name for f in fields(schema) if f.default is f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in content]:
        got = f"{place} without {', '.join(above + name for name in missing)}"
        raise ConfigError(got, "these keys, which have no defaults", "Add them.")
    values = {key: _value(hints[key], v, place, above + key) for key, v in content.items()}
    return schema(**values)


def fits(hint: Any, value: Any) -> bool:
    """Whether a plain value is of a type, or describes a value of it."""
    try:
        _value(hint, value, "", "")
    except ConfigError:
        return False
    return True


def _value(hint: Any, value: Any, place: str, key: str) -> Any:
    """A plain value as its type has it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _either(hint, value, place, key)
    if origin is Literal and any(value == word and type(value) is type(word) for word in inner):
        return value
    if is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type[Any], hint), value, place, f"{key}.")
    if origin in (list, tuple) and isinstance(value, list):
        items = (_value(inner[0], item, place, f"{key}[{i}]") for i, item in enumerate(value))
        return origin(items)
    if _is_mapping(origin) and isinstance(value, Mapping) and all(map(_is_text, value)):
        return {name: _value(inner[1], v, place, f"{key}.{name}") for name, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint in WORDS and type(value) is hint:
        return value
    raise ConfigError(f"{place} with {key}: {value!r}", _words(hint), "Correct that key.")


def _either(hint: Any, value: Any, place: str, key: str) -> Any:
    """The value as the first type of several that it fits; the only section among them says itself
    what is wrong within it."""
    inner = typing.get_args(hint)
    sections = [one for one in inner if is_dataclass(one)]
    for one in inner:
        if fits(one, value) or (isinstance(value, Mapping) and sections == [one]):
            return _value(one, value, place, key)
    raise ConfigError(f"{place} with {key}: {value!r}", _words(hint), "Correct that key.")


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_text(key: object) -> bool:
    return isinstance(key, str)


def _words(hint: Any) -> str:
    """A type for people."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        # classes that no file can describe are left out
        known = [
            one for one in inner if one in WORDS or typing.get_origin(one) or is_dataclass(one)
        ]
        return ", or ".join(map(_words, known))
    if origin in (list, tuple):
        return f"a list of {_words(inner[0])}"
    return WORDS.get(hint, "keys and values")
