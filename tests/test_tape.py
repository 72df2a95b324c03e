"""Per-sample gradients of models that per-sample code finds hard, against one backward() a sample
and output, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pieces import LENGTH, PIECES, WIDTH, Net, jacobians
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fisher_forget import Categorical, estimate_curvature, forget
from fisher_forget.curvature.passes import squared_gradient_norms
from fisher_forget.curvature.structures.dense import Dense
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import resolve_split
from fisher_forget.errors import ModelError
from fisher_forget.params import flatten

SAMPLES = 20
LIKELIHOOD = Categorical()


def case(*names: str, seed: int = 0) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(seed)
    model = Net(*names).double().eval()
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64)
    return model, TensorDataset(x, torch.randint(0, 3, (SAMPLES,)))


def truth(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """The GGN [d, d] of the mean loss, and the squared gradient norms [N]."""
    x, y = data.tensors
    jacobian, p = jacobians(model, x), model(x).detach().softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nki,nkl,nlj->ij", jacobian, middle, jacobian) / len(x)
    residual = p - nn.functional.one_hot(y, 3)
    return ggn, torch.einsum("nki,nk->ni", jacobian, residual).square().sum(1)


def agrees(model: nn.Module, data: TensorDataset, batch_size: int, memory: int | None) -> None:
    ggn, norms = truth(model, data)
    loader = DataLoader(data, batch_size=batch_size)
    options: dict[str, Any] = {"kind": "exact", "memory": memory}
    diagonal = estimate_curvature(model, loader, structure="diagonal", **options).diagonal()
    torch.testing.assert_close(flatten(diagonal), ggn.diag(), rtol=1e-7, atol=1e-12)
    ekfac = estimate_curvature(model, loader, structure="ekfac", **options)
    assert ekfac.trace() == pytest.approx(float(ggn.trace()), rel=1e-7)
    dense = estimate_curvature(model, loader, structure="dense", **options)
    assert isinstance(dense, Dense)
    values = torch.linalg.eigvalsh(ggn)
    scale = float(values.max())
    assert dense.trace() == pytest.approx(float(ggn.trace()), rel=1e-7)
    shift = 0.1 * scale
    expected = float(torch.logdet(ggn + shift * torch.eye(len(ggn), dtype=torch.float64)))
    assert dense.damped(shift).logdet() == pytest.approx(expected, rel=1e-7, abs=1e-7)
    split = resolve_split(loader, [], allow_empty=True)
    found = squared_gradient_norms(Tape(model), split, split.retain, LIKELIHOOD, memory=memory)
    torch.testing.assert_close(found, norms, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 20])
@pytest.mark.parametrize("name", PIECES)
def test_each_piece(name: str, batch_size: int) -> None:
    model, data = case(name)
    agrees(model, data, batch_size, None)


@pytest.mark.parametrize("name", ["sorted", "experts", "head a task", "early exit"])
def test_first_samples_that_do_not_show_it(name: str) -> None:
    """They are the same, so none of them is routed otherwise or moved to another place."""
    model, data = case(name)
    x = data.tensors[0]
    x[:10] = x[:1].clone()
    agrees(model, data, 10, None)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    names=st.lists(st.sampled_from(list(PIECES)), min_size=2, max_size=3),
    seed=st.integers(0, 2**16),
    batch_size=st.sampled_from([2, 9, 20]),
    memory=st.sampled_from([1, 20_000, None]),
)
def test_random_models(names: list[str], seed: int, batch_size: int, memory: int | None) -> None:
    model, data = case(*names, seed=seed)
    agrees(model, data, batch_size, memory)


def transformer(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of `transformers`, with random weights, and its inputs."""
    transformers = pytest.importorskip("transformers", reason="not installed")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    build, options = {
        "bert": ("BertForSequenceClassification", {**small, **words, "intermediate_size": 8}),
        "vit": ("ViTForImageClassification", {**small, "image_size": 8, "patch_size": 4}),
        "llama": ("LlamaForCausalLM", {**small, **words, "intermediate_size": 8}),
        "gemma": (
            "GemmaForCausalLM",
            {**small, **words, "intermediate_size": 8, "head_dim": 4, "num_key_value_heads": 2},
        ),
        "gpt2": ("GPT2LMHeadModel", {**words, "n_embd": 8, "n_layer": 1, "n_head": 2}),
    }[name]
    family = build.split("For")[0].removesuffix("LMHeadModel")
    torch.manual_seed(0)
    model = getattr(transformers, build)(getattr(transformers, f"{family}Config")(**options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    inputs = {"input_ids": torch.randint(3, 11, (8, 5))}
    return model.double().eval(), inputs if name != "vit" else {
        "pixel_values": torch.randn(8, 3, 8, 8, dtype=torch.float64)
    }


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        ("bert", set()),
        ("gpt2", set()),
        ("llama", set()),
        ("gemma", {"model.embed_tokens.weight"}),  # scaled by its own class
        ("vit", {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}),
    ],
)
def test_transformers_go_by_rules(name: str, stray: set[str]) -> None:
    """Position ids that are fed once for the batch, norms of the library's own, keys' biases whose
    gradient is zero: by rules; bare parameters by vmap."""
    model, inputs = transformer(name)
    batch = Batch((), inputs, torch.zeros(8, dtype=torch.long))
    tape = Tape(model)
    tape.verify(batch)
    assert set(tape.stray) == stray
    assert tape._vectorised
    record = tape.run(batch)
    column = torch.randn(record.outputs.shape, dtype=torch.float64)
    found = record.per_sample(column, record.pull(column))
    for n, one in enumerate(batch.chunks(1)):
        outputs = model(**one.kwargs).logits
        names, leaves = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(outputs, leaves, column[n : n + 1], allow_unused=True)
        for key, p, g in zip(names, leaves, grads, strict=True):
            expected = torch.zeros_like(p) if g is None else g
            # the norms of language models compute in float32
            torch.testing.assert_close(found[key][n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gru", "lstm", "rnn", "projected", "time first", "cells"])
def test_recurrent_layers_go_by_rules(name: str) -> None:
    """Recorded step by step they give what torch's own kernels give."""
    model, data = case(name)
    tape, batch = Tape(model), Batch(data.tensors[:1], {}, data.tensors[1])
    tape.verify(batch)
    assert not tape.stray
    torch.testing.assert_close(tape.run(batch).outputs, model(data.tensors[0]))


class TestTrust:
    """When a rule is trusted."""

    def batch(self, size: int = 8, seed: int = 0) -> Batch:
        x = torch.randn(size, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        return Batch((x,), {}, torch.zeros(size, dtype=torch.long))

    def test_a_layer_that_turns_out_otherwise_starts_the_work_anew(self) -> None:
        """The first samples feed each expert alike; later ones do not."""
        model = Net("experts").eval()
        calm = self.batch()
        calm.args[0][:] = calm.args[0][:1]  # the same sample, eight times
        tape, tries = Tape(model), []
        tape.verify(calm)
        assert not tape.stray

        def work() -> Tensor:
            tries.append(1)
            record = tape.run(self.batch(seed=1))
            column = torch.ones_like(record.outputs)
            return record.squared_norms(column, record.pull(column))

        found = tape.settled(work)
        assert len(tries) > 1
        assert {name.split(".")[0] for name in tape.stray} == {"body"}
        rows = jacobians(model, self.batch(seed=1).args[0]).sum(1)
        torch.testing.assert_close(found, rows.square().sum(1).double(), rtol=1e-4, atol=1e-8)

    def test_a_layer_seen_late_is_verified_then(self) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.late = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

            def forward(self, x: Tensor, late: bool) -> Tensor:
                return self.stem(x[:, 0]) + (self.late(x[:, 1]) if late else 0.0)

        tape, x = Tape(Late().eval()), self.batch().args[0]
        targets = torch.zeros(8, dtype=torch.long)
        tape.verify(Batch((x, False), {}, targets))
        record = tape.run(Batch((x, True), {}, targets))
        assert all(use.trusted for use in record.uses)
        assert len(record.uses) == 2
        assert not tape.stray

    def test_a_weight_that_is_used_otherwise_late(self) -> None:
        """The first samples do not use the layer at all; later ones use its weight, not the
        layer."""

        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.late = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3, bias=False)

            def forward(self, x: Tensor, late: bool) -> Tensor:
                rest = x[:, 1] @ self.late.weight.T if late else 0.0
                return self.stem(x[:, 0]) + rest

        model, x = Late().double().eval(), self.batch().args[0].double()
        tape, targets = Tape(model), torch.zeros(8, dtype=torch.long)
        tape.verify(Batch((x, False), {}, targets))
        assert not tape.stray

        def norms() -> Tensor:
            record = tape.run(Batch((x, True), {}, targets))
            column = torch.ones_like(record.outputs)
            return record.squared_norms(column, record.pull(column))

        expected = 3 * (x[:, 0].square().sum(1) + 1 + x[:, 1].square().sum(1))
        torch.testing.assert_close(tape.settled(norms), expected)
        assert tape.stray == ("late.weight",)

    def test_other_lengths_are_verified(self) -> None:
        """Tokens of all samples merged: a rule that is right for each length."""

        class Merged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(WIDTH, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 3).mean(1)

        tape = Tape(Merged().eval())
        for length in (2, 3, 2, 5, 3):
            x = torch.randn(8, length, WIDTH)
            record = tape.run(Batch((x,), {}, torch.zeros(8, dtype=torch.long)))
            assert all(use.trusted for use in record.uses)
        assert not tape.stray

    def test_pairs_of_samples_are_compared_until_an_order_would_show(self) -> None:
        """A loader of batches of two, whose first batches come sorted."""
        model = Net("sorted").double().eval()
        x = self.batch(20).args[0].double()
        keys = model.stem(x)[:, 0, 0].argsort()
        x = x[torch.cat([keys[:8], keys[8:].flip(0)])]
        agrees(model, TensorDataset(x, torch.zeros(20, dtype=torch.long)), 2, None)

    def test_the_forward_pass_is_not_altered(self) -> None:
        """A layer fed once for the whole batch sees one row, also while it is recorded."""
        seen: list[torch.Size] = []
        tape = Tape(Net("prompt").eval())
        tape.verify(self.batch())
        for module in tape.model.modules():
            module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
        with torch.no_grad():
            tape.model(self.batch().args[0])
        plain = seen.copy()
        seen.clear()
        tape.run(self.batch())
        first = seen[: len(plain)]
        assert first == plain
        assert "body.0.place.weight" not in tape.stray

    def test_random_and_dependent_models_are_told_apart(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f = nn.Linear(WIDTH, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.f(x[:, 0] + torch.randn_like(x[:, 0]))

        with pytest.raises(ModelError, match="differ between two calls"):
            Tape(Noisy().eval()).verify(self.batch())


class Bags(Dataset[Any]):
    """Samples of different sizes, which fit in no batch of two."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(1 + index % 4, WIDTH, generator=generator, dtype=torch.float64)
        return x, index % 3


def test_samples_that_fit_in_no_batch() -> None:
    """A loader that yields them one by one is never asked for two."""
    torch.manual_seed(0)
    model = Net("cell", "prompt in front").double().eval()
    model.body[1].place = nn.Embedding(4, WIDTH).double()
    x = [Bags()[i][0] for i in range(SAMPLES)]
    rows = [jacobians(model, one[None])[0] for one in x]
    middle = [
        torch.diag(p) - torch.outer(p, p) for p in (model(one[None])[0].softmax(0) for one in x)
    ]
    expected = sum((r.T @ h @ r).diag() for r, h in zip(rows, middle, strict=True)) / SAMPLES
    loader = DataLoader(Bags(), batch_size=1)
    found = estimate_curvature(model, loader, structure="diagonal", kind="exact").diagonal()
    torch.testing.assert_close(flatten(found), expected.detach(), rtol=1e-7, atol=1e-12)
    result = forget(model, loader, [0, 1], drift=True, noise=None, progress=False)
    assert len(result.split.retain) == SAMPLES - 2
