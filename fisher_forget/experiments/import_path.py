"""Functions and classes of the user's own, which a configuration names as package.module:name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fisher_forget._util.isolation import seeded_rng
from fisher_forget.errors import ConfigError, FisherForgetError

DEBUG = "add --debug to see where"


def is_own(name: str) -> bool:
    """Whether a name is an import path, and not one of ours."""
    return ":" in name


def find(path: str, role: str) -> Any:
    """The function or class at an import path.

    Args:
        path: package.module:name; the name may go on into a class, as in module:Class.method.
        role: What it is for, in messages: "the model", "the data".

    Raises:
        ConfigError: If the module is not found or cannot be imported, or holds no such thing that
            can be called.

    Example:
        >>> find("torch.nn:Linear", "the model")
        <class 'torch.nn.modules.linear.Linear'>
    """
    module, _, name = path.partition(":")
    expected = f"{role} as package.module:function"
    try:
        target: Any = import_module(module)
    except Exception as error:  # whatever its code raises
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module}.".startswith(f"{absent}."):
            fix = f"Start in the folder that holds {module.partition('.')[0]!r}, or install it."
            raise ConfigError(f"{path!r}, but no module {absent!r}", expected, fix) from error
        got = f"{type(error).__name__} while importing {module!r} for {path!r}: {error}"
        raise ConfigError(got, "a module that can be imported", f"Correct it; {DEBUG}.") from error
    for part in name.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), n=1)
            fix = f"Did you mean {near[0]!r}?" if near else "Correct the name after the colon."
            raise ConfigError(f"{path!r}, but no {part!r} in it", expected, fix)
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(
            f"{path!r}, which is a {type(target).__name__}", expected, "Name a function or a class."
        )
    return target


def make(path: str, role: str, options: Mapping[str, Any], *, seed: int) -> Any:
    """What the function at an import path returns for the options.

    The global random states of Python, NumPy and torch are seeded for the call, and put back
    afterwards.

    Args:
        path: package.module:name.
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
