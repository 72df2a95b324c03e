"""Running statistics of BatchNorm and InstanceNorm layers: buffers that hold data, too.

Statistics that this data set are recomputed on the retained data. Statistics that it never set,
such as those of a pre-trained backbone that was frozen in eval mode, say nothing of the forgotten
samples, and the weights behind them were trained on what they give: they stay, here and in every
training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fisher_forget import params as P
from fisher_forget._util.copies import copy_model, unwrapped
from fisher_forget.data.split import Indices, Split

BATCH = 64  # samples per batch, at least
SAMPLES = 20_000  # retained samples, at most, that statistics are recomputed on
DECISIVE = 2_000  # samples, at most, that tell whether this data set the statistics
# Mean KL of a layer's channels, nats, above which this data did not set its statistics. Networks
# trained here: .04 at most, .02 after several epochs. Frozen backbones whose data were shifted,
# scaled by .7, blurred or of another set: .1 and more at the first layer (docs/research.md).
FAR = 0.05

Statistics = tuple[Tensor, Tensor]  # mean and variance, [C] each


def norm_layers(model: nn.Module) -> dict[str, _NormBase]:
    """Layers with running statistics, by their names in the model without wrappers; one that
    several places share counts once."""
    return {
        name: layer
        for name, layer in unwrapped(model).named_modules()
        if isinstance(layer, _NormBase)
        and layer.track_running_stats
        and layer.running_mean is not None
    }


def foreign_statistics(model: nn.Module, split: Split, *, private: bool = False) -> tuple[str, ...]:
    """Names of the layers whose running statistics the data of the split did not set.

    The statistics are recomputed at the given weights on retained and forgotten samples, as in
    training: a layer normalises by the statistics of its batch. Where they are far from the given
    ones it normalises by these instead, as it did in training, so that the layers behind it see the
    inputs that they saw then. A layer that no sample reaches is foreign.

    Args:
        model: As trained; untouched.
        split: All of its samples count, 2,000 at most.
        private: The model is a copy in eval mode, with which it is done: it need not be copied.
    """
    if not norm_layers(model):
        return ()
    twin = model if private else copy_model(model).eval()
    layers = norm_layers(twin)
    done = _recomputed(twin, layers, split, split.indices("all"), DECISIVE, decide=True)
    return tuple(name for name in layers if done[name].foreign)


def refresh_statistics(
    model: nn.Module, split: Split, kept: Collection[str] = ()
) -> tuple[str, ...]:
    """Recompute running statistics on the retained data, in place.

    As in training, a layer normalises by the statistics of its batch; here batches are drawn at
    random from all retained samples (20,000 at most), since in a data set sorted by class
    neighbours are alike, and each counts by its size. No other buffer changes, and the count of
    batches stays that of the training.

    Args:
        model: In eval mode; its statistics change.
        split: Who is retained.
        kept: Names of layers that go on normalising by the statistics that they have.

    Returns:
        Names of the layers refreshed: those that a batch of at least two values a channel reaches.
    """
    done = _recomputed(model, _others(model, kept), split, split.retain, SAMPLES)
    refreshed = tuple(name for name, layer in done.items() if layer.rows)
    with torch.no_grad():
        for name in refreshed:
            for old, new in zip(_statistics(done[name].layer), done[name].statistics, strict=True):
                old.copy_(new)
    return refreshed


def statistics_at(
    model: nn.Module,
    at: Mapping[str, Tensor],
    split: Split,
    samples: Indices,
    kept: Collection[str],
) -> P.Params:
    """What `refresh_statistics` would set at some weights: statistics by their names as buffers.

    Args:
        model: A private copy, in eval mode.
        at: Weights by name.
        split: Data.
        samples: Those that the statistics are of, in place of all retained ones.
        kept: Names of layers that go on normalising by the statistics that they have.
    """
    layers = _others(model, kept)
    if not layers:
        return {}
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    own = {name: [names[id(x)] for x in _statistics(layer)] for name, layer in layers.items()}
    with P.attached(model, at):
        done = _recomputed(model, layers, split, samples, SAMPLES)
    return {
        buffer: value
        for name, layer in done.items()
        if layer.rows
        for buffer, value in zip(own[name], layer.statistics, strict=True)
    }


def _others(model: nn.Module, kept: Collection[str]) -> dict[str, _NormBase]:
    return {name: layer for name, layer in norm_layers(model).items() if name not in kept}


def train_mode(model: nn.Module, kept: Iterable[str]) -> nn.Module:
    """The model in train mode, but for the norm layers that keep their statistics."""
    model.train()
    layers = norm_layers(model)
    for name in kept:
        layers[name].eval()
    return model


@contextmanager
def pinned(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within, these norm layers stay in eval mode, also where a training function of the user's
    calls `model.train()`; of a copy that it makes, too."""
    found = norm_layers(model)
    layers = [found[name] for name in names]
    for layer in layers:
        layer.eval()
        layer.train = partial(_ignored, layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.train


def _ignored(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def still_given(names: Iterable[str], start: nn.Module, model: nn.Module) -> list[str]:
    """Those of the layers that hold the same statistics in both models."""
    first, second = norm_layers(start), norm_layers(model)
    return [
        name
        for name in names
        if all(map(torch.equal, _statistics(first[name]), _statistics(second[name])))
    ]


def held_statistics(model: nn.Module) -> list[str]:
    """Names of the frozen layers that hold statistics of any data."""
    return [
        name
        for name, layer in norm_layers(model).items()
        if not any(p.requires_grad for p in layer.parameters(recurse=False)) and not _initial(layer)
    ]


def frozen_statistics(model: nn.Module, split: Split) -> list[str]:
    """Names of the layers that keep their statistics in a training of the model on this data.

    They are frozen and hold statistics that other data set: those of a pre-trained backbone. A
    layer whose own parameters are trained follows the data, as usual.

    Args:
        model: Where the training starts; untouched.
        split: Its samples are trained on.
    """
    held = held_statistics(model)
    foreign = foreign_statistics(model, split) if held else ()
    return [name for name in held if name in foreign]


def _recomputed(
    model: nn.Module,
    layers: Mapping[str, _NormBase],
    split: Split,
    samples: Indices,
    most: int,
    *,
    decide: bool = False,
) -> dict[str, _Recomputed]:
    """Forward passes over some of the samples, in random batches of one size, in which the layers
    set their statistics anew. They work on copies of the buffers: the model's stay."""
    done = {name: _Recomputed(layer, decide) for name, layer in layers.items()}
    order = np.random.default_rng(0).permutation(samples)[:most]
    if not layers or len(order) < 2:
        return done
    batches = max(1, len(order) // max(split.batch_size, BATCH))
    walk = replace(split, batch_size=-(-len(order) // batches))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), ExitStack() as hooks:
        for layer in done.values():
            layer.attach(hooks)
        for batch in walk.batches(order):
            if len(batch) > 1:
                batch = batch.on(model)
                P.call(model, buffers, batch.args, batch.kwargs)
    return done


class _Recomputed:
    """Lets a layer in eval mode set its running statistics anew, call by call.

    They become the mean over all calls so far, each weighted by its rows.

    Args:
        layer: With its given statistics.
        decide: Where the new statistics are far from the given ones, normalise by the given ones.

    Attributes:
        statistics: Those so far.
        rows: Leading size of all inputs so far that had a variance.
        foreign: Whether the statistics so far are far from the given ones.
    """

    def __init__(self, layer: _NormBase, decide: bool) -> None:
        self.layer, self.rows, self.foreign = layer, 0, True
        self.statistics = _statistics(layer)
        self._given = _given(layer) if decide else []
        self._momentum = layer.momentum

    def attach(self, hooks: ExitStack) -> None:
        """Have the layer call this object at every forward, until the hooks are closed."""
        before = self.layer.register_forward_pre_hook(self._before, with_kwargs=True)
        hooks.callback(before.remove)
        after = self.layer.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        hooks.callback(after.remove)

    def _before(self, layer: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = next(iter((*args, *kwargs.values())))
        # a batch (of InstanceNorm: a sample) with one value a channel has no variance
        values = x[:1] if isinstance(layer, _InstanceNorm) else x
        if values.numel() <= values.shape[1]:
            return
        if not self.rows:
            layer.reset_running_stats()
        self.rows += len(x)
        layer.momentum = len(x) / self.rows
        layer.train()

    def _after(
        self, layer: _NormBase, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None
    ) -> Tensor | None:
        layer.eval()
        layer.momentum = self._momentum
        if not self.rows or output is None:  # None after an error, which goes on its way
            return output
        self.statistics = new = _statistics(layer)
        if not self._given:
            return output
        self.foreign = not any(_divergence(new, given, layer.eps) <= FAR for given in self._given)
        if self.foreign:
            layer.running_mean, layer.running_var = self._given[0]
            output = layer.forward(*args, **kwargs)
            layer.running_mean, layer.running_var = new
        return output


def _statistics(layer: _NormBase) -> Statistics:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def _initial(layer: _NormBase) -> bool:
    """Whether no data has set its statistics: mean 0 and variance 1, as at its construction."""
    mean, var = _statistics(layer)
    return not bool(mean.any()) and bool((var == 1).all())


def _given(layer: _NormBase) -> list[Statistics]:
    """Copies of the layer's statistics, as they are and without what the initial ones left in them.

    In the moving average of n batches the initial mean 0 and variance 1 have the share
    (1 - momentum)^n, which is large after few. Statistics that were set by another average, as
    `torch.optim.swa_utils.update_bn` and `refresh_statistics` do, have no such share.
    """
    mean, var = (x.clone() for x in _statistics(layer))
    batches = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    share = 1.0 if layer.momentum is None else (1 - layer.momentum) ** batches
    if share == 1:
        return [(mean, var)]
    return [(mean, var), (mean / (1 - share), ((var - share) / (1 - share)).clamp(min=0))]


def _divergence(new: Statistics, given: Statistics, eps: float) -> float:
    """Mean over channels of KL(N(new) || N(given)), nats, of the variances that a layer divides by,
    those with eps."""
    (mean, var), (given_mean, given_var) = (
        (m.detach().cpu().double(), v.detach().cpu().double() + eps) for m, v in (new, given)
    )
    shift = (mean - given_mean).square() / given_var
    ratio = var / given_var
    return float((shift + ratio - 1 - ratio.log()).mean()) / 2
