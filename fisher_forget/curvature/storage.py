"""Curvature on disk: safetensors with metadata that says which model, which data and what kind it
belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fisher_forget._util import files
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Info
from fisher_forget.curvature.rules import rule_for
from fisher_forget.curvature.rules.layers import MatrixRule
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.curvature.structures.ekfac import Kronecker, Matrix
from fisher_forget.curvature.structures.low_rank import LowRank
from fisher_forget.data.split import Split
from fisher_forget.errors import CurvatureError, StorageError
from fisher_forget.params import Params

FORMAT = "1"


def save_curvature(path: str | Path, curvature: Curvature, model: nn.Module, data: Split) -> None:
    """Write a curvature, with fingerprints of the model and the data that it was estimated on.

    Raises:
        CurvatureError: If the structure holds no tensors of its own (matrix-free).
        StorageError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(curvature, "", tensors)
    metadata = {
        "format": FORMAT,
        "fisher_forget": version("fisher-forget"),
        "model": files.fingerprint(dict(model.state_dict())),
        "data": data.fingerprint(),
        "info": json.dumps(None if curvature.info is None else asdict(curvature.info)),
        "tree": json.dumps(tree),
    }
    files.save_tensors(path, tensors, metadata)


def load_curvature(path: str | Path, model: nn.Module, data: Split) -> Curvature:
    """Read a curvature back.

    Raises:
        StorageError: If the file is damaged, of another format, or was made for another model or
            other data.
    """
    tensors, metadata = files.load_tensors(path)
    asked = {
        "format": FORMAT,
        "model": files.fingerprint(dict(model.state_dict())),
        "data": data.fingerprint(),
    }
    for key, expected in asked.items():
        if metadata.get(key) != expected:
            raise StorageError(
                f"{path} made for {key} {metadata.get(key)}",
                f"{key} {expected}",
                "Estimate the curvature again.",
            )
    info = json.loads(metadata["info"])
    found = _unpack(json.loads(metadata["tree"]), "", tensors, model)
    return replace(found, info=None if info is None else Info(**info))


def _pack(curvature: Curvature, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe the operator; its tensors go into `tensors` under `at`."""
    if isinstance(curvature, BlockDiagonal):
        parts = [
            [list(names), _pack(part, f"{at}{i}/", tensors)]
            for i, (names, part) in enumerate(curvature.parts)
        ]
        return {"type": "blocks", "parts": parts, "order": list(curvature.order)}
    if isinstance(curvature, LowRank):
        tensors |= {f"{at}basis": curvature.basis, f"{at}eigenvalues": curvature.eigenvalues}
        tensors |= {f"{at}like/{name}": p for name, p in curvature.like.items()}
        return {
            "type": "low_rank",
            "delta": curvature.delta,
            "tau": curvature.tau,
            "like": list(curvature.like),
        }
    if not isinstance(curvature, (Diagonal, Kronecker, Dense)):
        raise CurvatureError(
            f"a {type(curvature).__name__}",
            "a diagonal, EKFAC, dense, low-rank or mixed curvature",
            "A matrix-free curvature is its model and data: store these.",
        )
    tensors |= {f"{at}eigenvalues/{key}": value for key, value in curvature.eigenvalues.items()}
    tree: dict[str, Any] = {
        "tau": curvature.tau,
        "signed": curvature.signed,
        "keys": list(curvature.eigenvalues),
    }
    if isinstance(curvature, Diagonal):
        return tree | {"type": "diagonal"}
    if isinstance(curvature, Dense):
        tensors |= {f"{at}basis": curvature.basis} | {
            f"{at}like/{name}": p for name, p in curvature.like.items()
        }
        return tree | {"type": "dense", "like": list(curvature.like)}
    if curvature.row is not None:
        tensors[f"{at}row"] = curvature.row
    tensors[f"{at}col"] = curvature.col
    return tree | {
        "type": "kronecker",
        "weight": curvature.layout.weight,
        "bias": curvature.layout.bias,
    }


def _unpack(
    tree: dict[str, Any], at: str, tensors: dict[str, Tensor], model: nn.Module
) -> Curvature:
    """Inverse of `_pack`; the layout of a Kronecker block comes from the model's layer."""
    kind = tree["type"]
    if kind == "blocks":
        parts = [
            (tuple(names), _unpack(part, f"{at}{i}/", tensors, model))
            for i, (names, part) in enumerate(tree["parts"])
        ]
        return BlockDiagonal(tuple(parts), tuple(tree["order"]))
    like: Params = {name: tensors[f"{at}like/{name}"] for name in tree.get("like", [])}
    if kind == "low_rank":
        return LowRank(
            basis=tensors[f"{at}basis"],
            eigenvalues=tensors[f"{at}eigenvalues"],
            delta=tree["delta"],
            like=like,
            tau=tree["tau"],
        )
    eigenvalues = {key: tensors[f"{at}eigenvalues/{key}"] for key in tree["keys"]}
    tau, signed = tree["tau"], tree["signed"]
    if kind == "diagonal":
        return Diagonal(eigenvalues, tau, signed=signed)
    if kind == "dense":
        return Dense(
            eigenvalues=eigenvalues, tau=tau, signed=signed, basis=tensors[f"{at}basis"], like=like
        )
    layout = Matrix(_rule_of(tree["weight"], model), tree["weight"], tree["bias"])
    return Kronecker(
        eigenvalues=eigenvalues,
        tau=tau,
        signed=signed,
        layout=layout,
        row=tensors.get(f"{at}row"),
        col=tensors[f"{at}col"],
    )


def _rule_of(weight: str, model: nn.Module) -> MatrixRule:
    wanted = dict(model.named_parameters())[weight]
    for module in model.modules():
        rule = (
            rule_for(module) if any(p is wanted for p in module.parameters(recurse=False)) else None
        )
        if isinstance(rule, MatrixRule):
            return rule
    raise StorageError(
        f"a block of {weight}",
        "a layer with a matrix of that name",
        "Estimate the curvature again.",
    )
