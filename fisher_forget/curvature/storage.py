"""Curvature on disk: safetensors, with metadata of the model, the data and the kind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fisher_forget._util import files
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Info, Stored
from fisher_forget.curvature.structures import STRUCTURES
from fisher_forget.data.split import Split
from fisher_forget.errors import StorageError

FORMAT = "2"


def save_curvature(path: str | Path, curvature: Curvature, model: nn.Module, data: Split) -> None:
    """Write a curvature, with fingerprints of the model and the data that it was estimated on.

    Raises:
        CurvatureError: If the structure holds no tensors of its own (matrix-free).
        StorageError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _write(curvature.pack(), "", tensors)
    metadata = _marks(model, data) | {
        "fisher_forget": version("fisher-forget"),
        "info": json.dumps(None if curvature.info is None else asdict(curvature.info)),
        "tree": json.dumps(tree),
    }
    files.save_tensors(path, tensors, metadata)


def load_curvature(path: str | Path, model: nn.Module, data: Split) -> Curvature:
    """Read a curvature back, to the device of the model.

    Raises:
        StorageError: If the file is damaged, of another format, or of another model or data.
    """
    tensors, metadata = files.load_tensors(path)
    for key, expected in _marks(model, data).items():
        if metadata.get(key) != expected:
            got = f"{path} made for {key} {metadata.get(key)}"
            raise StorageError(got, f"{key} {expected}", "Estimate the curvature again.")
    device = next(iter(model.parameters())).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    info = json.loads(metadata["info"])
    curvature = _read(json.loads(metadata["tree"]), "", tensors, model)
    return replace(curvature, info=None if info is None else Info(**info))


def _marks(model: nn.Module, data: Split) -> dict[str, str]:
    """What a file must agree on with who reads it."""
    weights = files.fingerprint(dict(model.state_dict()))
    return {"format": FORMAT, "model": weights, "data": data.fingerprint()}


def _write(stored: Stored, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tree that JSON holds; tensors go into `tensors` under `at`."""
    tensors |= {f"{at}{name}": value for name, value in stored.tensors.items()}
    tree = {"type": stored.type, **stored.settings}
    if stored.parts:
        parts = enumerate(stored.parts)
        tree["parts"] = [[list(n), _write(part, f"{at}{i}/", tensors)] for i, (n, part) in parts]
    return tree


def _read(tree: dict[str, Any], at: str, tensors: dict[str, Tensor], model: nn.Module) -> Curvature:
    """Inverse of `_write`, parts first."""
    settings = {key: value for key, value in tree.items() if key not in ("type", "parts")}
    pairs = list(enumerate(tree.get("parts", [])))
    parts = [_read(part, f"{at}{i}/", tensors, model) for i, (_, part) in pairs]
    names = tuple((tuple(names), Stored(part["type"])) for _, (names, part) in pairs)
    inside = {name.removeprefix(at): x for name, x in tensors.items() if name.startswith(at)}
    by_name: dict[str, type[Curvature]] = {BlockDiagonal.stored_as: BlockDiagonal}
    for spec in STRUCTURES.values():
        by_name |= {operator.stored_as: operator for operator in spec.operators}
    stored = Stored(tree["type"], settings, inside, names)
    return by_name[stored.type].unpack(stored, parts, model)
