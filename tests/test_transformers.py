"""Models of `transformers` go through unchanged: GPT-2 with dict batches, padding and a tied
embedding, and ViT."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fisher_forget import Categorical, estimate_curvature
from fisher_forget.params import Params

transformers = pytest.importorskip("transformers", reason="not installed")

TIGHT = 1e-6  # relative, float64
VOCABULARY, TOKENS, PADDING = 9, 5, 0

pytestmark = [
    pytest.mark.parametrize("attention", ["sdpa", "eager"]),
]


class Dicts(Dataset[dict[str, Tensor]]):
    """Samples as dicts, from tensors that lead with the samples."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[index] for name, x in self.tensors.items()}


def texts(
    lengths: tuple[int, ...] = (TOKENS, TOKENS - 1, TOKENS - 3), padding: int = PADDING
) -> Dicts:
    """Random sequences, padded on the right; the label of a token is the one after it: shifted
    by the user, so that the models' own loss, which shifts inside, is not what they mean."""
    ids = torch.randint(
        1, VOCABULARY, (len(lengths), TOKENS + 1), generator=torch.Generator().manual_seed(2)
    )
    kept = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    inputs, labels = ids[:, :-1].where(kept, padding), ids[:, 1:].where(kept, -100)
    return Dicts(input_ids=inputs, attention_mask=kept.long(), labels=labels)


def images() -> Dicts:
    generator = torch.Generator().manual_seed(3)
    return Dicts(
        pixel_values=torch.randn(5, 1, 4, 4, generator=generator), labels=torch.arange(5) % 3
    )


def seeded(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
        with torch.no_grad():
            for (
                p
            ) in model.parameters():  # the default's norms of 1 and biases of 0 would hide errors
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def gpt2(attention: str, **options: int) -> nn.Module:
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 2, **options}
    tokens = {
        "vocab_size": VOCABULARY,
        "n_positions": TOKENS,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return seeded(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**sizes, **tokens, attn_implementation=attention),
    )


def vit(attention: str) -> nn.Module:
    sizes = {
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 6,
    }
    config = transformers.ViTConfig(
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        **sizes,
        attn_implementation=attention,
    )
    return seeded(transformers.ViTForImageClassification, config)


def brute_force(model: nn.Module, data: Dicts) -> Params:
    """Sum over samples, scored positions t and classes y of p_ty (d log p_ty / dw)^2, per scored
    position."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for n in range(len(data)):
        sample = {name: x[None] for name, x in data[n].items()}
        labels = sample.pop("labels").reshape(-1)
        floating = {name: x.double() if x.is_floating_point() else x for name, x in sample.items()}
        logp = model(**floating).logits.reshape(len(labels), -1).log_softmax(-1)
        for t, y in itertools.product(range(len(labels)), range(logp.shape[1])):
            if labels[t] == -100:
                continue
            grads = torch.autograd.grad(logp[t, y], list(model.parameters()), retain_graph=True)
            for name, g in zip(total, grads, strict=True):
                total[name] += logp[t, y].exp().detach() * g.square()
        count += int((labels != -100).sum())
    return {name: value / count for name, value in total.items()}


def assert_close(found: Params, truth: Params) -> None:
    assert list(found) == list(truth)
    largest = max(float(value.max()) for value in truth.values())
    for name, value in truth.items():
        assert float((found[name] - value).abs().max()) < TIGHT * largest, name


@pytest.mark.parametrize(("build", "data"), [(gpt2, texts()), (vit, images())], ids=["gpt2", "vit"])
class TestUnchanged:
    def test_diagonal_is_the_brute_force(self, build: Any, data: Dicts, attention: str) -> None:
        model = build(attention).double()
        loader = DataLoader(data, batch_size=2)
        assert_close(
            estimate_curvature(
                model, loader, Categorical(), structure="diagonal", kind="exact"
            ).diagonal(),
            brute_force(model, data),
        )

    def test_ekfac_keeps_the_trace(self, build: Any, data: Dicts, attention: str) -> None:
        model = build(attention).double()
        found = estimate_curvature(
            model, DataLoader(data, batch_size=2), Categorical(), structure="ekfac", kind="exact"
        )
        truth = brute_force(model, data)
        assert set(found.diagonal()) == set(truth)
        assert found.trace() == pytest.approx(
            sum(float(value.sum()) for value in truth.values()), rel=TIGHT
        )

    @pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
    def test_model_is_untouched(
        self,
        build: Any,
        data: Dicts,
        attention: str,
        structure: Any,
        untouched: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        model: Any = build(attention)
        config = model.config.to_dict()
        with untouched(model):
            found = estimate_curvature(
                model,
                DataLoader(data, batch_size=2),
                Categorical(),
                structure=structure,
                kind="sketch",
            )
        assert model.config.to_dict() == config
        assert 0 < found.trace() < float("inf")


def test_padding_takes_no_part(attention: str) -> None:
    model = gpt2(attention).double()
    first, second = (
        estimate_curvature(
            model, texts(padding=token), Categorical(), structure="diagonal", kind="exact"
        ).diagonal()
        for token in (PADDING, 5)
    )
    assert_close(first, second)


def test_tied_embedding_is_one_parameter(attention: str) -> None:
    model = gpt2(attention)
    found = estimate_curvature(model, texts(), Categorical(), structure="ekfac").diagonal()
    assert "transformer.wte.weight" in found
    assert "lm_head.weight" not in found


def test_ekfac_of_several_blocks_does_not_depend_on_the_batch_size(attention: str) -> None:
    model = gpt2(attention, n_layer=3, n_embd=8).double()
    data = texts((TOKENS, 2, 4, 3, TOKENS, 1, 4))
    one, other = (
        estimate_curvature(
            model,
            DataLoader(data, batch_size=size),
            Categorical(),
            structure="ekfac",
            kind="sketch",
        )
        for size in (2, 7)
    )
    assert_close(one.diagonal(), other.diagonal())
