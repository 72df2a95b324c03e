"""Copies of models: whatever they carry, the copy computes the same by weights of its own."""

from __future__ import annotations

import copy
import functools
import io
import logging
import socket
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import blobs_data, seeded, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fisher_forget import forget
from fisher_forget._util.copies import copy_model, private_copy, unwrapped
from fisher_forget.errors import ModelError

X, Y = blobs_data().tensors
PLAIN: dict[str, Any] = {"drift": True, "noise": None, "progress": False}


class Keeping(nn.Module):
    """Keeps what its first layer gave, in one of several places, and carries one thing more."""

    def __init__(self, where: str = "attribute", more: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.where, self.more = nn.Linear(4, 6), nn.Linear(6, 3), where, more
        self.kept: list[Any] = []
        self.box = types.SimpleNamespace()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if self.where == "attribute":
            self.hidden = hidden
        elif self.where == "list":
            self.kept.append({"hidden": [hidden]})
        elif self.where == "object":
            self.box.hidden = (hidden, 1)
        return self.b(hidden)


class OwnCopy(Keeping):
    """A class that says itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        twin = OwnCopy.__new__(OwnCopy)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        twin.more = "copied"
        return twin


class InClosure(Keeping):
    """Its forward is replaced by a function that holds the model."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.forward

        def forward(x: Tensor, factor: Callable[..., Tensor] = self.b.forward) -> Tensor:
            return plain(x) + 0 * factor(torch.tanh(self.a(x)))

        self.forward = forward  # type: ignore[method-assign]


class Bound(Keeping):
    """Holds itself in a bound method, a partial, a weak reference and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.a.forward, functools.partial(self.apply_layer, self.b)
        self.parent = weakref.ref(self)
        self.a.register_forward_hook(lambda _module, _args, out: out + 0 * self.b.bias.sum())

    @staticmethod
    def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        assert self.parent() is self
        return self.second(torch.tanh(self.first(x)) + 0 * self.a(x))


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 3)  # type: ignore[no-any-return, no-untyped-call]


def hidden(make: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attribute": Keeping,
    "list": lambda: Keeping("list"),
    "object": lambda: Keeping("object"),
    "own copy": OwnCopy,
    "closure": InClosure,
    "bound": Bound,
    "weight_norm": hidden(torch.nn.utils.weight_norm),
    "spectral_norm": hidden(torch.nn.utils.spectral_norm),
    "pruning": hidden(pruned),
    "parametrised": hidden(parametrizations.weight_norm),
    "orthogonal": hidden(parametrizations.orthogonal),
    "traced graph": lambda: torch.fx.symbolic_trace(small_net()),
    "average": lambda: torch.optim.swa_utils.AveragedModel(small_net()),
    "compiled part": lambda: nn.Sequential(torch.compile(small_net(), backend="eager")),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


@pytest.mark.parametrize("name", MODELS)
class TestWhatModelsCarry:
    def used(self, name: str) -> nn.Module:
        model = seeded(MODELS[name])
        model(X)
        return model

    def test_the_copy_computes_the_same_by_weights_of_its_own(self, name: str) -> None:
        model = self.used(name)
        before, twin = model(X), copy_model(model)
        assert torch.equal(twin(X), before)
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0.5).add_(0.1)
        assert not torch.allclose(twin(X), before)
        assert torch.equal(model(X), before)
        tensors = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, twin)]
        assert not tensors[0] & tensors[1]

    def test_the_result_is_the_model_at_the_new_weights(self, name: str, untouched: Any) -> None:
        model = self.used(name)
        with untouched(model):
            result = forget(model, blobs_data(), [0, 5], weight_decay=0.01, **PLAIN)
        expected = torch.func.functional_call(copy_model(model), result.newton.params, (X,))
        assert torch.allclose(result.model(X), expected, atol=1e-6)
        assert not torch.allclose(result.model(X), model(X), atol=1e-4)


def test_storing_an_activation_changes_no_number() -> None:
    plain, keeping = seeded(lambda: Keeping("nowhere")), seeded(Keeping)
    keeping(X)
    results = [forget(m, blobs_data(), [0, 5], **PLAIN).newton for m in (plain, keeping)]
    assert results[0].params.keys() == results[1].params.keys()
    assert all(torch.equal(results[0].params[n], w) for n, w in results[1].params.items())


class TestShared:
    @pytest.mark.parametrize(
        "build",
        [
            threading.Lock,
            threading.RLock,
            tempfile.TemporaryFile,
            socket.socket,
            lambda: logging.getLogger("fisher_forget.test"),
            lambda: torch,
            lambda: nn.Linear,
            lambda: nn.functional.relu,
        ],
    )
    @pytest.mark.parametrize("within", [lambda x: x, lambda x: {"x": [x]}])
    def test_with_the_given_model(self, build: Any, within: Any) -> None:
        value = build()
        twin = copy_model(Keeping(more=within(value)))
        assert (twin.more if twin.more is value else twin.more["x"][0]) is value

    @pytest.mark.parametrize("build", [threading.Event, threading.Condition, torch.Generator])
    def test_what_only_holds_a_lock_is_copied(self, build: Any) -> None:
        model = Keeping(more=build())
        assert type(copy_model(model).more) is type(model.more)

    @pytest.mark.parametrize("place", ["more", "a.stream", "b.in_a_list"])
    def test_a_generator_is_refused_by_name(self, place: str) -> None:
        def endless() -> Iterator[int]:
            yield 0

        model, (*path, name) = Keeping(), place.split(".")
        stream = endless()
        setattr(model.get_submodule(".".join(path)), name, [stream] if "list" in name else stream)
        with pytest.raises(ModelError, match=place):
            forget(model.eval(), blobs_data(), [0, 5], progress=False)
        next(stream)  # it was not touched

    def test_lists_of_a_hook_are_its_own(self) -> None:
        seen: list[Tensor] = []
        model = seeded(small_net)
        model[0].register_forward_hook(lambda _module, _args, out: seen.append(out))  # type: ignore[index]
        model(X)
        forget(model, blobs_data(), [0, 5], **PLAIN)
        assert len(seen) == 1

    def test_tied_tensors_stay_tied(self) -> None:
        model = Keeping(more={})
        model.more["weight"] = model.a.weight
        model.c = model.a
        twin = copy_model(model)
        assert twin.more["weight"] is twin.a.weight
        assert twin.c is twin.a


@given(
    st.recursive(
        st.integers() | st.just("tensor"), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=40, deadline=None)
def test_any_nesting_of_activations(tree: Any) -> None:
    def filled(x: Any) -> Any:
        if isinstance(x, list):
            return [filled(y) for y in x]
        if isinstance(x, dict):
            return {key: filled(y) for key, y in x.items()}
        return model.a.weight * 2 if x == "tensor" else x

    model = Keeping()
    model.more = filled(tree)
    twin = copy_model(model)
    flat = [torch.utils._pytree.tree_leaves(m.more) for m in (model, twin)]
    for given_leaf, copied in zip(*flat, strict=True):
        if isinstance(given_leaf, Tensor):
            assert torch.equal(copied, given_leaf)
            assert not copied.requires_grad
            assert copied.data_ptr() != given_leaf.data_ptr()
        else:
            assert copied == given_leaf


def distributed(model: nn.Module) -> nn.Module:
    """DistributedDataParallel over one process."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": distributed,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled, other backend": lambda m: torch.compile(m, backend="aot_eager"),
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
class TestWrappers:
    def test_count_as_the_model_within(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = seeded(small_net)
        plain = forget(model, blobs_data(), [0, 5], subset="0.*", **PLAIN)
        wrapped = wrap(model).eval()
        wrapped(X)
        result = forget(wrapped, blobs_data(), [0, 5], subset="0.*", **PLAIN)
        assert type(result.model) is nn.Sequential
        assert result.newton.params.keys() == {"0.weight", "0.bias"}
        for name, value in plain.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], value)
        assert unwrapped(wrapped) is model

    def test_compiled_parts(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = seeded(small_net)
        plain = forget(model, blobs_data(), [0, 5], **PLAIN)
        part = nn.Sequential(wrap(model), nn.Identity()).eval()
        part(X)
        result = forget(part, blobs_data(), [0, 5], **PLAIN)
        assert torch.allclose(result.model(X), plain.model(X), atol=1e-6)


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))  # type: ignore[no-any-return]


class OneLayer(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)


class Attention(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = self.encoder(query=x, key=x, value=x, key_padding_mask=mask)[0]
        return self.head(mixed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_in_the_mode_that_a_gpu_differentiates(
    kind: type[nn.RNNBase],
) -> None:
    model = nn.Sequential(kind(3, 4, num_layers=3, dropout=0.5)).eval()
    twin, x = private_copy(model), torch.randn(5, 2, 3)
    assert twin[0].training
    assert not (twin.training)
    assert not (model[0].training)
    assert model[0].dropout == 0.5
    torch.testing.assert_close(twin(x)[0], model(x)[0])


@pytest.mark.parametrize("build", [Encoder, lambda: Encoder(True), OneLayer, Attention])
def test_attention_gives_one_output_with_gradients_and_without(build: Any) -> None:
    model = seeded(build)
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) >= torch.tensor([[2], [6], [3], [0]])  # the last one is all padding
    twin, expected = private_copy(model), model(x, mask).detach()
    with torch.no_grad():
        assert torch.allclose(twin(x, mask), expected, atol=1e-6, equal_nan=True)
    assert torch.allclose(twin(x, mask), expected, atol=1e-6, equal_nan=True)
    assert not any(m._forward_pre_hooks for m in model.modules())
    data = [
        {
            "x": x[i],
            "mask": mask[i],
            "labels": torch.arange(6).remainder(3).masked_fill(mask[i], -100),
        }
        for i in (0, 1, 2)
    ] * 8
    result = forget(model, data, [0], **PLAIN)  # type: ignore[arg-type]
    outputs = copy_model(result.model)
    outputs.load_state_dict(result.model.state_dict())
    assert not any(m._forward_pre_hooks for m in result.model.modules())


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(small_net(), {nn.Linear})  # type: ignore[no-any-return, no-untyped-call]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.w.dtype) @ self.w).abs()


def integers() -> nn.Module:
    model = small_net()
    model[0].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)  # type: ignore[index]
    return model


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight.data = model[0].weight.data
    return model


def sharded() -> nn.Module:
    distributed(small_net())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    from torch.distributed.tensor import Replicate, distribute_module

    return distribute_module(small_net(), mesh, lambda *_: None) if Replicate else small_net()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: torch.jit.script(small_net()), "TorchScript"),
        (lambda: torch.jit.trace(small_net(), X), "TorchScript"),
        (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.Linear(3, 3)), "TorchScript"),
        (lazy, "has seen no batch"),
        (lambda: small_net().to("meta"), "meta device"),
        (quantised, "quantised layers"),
        (integers, "quantised weights of type torch.int8"),
        (Complex, "complex weights"),
        (sharded, "sharded"),
        (tied_by_data, r"share their memory, but not their gradients \(0.weight, 1.weight\)"),
        (lambda: small_net().half(), "half precision"),
        (lambda: small_net().to(torch.bfloat16), "half precision"),
    ],
)
def test_refused_with_the_true_reason(build: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        forget(build().eval(), blobs_data(), [0, 5], progress=False)


@pytest.mark.parametrize("build", [small_net, Keeping, lambda: nn.LSTM(4, 3)])
def test_a_copy_can_be_saved_like_the_model(build: Any) -> None:
    stream = io.BytesIO()
    torch.save(copy_model(seeded(build)).state_dict(), stream)
    stream.seek(0)
    assert torch.load(stream).keys() == build().state_dict().keys()
