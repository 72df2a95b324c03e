"""Reading a configuration: a YAML file, and flags over it; mistakes are named with their place."""

from __future__ import annotations

import difflib
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fisher_forget._util import files
from fisher_forget.errors import ConfigError
from fisher_forget.experiments.config import RunConfig, to_plain
from fisher_forget.experiments.import_path import check_allowed
from fisher_forget.experiments.run_folder import check_out
from fisher_forget.experiments.typed import Dumper, Loader, build, fits

DEEPEST, MOST = 50, 10_000_000  # levels and values of a file
NAMED = ("data", "model")  # sections that a plain name may stand for
GONE = {
    "reference_variant": "compare has it: `fisher-forget compare --methods "
    "'[fisher-forget, golatkar-code]'`."
}  # keys of version 0.1, and what does their work


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: type[RunConfig] = RunConfig,
    *,
    allow_code: bool = False,
) -> RunConfig:
    """Read a YAML file and apply `--key value` flags.

    `data` and `model` may be a plain name, which stands for {name: ...}.

    Args:
        path: The file.
        overrides: Such as ["--training.epochs", "5"].
        kind: `RunConfig`, `SweepConfig` or `CompareConfig`.
        allow_code: Whether names may be import paths, package.module:name, which run code of
            whoever wrote the file. The environment variable FISHER_FORGET_ALLOW_CODE=1 allows it,
            too.

    Raises:
        ConfigError: An unknown key (with its place and the nearest right name), a wrong type, an
            unreadable file; an import path where code is not allowed; results that would go
            elsewhere than below the current folder or the file's, unless a flag says so.
    """
    content = _read(path)
    for key in NAMED:
        if isinstance(content.get(key), str):
            content[key] = {"name": content[key]}
    _check_keys(content, kind, str(path))
    # an empty section has its defaults
    content = {key: value for key, value in content.items() if value is not None}
    given = set()
    for key, text in _flags(overrides):
        given.add(key)
        _check_keys(_nested(key, None), kind, "the command line")
        value = _flag_value(_hint(kind, key), text)
        _check_keys(_nested(key, value), kind, "the command line")
        _put(content, kind, key, value)
    config = _built(kind, content, path)
    for role, name in config.named:
        check_allowed(name, role, str(path), allow_code=allow_code)
    if "out" not in given:
        check_out(config, Path(path))
    return config


def _built(kind: type[RunConfig], content: Mapping[str, Any], path: str | Path) -> RunConfig:
    try:
        return build(kind, content, str(path))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # of the checks that a section makes itself
        message = " ".join(str(error).split())
        expected = "values of the documented types"
        raise ConfigError(f"{path}: {message}", expected, "Correct that key.") from error


def as_yaml(config: RunConfig, **layout: Any) -> str:
    """The resolved configuration, as `load_config` reads it; `layout` is PyYAML's."""
    text: str = yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, **layout)
    return text


def write_config(path: Path, config: RunConfig) -> None:
    """Write the resolved configuration beside its results.

    Raises:
        StorageError: If the file cannot be written.
    """
    files.write_text(path, as_yaml(config))


def _read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        with Path(path).open("rb") as file:
            content = yaml.load(file, Loader)
    except ConfigError:  # a key twice
        raise
    except (OSError, yaml.reader.ReaderError) as error:  # no such file, or no text
        got = f"{path}: {error}"
        raise ConfigError(got, "a readable YAML file", "Correct the path.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a number of too many digits
        got = f"{path}: {error}"
        raise ConfigError(got, "valid YAML", "Correct the file at that place.") from error
    _check_size(content, path)
    if not isinstance(content, dict):
        got = f"{path} holding {type(content).__name__}"
        raise ConfigError(got, "keys and values", "See configs/digits.yaml.")
    # a run of version 0.1 wrote the key whether or not it was used, and a finished one is read only
    finished = Path(path).with_name("metrics.json").exists()
    return {k: v for k, v in content.items() if k not in GONE or (v and not finished)}


def _check_size(content: Any, path: str | Path) -> None:
    """Refuse what holds itself, and what its aliases make larger than any memory."""
    left, count = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        inner = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(inner, list):
            continue
        count += len(inner)
        if depth > DEEPEST or count > MOST:
            got = f"{path}, which nests more than {DEEPEST} deep or holds more than {MOST:,} values"
            raise ConfigError(got, "a configuration", "Look for aliases (*name) in it.")
        left += [(one, depth + 1) for one in inner if isinstance(one, dict | list)]


def _flags(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of each flag; the key is data.name or model.name where a plain name follows
    --data or --model."""
    left = list(overrides)
    while left:
        flag = left.pop(0)
        key, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            strays = [flag, *itertools.takewhile(lambda one: not one.startswith("--"), left)]
            got = f"unrecognized arguments: {' '.join(strays)}"
            raise ConfigError(got, "--key value, for keys of the configuration", "Correct them.")
        if key and not equals:
            if not left or left[0].startswith("--"):
                got = f"{key}: expected one argument"
                raise ConfigError(got, "--key value", f"Add the value of --{key}.")
            text = left.pop(0)
        yield (f"{key}.name" if key in NAMED and not text.startswith("{") else key), text


def _flag_value(hint: Any, text: str) -> Any:
    """The text of a flag as YAML reads it; as it stands where text is wanted."""
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError):
        return text
    if str in (hint, *typing.get_args(hint)):
        return value if fits(hint, value) and not isinstance(value, str) else text
    return value if fits(hint, value) or isinstance(value, Mapping) else text


def _hint(schema: Any, key: str) -> Any:
    """The type at a key with dots, which is known; anything goes below a mapping."""
    first, _, rest = key.partition(".")
    hint = typing.get_type_hints(schema)[first]
    if not rest:
        return hint
    sections = [one for one in (hint, *typing.get_args(hint)) if is_dataclass(one)]
    return _hint(sections[0], rest) if sections else Any


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` as {"a": {"b": value}}."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _put(content: dict[str, Any], schema: Any, key: str, value: Any) -> None:
    """Set the value at a key with dots; the keys of a section go over those that it has."""
    if is_dataclass(_hint(schema, key)) and isinstance(value, Mapping):
        for name, inner in value.items():
            _put(content, schema, f"{key}.{name}", inner)
        return
    *above, last = key.split(".")
    for name in above:
        section = content.get(name)
        content[name] = dict(section) if isinstance(section, Mapping) else {}
        content = content[name]
    content[last] = value


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
        >>> from fisher_forget.experiments.config import RunConfig, to_plain
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
