"""What goes into and comes out of named layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy, unwrapped
from fisher_forget._util.isolation import isolated
from fisher_forget.data.samples import read_samples
from fisher_forget.errors import DataError, ModelError, NumericalError
from fisher_forget.evaluate.predictions import whole_splits

INPUT = "input"  # the name under which a model's own input is shown


def finite_samples(data: Any) -> TensorDataset:
    """Samples in memory, of `read_samples`, without NaN or infinite inputs.

    Raises:
        DataError: If they are something else; says how many.
    """
    samples = read_samples(data)
    for x in samples.tensors[:-1]:
        broken = int((~torch.isfinite(x.flatten(1) if x.dim() > 1 else x[:, None])).any(1).sum())
        if broken:
            got = f"NaN or infinite inputs in {broken:,} of {len(x):,} samples"
            raise DataError(got, "finite inputs", "Leave these samples out, or fill them in.")
    return samples


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """A layer by its name.

    Raises:
        ModelError: If there is none; names those that there are.
    """
    known: dict[str, nn.Module] = {k: m for k, m in unwrapped(model).named_modules() if k}
    if name not in known:
        got, expected = f"the layer {name!r}", f"one of {list(known)}"
        raise ModelError(got, expected, "Take a name of model.named_modules().")
    return known[name]


@isolated()
def activations(
    model: nn.Module, samples: TensorDataset, layers: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Outputs of layers, flattened: [N, width] each, on the CPU, in the order of the model.

    Args:
        model: In eval mode; untouched.
        samples: What it is asked about.
        layers: Names; by default of every layer without layers of its own that gives one tensor
            with a row for each sample, once.

    Raises:
        ModelError: If a named layer is not there, is not called once, or gives something else.
        NumericalError: If an output is not finite.
    """
    if isinstance(layers, str):
        layers = [layers]
    twin = private_copy(model)
    names = [k for k, m in twin.named_modules() if not list(m.children())]
    modules = {name: layer_of(twin, name) for name in (names if layers is None else layers)}
    seen: dict[str, list[Any]] = {}
    calls: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.setdefault(name, []).append(output)

        return hook

    for name, module in modules.items():
        module.register_forward_hook(note(name))
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in whole_splits({"asked": samples})["asked"].batches("all"):
            seen.clear()
            placed = batch.on(twin)
            P.first_call(twin, placed.args, placed.kwargs)
            for name, outputs in seen.items():
                calls[name] = len(outputs)
                x = outputs[0]
                if (
                    len(outputs) == 1
                    and isinstance(x, Tensor)
                    and x.shape[:1] == batch.targets.shape[:1]
                ):
                    parts.setdefault(name, []).append(x.detach().flatten(1).float().cpu())
    found = {name: torch.cat(x) for name, x in parts.items()}
    _check(layers, found, calls)
    return found


def _check(
    layers: Sequence[str] | None, found: Mapping[str, Tensor], calls: Mapping[str, int]
) -> None:
    for name, x in found.items():
        if not bool(torch.isfinite(x).all()):
            got = f"NaN or infinite outputs of {name!r}"
            raise NumericalError(got, "finite activations", "Check the weights and the inputs.")
    expected = "a layer that is called once and gives one tensor with a row for each sample"
    for name in layers or ():
        if name not in found:
            told = calls.get(name, 0)
            shape = ", whose output has no row for each sample" if told == 1 else ""
            got = f"{name!r}, called {told} times by forward{shape}"
            raise ModelError(got, expected, "Name another layer, such as one around it.")
    if not found:
        raise ModelError("a model without such layers", expected, "Name layers that are called.")


@isolated()
def inputs_of(model: nn.Module, samples: TensorDataset, layer: str) -> Tensor:
    """What goes into a layer: [N, width], on the CPU.

    Raises:
        ModelError: If it is not called once, on one vector a sample.
        NumericalError: If they are not finite.
    """
    twin = private_copy(model)
    seen: list[Any] = []
    layer_of(twin, layer).register_forward_pre_hook(lambda _, args: seen.append(args))
    parts = []
    with torch.no_grad():
        for batch in whole_splits({"asked": samples})["asked"].batches("all"):
            seen.clear()
            placed = batch.on(twin)
            P.first_call(twin, placed.args, placed.kwargs)
            x = seen[0][0] if len(seen) == 1 and seen[0] else None
            if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(batch.targets):
                shape = "something else" if not isinstance(x, Tensor) else tuple(x.shape)
                got = f"{layer!r}, called {len(seen)} times by forward, on {shape}"
                expected = "a layer that is called once, on one vector for each sample"
                raise ModelError(got, expected, "Name a layer after pooling or flattening.")
            if not bool(torch.isfinite(x).all()):
                got = f"NaN or infinite inputs of {layer!r}"
                raise NumericalError(got, "finite ones", "Check the weights before it.")
            parts.append(x.detach().cpu())
    return torch.cat(parts)


@isolated()
def called(model: nn.Module, samples: TensorDataset) -> list[str]:
    """Names of the modules in the order in which forward calls them first; "" is the model."""
    twin = private_copy(model)
    seen: dict[nn.Module, None] = {}
    for module in twin.modules():
        module.register_forward_pre_hook(lambda module, _: seen.setdefault(module))
    batch = next(iter(whole_splits({"asked": samples})["asked"].batches("all"))).on(twin)
    with torch.no_grad():
        P.first_call(twin, batch.args, batch.kwargs)
    names = {module: name for name, module in twin.named_modules()}
    return [names[module] for module in seen]


def in_order(model: nn.Module, samples: TensorDataset, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers once each, as forward calls them; those that it does not call come last."""
    place = {name: k for k, name in enumerate(called(model, samples))}
    return tuple(sorted(dict.fromkeys(layers), key=lambda name: place.get(name, len(place))))


def fed_before(model: nn.Module, samples: TensorDataset, layer: str) -> list[str]:
    """Names of the parameters of modules that forward calls before a layer, or around it: what its
    inputs depend on."""
    names = called(model, samples)
    modules = dict(unwrapped(model).named_modules())
    before = [modules[name] for name in names[: names.index(layer)]]
    owned = {id(p) for module in before for p in module.parameters(recurse=False)}
    return [name for name, p in unwrapped(model).named_parameters() if id(p) in owned]
