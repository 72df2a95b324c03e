"""The tape: one forward pass that records what every layer saw, and per-sample gradients read off
it.

Backward passes stop at the layer *outputs* (autograd.grad on recorded gradient edges), so weight
gradients are never formed by autograd. Before any work the tape is verified on a few samples of the
user's own data: a layer whose rule does not reproduce autograd's per-sample gradients (a weight
used outside its module, merged batch dimensions, a patched forward) has its parameters moved to the
torch.func fallback, so the result is exact either way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisher_forget import params as P
from fisher_forget.curvature.rules import rule_for
from fisher_forget.curvature.rules.layers import PIECE_BYTES, EmbeddingRule, LinearRule, Rule
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ModelError
from fisher_forget.params import Params

WEIGHTS = (1.0, -0.6180339887)  # of the two samples on which rules are compared with autograd
TOLERANCE = 1e-3  # relative, float32; a wrong rule is wrong by its own size


@dataclass
class Use:
    """One call of a layer: which block it feeds, its input, and where its output gradient can be
    read."""

    block: Block
    a: Tensor
    edge: GradientEdge | None
    version: int


@dataclass(eq=False)
class Block:
    """The parameters of one layer: canonical names by local name ("weight", "bias")."""

    rule: Rule
    names: dict[str, str]

    def per_sample(self, a: Tensor, g: Tensor) -> Params:
        """Gradients [N, *shape] by canonical name, for the parameters that are asked for."""
        found = self.rule.per_sample(a, g)
        return {self.names[local]: value for local, value in found.items() if local in self.names}


@dataclass
class Record:
    """What one forward pass saw."""

    tape: Tape
    batch: Batch
    outputs: Tensor
    uses: list[Use]
    _groups: list[Group] | None = None

    def pull(self, column: Tensor) -> list[Tensor | None]:
        """Gradients of <column, outputs> at the output of every recorded layer call."""
        if not self.uses:
            return []
        edges = [use.edge for use in self.uses if use.edge is not None]
        grads = torch.autograd.grad(
            self.outputs, edges, column, retain_graph=True, allow_unused=True
        )
        return [None if g is None else _lead(g, len(self.batch)) for g in grads]

    def without_graph(self) -> Record:
        """The same layer inputs without the graph that holds every activation, for a replay of
        known gradients."""
        uses = [Use(use.block, use.a, None, use.version) for use in self.uses]
        return Record(self.tape, self.batch, self.outputs.detach(), uses)

    def groups(self) -> list[Group]:
        """Layer calls that share parameters, together: the per-sample gradients of a tensor add
        over its uses."""
        if self._groups is None:
            by_name: dict[str, Group] = {}
            for index, use in enumerate(self.uses):
                merged = Group(self, [index], dict.fromkeys(use.block.names.values()))
                for name in use.block.names.values():
                    if (other := by_name.get(name)) is not None and other is not merged:
                        merged = other.merge(merged)
                by_name.update(dict.fromkeys(merged.names, merged))
            self._groups = list({id(g): g for g in by_name.values()}.values())
        return self._groups

    def per_sample(self, column: Tensor, grads: Sequence[Tensor | None]) -> Params:
        """Every parameter's per-sample gradient of <column, outputs>: [N, *shape]."""
        every = slice(0, len(self.batch))
        total: Params = {}
        for group in self.groups():
            total.update(group.per_sample(grads, every))
        if self.tape.stray:
            total.update(self.tape.functional(self.batch, column))
        for name, p in self.tape.params.items():
            if name not in total:  # a parameter that this batch does not use
                total[name] = p.new_zeros(len(self.batch), *p.shape)
        return {name: total[name] for name in self.tape.params}


@dataclass(eq=False)
class Group:
    """Calls (indices into `record.uses`) that share parameters, and the canonical names of those
    parameters."""

    record: Record
    calls: list[int]
    names: dict[str, None]
    _shared: Tensor | None = None

    def merge(self, other: Group) -> Group:
        self.calls = sorted({*self.calls, *other.calls})
        self.names.update(other.names)
        return self

    @property
    def uses(self) -> list[Use]:
        return [self.record.uses[i] for i in self.calls]

    def rank_one(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
        """a [N, I] and g [N, O] where each sample's gradient is g a^T: a Linear layer called once,
        at one position."""
        use, g = self.uses[0], grads[self.calls[0]]
        if (
            len(self.calls) > 1
            or g is None
            or type(use.block.rule) is not LinearRule
            or use.a.dim() != 2
        ):
            return None
        return use.a, g

    def per_sample(self, grads: Sequence[Tensor | None], rows: slice) -> Params:
        """Per-sample gradients [rows, *shape] of this group's parameters."""
        total: Params = {}
        # embeddings last: they add a few rows to the matrix that a tied layer has formed
        for call in sorted(
            self.calls, key=lambda i: isinstance(self.record.uses[i].block.rule, EmbeddingRule)
        ):
            use, g = self.record.uses[call], grads[call]
            if g is None:
                continue
            names = use.block.names
            found = {local: total[name] for local, name in names.items() if name in total}
            added = use.block.rule.added(found, use.a[rows], g[rows])
            total |= {names[local]: value for local, value in added.items() if local in names}
        return total

    def add_squares(
        self, totals: Params, grads: Sequence[Tensor | None], more: bool = False
    ) -> None:
        """Add sum_n of squared per-sample gradients to the totals of this group's parameters.

        Args:
            totals: By canonical name.
            grads: What `Record.pull` returned.
            more: Other columns of the same samples follow: keep what they share.
        """
        use, g = self.uses[0], grads[self.calls[0]]
        if len(self.calls) == 1 and g is not None:
            if more and self._shared is None:
                self._shared = use.block.rule.shared(use.a, g)
            wanted = {local: totals[name] for local, name in use.block.names.items()}
            use.block.rule.add_squares(wanted, use.a, g, self._shared)
            return
        for piece in self.pieces(grads):
            for name, value in piece.items():
                if len(value) == 1:
                    totals[name].addcmul_(value[0], value[0])
                else:
                    totals[name] += value.square().sum(0)

    def pieces(self, grads: Sequence[Tensor | None]) -> Iterator[Params]:
        """`per_sample` over runs of samples short enough that the gradients stay in cache."""
        each = 4 * sum(self.record.tape.params[name].numel() for name in self.names)
        step, total = max(1, PIECE_BYTES // each), len(self.record.batch)
        for start in range(0, total, step):
            yield self.per_sample(grads, slice(start, min(start + step, total)))


def _lead(x: Tensor, size: int) -> Tensor:
    """Give a tensor a leading sample dimension: [B T, ...] becomes [B, T, ...] (checked by the
    verification)."""
    if x.dim() and len(x) != size and len(x) % size == 0:
        return x.reshape(size, -1, *x.shape[1:])
    return x


class Tape:
    """Records forward passes of a private copy of a model.

    Args:
        model: The user's model; it is copied, never touched.
        subset: Name patterns of the parameters wanted; `None` for all with requires_grad.
    """

    def __init__(self, model: nn.Module, subset: str | tuple[str, ...] | None = None) -> None:
        wanted = set(P.trainable(model, subset))
        self.model = copy.deepcopy(model).eval()
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in wanted)
            p.grad = None
        self.params: Params = {n: p for n, p in self.model.named_parameters() if n in wanted}
        self.blocks: list[Block] = []
        self.stray: tuple[str, ...] = ()
        self._uses: list[Use] = []
        self._size = 0
        self._recording = False
        self._vectorised = True
        self._attach()

    def _attach(self) -> None:
        canonical = {id(p): name for name, p in self.params.items()}
        for module in self.model.modules():
            local = {
                n: canonical[id(p)]
                for n, p in module.named_parameters(recurse=False)
                if id(p) in canonical
            }
            rule = rule_for(module) if local else None
            if rule is None:
                continue
            block = Block(rule, local)
            self.blocks.append(block)
            module.register_forward_pre_hook(self._widen)
            module.register_forward_hook(self._recorder(block))
        covered = {name for block in self.blocks for name in block.names.values()}
        self.stray = tuple(name for name in self.params if name not in covered)

    def _widen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A layer fed once for the whole batch (position ids [1, T]) is fed once a sample:
        gradients stay apart."""
        if self._recording and args and isinstance(args[0], Tensor) and self._size > 1:
            x = args[0]
            if x.dim() > 1 and len(x) == 1:
                return (x.expand(self._size, *x.shape[1:]), *args[1:])
        return None

    def _recorder(self, block: Block) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._recording and isinstance(output, Tensor) and output.requires_grad:
                a = args[0].detach()
                self._uses.append(Use(block, a, get_gradient_edge(output), a._version))

        return record

    def run(self, batch: Batch) -> Record:
        """One forward pass over a chunk."""
        self._uses, self._size, self._recording = [], len(batch), True
        try:
            with torch.enable_grad():
                outputs = P.call(self.model, {}, batch.args, batch.kwargs)
        finally:
            self._recording = False
        uses, self._uses = self._uses, []
        for use in uses:
            if use.a._version != use.version:
                raise ModelError(
                    f"a {type(use.block.rule.module).__name__} whose input is overwritten in place after its forward",
                    "inputs that stay as they were until backward",
                    "Replace the in-place operation on that tensor.",
                )
            use.a = _lead(use.a, len(batch))
        return Record(self, batch, outputs, uses)

    def functional(self, batch: Batch, column: Tensor) -> Params:
        """Per-sample gradients of the stray parameters by torch.func; sample by sample where vmap
        can't trace."""
        stray = {name: self.params[name].detach() for name in self.stray}

        def outputs(theta: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return P.call(self.model, theta, args, kwargs)

        def one(args: tuple[Any, ...], kwargs: dict[str, Any], v: Tensor) -> Params:
            args, kwargs = _batched((args, kwargs))
            pull: Any = torch.func.vjp(lambda theta: outputs(theta, args, kwargs)[0], stray)[1]
            gradient: Params = pull(v)[0]
            return gradient

        if self._vectorised:
            try:
                dims = torch.utils._pytree.tree_map(
                    lambda x: (
                        0 if isinstance(x, Tensor) and x.dim() and len(x) == len(batch) else None
                    ),
                    (batch.args, batch.kwargs),
                )
                with torch.no_grad():
                    each: Params = torch.func.vmap(one, in_dims=(*dims, 0))(
                        batch.args, batch.kwargs, column
                    )
                    return each
            except (RuntimeError, ModelError):
                self._vectorised = (
                    False  # data-dependent control flow: the loop below is slower and always right
                )
        with torch.no_grad():
            rows = [one(*_unbatched(b), column[i]) for i, b in enumerate(batch.chunks(1))]
        return {name: torch.stack([row[name] for row in rows]) for name in stray}

    def verify(self, batch: Batch) -> Record:
        """Compare with autograd on two samples, and move what disagrees to the fallback.

        One weighted backward pass sum_n c_n <v_n, f_n> is held against sum_n c_n M_n, with M_n the
        rules' per-sample gradients for columns v_n: random v and unequal c make a wrong rule, and a
        right sum wrongly split, disagree.

        Returns:
            What the two samples' forward pass recorded.

        Raises:
            ModelError: If outputs are not one differentiable row a sample, or depend on the others
                in the batch.
        """
        probe = next(batch.chunks(len(WEIGHTS)))
        record = self.run(probe)
        outputs = record.outputs
        if outputs.dim() == 0 or len(outputs) != len(probe) or not outputs.requires_grad:
            shape = f"outputs of shape {tuple(outputs.shape)} for {len(probe)} samples"
            raise ModelError(
                shape if outputs.requires_grad else f"{shape}, cut off from the parameters",
                "one output a sample, differentiable with respect to the parameters",
                "Return the logits themselves, one row a sample, without detach() or no_grad().",
            )
        self._check_independence(probe, outputs.detach())
        column = P.randn_like({"": outputs}, torch.Generator().manual_seed(0))[""]
        weights = outputs.new_tensor(WEIGHTS[: len(probe)])
        weighted = column * weights.view(-1, *(1,) * (outputs.dim() - 1))
        found = self._by_rules(record, column, weights)
        truth = torch.autograd.grad(
            outputs, list(self.params.values()), weighted, allow_unused=True
        )
        found = {name: value.detach() for name, value in found.items()}
        stray = set(self.stray)
        for (name, p), g in zip(self.params.items(), truth, strict=True):
            expected = torch.zeros_like(p) if g is None else g
            value = found.get(name, torch.zeros_like(p))
            if value.shape != p.shape:
                stray.add(name)
                continue
            error = torch.linalg.vector_norm(value - expected)
            if not float(error) <= TOLERANCE * float(torch.linalg.vector_norm(expected)):
                stray.add(name)
        self._drop(stray)
        return record.without_graph()

    def _check_independence(self, probe: Batch, outputs: Tensor) -> None:
        """The last sample alone must give what it gives in the batch."""
        tolerance = TOLERANCE * max(float(outputs.abs().max()), 1e-3)
        *_, single = probe.chunks(1)
        with torch.no_grad():
            alone = P.call(self.model, {}, single.args, single.kwargs)[0]
            if float((alone - outputs[-1]).abs().max()) > tolerance:
                raise ModelError(
                    "a model whose output for a sample depends on the other samples of its batch, or on chance",
                    "one output a sample, the same at every call",
                    "Call model.eval(), and remove what mixes samples (batch statistics) or draws random numbers.",
                )

    def _by_rules(self, record: Record, column: Tensor, weights: Tensor) -> Params:
        """sum_n c_n M_n; a rule that fails outright contributes a shape that matches nothing."""
        total: Params = {}
        for use, g in zip(record.uses, record.pull(column), strict=True):
            try:
                found = use.block.per_sample(use.a, g) if g is not None else {}
                summed = {name: torch.tensordot(weights, value, 1) for name, value in found.items()}
            except (RuntimeError, ValueError, IndexError):
                summed = {name: torch.full((0,), 0.0) for name in use.block.names.values()}
            for name, value in summed.items():
                same = name in total and total[name].shape == value.shape
                total[name] = total[name] + value if same else value
        return total

    def _drop(self, stray: set[str]) -> None:
        """Take parameters away from their rules."""
        self.stray = tuple(name for name in self.params if name in stray)
        for block in self.blocks:
            block.names = {local: name for local, name in block.names.items() if name not in stray}
        self.blocks = [block for block in self.blocks if block.names]


def _batched(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.unsqueeze(0), tree)


def _unbatched(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    single = batch.map(lambda x: x[0] if x.dim() else x)
    return single.args, single.kwargs
