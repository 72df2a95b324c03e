"""Deletion inference and shadow models on networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.attacks.classical import RELEASES, Report, both
from benchmarks.attacks.networks import Digits
from fisher_forget import forget, resolve_split
from fisher_forget.attack import FEATURES, Pair, Release, ShadowInference, shadow_pairs
from fisher_forget.baselines import METHODS
from fisher_forget.data.samples import take
from fisher_forget.data.split import Indices

CONTROL = "control: neither saw the samples"


def requests(originals: int = 3, deleted: int = 50) -> Report:
    """One request for fifty samples, by several methods, of several originals."""
    own, everyone = Digits(), np.arange(700)
    pairs: dict[str, list[Pair]] = {}
    for seed in range(originals):
        order = np.random.default_rng(seed).permutation(700)
        gone, kept = order[:deleted], order[deleted : 2 * deleted]
        before, split = own.fit(everyone, seed), resolve_split(own.data, gone)
        samples = take(own.data, gone), take(own.data, kept)
        exact = [own.fit(split.retain, 1000 + k) for k in range(3)]
        after = {
            "fisher-forget": own.forget(before, gone),
            "fisher-forget, without noise": own.forget(before, gone, noise=None),
            "fine-tuning": METHODS["finetune"]().unlearn(before, split).model,
            "SSD": METHODS["ssd"]().unlearn(before, split).model,
            "retrained": own.fit(split.retain, 1000 + 3),
            "control: trained on the same data": own.fit(everyone, 500 + seed),
        }
        for name, model in after.items():
            pairs.setdefault(name, []).append(Pair(before, model, *samples, exact))
    found: Report = {"methods": {name: both(x) for name, x in pairs.items()}, "defences": {}}
    for name, release in (RELEASES | {"the largest three": Release(top_k=3)}).items():
        found["defences"][name] = both(pairs["fisher-forget"], release)
    return found


def shadow(originals: int = 4, deletions: int = 20) -> Report:
    """Chen et al. on retrained models and on ours, feature by feature."""
    own, found = Digits(), Report()
    outside = partial(own.fit, data=own.public)
    theirs, ours = (partial(without_one, own, data) for data in (own.public, own.data))
    plan: dict[str, Any] = {
        "template": own.start,
        "originals": originals,
        "deletions": deletions,
        "progress": False,
    }
    rows = np.random.default_rng(0).permutation(700)
    unseen = take(own.data, rows[350:450]), take(own.data, rows[450:550])
    control = Pair(*(own.fit(rows[:350], seed) for seed in (700, 701)), *unseen)
    for name, (attacker, owner) in {
        "retrained": (None, None),
        "fisher-forget": (theirs, ours),
    }.items():
        shadows = shadow_pairs(outside, own.public, forget_fn=attacker, **plan)
        targets = shadow_pairs(own.fit, own.data, forget_fn=owner, **(plan | {"seed": 500}))
        for feature in FEATURES:
            found[f"{name}, {feature}"] = ShadowInference(shadows, feature).run(targets).to_dict()
        for release in ("the largest", "labels", "noise of .05"):
            attack = ShadowInference(shadows, "sorted_diff", release=RELEASES[release])
            found[f"{name}, sorted_diff, {release}"] = attack.run(targets).to_dict()
    return found | {
        f"{CONTROL}, {f}": ShadowInference(shadows, f).run(control).to_dict() for f in FEATURES
    }


def without_one(
    own: Digits, data: TensorDataset, before: nn.Module, trained: Indices, gone: int
) -> nn.Module:
    """The second release of a network of some of the data."""
    (place,) = np.flatnonzero(trained == gone)
    generator = torch.Generator().manual_seed(gone)
    samples = take(data, trained)
    return forget(before, samples, [int(place)], generator=generator, **own.options).model
