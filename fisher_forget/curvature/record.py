"""What one forward pass saw, and the per-sample gradients read off it.

Backward passes stop at the layer *outputs* (autograd.grad on recorded gradient edges), so weight
gradients are never formed by autograd: the layers' rules form them from inputs and output
gradients, or form only what is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisher_forget.curvature.fallback import Fallback
from fisher_forget.curvature.rules.base import PIECE_BYTES, Rule
from fisher_forget.data.batches import Batch
from fisher_forget.params import Params

Grads = Sequence[Tensor | None]  # at the output of every recorded layer call


@dataclass(frozen=True)
class LayerParams:
    """The parameters of one layer: canonical names by local name ("weight", "bias")."""

    rule: Rule
    names: dict[str, str]

    def per_sample(self, a: Tensor, g: Tensor) -> Params:
        """Gradients [N, *shape] by canonical name, for the parameters that are asked for."""
        gradients = self.rule.per_sample(a, g)
        return {self.names[local]: x for local, x in gradients.items() if local in self.names}


class RulesChanged(Exception):
    """Some layers are not fed as they were where their rules were verified.

    Args:
        names: Their parameters, which must move to the fallback.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = tuple(names)


@dataclass
class Use:
    """One call of a layer.

    Attributes:
        layer: The layer.
        a: Its input, samples first.
        edge: Where its output gradient can be read; `None` without a graph.
        rows: Rows that it was fed a sample; `None` if their number is no multiple of the samples'.
        trusted: Whether its rule was verified for that.
    """

    layer: LayerParams
    a: Tensor
    edge: GradientEdge | None
    rows: int | None = None
    trusted: bool = True


@dataclass
class Record:
    """What one forward pass saw.

    Attributes:
        params: The parameters wanted, by canonical name.
        batch: The samples.
        outputs: The model's, with their graph.
        uses: The layer calls.
        fallback: Gradients of the parameters without a rule; `None` if there are none.
    """

    params: Params
    batch: Batch
    outputs: Tensor
    uses: list[Use]
    fallback: Fallback | None
    _groups: list[Group] | None = None

    def pull(self, column: Tensor) -> list[Tensor | None]:
        """Gradients of <column, outputs> at the output of every recorded layer call.

        Raises:
            RulesChanged: If one passes through a call whose rule was not verified.
        """
        if not self.uses:
            return []
        # gradients stop at the layers' outputs: those of the weights are never formed
        edges = [use.edge for use in self.uses if use.edge is not None]
        grads = torch.autograd.grad(
            self.outputs, edges, column, retain_graph=True, allow_unused=True
        )
        for use, g in zip(self.uses, grads, strict=True):
            if not use.trusted and g is not None and bool(g.any()):
                raise RulesChanged(use.layer.names.values())
        return [None if g is None else by_sample(g, len(self.batch)) for g in grads]

    def without_graph(self) -> Record:
        """The same layer inputs without the graph that holds every activation, for a replay of
        known gradients."""
        uses = [replace(use, edge=None) for use in self.uses]
        fallback = None if self.fallback is None else self.fallback.without_graph()
        return Record(self.params, self.batch, self.outputs.detach(), uses, fallback)

    def groups(self) -> list[Group]:
        """Layer calls by shared parameters: per-sample gradients of a tensor add over its uses."""
        if self._groups is None:
            # union-find by name: two calls with one parameter in common are one group
            by_name: dict[str, Group] = {}
            for index, use in enumerate(self.uses):
                merged = Group(self, [index], dict.fromkeys(use.layer.names.values()))
                for name in use.layer.names.values():
                    if (other := by_name.get(name)) is not None and other is not merged:
                        merged = other.merge(merged)
                by_name.update(dict.fromkeys(merged.names, merged))
            self._groups = list({id(g): g for g in by_name.values()}.values())
        return self._groups

    def close(self) -> None:
        """Give the groups up, which refer to their record: else its graph lives until Python next
        collects garbage, and several are held at a time."""
        self._groups = None

    def stray(self, column: Tensor) -> Params:
        """Per-sample gradients [N, *shape] of the parameters that no rule covers."""
        return {} if self.fallback is None else self.fallback(column)

    def per_sample(self, column: Tensor, grads: Grads) -> Params:
        """Every parameter's per-sample gradient of <column, outputs>: [N, *shape]."""
        total: Params = {}
        for group in self.groups():
            total.update(group.per_sample(grads, slice(0, len(self.batch))))
        total.update(self.stray(column))
        for name, p in self.params.items():
            if name not in total:  # a parameter that this batch does not use
                total[name] = p.new_zeros(len(self.batch), *p.shape)
        return {name: total[name] for name in self.params}

    def squared_norms(self, column: Tensor, grads: Grads) -> Tensor:
        """|d <column_n, outputs_n> / dw|^2 over all parameters [N], in float64."""
        total = column.new_zeros(len(self.batch), dtype=torch.float64)
        for group in self.groups():
            total += group.squared_norms(grads)
        for gradient in self.stray(column).values():
            total += _row_squares(gradient)
        return total


@dataclass(eq=False)
class Group:
    """Calls (indices into `record.uses`) that share parameters, and these parameters' names."""

    record: Record
    calls: list[int]
    names: dict[str, None]
    _shared: Tensor | None = None

    def merge(self, other: Group) -> Group:
        """Take over the calls and names of another group."""
        self.calls = sorted({*self.calls, *other.calls})
        self.names.update(other.names)
        return self

    @property
    def uses(self) -> list[Use]:
        """The calls themselves."""
        return [self.record.uses[i] for i in self.calls]

    @property
    def layer(self) -> LayerParams:
        """The layer of the first call."""
        return self.record.uses[self.calls[0]].layer

    def rank_one(self, grads: Grads) -> tuple[Tensor, Tensor] | None:
        """a [N, I] and g [N, O] where each sample's gradient is g a^T: a Linear layer called once,
        at one position."""
        use, g = self.record.uses[self.calls[0]], grads[self.calls[0]]
        if len(self.calls) > 1 or g is None or not use.layer.rule.rank_one or use.a.dim() != 2:
            return None
        return use.a, g

    def per_sample(self, grads: Grads, rows: slice) -> Params:
        """Per-sample gradients [rows, *shape] of this group's parameters."""
        total: Params = {}
        # embeddings last: they add a few rows to the matrix that a tied layer has formed
        for call in sorted(self.calls, key=lambda i: self.record.uses[i].layer.rule.sparse):
            use, g = self.record.uses[call], grads[call]
            if g is None:
                continue
            names = use.layer.names
            before = {local: total[name] for local, name in names.items() if name in total}
            added = use.layer.rule.added(before, use.a[rows], g[rows])
            total |= {names[local]: value for local, value in added.items() if local in names}
        return total

    def add_squares(self, totals: Params, grads: Grads, more: bool = False) -> None:
        """Add sum_n of squared per-sample gradients to the totals of this group's parameters.

        Args:
            totals: By canonical name.
            grads: What `Record.pull` returned.
            more: Other columns of the same samples follow: keep what they share.
        """
        use, g = self.record.uses[self.calls[0]], grads[self.calls[0]]
        if len(self.calls) == 1 and g is not None:
            if more and self._shared is None:
                self._shared = use.layer.rule.shared(use.a, g)
            wanted = {local: totals[name] for local, name in use.layer.names.items()}
            use.layer.rule.add_squares(wanted, use.a, g, self._shared)
            return
        for piece in self.pieces(grads):
            for name, value in piece.items():
                if len(value) == 1:
                    totals[name].addcmul_(value[0], value[0])
                else:
                    totals[name] += value.square().sum(0)

    def squared_norms(self, grads: Grads) -> Tensor:
        """Squared length of each sample's gradient of this group's parameters [N], in float64."""
        thin = self.rank_one(grads)
        if thin is not None:
            # |g a^T|^2 = |g|^2 |a|^2, and the bias' gradient is g itself
            a, g = thin
            names = self.layer.names
            factor = _row_squares(a) * ("weight" in names) + ("bias" in names)
            return _row_squares(g) * factor
        # runs of samples, in order: what several uses of a parameter add is summed, then squared
        runs = [[_row_squares(value) for value in run.values()] for run in self.pieces(grads)]
        pieces = [torch.stack(squares).sum(0) for squares in runs if squares]
        size = len(self.record.batch)
        return torch.cat(pieces) if pieces else self.record.outputs.new_zeros(size).double()

    def pieces(self, grads: Grads) -> Iterator[Params]:
        """`per_sample` over runs of samples short enough that the gradients stay in cache."""
        for rows in self._runs():
            yield self.per_sample(grads, rows)

    def weighted(self, grads: Grads, weights: Tensor) -> Params:
        """sum_n c_n M_n for weights c [N] of the samples."""
        total: Params = {}
        for rows in self._runs():
            for name, value in self.per_sample(grads, rows).items():
                summed = torch.tensordot(weights[rows], value, 1)
                total[name] = total[name] + summed if name in total else summed
        return total

    def _runs(self) -> Iterator[slice]:
        row_bytes = 4 * sum(self.record.params[name].numel() for name in self.names)
        step, total = max(1, PIECE_BYTES // max(row_bytes, 1)), len(self.record.batch)
        for start in range(0, total, step):
            yield slice(start, min(start + step, total))


def by_sample(x: Tensor, size: int) -> Tensor:
    """Give a tensor a leading sample dimension: [B T, ...] becomes [B, T, ...]; the tape's
    verification says whether these are the samples."""
    if x.dim() and len(x) != size and len(x) % size == 0:
        return x.reshape(size, -1, *x.shape[1:])
    return x


def _row_squares(x: Tensor) -> Tensor:
    """Sum of squares of each row [N], in float64."""
    return x.reshape(len(x), -1).square().sum(1, dtype=torch.float64)
