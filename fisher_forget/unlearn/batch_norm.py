"""BatchNorm's running statistics: they hold the forgotten data, too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fisher_forget import params as P
from fisher_forget.data.split import Split

BATCH = 64  # samples per batch, at least
SAMPLES = 20_000  # retained samples, at most


def refresh_statistics(model: nn.Module, split: Split) -> bool:
    """Recompute BatchNorm's running statistics on the retained data, in place.

    As in training, a layer normalises by the statistics of its batch; here batches are drawn at
    random from all retained samples (20,000 at most), since in a data set sorted by class
    neighbours are alike, and each counts by its size.

    Returns:
        Whether there was anything to do, and samples to do it with: a single one has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    order = np.random.default_rng(0).permutation(split.retain)[:SAMPLES]
    if not norms or len(order) < 2:
        return False
    batches = max(1, len(order) // max(split.batch_size, BATCH))
    walk = replace(split, batch_size=-(-len(order) // batches))
    seen = 0
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.train()
    with torch.no_grad():
        for batch in walk.batches(order):
            if len(batch) < 2:
                continue
            seen += len(batch)
            for m in norms:
                m.momentum = len(batch) / seen  # a running mean over all samples so far
            batch = batch.on(model)
            P.call(model, {}, batch.args, batch.kwargs)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.eval()
    return True
