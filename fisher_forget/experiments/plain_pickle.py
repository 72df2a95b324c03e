"""Pickles of plain values, read without the module that can run them.

A pickle is a small program: it may import and call what it names, and NumPy's own functions crash
on shapes and types made up for them. Here its opcodes are taken one at a time, and only those that
make numbers, text, bytes, lists, tuples, dictionaries with keys of text, and arrays of uint8; for
NumPy's names stand tokens, which nothing calls.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    **{f"numpy.{core}.multiarray _reconstruct": "_reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "_frombuffer" for core in ("core", "_core")},
}
INLINE = {  # opcodes that put their own argument on the stack
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(str):
    """Stands for one of NumPy's functions or classes."""

    __slots__ = ()


class _Bytes:
    """An array of uint8 that is being put together: its content comes after its place."""

    value: NDArray[np.uint8] | None = None

    def fill(self, shape: object, order: str, raw: object) -> None:
        """Make the array.

        Raises:
            ValueError: If the values do not fill the shape.
        """
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 has bytes as text
        sizes = shape if isinstance(shape, tuple) and len(shape) <= 4 else (None,)
        fits = all(type(size) is int and size >= 0 for size in sizes)
        if not (fits and isinstance(raw, bytes | bytearray) and len(raw) == math.prod(sizes)):
            raise ValueError(f"an array whose values do not fill its shape {str(shape)[:80]}")
        self.value = np.frombuffer(raw, np.uint8).reshape(sizes, order=order)  # type: ignore[call-overload]


def loads(content: bytes) -> dict[str, Any]:
    """The dictionary in a pickle: text -> a number, text, a list of such, or an array of uint8.

    Args:
        content: As Python 2 wrote it, whose text is read as latin1, or Python 3 from protocol 3 on.

    Raises:
        ValueError: If it is damaged, or holds or asks for anything else.

    Example:
        >>> import pickle
        >>> loads(pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [3, 4]}))["labels"]
        [3, 4]
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            machine.step(opcode.name, argument)
        result = machine.stack.pop()
    except (IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {str(error)[:80]})") from error
    if not isinstance(result, dict) or machine.stack or machine.marks:
        raise ValueError(f"it holds {type(result).__name__}, not a dictionary")
    return {key: one.value if isinstance(one, _Bytes) else one for key, one in result.items()}


class _Machine:
    """Stack, marks on it, and memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in INLINE:
            self.stack.append(argument)
        elif name in FIXED:
            self.stack.append(FIXED[name]())
        elif name in TUPLES:
            self.stack.append(tuple(self._last(TUPLES[name])))
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it uses the opcode {name}, which no array needs")

    def mark(self, _: Any) -> None:
        """What comes next belongs together."""
        self.marks.append(len(self.stack))

    def put(self, place: int | None) -> None:
        """Remember the top of the stack."""
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def get(self, place: int) -> None:
        """Put on the stack what was remembered."""
        self.stack.append(self.memo[place])

    def named(self, argument: str | None) -> None:
        """A token for a name."""
        name = " ".join(self._last(2)) if argument is None else argument
        if name not in NAMES:
            raise ValueError(f"it asks for {name.replace(' ', '.')}, which no array needs")
        self.stack.append(_Name(NAMES[name]))

    def call(self, _: Any) -> None:
        """What a call would have made: a type or an array of uint8."""
        function, arguments = self._last(2)
        if not isinstance(function, _Name):
            raise ValueError("it calls what is no function")
        if function == "dtype":
            if arguments[0] not in ("u1", "|u1"):
                raise ValueError(f"an array of {str(arguments[0])[:40]!r}, where uint8 is expected")
            self.stack.append(_Name("uint8"))
            return
        made = _Bytes()
        if function == "_frombuffer":
            raw, kind, shape, order = arguments
            self._fill(made, kind, shape, order == "F", raw)
        elif function != "_reconstruct":
            raise ValueError(f"it calls {function}")
        self.stack.append(made)

    def state(self, _: Any) -> None:
        """Content of the array on the stack; that of its type says nothing for bytes."""
        target, values = self._last(2)
        if isinstance(target, _Bytes) and target.value is None:
            _, shape, kind, fortran, raw = values
            self._fill(target, kind, shape, bool(fortran), raw)
        elif not isinstance(target, _Name):
            raise ValueError("it sets the state of what has none")
        self.stack.append(target)

    def extend(self, _: Any) -> None:
        """Several items of the list on the stack."""
        items = self._since_mark()
        self._items(items)

    def append(self, _: Any) -> None:
        """One item of the list on the stack."""
        self._items(self._last(1))

    def update(self, _: Any) -> None:
        """Several keys and values of the dictionary on the stack."""
        self._keys(self._since_mark())

    def set(self, _: Any) -> None:
        """A key and a value of the dictionary on the stack."""
        self._keys(self._last(2))

    def tuple(self, _: Any) -> None:
        """All since the mark."""
        self.stack.append((*self._since_mark(),))

    def list(self, _: Any) -> None:
        """All since the mark."""
        self.stack.append([*self._since_mark()])

    def dict(self, _: Any) -> None:
        """Keys and values since the mark."""
        items = self._since_mark()
        self.stack.append({})
        self._keys(items)

    def _fill(self, made: _Bytes, kind: object, shape: object, fortran: bool, raw: object) -> None:
        if not (isinstance(kind, _Name) and kind == "uint8"):
            raise ValueError("an array of a type that is not said")
        made.fill(shape, "F" if fortran else "C", raw)

    def _items(self, items: Any) -> None:
        if type(self.stack[-1]) is not type([]):
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(items)

    def _keys(self, items: Any) -> None:
        # nothing but text is hashed: deep tuples exhaust the stack of the process
        if type(self.stack[-1]) is not type({}) or not all(type(key) is str for key in items[::2]):
            raise ValueError("keys that are not text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _last(self, count: int) -> Any:
        least = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < least:
            raise ValueError("it takes more than there is")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> Any:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.named),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.state,
    "APPENDS": _Machine.extend,
    "APPEND": _Machine.append,
    "SETITEMS": _Machine.update,
    "SETITEM": _Machine.set,
    "TUPLE": _Machine.tuple,
    "LIST": _Machine.list,
    "DICT": _Machine.dict,
}
