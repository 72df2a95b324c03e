"""What a function does, as a fingerprint: stored results know the code that made them."""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

from fisher_forget._util import files

# of a class, what Python adds and what says nothing of what it does
ADDED = {"__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "_abc_impl"}
ADDED |= {"__annotations__", "__dataclass_fields__"}
HOMES = ("site-packages", "dist-packages")
STANDARD, OURS = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]


def code_fingerprint(function: Callable[..., Any]) -> str:
    """16 hexadecimal digits that change when a function does other things.

    They are of its bytecode and constants, its defaults, what its closure, `functools.partial`,
    method or object holds, and of the functions, classes and values that it finds by their global
    names, all of these in the same way; of a module of the user's own that it names, the file.
    Comments and the place in the file do not count. Of installed packages, this one among them,
    name and version stand for the code. What a function imports while it runs, or reads from files,
    is not seen.

    Raises:
        StorageError: If something that it holds cannot be told from another one of its kind: its
            `repr` is a memory address, as that of a `torch.Generator`.
    """
    return _Reader().mark(function)


class _Reader:
    """Walks over what a function refers to, each thing once."""

    def __init__(self) -> None:
        self._marks: dict[int, str] = {}
        self._held: list[object] = []  # so that no id is given twice

    def mark(self, value: Any) -> str:
        if id(value) not in self._marks:
            self._held.append(value)
            # where it refers to itself, the order in which it was met stands for it
            self._marks[id(value)] = f"met {len(self._held)}"
            self._marks[id(value)] = files.fingerprint(type(value).__name__, self._told(value))
        return self._marks[id(value)]

    def _told(self, value: Any) -> object:
        """What `files.fingerprint` tells apart, in place of a value."""
        if isinstance(value, partial):
            return self._all([value.func, value.args, value.keywords])
        if isinstance(value, MethodType):
            return self._all([value.__func__, value.__self__])
        if isinstance(value, ModuleType):
            return _name(value.__name__) if _installed(value.__name__) else _source(value)
        if isinstance(value, BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, FunctionType):
            # of a text that was executed, the module may be that of Python
            known = _installed(value.__module__) and value.__module__ != "builtins"
            return _name(value.__module__, value) if known else self._function(value)
        if isinstance(value, type):
            known = _installed(value.__module__)
            return _name(value.__module__, value) if known else self._class(value)
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, Mapping):
            return {repr(key): self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return self._all(value)
        return self._object(value)

    def _all(self, values: Any) -> list[str]:
        return [self.mark(value) for value in values]

    def _function(self, function: FunctionType) -> object:
        cells = [_content(cell) for cell in function.__closure__ or ()]
        names = sorted(set(_globals(function.__code__)) & set(function.__globals__))
        found = {name: self.mark(function.__globals__[name]) for name in names}
        given = self._all([function.__defaults__, function.__kwdefaults__, *cells])
        return [self.mark(function.__code__), given, found]

    def _class(self, kind: type) -> object:
        own = {name: value for name, value in vars(kind).items() if name not in ADDED}
        return [kind.__qualname__, self._all(kind.__bases__), self.mark(own)]

    def _code(self, code: CodeType) -> object:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        rest = code.co_exceptiontable, code.co_flags, code.co_argcount, code.co_kwonlyargcount
        return [code.co_code, *names, *rest, self._all(code.co_consts)]

    def _object(self, value: Any) -> object:
        """Its class, and what it holds."""
        if isinstance(value, staticmethod | classmethod):
            return self.mark(value.__func__)
        if isinstance(value, cached_property):
            return self.mark(value.func)
        if isinstance(value, property):
            return self._all([value.fget, value.fset, value.fdel])
        if type(value) is type(lru_cache(_globals)):
            return self.mark(value.__wrapped__)
        if isinstance(value, Tensor | Path) or not hasattr(value, "__dict__"):
            return value
        return self._all([type(value), value.__getstate__()])


def _globals(code: CodeType) -> Iterator[str]:
    """Names that it looks up outside, those of functions within it too."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _installed(module: str) -> bool:
    """Whether the code is that of Python or of a package, and not the user's own."""
    if module == "__main__":  # of a notebook, too, where its file is that of the server
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module.partition(".")[0] in sys.stdlib_module_names
    place = Path(file)
    within = any(place.is_relative_to(home) for home in (STANDARD, OURS))
    return within or any(home in place.parts for home in HOMES)


def _name(module: str, value: Any = None) -> str:
    """With the version of its package."""
    version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", "")
    return f"{module} {version} {getattr(value, '__qualname__', '')}"


def _source(module: ModuleType) -> object:
    file = getattr(module, "__file__", None)
    return [module.__name__, Path(file).read_bytes() if file else ""]
