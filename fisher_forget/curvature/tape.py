"""The tape: a private copy of a model, whose recorded passes tell per-sample gradients.

A layer's rule is trusted only where it was seen to be right: on a few samples of the user's own
data the rules' gradients are held against autograd's, and every later call must feed the layer as
many rows a sample as it did there. What fails (a weight used outside its module, rows that are
routed or merged, a patched forward) moves to the fallback, so the result is exact either way. The
forward pass itself is never altered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy
from fisher_forget.curvature.fallback import Fallback
from fisher_forget.curvature.record import LayerParams, Record, RulesChanged, Use, by_sample
from fisher_forget.curvature.recurrent import StepByStep, gates_of
from fisher_forget.curvature.rules import rule_for
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ModelError
from fisher_forget.params import Params

PROBE = 4  # samples on which rules are compared with autograd
TOLERANCE = 1e-3  # relative, float32; a wrong rule is wrong by its own size
ROUNDING = 1e3  # units of rounding error of a layer's largest gradient that count as zero
SHARED = 0  # rows a sample of a layer that is fed once for the whole batch

T = TypeVar("T")


class Call(NamedTuple):
    """One call of a layer."""

    module: nn.Module
    a: Tensor
    version: int  # of the input
    edge: GradientEdge  # of the output


class _Recorder:
    """A forward hook that notes the layers' calls while a pass is recorded, and else does
    nothing."""

    def __init__(self) -> None:
        self.calls: list[Call] | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.calls is not None and isinstance(output, Tensor) and output.requires_grad:
            a = next(iter((*args, *kwargs.values())))
            self.calls.append(Call(module, a.detach(), a._version, get_gradient_edge(output)))


class Tape:
    """Records forward passes of a private copy of a model.

    The copy is made once, at construction; its hooks are silent outside `run`, so that it also
    serves plain forward passes (`torch.func.functional_call(tape.model, ...)`), in any memory
    layout.

    Args:
        model: The user's model; it is copied, never touched.
        subset: Name patterns of the parameters wanted; `None` for all with requires_grad.

    Attributes:
        model: The copy, in eval mode; exactly the wanted parameters require gradients.
        params: The parameters wanted, by canonical name.
        stray: Names of those that no rule covers.
    """

    def __init__(self, model: nn.Module, subset: str | tuple[str, ...] | None = None) -> None:
        wanted = set(P.trainable(model, subset))
        self.model = private_copy(model)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in wanted)
            p.grad = None
        self._recorder, self._gates = _Recorder(), gates_of(self.model)
        self._cover(wanted)
        for module in self._layers:
            module.register_forward_hook(self._recorder, with_kwargs=True)

    def restricted(self, subset: str | tuple[str, ...]) -> Tape:
        """A tape of some of the parameters that shares the private model; verify it anew.

        Raises:
            ModelError: If no parameter matches.
        """
        twin = copy.copy(self)
        twin._cover(set(P.trainable(self.model, subset)) & set(self.params))
        return twin

    def _cover(self, wanted: set[str]) -> None:
        """Find the layers whose rules serve the wanted parameters; the others are stray."""
        self.params: Params = {n: p for n, p in self.model.named_parameters() if n in wanted}
        canonical = {id(p): name for name, p in self.params.items()}
        self._layers: dict[nn.Module, LayerParams] = {}
        for module in (*self.model.modules(), *self._gates.values()):
            own = module.named_parameters(recurse=False)
            names = {local: canonical[id(p)] for local, p in own if id(p) in canonical}
            rule = rule_for(module) if names else None
            if rule is not None:
                self._layers[module] = LayerParams(rule, names)
        covered = {name for layer in self._layers.values() for name in layer.names.values()}
        self.stray = tuple(name for name in self.params if name not in covered)
        # rows a sample with which each layer was seen to be right
        self._verified: dict[nn.Module, set[int]] = {}
        # layers, and shapes of a sample, that a verification has seen
        self._seen: set[nn.Module | tuple[torch.Size, ...]] = set()
        self._passes = self._pairs = 0  # passes over batches, and neighbours in compared ones
        self._vectorised = True

    def settled(self, work: Callable[[], T]) -> T:
        """What `work` returns; it begins anew where one of its passes feeds a layer as it was not
        verified, after that layer has moved to the fallback."""
        while True:
            try:
                return work()
            except RulesChanged as changed:  # a layer fewer each time: this ends
                self._drop(changed.names)
                self._pairs = 0  # how the fallback computes them is compared next

    def run(self, batch: Batch) -> Record:
        """One forward pass over a chunk; `settled` goes around what reads it."""
        record = self._recorded(batch)
        strangers = {use.layer.rule.module for use in record.uses if not use.trusted}
        # other lengths, and layers not seen before, may well be right
        unseen = strangers and not (strangers | {batch.sample_shapes()}) <= self._seen
        if unseen or self._due(len(batch)):
            stray = self.stray
            self._compare(self._recorded(next(batch.chunks(PROBE if unseen else 2))))
            if self.stray != stray:
                raise RulesChanged(())
            for use in record.uses:
                use.trusted = self._trusts(use, len(batch))
        return record

    def _due(self, size: int) -> bool:
        """Whether to compare once more: small batches may hide that samples change places, and what
        depends on the data may show late. Passes 8, 16, 32, ... are compared."""
        if size < 2:
            return False
        self._passes += 1
        again = self._passes >= 8 and self._passes & (self._passes - 1) == 0
        return again or self._pairs < PROBE - 1

    def _recorded(self, batch: Batch) -> Record:
        """A forward pass and its calls of layers, trusted or not."""
        calls, size = list[Call](), len(batch)
        self._recorder.calls = calls
        try:
            with torch.enable_grad(), StepByStep(self._gates) if self._gates else nullcontext():
                outputs = P.call(self.model, {}, batch.args, batch.kwargs)
        finally:
            self._recorder.calls = None
        uses = []
        for call in calls:
            layer = self._layers.get(call.module)
            # another tape's of the same model, moved to the fallback, or fed nothing
            if layer is None or not call.a.numel():
                continue
            if call.a._version != call.version:
                name = type(call.module).__name__
                got = f"a {name} whose input is overwritten in place after its forward"
                fix = "Replace the in-place operation on that tensor."
                raise ModelError(got, "inputs that stay as they were until backward", fix)
            use = _use(layer, call, size, outputs)
            use.trusted = self._trusts(use, size)
            uses.append(use)
        used = {name for use in uses for name in use.layer.names.values()}
        reached = _reached(outputs, {n: p for n, p in self.params.items() if n not in used})
        if others := [name for name in reached if name not in self.stray]:
            raise RulesChanged(others)  # used otherwise than by a call of their layer
        fallback = None
        if reached:
            fallback = Fallback(self.model, reached, batch, self._vectorised)
        return Record(self.params, batch, outputs, uses, fallback)

    def _trusts(self, use: Use, size: int) -> bool:
        """Whether the layer was seen to be right with so many rows a sample; all rows of a batch of
        one are that sample's."""
        known = self._verified.get(use.layer.rule.module, set())
        return use.rows in known or (size == 1 and bool(known))

    def verify(self, batch: Batch) -> Record:
        """Compare with autograd on a few samples, and move what disagrees to the fallback.

        One weighted backward pass sum_n c_n <v_n, f_n> is held against sum_n c_n M_n, with M_n the
        rules' per-sample gradients for columns v_n: random v and unequal c make a wrong rule, and a
        right sum wrongly split, disagree.

        Returns:
            What the samples' forward pass recorded.

        Raises:
            ModelError: If outputs are not one differentiable row a sample, depend on other samples,
                or are not the same at every call.
        """
        probe = next(batch.chunks(PROBE))
        record = self.settled(lambda: self._recorded(probe))
        outputs = record.outputs
        if outputs.dim() == 0 or len(outputs) != len(probe) or not outputs.requires_grad:
            shape = f"outputs of shape {tuple(outputs.shape)} for {len(probe)} samples"
            got = shape if outputs.requires_grad else f"{shape}, cut off from the parameters"
            expected = "one output a sample, differentiable with respect to the parameters"
            fix = "Return the logits themselves, one row a sample, without detach() or no_grad()."
            raise ModelError(got, expected, fix)
        self._check_independence(probe, outputs.detach())
        return self._compare(record).without_graph()

    def _compare(self, record: Record) -> Record:
        """Hold what was recorded of a few samples against autograd; see `verify`."""
        outputs, probe = record.outputs, record.batch
        generator = torch.Generator().manual_seed(0)
        column = P.randn_like({"": outputs}, generator)[""]
        weights = P.randn_like({"": outputs.new_zeros(len(probe))}, generator)[""]
        weighted = column * weights.view(-1, *(1,) * (outputs.dim() - 1))
        truth = P.pull(outputs, self.params, weighted)
        self._verify_rules(record, truth, column, weights)
        if self.stray and self._vectorised:
            self._vectorised = self._can_vectorise(probe, truth, column, weights)
        self._seen |= {probe.sample_shapes(), *(use.layer.rule.module for use in record.uses)}
        self._pairs += len(probe) - 1
        return record

    def _verify_rules(self, record: Record, truth: Params, column: Tensor, weights: Tensor) -> None:
        """Drop the rules that are wrong, and note how often a sample the others were fed."""
        for use in record.uses:
            use.trusted = True
        try:
            grads = record.pull(column)
        except RuntimeError:  # reentrant checkpoints let no gradient at a layer be asked for
            self._drop(self.params)
            return
        by_rules: Params = {}
        for group in record.groups():
            try:
                by_rules |= group.weighted(grads, weights)
            except Exception:  # a rule that does not know what its layer is fed
                self._drop(group.names)
        for layer in [*self._layers.values()]:
            own = {name: self.params[name] for name in layer.names.values()}
            self._drop(_wrong(by_rules, truth, own))
        for use, g in zip(record.uses, grads, strict=True):
            module, rows = use.layer.rule.module, use.rows
            # what no gradient has passed through was not seen to be right
            passed = g is not None and bool(g.any())
            if passed and rows is not None and module in self._layers:
                self._verified.setdefault(module, set()).add(rows)

    def _can_vectorise(self, probe: Batch, truth: Params, column: Tensor, weights: Tensor) -> bool:
        """Whether vmap traces the model, and right."""
        stray = {name: self.params[name] for name in self.stray}
        fallback = Fallback(self.model, stray, probe, True)
        gradients = fallback(column)
        found = {name: torch.tensordot(weights, value, 1) for name, value in gradients.items()}
        return fallback.vectorised and not _wrong(found, truth, stray)

    def _check_independence(self, probe: Batch, outputs: Tensor) -> None:
        """The first and the last sample alone must give what they gave in the batch."""
        expected = "one output a sample, the same at every call"
        fix = "Call model.eval(), and remove what mixes samples "
        fix += "(batch statistics, padding without a mask)."
        if shared := probe.shared_shapes():
            fix += f" Inputs without a row for every sample, {shared}, go along whole: "
            fix += "pad samples that are merged in them (bags with offsets, graphs)."
        singles = list(probe.chunks(1))
        for index in {0, len(singles) - 1}:
            try:
                alone = self._outputs(singles[index])
            except ModelError as error:
                got = f"a forward that works on {len(probe)} samples and fails on one of them"
                raise ModelError(f"{got} ({error.__cause__})", expected, fix) from error
            if _close(alone, outputs[index : index + 1]):
                continue
            if not _close(self._outputs(probe), outputs):
                got = "a model whose outputs differ between two calls on the same samples"
                fix = "Call model.eval(), and remove what draws random numbers or keeps a state."
                raise ModelError(got, expected, fix)
            depends = "depends on the other samples of its batch"
            raise ModelError(f"a model whose output for a sample {depends}", expected, fix)

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Tensor:
        """Without a graph."""
        return P.call(self.model, {}, batch.args, batch.kwargs)

    def _drop(self, stray: Iterable[str]) -> None:
        """Take parameters away from their rules."""
        gone = {*stray, *self.stray}
        self.stray = tuple(name for name in self.params if name in gone)
        layers, self._layers = self._layers, {}
        for module, layer in layers.items():
            names = {local: name for local, name in layer.names.items() if name not in gone}
            if names:
                self._layers[module] = LayerParams(layer.rule, names)


def _use(layer: LayerParams, call: Call, size: int, outputs: Tensor) -> Use:
    """A call with its rows put in the order of the samples, as far as their number tells."""
    a, edge = call.a, call.edge
    length = len(a) if a.dim() else 0
    if size > 1 and length == 1:
        added = _added_to_every_sample(edge.node, outputs)
        if added is not None:
            return Use(layer, a.expand(size, *a.shape[1:]), added, SHARED)
    return Use(layer, by_sample(a, size), edge, length // size if length % size == 0 else None)


def _nodes(outputs: Tensor) -> Iterator[Node]:
    """The graph of the outputs."""
    todo = [] if outputs.grad_fn is None else [outputs.grad_fn]
    known = set(todo)
    while todo:
        current = todo.pop()
        yield current
        for following, _ in current.next_functions:
            if following is not None and following not in known:
                known.add(following)
                todo.append(following)


def _reached(outputs: Tensor, params: Params) -> Params:
    """The parameters that the outputs depend on, as far as the graph shows."""
    if not params:
        return {}
    leaves, whole = set[int](), False
    for node in _nodes(outputs):
        leaves.add(id(getattr(node, "variable", None)))
        whole = whole or "CheckpointFunction" in node.name()  # a reentrant one hides its own graph
    return {name: p for name, p in params.items() if whole or id(p) in leaves}


def _added_to_every_sample(node: Node, outputs: Tensor) -> GradientEdge | None:
    """Where the outputs of a layer that is fed once for the whole batch (position ids [1, T]) are
    added to what every sample has of its own: the gradient at the sum is each sample's.

    It is read off the graph. The verification says whether it is right.
    """
    found = [
        current
        for current in _nodes(outputs)
        if any(following is node for following, _ in current.next_functions)
    ]
    if len(found) == 1 and found[0].name() == "AddBackward0":
        return GradientEdge(found[0], 0)
    return None


def _wrong(found: Params, truth: Params, params: Params) -> list[str]:
    """The parameters whose gradient is not the expected one; a missing one is zero.

    What is zero but for rounding (a key's bias in attention) is judged by the largest gradient of
    the given parameters.
    """
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    truth = {name: truth.get(name, zero) for name, zero in zeros.items()}
    largest = max(float(torch.linalg.vector_norm(g)) for g in truth.values())
    wrong = []
    for name, expected in truth.items():
        value = found.get(name, zeros[name]).detach()
        rounding = ROUNDING * torch.finfo(expected.dtype).eps * largest
        bound = max(TOLERANCE * float(torch.linalg.vector_norm(expected)), rounding)
        # NaN is wrong, too
        if value.shape != expected.shape or not float((value - expected).norm()) <= bound:
            wrong.append(name)
    return wrong


def _close(value: Tensor, expected: Tensor) -> bool:
    """Whether outputs agree; infinite ones (masked classes) must be equal."""
    if value.shape != expected.shape:
        return False
    finite = expected[expected.isfinite()].abs()
    scale = max(float(finite.max()) if len(finite) else 0.0, 1e-3)
    gap = (value - expected).abs().where(value != expected, 0.0)
    return not bool((gap > TOLERANCE * scale).any())
