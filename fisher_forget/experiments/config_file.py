"""Reading a configuration: a YAML file, and flags over it; mistakes are named with their place."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from fisher_forget.errors import ConfigError
from fisher_forget.experiments.config import RunConfig

KEY = "config"  # jsonargparse nests the schema under one argument
NAMED = ("data", "model")  # sections that a plain name may stand for
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
    flags = [f"--{KEY}.{flag[2:]}" if flag.startswith("--") else flag for flag in flags]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{KEY}", type=kind)
    try:
        # the file first, then the flags over it
        parsed = parser.parse_args([f"--{KEY}={json.dumps(content, default=str)}", *flags])
        return typing.cast(RunConfig, parser.instantiate(parsed)[KEY])
    except ConfigError:
        raise
    # the parser unpacks a section before it looks at its type
    except (ArgumentError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace(f"{KEY}.", "").split())
        expected = "values of the documented types"
        raise ConfigError(f"{path}: {message}", expected, "Correct that key.") from error


def _read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
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
