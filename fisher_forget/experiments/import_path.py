"""Functions and classes that are not the package's: of plug-ins, which installed packages declare
as entry points, and of the user's own, which are named as package.module:name.

A plug-in has a plain name, and whoever installed it trusts it. An import path reaches all that
Python can import, so that a file which holds one can run anything: `config_file` refuses it unless
code is allowed.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fisher_forget._util.isolation import seeded_rng
from fisher_forget.errors import ConfigError, FisherForgetError

DEBUG = "add --debug to see where"
VARIABLE = "FISHER_FORGET_ALLOW_CODE"
# what a name is for -> group of the entry points that installed packages declare
GROUPS = {
    "the data": "fisher_forget.data",
    "the model": "fisher_forget.models",
    "a method": "fisher_forget.methods",
}


def is_path(name: str) -> bool:
    """Whether a name is an import path."""
    return ":" in name


def is_own(name: str, role: str) -> bool:
    """Whether a name is an import path or a plug-in's; the package's own names come first."""
    return is_path(name) or name in plugins(role)


def plugins(role: str) -> dict[str, EntryPoint]:
    """Name -> entry point of what installed packages declare for a role; nothing is imported.

    Raises:
        ConfigError: If two packages declare the same name for different things.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUPS[role]):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            got = f"{role} {entry.name!r} of two packages: {other.value} and {entry.value}"
            raise ConfigError(got, "one of that name", "Uninstall one of them.")
    return found


def check_allowed(name: str, role: str, source: str, *, allow_code: bool) -> None:
    """Refuse an import path, before anything is imported, unless code is allowed.

    Args:
        name: As a configuration has it.
        role: What it is for, in messages.
        source: The configuration, in messages.
        allow_code: Whether the user vouches for it; the environment variable
            FISHER_FORGET_ALLOW_CODE=1 says so, too.

    Raises:
        ConfigError: If it is an import path, and code is not allowed.
    """
    if is_path(name) and not (allow_code or os.environ.get(VARIABLE) == "1"):
        got = f"{name!r} as {role} in {source}, an import path: using it runs code"
        expected = "a name of this package or of an installed plug-in"
        fix = f"Pass --allow-code, or set {VARIABLE}=1, if you trust whoever wrote this file"
        raise ConfigError(got, expected, f"{fix} (in Python: allow_code=True).")


@contextmanager
def current_folder_last() -> Iterator[None]:
    """Look for modules in the current folder, too, but only after all that is installed."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def find(path: str, role: str) -> Any:
    """The function or class at an import path, or of a plug-in.

    Args:
        path: package.module:name; the name may go on into a class, as in module:Class.method. Or
            the name of a plug-in.
        role: What it is for, in messages: "the model", "the data", "a method".

    Raises:
        ConfigError: If the module is not found or cannot be imported, or holds no such thing that
            can be called.

    Example:
        >>> find("torch.nn:Linear", "the model")
        <class 'torch.nn.modules.linear.Linear'>
    """
    said = repr(path)
    if not is_path(path):
        value = plugins(role)[path].value.partition("[")[0].strip()  # what is in brackets is old
        said, path = f"{value!r} of the plug-in {path!r}", value
    module, _, name = path.partition(":")
    expected = f"{role} as package.module:function"
    try:
        target: Any = import_module(module)
    except Exception as error:  # whatever its code raises
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module}.".startswith(f"{absent}."):
            fix = f"Start in the folder that holds {module.partition('.')[0]!r}, or install it."
            raise ConfigError(f"{said}, but no module {absent!r}", expected, fix) from error
        got = f"{type(error).__name__} while importing {module!r} for {said}: {error}"
        raise ConfigError(got, "a module that can be imported", f"Correct it; {DEBUG}.") from error
    for part in name.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), n=1)
            fix = f"Did you mean {near[0]!r}?" if near else "Correct the name after the colon."
            raise ConfigError(f"{said}, but no {part!r} in it", expected, fix)
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"{said}, which is a {type(target).__name__}", expected, "Name a function or a class."
        )
    return target


def make(path: str, role: str, options: Mapping[str, Any], *, seed: int) -> Any:
    """What the function at an import path, or of a plug-in, returns for the options.

    The global random states of Python, NumPy and torch are seeded for the call, and put back
    afterwards.

    Args:
        path: package.module:name, or the name of a plug-in.
        role: What it is for, in messages.
        options: Keyword arguments.
        seed: Of the global random states.

    Raises:
        ConfigError: As `find`; or the function does not take the options, or fails.

    Example:
        >>> make("torch.nn:Linear", "the model", {"in_features": 3, "out_features": 2}, seed=0)
        Linear(in_features=3, out_features=2, bias=True)
    """
    function = find(path, role)
    _check_options(path, role, function, options)
    try:
        with seeded_rng(seed):
            return function(**options)
    except FisherForgetError:
        raise
    except Exception as error:
        got = f"{type(error).__name__} from {path}: {error}"
        fix = f"Correct the function or its options; {DEBUG}."
        raise ConfigError(got, f"{role} from it", fix) from error


def _check_options(path: str, role: str, function: Any, options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # as of some builtins, which then say themselves what they do not take
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        got = f"the options {sorted(options)} for {path}{signature}: {error}"
        expected = f"options that {role} takes"
        raise ConfigError(got, expected, "Correct `options` in the configuration.") from error
