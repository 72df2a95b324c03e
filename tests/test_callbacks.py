"""Checkpoints of trainers that own the loop, with the trainers themselves."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fisher_forget import ConfigError, lightning_callback, list_checkpoints, trainer_callback

DATA = TensorDataset(
    torch.randn(32, 3, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
)


def test_lightning(tmp_path):
    """Sixteen batches of which two make a step, and two epochs: 16 steps."""
    lightning = pytest.importorskip("pytorch_lightning", reason="not installed")
    seen = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_before_zero_grad(self, _):
            seen[self.trainer.global_step] = self.net.weight.detach().clone()

    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            callbacks=[lightning_callback(tmp_path, (0.5, 0.75))],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, DataLoader(DATA, batch_size=2))
    kept = list_checkpoints(tmp_path)
    assert [one.point for one in kept] == [0.5, 0.75]
    for one, step in zip(kept, (8, 12), strict=True):
        assert torch.equal(one.model(nn.Linear(3, 2)).weight, seen[step])
    assert not torch.equal(seen[8], seen[12])


def test_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="not installed")
    transformers = pytest.importorskip("transformers", reason="not installed")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    seen = {}

    class See(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            seen[state.global_step] = given["model"].linear.weight.detach().clone()

    model = Net()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"x": x, "labels": y} for x, y in DATA]
    transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[See(), trainer_callback(tmp_path / "kept")]
    ).train()
    kept = list_checkpoints(tmp_path / "kept")
    assert [one.point for one in kept] == [0.5, 0.75, 7 / 8]
    for one, step in zip(kept, (4, 6, 7), strict=True):
        assert torch.equal(one.model(Net()).linear.weight, seen[step])


@pytest.mark.parametrize("make", [lightning_callback, trainer_callback])
def test_without_the_library(make, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install"):
        make(tmp_path)
