"""The one place that copies a model.

`copy.deepcopy` fails on much that trained models carry: activations that forward has stored, locks,
files, loggers. And it shares functions, so that a hook or a replaced forward which holds the model
in its closure would go on working on the given one. Here a model is walked through as pickle does,
with these rules for what is found:

| found | in the copy |
|---|---|
| tensors | copied; without their graph where they have one |
| containers, modules, objects | copied, by `__deepcopy__` where the class has one |
| functions and methods | bound to the copy, by their closures and defaults, too |
| classes, imported modules, and what cannot be copied: locks, files, sockets | shared |
| generators and other iterators that cannot be copied | refused: reading them would change both |
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fisher_forget.errors import ModelError

M = TypeVar("M", bound=nn.Module)
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without DataParallel, DistributedDataParallel and torch.compile around it,
    which give its parameters other names."""
    while True:
        if isinstance(model, PARALLEL):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def copy_model(model: M) -> M:
    """A copy of a model, unwrapped, that shares nothing with it that forward could change.

    Raises:
        ModelError: If an attribute cannot be copied; names it.
    """
    model = cast(M, unwrapped(model))
    try:
        return cast(M, _copied(model, model))
    except Exception as error:
        where, value = _culprit(model)
        got = f"{where} of type {type(value).__name__}, which cannot be copied ({error})"
        fix = f"Delete it (del model.{where}), or keep it outside of the model."
        raise ModelError(got, "a model that can be copied, as the given one stays", fix) from error


def private_copy(model: M) -> M:
    """A copy in eval mode that computes the same with gradients as without.

    Without gradients torch takes another way through attention, which gives other values at padded
    positions and NaN where all are padded. It does so only where query, key and value are the same
    object, and no hook is attached to the layer. On a GPU, recurrent layers have no gradients in
    eval mode: they are in training mode without dropout, which computes the same.
    """
    twin = copy_model(model).eval()
    for module in twin.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(_apart, with_kwargs=True)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.RNNBase):
            module.dropout, module.training = 0.0, True
    return twin


def _apart(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give attention its key, and value, as another object than its query."""
    names = ("query", "key", "value")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (given[name] for name in names)
    if query is not key or key is not value:
        return None
    given["key"] = given["value"] = key.view_as(key)
    changed = [given.pop(name) for name in names[: len(args)]]
    return (*changed, *args[len(changed) :]), given


def _culprit(model: nn.Module) -> tuple[str, Any]:
    """Name and value of the first attribute that cannot be copied by itself."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            try:
                _copied(value, model)
            except Exception:  # of any kind: this is what is looked for
                return f"{name}.{attribute}".lstrip("."), value
    return type(model).__name__, model


def _copied(value: Any, model: nn.Module) -> Any:
    """A copy of a value that belongs to a model."""
    with torch.inference_mode(False), torch.no_grad():
        table = _Table(model)
        stream = io.BytesIO()
        _Taker(stream, table).dump(value)
        stream.seek(0)
        return _Giver(stream, table).load()


class _Given:
    """Stands for a value that the copy shares with the model."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Table:
    """What takes no part in pickling: copies of tensors, and shared values, by the original's id.

    Attributes:
        copies: As `copy.deepcopy` keeps them in its memo.
        parts: Ids of the model's modules, parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.copies: dict[int, Any] = {}
        self.parts = {
            id(x) for xs in (model.modules(), model.parameters(), model.buffers()) for x in xs
        }
        self._alive: list[Any] = []  # so that no id is used twice

    def put(self, value: Any, twin: Any) -> int:
        """Note a value's copy, and return its key."""
        self._alive.append(value)
        self.copies[id(value)] = twin
        return id(value)

    def tensor(self, x: Tensor) -> int:
        """Copy a tensor, at most once."""
        if id(x) not in self.copies:
            leaf = x if isinstance(x, nn.Parameter) or not x.requires_grad or x.is_leaf else None
            self.put(x, copy.deepcopy(x.detach() if leaf is None else leaf, self.copies))
        return id(x)


class _Taker(pickle.Pickler):
    """Writes the structure of a value down; see the module for its rules."""

    def __init__(self, stream: io.BytesIO, table: _Table) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._table = table

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Tensor):
            return self._table.tensor(value)
        if isinstance(value, _Given):
            return self._table.put(value.value, value.value)
        if isinstance(value, (type, types.ModuleType)):
            return self._table.put(value, value)
        if isinstance(value, types.FunctionType) and not any(self._held(value)):
            return self._table.put(value, value)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return _rebound, (_Given(value), *self._held(value)), vars(value)
        if isinstance(value, types.MethodType):
            return types.MethodType, (value.__func__, value.__self__)
        if isinstance(value, types.CellType):
            return types.CellType, (), _contents(value), None, None, _fill
        if isinstance(value, weakref.ref):
            target = value()
            return (weakref.ref, (target,)) if id(target) in self._table.parts else _shared(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if hasattr(type(value), "__deepcopy__"):
            return _shared(copy.deepcopy(value, self._table.copies))
        return _reduced(value)

    def _module(self, module: nn.Module) -> Any:
        if is_parametrized(module):  # its class refuses to be pickled, and copies its attributes
            return _new, (type(module),), vars(module)
        if hasattr(module, "_orig_mod"):  # compiled again at the first call of the copy
            return type(module), (module._orig_mod, _Given(module.dynamo_ctx))
        if hasattr(type(module), "__deepcopy__"):
            # all its tensors first: by the memo they are copied as everywhere else
            _Taker(io.BytesIO(), self._table).dump(vars(module))
            return _shared(copy.deepcopy(module, self._table.copies))
        return _reduced(module)

    def _held(self, function: types.FunctionType) -> tuple[Any, ...]:
        """What a function holds: closure, defaults, keyword defaults, and globals of its module
        that are parts of the model."""
        parts, code, known = self._table.parts, function.__code__, function.__globals__
        named = {name: known[name] for name in code.co_names if name in known}
        within = {
            name: value
            for name, value in named.items()
            if id(value) in parts or id(getattr(value, "__self__", None)) in parts
        }
        home = sys.modules.get(function.__module__)
        if getattr(home, function.__qualname__, None) is function:  # its defaults are the module's
            return None, None, None, within
        return function.__closure__, function.__defaults__, function.__kwdefaults__, within


class _Giver(pickle.Unpickler):
    """Builds the copy."""

    def __init__(self, stream: io.BytesIO, table: _Table) -> None:
        super().__init__(stream)
        self._table = table

    def persistent_load(self, key: int) -> Any:
        return self._table.copies[key]


def _reduced(value: Any) -> Any:
    """How pickle takes a value apart; shared where it cannot."""
    try:
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:  # each type says in its own way that it is bound to this process
        if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise
        return _shared(value)
    return _shared(value) if isinstance(reduced, str) else reduced  # a global name


def _shared(value: Any) -> Any:
    return _itself, (_Given(value),)


def _new(kind: type[M]) -> M:
    return kind.__new__(kind)


def _itself(value: Any) -> Any:
    return value


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    """What a closure's cell holds; empty before it is assigned."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _fill(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    for value in contents:
        cell.cell_contents = value


def _rebound(
    function: types.FunctionType,
    closure: tuple[types.CellType, ...] | None,
    defaults: tuple[Any, ...] | None,
    keywords: dict[str, Any] | None,
    within: dict[str, Any],
) -> Callable[..., Any]:
    """A function that holds other things."""
    known = function.__globals__ | within if within else function.__globals__
    twin = types.FunctionType(function.__code__, known, function.__name__, defaults, closure)
    twin.__kwdefaults__ = keywords
    for name in functools.WRAPPER_ASSIGNMENTS:
        setattr(twin, name, getattr(function, name))
    return twin
