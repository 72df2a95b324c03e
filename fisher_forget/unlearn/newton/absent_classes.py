r"""Classes with no retained sample: where their output rows would be.

A row w_c of the last layer that no retained sample is labelled with has next to no curvature: with
p_c the probability of its class and h the features, its block of the GGN is the retained mean of
p_c (1 - p_c) h h^T. The flow moves it by dw_c/dt = -(wd w_c + mean p_c h) with p_c -> 0, that is by
weight decay alone, for longer than any step. The limit w_c = 0 is known, so the correction starts
there.

A network that ends in a log-softmax has no output that one row alone changes: give its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import NumericalError
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Gradient, Objective

TRACE = 1e-9  # of a class's target mass: what subtracting soft labels leaves
ALIKE = 1e-5  # relative difference of outputs that are the same


def absent_classes(total: Gradient, retained: Gradient) -> tuple[int, ...]:
    """Classes that some sample is labelled with, but no retained one; none without classes."""
    gone = (total.classes > 0) & (retained.classes <= TRACE * total.classes)
    return tuple(gone.flatten().nonzero().flatten().tolist()) if gone.dim() else ()


def clear_rows(
    objective: Objective, split: Split, probe: Indices, classes: Sequence[int]
) -> Params | None:
    """The original parameters with the output rows of some classes set to zero.

    A parameter has output rows if setting those of `classes` to zero changes their outputs and no
    others. That is measured, so any architecture will do: a linear or convolutional head, with or
    without bias, tied or reparametrised.

    Args:
        objective: The model; parameters that do not move keep their rows.
        split: Data.
        probe: Samples to measure on.
        classes: Whose rows.

    Returns:
        The parameters, or `None` if the outputs of `classes` depend on the input even then: there
        are no such rows.
    """
    rows = list(classes)

    def outputs(at: Params) -> Tensor:
        """[positions, classes], of those of all samples one after the other."""
        pairs = objective.forward(split.batches(probe), at)
        rows = (objective.likelihood.aligned(f, y)[0].flatten(0, -2) for f, y in pairs)
        # a class that is masked out at some positions says nothing there
        return torch.cat(list(rows)).nan_to_num(neginf=0.0)

    before = outputs(objective.start)
    alike = ALIKE * float(before.abs().max())
    others = torch.ones(before.shape[-1], dtype=torch.bool)
    others[rows] = False
    cleared = dict(objective.start)
    for name, value in objective.start.items():
        if not value.dim() or len(value) != before.shape[-1]:
            continue
        zeroed = value.clone()
        zeroed[rows] = 0
        try:
            after = outputs(cleared | {name: zeroed})
        except NumericalError:  # a direction of length zero, say
            continue
        moved = (after - before).abs().amax(0)
        # these are output rows if their classes' outputs move, and no others
        if float(moved[others].max()) <= alike < float(moved[rows].max()):
            cleared[name], before = zeroed, after
    # once all rows are zero, nothing of the input is left in those outputs
    return cleared if float(before[:, rows].std(0).max()) <= alike else None
