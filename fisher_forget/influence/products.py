r"""What a sample's gradient is along given directions, and how long it is in a curvature's metric.

For the gradient g_n = dl_n/dw of every sample, one pass over the data gives

    g_n . v_k   and   g_n^T H^-1 g_n,

v_k any directions in parameter space, H a curvature with a known basis. Gradients are read off the
layers' inputs and output gradients a few at a time, and none is kept; a Linear layer at one
position forms none, g^T V a and (Q_row^T g)^2 (1 / Lambda) (Q_col^T a)^2 are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_forget import params as P
from fisher_forget._util.isolation import isolated
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.curvature.options import CurvatureOptions
from fisher_forget.curvature.passes import Reader, Walk
from fisher_forget.curvature.record import Grads, Record
from fisher_forget.curvature.rules.base import PATCH_BYTES
from fisher_forget.curvature.structures.diagonal import Diagonal
from fisher_forget.curvature.structures.kronecker import KEY, Kronecker, turn
from fisher_forget.data.pieces import PIECE
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import CurvatureError
from fisher_forget.likelihood import Categorical, Likelihood
from fisher_forget.params import Params
from fisher_forget.unlearn.objective import Objective


@dataclass(frozen=True)
class Readings:
    """What one pass says of each sample, in the order of the samples; float64, on the CPU.

    Attributes:
        products: g_n . v_k: [samples, directions].
        squares: g_n^T H^-1 g_n: [samples]; zeros without a metric.
        losses: l_n, summed over a sample's positions, nats: [samples].
        counts: Scored positions: [samples].
        labels: Classes [samples], -1 where targets are none.
        predicted: The most probable classes [samples], -1 without classes.
    """

    products: Tensor
    squares: Tensor
    losses: Tensor
    counts: Tensor
    labels: Tensor
    predicted: Tensor

    @classmethod
    def blank(cls, size: int, directions: int = 0) -> Readings:
        """To be filled piece by piece. It is made at once: what each piece left behind in between
        would split the memory of the next."""
        return cls(
            torch.zeros(size, directions, dtype=torch.float64),
            *(torch.zeros(size, dtype=torch.float64) for _ in range(3)),
            *(torch.full((size,), -1) for _ in range(2)),
        )

    def note(self, rows: slice, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
        """Fill in what the outputs of some samples say."""
        self.losses[rows] = likelihood.losses(outputs.double(), targets)
        self.counts[rows] = likelihood.counts(targets).double()
        if isinstance(likelihood, Categorical) and outputs.dim() == 2:
            self.predicted[rows] = outputs.argmax(1)
            if targets.dim() == 1 and not targets.is_floating_point():
                self.labels[rows] = targets

    @property
    def positions(self) -> float:
        """Scored positions of all samples, N."""
        return float(self.counts.sum()) or 1.0


@isolated()
def read_gradients(
    objective: Objective,
    split: Split,
    samples: Indices,
    directions: Sequence[Params] = (),
    metric: Curvature | None = None,
    *,
    progress: bool = False,
) -> Readings:
    """g_n . v_k and g_n^T H^-1 g_n of every sample, in one pass over the data.

    Args:
        objective: Whose losses l_n are, at its original weights.
        split: The data.
        samples: Indices of the samples, at least one.
        directions: v_k, by parameter name; names that are missing are zero.
        metric: H, damped: an EKFAC or a diagonal.
        progress: Show a progress bar.

    Raises:
        CurvatureError: If H has no basis in which a layer's gradient is cheap, or is singular.
        ModelError, DataError, NumericalError: If the model or the data cannot be used.
    """
    tape, likelihood = objective.tape, objective.likelihood
    blocks = _blocks(metric)
    tape.verify(split.few(samples).on(tape.model))
    # the one column of the empirical kind is dl_n/df_n, which back-propagates to dl_n/dw
    room = objective.memory // PIECE
    options = CurvatureOptions(kind="empirical", memory=room, progress=progress)
    walk = Walk(tape, split, samples, likelihood, options)

    def read() -> Readings:
        reader = _GradientReader(walk, directions, blocks)
        walk.accumulate(reader)
        return reader.found

    return tape.settled(read)


def mean_gradient(
    objective: Objective, split: Split, samples: Indices, weights: Tensor | None = None
) -> Params:
    """Mean gradient of the loss, (1/N) sum_n g_n over N scored positions; or, with weights c, that
    of samples, (1/M) sum_n c_n g_n over M samples.

    Args:
        objective: Whose losses, at its original weights.
        split: The data.
        samples: Indices of the samples.
        weights: c [M].
    """
    if weights is None:
        return objective.gradient(split.batches(samples), objective.start).mean()
    total, done, likelihood = P.zeros_like(objective.start), 0, objective.likelihood
    for batch in objective.pieces(split.batches(samples)):
        with torch.enable_grad(), P.attached(objective.model, objective.start):
            outputs = objective.outputs(batch)
            if outputs.requires_grad:
                column = likelihood.residual(outputs.detach().double(), batch.targets)
                c = weights[done : done + len(batch)].to(column)
                column = column * c.view(-1, *[1] * (column.dim() - 1))
                pulled = P.pull(outputs, objective.tape.params, column.to(outputs.dtype))
                for name, g in pulled.items():
                    total[name] += g
        done += len(batch)
    return P.scale(total, 1 / max(done, 1))


Blocks = dict[tuple[str, ...], tuple[Spectral, Tensor]]  # names: operator, 1 / eigenvalues


def _blocks(metric: Curvature | None) -> Blocks:
    """The metric by what is read together: a layer's matrix, or one parameter of a diagonal."""
    if metric is None:
        return {}
    found: Blocks = {}
    parts = metric.parts if isinstance(metric, BlockDiagonal) else (((), metric),)
    for names, part in parts:
        if isinstance(part, Kronecker):
            found[names] = part, part.spectrum()[KEY]
        elif isinstance(part, Diagonal):
            found |= {(name,): (part, values) for name, values in part.spectrum().items()}
        else:
            got = f"a metric that holds a {type(part).__name__}"
            fix = "Use structure='ekfac' or 'diagonal'."
            raise CurvatureError(got, "an EKFAC or a diagonal curvature", fix)
    if any(float(values.min()) <= 0 for _, values in found.values()):
        fix = "Add damping or weight decay."
        raise CurvatureError("a singular metric", "eigenvalues above 0", fix)
    return {names: (part, 1 / values) for names, (part, values) in found.items()}


class _GradientReader(Reader):
    """Reads the one column of the empirical kind."""

    label = "gradients"

    def __init__(self, walk: Walk, directions: Sequence[Params], blocks: Blocks) -> None:
        self.likelihood, self.blocks, self.count = walk.likelihood, blocks, len(directions)
        self.directions: Params = {
            name: torch.stack([v.get(name, torch.zeros_like(p)) for v in directions])
            for name, p in walk.tape.params.items()
            if directions
        }
        self.found, self.done = Readings.blank(len(walk.samples), self.count), 0

    def add(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        size, device = len(record.batch), column.device
        products = torch.zeros(size, self.count, dtype=torch.float64, device=device)
        squares = torch.zeros(size, dtype=torch.float64, device=device)
        blocks, wide = dict(self.blocks), []
        for group in record.groups():
            thin, names = group.rank_one(grads), group.layer.names
            block = tuple(names[key] for key in ("weight", "bias") if key in names)
            if thin is None or (blocks and not self._is_matrix(block)):
                wide.append(group)
                continue
            products += _thin_products(names, self.directions, *thin) if self.count else 0
            if block in blocks:
                squares += _thin_squares(*blocks.pop(block), *thin)
        stray = record.stray(column)
        for rows in _runs(record, {name for group in wide for name in group.names}):
            piece = {name: value[rows] for name, value in stray.items()}
            for group in wide:
                piece |= group.per_sample(grads, rows)
            for name, value in piece.items() if self.count else ():
                along = self.directions[name].flatten(1).T
                products[rows] += value.reshape(len(value), -1) @ along
            for held, (part, inverse) in blocks.items():
                if all(name in piece for name in held):
                    squares[rows] += _squares(held, part, inverse, piece)
        rows = slice(self.done, self.done + size)
        self.found.products[rows], self.found.squares[rows] = products, squares
        self.found.note(rows, self.likelihood, record.outputs.detach(), record.batch.targets)
        self.done += size

    def _is_matrix(self, names: tuple[str, ...]) -> bool:
        return names in self.blocks and isinstance(self.blocks[names][0], Kronecker)


def _runs(record: Record, names: set[str]) -> Iterator[slice]:
    """Runs of samples whose gradients of these parameters fit `PATCH_BYTES`."""
    size = len(record.batch)
    numbers = sum(record.params[name].numel() for name in names)
    step = max(1, PATCH_BYTES // (4 * max(numbers, 1)))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _thin_products(names: dict[str, str], directions: Params, a: Tensor, g: Tensor) -> Tensor:
    """g^T V_k a of every sample, and g . b_k with a bias: [samples, directions]."""
    found = []
    for k in range(len(next(iter(directions.values())))):
        total = g.new_zeros(len(g))
        if "weight" in names:
            total = ((g @ directions[names["weight"]][k]) * a).sum(1)
        if "bias" in names:
            total = total + g @ directions[names["bias"]][k]
        found.append(total)
    return torch.stack(found, 1)


def _thin_squares(part: Spectral, inverse: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """(Q_row^T g)^2 (1 / Lambda) (Q_col^T a)^2 of every sample; with a 1 below a for a bias."""
    assert isinstance(part, Kronecker)
    if part.layout.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
    y = g if part.row is None else g @ part.row
    return ((y.square() @ inverse) * (a @ part.col).square()).sum(1)


def _squares(names: tuple[str, ...], part: Spectral, inverse: Tensor, piece: Params) -> Tensor:
    """|Lambda^-1/2 Q^T g|^2 of a block, from per-sample gradients."""
    if isinstance(part, Kronecker):
        turned = turn(part.layout.join(piece), part.row, part.col)
    else:
        turned = piece[names[0]]
    return (turned.square() * inverse).reshape(len(turned), -1).sum(1)
