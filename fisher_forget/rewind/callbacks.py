"""`CheckpointKeeper` as a callback of trainers that own the loop. Their libraries are optional."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_forget.errors import ConfigError
from fisher_forget.rewind.checkpoints import POINTS, CheckpointKeeper


def lightning_callback(folder: str | Path, points: Sequence[float] = POINTS) -> Any:
    """A callback for `lightning.Trainer(callbacks=[...])` that keeps checkpoints.

    What it keeps is the state of the LightningModule; `rewind` finds the model's own weights in it.
    With several processes the first one writes; the model must be whole there (DDP, not FSDP).

    Args:
        folder: See `CheckpointKeeper`.
        points: See `CheckpointKeeper`.

    Raises:
        ConfigError: If neither `lightning` nor `pytorch_lightning` is installed.
    """
    base = _base("Callback", "lightning.pytorch", "pytorch_lightning")

    def on_train_batch_end(self: Any, trainer: Any, module: Any, *_: Any) -> None:
        done = trainer.global_step
        if not trainer.is_global_zero or done == self.done:  # gradients are being accumulated
            return
        if self.keeper is None:
            total = int(trainer.estimated_stepping_batches)
            self.keeper = CheckpointKeeper(folder, total, points)
        self.done = done
        self.keeper.step(module, done)

    body = {"on_train_batch_end": on_train_batch_end, "keeper": None, "done": 0}
    return type("KeepCheckpoints", (base,), body)()


def trainer_callback(folder: str | Path, points: Sequence[float] = POINTS) -> Any:
    """A callback for `transformers.Trainer(callbacks=[...])` that keeps checkpoints.

    With several processes the first one writes; the model must be whole there (DDP, not FSDP).

    Args:
        folder: See `CheckpointKeeper`.
        points: See `CheckpointKeeper`.

    Raises:
        ConfigError: If `transformers` is not installed.
    """
    base = _base("TrainerCallback", "transformers")

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.keeper is None:
            self.keeper = CheckpointKeeper(folder, state.max_steps, points)
        self.keeper.step(given["model"], state.global_step)

    body = {"on_step_end": on_step_end, "keeper": None}
    return type("KeepCheckpoints", (base,), body)()


def _base(name: str, *modules: str) -> type:
    """The library's own class of callbacks, from the first module that is installed."""
    for module in modules:
        try:
            found: type = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        return found
    got = f"no {' or '.join(modules)} in this environment"
    raise ConfigError(got, "the library whose trainer calls back", f"pip install {modules[-1]}")
