"""What rewind() returns: the model that was trained again from a checkpoint, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fisher_forget._util.numbers import percent
from fisher_forget.data.split import Split
from fisher_forget.rewind.checkpoints import Checkpoint
from fisher_forget.unlearn.newton.step import NewtonStep
from fisher_forget.unlearn.result import NotStored


@dataclass(frozen=True, repr=False)
class RewindResult:
    """A model whose training went on from a checkpoint without the forgotten samples.

    It can be pickled without the training data, and without checkpoints that lie in memory, which
    hold the forgotten samples.

    Attributes:
        model: In eval mode, on the given model's device.
        split: Who was retained and forgotten.
        checkpoint: Where the training began again.
        newton: The Newton correction at the checkpoint, or `None` without.
        losses: Mean loss in nats, of 2,000 samples of each part at most: retain_before,
            retain_after, forget_before, forget_after.
        holding: All checkpoints that were given: every one holds the forgotten samples still.
        seconds: Wall time of each stage: newton, training, check.
        versions: Of this package, torch and Python.
    """

    model: nn.Module
    split: Split = field(repr=False)
    checkpoint: Checkpoint
    newton: NewtonStep | None
    losses: dict[str, float]
    holding: tuple[Checkpoint, ...]
    seconds: dict[str, float]
    versions: dict[str, str]

    def __getstate__(self) -> dict[str, Any]:
        split = self.split
        stored = Split(NotStored(len(split.base)), split.retain, split.forget, split.batch_size)  # type: ignore[arg-type]
        holding = tuple(one.without_weights() for one in self.holding)
        bare = {"checkpoint": self.checkpoint.without_weights(), "holding": holding}
        return vars(self) | {"split": stored} | bare

    @property
    def share(self) -> float:
        """Share of a training's steps that was trained again."""
        return self.checkpoint.rest

    def __str__(self) -> str:
        loss, files = self.losses, [one.where for one in self.holding]
        n = self.newton
        taken = "none" if n is None else f"{len(n.accepted)} sub-steps, |step| {n.norm:.3g}"
        if n is not None and not n.accepted:
            taken = "no step stayed within the budget"
        held = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        return "\n".join(
            [
                f"Forgot {len(self.split.forget):,} samples, retained {len(self.split.retain):,}, "
                f"in {sum(self.seconds.values()):.1f} s",
                f"  rewound    to {percent(self.checkpoint.point)} % of the training, "
                f"{self.checkpoint.where}",
                f"  newton     {taken}; {self.seconds['newton']:.1f} s",
                f"  training   the last {percent(self.share)} % again, on retained data; "
                f"{self.seconds['training']:.1f} s",
                "  noise      none",
                f"  loss       retain {loss['retain_before']:.4g} -> {loss['retain_after']:.4g} "
                f"nats, forget {loss['forget_before']:.4g} -> {loss['forget_after']:.4g} nats",
                f"  held       {len(files)} checkpoint{'s' * (len(files) > 1)} still hold"
                f"{'s' * (len(files) == 1)} what was forgotten: {held}",
                "  An estimate, not a certificate: compare with retrained models to see how close "
                "it came.",
            ]
        )

    __repr__ = __str__  # its fields hold whole models

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        n = self.newton
        return {
            "forgotten": len(self.split.forget),
            "retained": len(self.split.retain),
            "point": self.checkpoint.point,
            "checkpoint": self.checkpoint.where,
            "newton": None if n is None else {"substeps": len(n.accepted), "norm": n.norm},
            "losses": self.losses,
            "holding": [one.where for one in self.holding],
            "seconds": self.seconds,
            "versions": self.versions,
        }
