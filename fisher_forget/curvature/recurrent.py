"""Recurrent layers step by step: each gate is a Linear layer, and has its rule.

torch computes a recurrent layer in one call, which shows nothing of its steps. While a pass is
recorded, a mode puts the steps in its place, for the calling thread alone; no module changes, and
the numbers are the same. Packed sequences stay as they are: they hide which row is whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]  # hidden state [B, H], and an LSTM's cell state
Key = tuple[int, int]  # of a weight and its bias
Step = Callable[[Tensor, Tensor, State], State]  # what comes from the input, and from the state


def _tanh(into: Tensor, over: Tensor, _: State) -> State:
    return (torch.tanh(into + over),)


def _relu(into: Tensor, over: Tensor, _: State) -> State:
    return (torch.relu(into + over),)


def _gru(into: Tensor, over: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = into.chunk(3, -1), over.chunk(3, -1)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (torch.lerp(new, state[0], torch.sigmoid(z + hz)),)


def _lstm(into: Tensor, over: Tensor, state: State) -> State:
    i, f, g, o = (into + over).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


LAYERS: Mapping[Any, Step] = {
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
    torch.gru: _gru,
    torch.lstm: _lstm,
}
CELLS: Mapping[Any, Step] = {
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
    torch.gru_cell: _gru,
    torch.lstm_cell: _lstm,
}


def gates_of(model: nn.Module) -> dict[Key, nn.Linear]:
    """A Linear layer for each weight of the model's recurrent layers and its bias, by their
    identities; it holds the parameters themselves."""
    gates = {}
    for module in model.modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        own = dict(module.named_parameters(recurse=False))
        for name, weight in own.items():
            if weight.dim() == 2:
                bias = own.get(name.replace("weight", "bias"))
                gate = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
                gate.weight, gate.bias = weight, bias  # type: ignore[assignment]
                gates[_key(weight, bias)] = gate
    return gates


def _key(weight: Tensor, bias: Tensor | None) -> Key:
    return id(weight), id(bias)


def _keys(weights: Sequence[Tensor | None]) -> list[Key]:
    """The keys of what torch is given: layer by layer and side by side two weights, their biases if
    there are any, and perhaps a projection, which has none."""
    keys = []
    for weight, behind in zip(weights, [*weights[2:], None, None], strict=True):
        if weight is not None and weight.dim() == 2:
            keys.append(_key(weight, behind if behind is not None and behind.dim() == 1 else None))
    return keys


class StepByStep(TorchFunctionMode):
    """While it is on, recurrent layers go through the gates.

    Args:
        gates: Of `gates_of`.
    """

    def __init__(self, gates: Mapping[Key, nn.Linear]) -> None:
        super().__init__()
        self._gates = gates

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in CELLS and (gates := self._known(args[2:])):
            (x, state), (into, over) = args[:2], gates
            several = not isinstance(state, Tensor)
            given = tuple(state) if several else (state,)
            new = CELLS[func](into(x), over(given[0]), given)
            return new if several else new[0]
        # of a packed sequence the second argument holds its lengths, and the third the state
        if func in LAYERS and isinstance(args[3], bool) and (gates := self._known(args[2])):
            x, state, _, _, layers, dropout, train, *rest = args
            if not (train and dropout):
                return self._layers(LAYERS[func], x, state, gates, layers, *rest)
        return func(*args, **(kwargs or {}))

    def _known(self, weights: Sequence[Tensor | None]) -> list[nn.Linear]:
        """The gates of these weights; none if one is no parameter, as with `weight_norm`."""
        keys = _keys(weights)
        return [self._gates[key] for key in keys] if self._gates.keys() >= set(keys) else []

    def _layers(
        self,
        step: Step,
        x: Tensor,
        state: Tensor | Sequence[Tensor],
        gates: Sequence[nn.Linear],
        layers: int,
        *rest: bool,
    ) -> tuple[Tensor, ...]:
        """All layers and directions, as torch's own function returns them."""
        bidirectional, batch_first = rest
        x = x if batch_first else x.transpose(0, 1)
        given = (state,) if isinstance(state, Tensor) else tuple(state)
        sides = 2 if bidirectional else 1
        each = len(gates) // (layers * sides)  # into, over, and perhaps a projection
        last: list[State] = []
        for layer in range(layers):
            seen = []
            for side in range(sides):
                at = layer * sides + side
                own = gates[at * each : (at + 1) * each]
                outputs, end = _run(step, x, tuple(s[at] for s in given), own, bool(side))
                seen.append(outputs)
                last.append(end)
            x = torch.cat(seen, -1)
        ends = (torch.stack(states) for states in zip(*last, strict=True))
        return (x if batch_first else x.transpose(0, 1), *ends)


def _run(
    step: Step, x: Tensor, state: State, gates: Sequence[nn.Linear], backwards: bool
) -> tuple[Tensor, State]:
    """Outputs [B, T, H] of one layer in one direction, and its last state."""
    into, over, *projection = gates
    entering, outputs = into(x), []
    times = range(x.shape[1])
    for t in reversed(times) if backwards else times:
        state = step(entering[:, t], over(state[0]), state)
        if projection:
            state = (projection[0](state[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state
