"""The tape: a private copy of a model, whose recorded passes tell per-sample gradients.

Before any work the tape is verified on a few samples of the user's own data: a layer whose rule
does not reproduce autograd's per-sample gradients (a weight used outside its module, merged batch
dimensions, a patched forward) has its parameters moved to the torch.func fallback, so the result is
exact either way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisher_forget import params as P
from fisher_forget._util.copies import private_copy
from fisher_forget.curvature.record import LayerParams, Record, Use, by_sample
from fisher_forget.curvature.rules import rule_for
from fisher_forget.data.batches import Batch
from fisher_forget.errors import ModelError
from fisher_forget.params import Params

WEIGHTS = (1.0, -0.6180339887)  # of the two samples on which rules are compared with autograd
TOLERANCE = 1e-3  # relative, float32; a wrong rule is wrong by its own size


Call = tuple[nn.Module, Tensor, int, GradientEdge]  # layer, input, its version, output


class _Recorder:
    """Forward hooks that note the layers' calls while a pass is recorded, and else do nothing.

    The hooks are plain functions, so that a deep copy of the model shares them and stays silent.
    """

    def __init__(self) -> None:
        self.calls: list[Call] | None = None
        self.samples = 0

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: self._widened(args))
        module.register_forward_hook(lambda _, args, output: self._note(module, args, output))

    def _widened(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Feed inputs for the whole batch (position ids [1, T]) to the layer once a sample."""
        if self.calls is not None and args and isinstance(args[0], Tensor) and self.samples > 1:
            x = args[0]
            if x.dim() > 1 and len(x) == 1:
                return (x.expand(self.samples, *x.shape[1:]), *args[1:])
        return None

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.calls is not None and isinstance(output, Tensor) and output.requires_grad:
            a = args[0].detach()
            self.calls.append((module, a, a._version, get_gradient_edge(output)))


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
        self._recorder = _Recorder()
        self._vectorised = True
        self._cover(wanted)
        for module in self._layers:
            self._recorder.attach(module)

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
        for module in self.model.modules():
            own = module.named_parameters(recurse=False)
            names = {local: canonical[id(p)] for local, p in own if id(p) in canonical}
            rule = rule_for(module) if names else None
            if rule is not None:
                self._layers[module] = LayerParams(rule, names)
        covered = {name for layer in self._layers.values() for name in layer.names.values()}
        self.stray = tuple(name for name in self.params if name not in covered)

    def run(self, batch: Batch) -> Record:
        """One forward pass over a chunk."""
        recorder, calls = self._recorder, list[Call]()
        recorder.calls, recorder.samples = calls, len(batch)
        try:
            with torch.enable_grad():
                outputs = P.call(self.model, {}, batch.args, batch.kwargs)
        finally:
            recorder.calls = None
        uses = []
        for module, a, version, edge in calls:
            layer = self._layers.get(module)
            if layer is None:  # another tape's of the same model, or moved to the fallback
                continue
            if a._version != version:
                name = type(module).__name__
                got = f"a {name} whose input is overwritten in place after its forward"
                fix = "Replace the in-place operation on that tensor."
                raise ModelError(got, "inputs that stay as they were until backward", fix)
            uses.append(Use(layer, by_sample(a, len(batch)), edge))
        functional = self.functional if self.stray else None
        return Record(self.params, batch, outputs, uses, functional)

    def functional(self, batch: Batch, column: Tensor) -> Params:
        """Gradients of the stray parameters by torch.func, by sample where vmap can't trace."""
        stray = {name: self.params[name].detach() for name in self.stray}

        def single(args: tuple[Any, ...], kwargs: dict[str, Any], v: Tensor) -> Params:
            args, kwargs = _batched((args, kwargs))
            pull: Any = torch.func.vjp(lambda w: P.call(self.model, w, args, kwargs)[0], stray)[1]
            gradient: Params = pull(v)[0]
            return gradient

        if self._vectorised:
            total = len(batch)
            dims = torch.utils._pytree.tree_map(
                lambda x: 0 if isinstance(x, Tensor) and x.dim() and len(x) == total else None,
                (batch.args, batch.kwargs),
            )
            vectorised = torch.func.vmap(single, in_dims=(*dims, 0))
            try:
                with torch.no_grad():
                    gradients: Params = vectorised(batch.args, batch.kwargs, column)
                    return gradients
            except (RuntimeError, ModelError):
                # data-dependent control flow: the loop below is slower and always right
                self._vectorised = False
        with torch.no_grad():
            rows = [single(*_unbatched(b), column[i]) for i, b in enumerate(batch.chunks(1))]
        return {name: torch.stack([row[name] for row in rows]) for name in stray}

    def verify(self, batch: Batch) -> Record:
        """Compare with autograd on two samples, and move what disagrees to the fallback.

        One weighted backward pass sum_n c_n <v_n, f_n> is held against sum_n c_n M_n, with M_n the
        rules' per-sample gradients for columns v_n: random v and unequal c make a wrong rule, and a
        right sum wrongly split, disagree.

        Returns:
            What the two samples' forward pass recorded.

        Raises:
            ModelError: If outputs are not one differentiable row a sample, or depend on others.
        """
        probe = next(batch.chunks(len(WEIGHTS)))
        record = self.run(probe)
        outputs = record.outputs
        if outputs.dim() == 0 or len(outputs) != len(probe) or not outputs.requires_grad:
            shape = f"outputs of shape {tuple(outputs.shape)} for {len(probe)} samples"
            got = shape if outputs.requires_grad else f"{shape}, cut off from the parameters"
            expected = "one output a sample, differentiable with respect to the parameters"
            fix = "Return the logits themselves, one row a sample, without detach() or no_grad()."
            raise ModelError(got, expected, fix)
        self._check_independence(probe, outputs.detach())
        self._drop(set(self.stray) | self._disagreeing(record))
        return record.without_graph()

    def _disagreeing(self, record: Record) -> set[str]:
        """Parameters whose gradient by the rules is not autograd's."""
        outputs = record.outputs
        column = P.randn_like({"": outputs}, torch.Generator().manual_seed(0))[""]
        weights = outputs.new_tensor(WEIGHTS[: len(outputs)])
        weighted = column * weights.view(-1, *(1,) * (outputs.dim() - 1))
        by_rules = self._by_rules(record, column, weights)
        leaves = list(self.params.values())
        truth = torch.autograd.grad(outputs, leaves, weighted, allow_unused=True)
        wrong = set()
        for (name, p), g in zip(self.params.items(), truth, strict=True):
            expected = torch.zeros_like(p) if g is None else g
            value = by_rules.get(name, torch.zeros_like(p)).detach()
            if value.shape != p.shape:
                wrong.add(name)
                continue
            error = torch.linalg.vector_norm(value - expected)
            if not float(error) <= TOLERANCE * float(torch.linalg.vector_norm(expected)):
                wrong.add(name)  # also where it is not a number
        return wrong

    def _check_independence(self, probe: Batch, outputs: Tensor) -> None:
        """The last sample alone must give what it gives in the batch."""
        tolerance = TOLERANCE * max(float(outputs.abs().max()), 1e-3)
        *_, single = probe.chunks(1)
        with torch.no_grad():
            alone = P.call(self.model, {}, single.args, single.kwargs)[0]
            if float((alone - outputs[-1]).abs().max()) > tolerance:
                got = "a model whose output for a sample depends on the other samples of its batch"
                mixing = "mixes samples (batch statistics) or draws random numbers"
                fix = f"Call model.eval(), and remove what {mixing}."
                expected = "one output a sample, the same at every call"
                raise ModelError(f"{got}, or on chance", expected, fix)

    def _by_rules(self, record: Record, column: Tensor, weights: Tensor) -> Params:
        """sum_n c_n M_n; a rule that fails outright contributes a shape that matches nothing."""
        total: Params = {}
        for use, g in zip(record.uses, record.pull(column), strict=True):
            try:
                gradients = use.layer.per_sample(use.a, g) if g is not None else {}
                summed = {n: torch.tensordot(weights, value, 1) for n, value in gradients.items()}
            except (RuntimeError, ValueError, IndexError):
                summed = {name: torch.full((0,), 0.0) for name in use.layer.names.values()}
            for name, value in summed.items():
                same = name in total and total[name].shape == value.shape
                total[name] = total[name] + value if same else value
        return total

    def _drop(self, stray: set[str]) -> None:
        """Take parameters away from their rules."""
        self.stray = tuple(name for name in self.params if name in stray)
        layers, self._layers = self._layers, {}
        for module, layer in layers.items():
            names = {local: name for local, name in layer.names.items() if name not in stray}
            if names:
                self._layers[module] = LayerParams(layer.rule, names)


def _batched(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.unsqueeze(0), tree)


def _unbatched(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    single = batch.map(lambda x: x[0] if x.dim() else x)
    return single.args, single.kwargs
