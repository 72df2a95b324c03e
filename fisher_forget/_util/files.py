"""Files that survive a kill: written beside their place and moved into it; reading runs no code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fisher_forget._util.copies import copy_model
from fisher_forget.errors import StorageError

CHECKSUM = "sha256-2"  # of tensors and metadata: the format does not notice a flipped bit
EARLIER = ("sha256",)
AGAIN = "Remove it and compute it again."
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|\.tmp\w{6}")


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors of any layout and device; the file appears complete or not at all.

    Tensors that share memory are written once each, and come back as separate ones.

    Raises:
        StorageError: If the file cannot be written.
    """
    # a clone of each, because the format refuses shared memory and strides
    own = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    notes = {**metadata, CHECKSUM: _hash([own, dict(metadata)])}
    write_file(Path(path), lambda temporary: save_file(own, temporary, metadata=notes))


def load_tensors(
    path: str | Path, *, foreign: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a file of `save_tensors`.

    Args:
        path: The file.
        foreign: It may be one of another library, which has no checksum.

    Raises:
        StorageError: If there is no such file, or it is damaged.
    """
    with _reading(Path(path)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(file.metadata() or {})
    written = metadata.pop(CHECKSUM, None)
    if written != _hash([tensors, metadata]) and not (foreign and written is None):
        raise StorageError(
            f"{path} with another checksum than that of its content", "an undamaged file", AGAIN
        )
    return tensors, metadata


def read_metadata(path: str | Path, *, checked: bool = False) -> dict[str, str]:
    """The metadata alone, without reading the tensors.

    Args:
        path: The file.
        checked: Only of a file that has a checksum of this version.

    Raises:
        StorageError: If there is no such file, its header is damaged, or it has no checksum.
    """
    with _reading(Path(path)) as file:
        notes = dict(file.metadata() or {})
    if notes.pop(CHECKSUM, None) is None and checked:
        raise StorageError(f"{path} of an earlier version", "one with a checksum", AGAIN)
    return notes


def own_metadata(path: str | Path) -> dict[str, str] | None:
    """The metadata of a file that `save_tensors` wrote, in this version or an earlier one; `None`
    where it is damaged, or of another library."""
    try:
        with _reading(Path(path)) as file:
            notes = dict(file.metadata() or {})
    except StorageError:
        return None
    marks = [notes.pop(name, None) for name in (CHECKSUM, *EARLIER)]
    return notes if any(marks) else None


def save_model(path: str | Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a model's parameters and persistent buffers.

    Raises:
        StorageError: If the file cannot be written, or the model keeps state that is not a tensor.
    """
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        got = f"state that is not a tensor: {odd}"
        raise StorageError(got, "tensors only", "Drop get_extra_state from the model.")
    save_tensors(path, state, metadata)


def load_model(
    path: str | Path, model: nn.Module, expect: Mapping[str, str] | None = None
) -> nn.Module:
    """A deep copy of `model`, in eval mode, with the weights and buffers of a file of `save_model`.

    Args:
        path: The file.
        model: Gives the architecture; untouched.
        expect: Metadata that the file must have.

    Raises:
        StorageError: If the file is missing or damaged, its metadata differ from `expect`, or it is
            of another model.
    """
    tensors, metadata = load_tensors(path)
    for name, value in (expect or {}).items():
        if metadata.get(name) != value:
            got = f"{path} with {name}={metadata.get(name)!r}"
            raise StorageError(got, f"{name}={value!r}", "It belongs to another run.")
    return fill_model(model, tensors)


def fill_model(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `model`, in eval mode, that holds `state`.

    Raises:
        StorageError: If names, shapes or dtypes differ from the model's.
    """
    twin = copy_model(model)
    own = twin.state_dict()
    wrong = sorted(state.keys() ^ own.keys()) or [
        f"{name} {tuple(t.shape)} {t.dtype} for {tuple(own[name].shape)} {own[name].dtype}"
        for name, t in state.items()
        if t.shape != own[name].shape or t.dtype != own[name].dtype
    ]
    if wrong:
        got = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        fix = "Build the model with the options that the stored one was built with."
        got = f"weights that differ from the model's in {got}"
        raise StorageError(got, f"those of {type(model).__name__}", fix)
    twin.load_state_dict(dict(state))
    twin.zero_grad(set_to_none=True)
    return twin.eval()


def write_json(path: str | Path, obj: object) -> None:
    """Write dataclasses, mappings, sequences, arrays, tensors and scalars as JSON; NaN and infinity
    become null.

    Raises:
        StorageError: If something else is in it, or the file cannot be written.
    """
    write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text, in UTF-8; half a surrogate pair, as odd file names have it, as JSON writes it.

    Raises:
        StorageError: If the file cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    write_file(Path(path), lambda temporary: temporary.write_bytes(content))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        StorageError: If it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: {error}", "a JSON file written by a finished run", AGAIN
        ) from error


def ensure_folder(path: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        StorageError: If it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error}", "a folder that can be made", "Name another folder."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder} without permission to write", "a writable folder", "Name another folder."
        )
    return folder


def fingerprint(*parts: object) -> str:
    """16 hexadecimal digits that change when any part does, and are the same on every machine.

    Parts are scalars, strings, paths, sequences, sets, mappings (in any order), dataclasses,
    arrays, tensors, modules, functions by their name, and anything whose `repr` says all of it. A
    tuple equals a list.

    Raises:
        StorageError: If a part's `repr` holds a memory address, as that of a lambda does.
    """
    return _hash(list(parts))[:16]


def _hash(part: object) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(part):
        # the length first, or "ab", "c" would equal "a", "bc"
        digest.update(b"%d:" % len(piece))
        digest.update(piece)
    return digest.hexdigest()


def _pieces(part: object) -> Iterator[bytes | memoryview]:
    """The bytes that stand for a part, type by type."""
    if isinstance(part, Tensor):
        flat = part.detach().cpu().contiguous().reshape(-1)
        yield f"tensor {part.dtype} {tuple(part.shape)}".encode()
        yield flat.view(torch.uint8).numpy().data  # as bytes: NumPy knows no bfloat16
    elif isinstance(part, np.ndarray) and part.dtype != object:
        yield f"array {part.dtype.str} {part.shape}".encode()
        yield part.tobytes()
    elif isinstance(part, nn.Module):
        yield f"module {part!r}".encode()
        yield from _pieces(part.state_dict())
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield f"dataclass {type(part).__qualname__}".encode()
        names = [field.name for field in dataclasses.fields(part)]
        yield from _pieces({name: getattr(part, name) for name in names})
    elif isinstance(part, Mapping):
        yield f"mapping {len(part)}".encode()
        for key in sorted(part, key=repr):
            yield from _pieces(key)
            yield from _pieces(part[key])
    elif isinstance(part, (list, tuple, range)):
        yield f"sequence {len(part)}".encode()
        for item in part:
            yield from _pieces(item)
    elif isinstance(part, (set, frozenset)):
        yield f"set {sorted(_hash(item) for item in part)}".encode()
    else:
        yield _text(part).encode()


def _text(part: object) -> str:
    if isinstance(part, np.generic):
        part = part.item()
    if isinstance(part, os.PathLike):
        return f"path {os.fspath(part)}"
    name = getattr(
        part, "__qualname__", "<"
    )  # a lambda's or a nested function's, with a "<", does not say what it does
    text = f"{part.__module__}.{name}" if "<" not in name else repr(part)
    if re.search(r" at 0x[0-9a-fA-F]+", text):
        fix = "Pass what it is made of instead."
        raise StorageError(
            f"{text}, which differs in every run", "a part whose repr says all of it", fix
        )
    return f"{type(part).__name__} {text}"


def plain(obj: object) -> Any:
    """What json can write."""
    if obj is None or isinstance(obj, (bool, int, str)):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, Tensor):
        return plain(obj.detach().cpu().tolist())
    if isinstance(obj, (np.generic, np.ndarray)):
        return plain(obj.tolist())
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple, range)):
        return [plain(item) for item in obj]
    if isinstance(obj, os.PathLike):
        return str(os.fspath(obj))
    got = f"an object of type {type(obj).__name__}"
    raise StorageError(got, "what JSON can hold", "Convert it before writing it.")


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise StorageError(
            f"no file {path}", "a file written earlier", "Check the path, or compute it again."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{path}, which cannot be read: {error}", "an undamaged safetensors file", AGAIN
        ) from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside the path, and move it there.

    A kill, or a machine that loses its power, leaves the old file or the new one: a rename within a
    folder is atomic, and both are on the disk (fsync) when this returns.

    Raises:
        StorageError: If the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: {error}", "a file that can be written", "Check the folder and its space."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; where the system cannot say so, do nothing."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporary(folder: Path) -> None:
    """Remove what killed writes left behind, in a folder that nobody else writes to now: files of
    `write_file`, and those that safetensors writes within it."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
