"""Reading a configuration: a YAML file, and flags over it; mistakes are named with their place."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.config import RunConfig

KEY = "config"  # jsonargparse nests the schema under one argument
NAMED = ("data", "model")  # sections that a plain name may stand for
MERGE = "tag:yaml.org,2002:merge"  # the key <<
LONG = 100  # numbers of a list, from which on they are not looked at one by one
GONE = {
    "reference_variant": "compare has it: `fisher-forget compare --methods "
    "'[fisher-forget, golatkar-code]'`."
}  # keys of version 0.1, and what does their work


def load_config(
    path: str | Path, overrides: Sequence[str] = (), kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """Read a YAML file and apply `--key value` flags.

    `data` and `model` may be a plain name, which stands for {name: ...}.

    Args:
        path: The file.
        overrides: Such as ["--training.epochs", "5"].
        kind: `RunConfig`, `SweepConfig` or `CompareConfig`.

    Raises:
        ConfigError: An unknown key (with its place and the nearest right name), a wrong type, an
            unreadable file.
    """
    content = _read(path)
    for key in NAMED:
        if isinstance(content.get(key), str):
            content[key] = {"name": content[key]}
    _check_keys(content, kind, str(path))
    # an empty section has its defaults
    content = {key: value for key, value in content.items() if value is not None}
    flags = _spelled_out(overrides)
    for flag in flags:
        if flag.startswith("--"):
            _check_keys(_nested(flag[2:].split("=")[0]), kind, "the command line")
    over = {flag[2:].split("=")[0].split(".")[0] for flag in flags}
    # of what a flag changes, the parser must see all
    long = dict(_shortened({key: value for key, value in content.items() if key not in over}))
    flags = [f"--{KEY}.{flag[2:]}" if flag.startswith("--") else flag for flag in flags]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{KEY}", type=kind)
    try:
        # the file first, then the flags over it
        text = json.dumps(content, default=str, ensure_ascii=False)  # YAML knows no surrogates
        parsed = parser.parse_args([f"--{KEY}={text}", *flags])
        config = parser.instantiate(parsed)[KEY]
        for path_to, numbers in long.items():
            config = _changed(config, path_to, numbers)
        return typing.cast(RunConfig, config)
    except ConfigError:
        raise
    # the parser unpacks a section before it looks at its type
    except (ArgumentError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace(f"{KEY}.", "").split())
        expected = "values of the documented types"
        raise ConfigError(f"{path}: {message}", expected, "Correct that key.") from error


def _shortened(
    value: Any, place: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], list[Any]]]:
    """(place, numbers) of every long list of numbers of one type, of which the first alone is left
    in its place.

    The parser, which copies the whole list for each of its entries, sees by that one whether the
    type is right.
    """
    if isinstance(value, list) and len(value) > LONG and type(value[0]) in (int, float):
        if len(set(map(type, value))) == 1:
            yield place, value.copy()
            del value[1:]
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _shortened(inner, (*place, key))


def _changed(value: Any, place: Sequence[str | int], new: list[Any]) -> Any:
    """A copy of nested dataclasses, lists and dictionaries, with these numbers in a place."""
    if not place:  # as the parser has taken the first
        return [type(value[0])(number) for number in new]
    key, *rest = place
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{str(key): _changed(getattr(value, str(key)), rest, new)})
    twin = value.copy()
    twin[key] = _changed(value[key], rest, new)
    return twin


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that a mapping has twice; YAML's own readers take the last one."""

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


def _read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        with Path(path).open("rb") as file:
            content = yaml.load(file, _Loader)
    except (OSError, yaml.reader.ReaderError) as error:  # no such file, or no text
        got = f"{path}: {error}"
        raise ConfigError(got, "a readable YAML file", "Correct the path.") from error
    except yaml.YAMLError as error:
        got = f"{path}: {error}"
        raise ConfigError(got, "valid YAML", "Correct the file at that place.") from error
    if not isinstance(content, dict):
        got = f"{path} holding {type(content).__name__}"
        raise ConfigError(got, "keys and values", "See configs/digits.yaml.")
    # a run of version 0.1 wrote the key whether or not it was used, and a finished one is read only
    finished = Path(path).with_name("metrics.json").exists()
    return {k: v for k, v in content.items() if k not in GONE or (v and not finished)}


def _spelled_out(overrides: Sequence[str]) -> list[str]:
    """The flags with --data.name and --model.name, where a plain name follows --data and
    --model."""
    sections = {f"--{name}" for name in NAMED}
    flags: list[str] = []
    for flag in overrides:
        key, equals, value = flag.partition("=")
        if key in sections and equals and not value.startswith("{"):
            flag = f"{key}.name={value}"
        elif flags and flags[-1] in sections and not flag.startswith("{"):
            flags[-1] += ".name"
        flags.append(flag)
    return flags


def _nested(key: str) -> dict[str, Any]:
    """`a.b` as {"a": {"b": None}}."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest) if rest else None}


def _check_keys(content: Mapping[str, Any], schema: Any, place: str) -> None:
    """Refuse unknown keys before any type is looked at, with the nearest right name."""
    hints = typing.get_type_hints(schema)
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            fix = "Remove it, or see the documentation of the schema."
            fix = GONE.get(key, f"Did you mean {near[0]!r}?" if near else fix)
            raise ConfigError(f"the unknown key {key!r} in {place}", f"one of {sorted(hints)}", fix)
        hint = hints[key]
        if is_dataclass(hint) and not isinstance(value, Mapping | None):
            got = f"{place} with {key}: {value!r}"
            raise ConfigError(got, "keys and values below it", f"Correct {key!r}.")
        for section, inner, where in _sections(hint, value, key):
            _check_keys(section, inner, f"{place} at {where}")


def _sections(hint: Any, value: Any, key: str) -> Iterator[tuple[Mapping[str, Any], Any, str]]:
    """(keys and values, schema, place) of the section that a value is, or the list of sections."""
    entries = [(value, repr(key))]
    if typing.get_origin(hint) is list and isinstance(value, list):
        entries = [(entry, f"{key}[{index}]") for index, entry in enumerate(value)]
    schemas = [schema for schema in (hint, *typing.get_args(hint)) if is_dataclass(schema)]
    for section, where in entries:
        if isinstance(section, Mapping):
            yield from ((section, schema, where) for schema in schemas)


def option_names(schema: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Every key that a flag may set, with dots, and the words that it may be.

    Example:
        >>> from fisher_forget.experiments.config import RunConfig
        >>> option_names(RunConfig)["training.optimizer"]
        ('sgd', 'adam')
    """
    names: dict[str, tuple[str, ...]] = {}
    for key, hint in typing.get_type_hints(schema).items():
        if is_dataclass(hint):
            names |= option_names(hint, f"{prefix}{key}.")
            continue
        types = (hint, *typing.get_args(hint))
        literals = [option for option in types if typing.get_origin(option) is Literal]
        words = tuple(str(word) for option in literals for word in typing.get_args(option))
        names[prefix + key] = ("true", "false") if hint is bool else words
    return names
