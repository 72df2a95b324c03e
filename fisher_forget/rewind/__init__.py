"""Checkpoints of the training, and forgetting that starts from one of them."""

from fisher_forget.rewind.callbacks import lightning_callback, trainer_callback
from fisher_forget.rewind.checkpoints import Checkpoint, CheckpointKeeper, list_checkpoints
from fisher_forget.rewind.result import RewindResult
from fisher_forget.rewind.rewind import rewind

__all__ = [
    "Checkpoint",
    "CheckpointKeeper",
    "RewindResult",
    "lightning_callback",
    "list_checkpoints",
    "rewind",
    "trainer_callback",
]
