r"""Another label: go on training, with samples whose labels are known to be wrong as "any class but
that one".

    w <- w - lr grad of (1/B) (sum over D_r of l_n + sum over D_f of -log(1 - p_y)) + wd w

over batches of D_r and D_f mixed, y being the label that is wrong. What one would learn from
complementary labels (Ishida et al. 2017, arXiv:1705.07541; the loss is that of Yu et al. 2018,
arXiv:1711.09535, with uniform transitions).

It is no forgetting: to a model that was trained without D_f nothing has ever spoken against y. It
is for poison, of which more is known than that it should not be there. Poison that is fitted well
has no gradient left, 1 - p_y of its label, so that methods that start from it do not move; here the
gradient is that of f_y - log sum_{c != y} exp f_c, times p_y. And what is unknown of the poison is
outvoted, where retraining without the known part would learn it all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_forget.baselines.base import SgdMethod, Training
from fisher_forget.baselines.protocol import Grid, Range
from fisher_forget.baselines.random_labels import labelled
from fisher_forget.baselines.training_loop import Epoch, Loss, each, numbered
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Categorical


@dataclass(frozen=True, kw_only=True)
class OtherLabel(SgdMethod):
    """Training goes on; forgotten samples count as any class but their label.

    Raises:
        ConfigError: In `unlearn`, if the targets are not one class each.
    """

    name = "other-label"
    grid: ClassVar[Grid] = {"lr": Range(1e-3, 0.2), "epochs": Range(1, 10, whole=True)}

    epochs: int = 5
    lr: float = 0.05
    batch_size: int = 64

    def losses(self, training: Training) -> Epoch:
        likelihood, split = labelled(training.likelihood, self.name), training.split

        def loss(wrong: Tensor, model: nn.Module, batch: Batch) -> Tensor:
            outputs, targets = training.outputs(model, batch), batch.targets
            kept, other = likelihood.losses(outputs, targets), avoided(likelihood, outputs, targets)
            total = other.where(wrong.to(other.device), kept).sum()
            return total / likelihood.counts(targets).sum().to(total)

        def epoch(_: int, rng: np.random.Generator) -> Iterator[Loss]:
            for rows, batch in numbered(split, split.indices("all"), self.batch_size, rng):
                wrong = torch.from_numpy(np.isin(rows, split.forget))
                yield from each([batch], partial(loss, wrong))

        return epoch


def avoided(likelihood: Categorical, outputs: Tensor, targets: Tensor) -> Tensor:
    """-log(1 - p_y), nats, summed over the scored positions of a sample: [B].

    Raises:
        ConfigError: If targets are probabilities.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> round(float(avoided(Categorical(), logits, torch.tensor([2])).exp()), 4)  # 4 / 3
        1.3333
    """
    rows, labels = likelihood.aligned(outputs, targets)
    if labels.is_floating_point():
        expected, fix = "one class each, which is wrong", "Choose another method."
        raise ConfigError("targets that are probabilities", expected, fix)
    scored = labels != likelihood.ignore_index
    own = F.one_hot(labels.where(scored, 0), rows.shape[-1]).bool()
    # log(1 + e^m): p_y itself may round to 1
    margin = rows[own].view_as(labels) - rows.masked_fill(own, -torch.inf).logsumexp(-1)
    return F.softplus(margin).where(scored, 0).reshape(len(labels), -1).sum(1)
