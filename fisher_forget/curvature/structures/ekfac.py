"""Kronecker structure with eigenvalue correction (EKFAC; George et al. 2018, arXiv:1806.03884).

For a layer with matrix M = [W b] of shape [O, I], the basis is Q_row (x) Q_col from the second
moments of the output gradients and of the inputs (with a 1 for the bias), in the *expand*
convention for shared weights (Eschenhagen et al. 2023, arXiv:2311.00636). The eigenvalues are then
corrected to the exact diagonal in that basis,

    Lambda_ij = sum_n (Q_row^T M_n Q_col)_ij^2 / N,   M_n the gradient of sample n,

the best diagonal in Frobenius norm. Any orthonormal basis keeps this an unbiased trace; a side that
is one-hot or too large keeps the standard basis. Parameters that are not in a matrix get the exact
diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fisher_forget.curvature import cost
from fisher_forget.curvature.cost import CostEstimate
from fisher_forget.curvature.operator import BlockDiagonal, Curvature, Spectral
from fisher_forget.curvature.passes import Accumulator, Walk
from fisher_forget.curvature.record import Grads, Group, Record
from fisher_forget.curvature.rules.base import PATCH_BYTES, MatrixRule, add_squared_products
from fisher_forget.curvature.solvers import eigh
from fisher_forget.curvature.structures.diagonal import Diagonal, Settling, ThinSquares
from fisher_forget.curvature.structures.kronecker import KEY, Kronecker, Matrix, turn
from fisher_forget.curvature.structures.spec import StructureSpec
from fisher_forget.curvature.tape import Tape
from fisher_forget.errors import CurvatureError
from fisher_forget.params import Params

REPLAY_BYTES = 256 << 20  # layer inputs and output gradients kept from the first pass

Step = tuple[Record, Tensor, Grads, bool]


def symmetric_basis(covariance: Tensor) -> Tensor:
    """Orthonormal eigenvectors [k, k] from an upper triangle, in float64 where that is cheap."""
    exact = covariance.double() if len(covariance) <= 512 else covariance
    return eigh(exact, upper=True)[1].to(covariance.dtype)


class EkfacSum(Accumulator):
    """Accumulates the sides' second moments in a first pass over the data and Lambda in a second.

    Where all layer inputs and output gradients of the first pass fit `REPLAY_BYTES`, the second is
    a replay of them: no forward or backward pass is repeated.

    Args:
        tape: The model.
        basis: Take the eigenbases of this EKFAC of the same model: one pass, and sums that add.
        decompose: Second moment, known by its upper triangle -> orthonormal basis.
        replay: Whether the second pass may be a replay.

    Attributes:
        remembered: Bytes of inputs and gradients that were kept for the replay.
    """

    def __init__(
        self,
        tape: Tape,
        basis: Curvature | None = None,
        *,
        decompose: Callable[[Tensor], Tensor] = symmetric_basis,
        replay: bool = True,
    ) -> None:
        self.passes = 2
        self.params = {name: p.detach() for name, p in tape.params.items()}
        self.layouts: dict[str, Matrix] = {}
        self.moments: dict[str, tuple[Tensor | None, Tensor]] = {}
        self.bases: dict[str, tuple[Tensor | None, Tensor]] = {}
        self.lambdas: Params = {}
        self.rest: Params = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.remembered = 0
        self._decompose = decompose
        self._thin = ThinSquares()
        self._pass = 0
        self._replay: list[Step] | None = [] if replay else None
        if basis is not None:
            self._adopt(basis)

    def _adopt(self, basis: Curvature) -> None:
        parts = basis.parts if isinstance(basis, BlockDiagonal) else ()
        for _, part in parts:
            if isinstance(part, Kronecker) and part.layout.weight in self.params:
                self.layouts[part.layout.weight] = part.layout
                self.bases[part.layout.weight] = part.row, part.col
        # where no rule covers a layer, an EKFAC has no bases
        if not self.bases and {name for names, _ in parts for name in names} != self.params.keys():
            raise CurvatureError(
                "basis= without EKFAC blocks of this model", "an EKFAC of it", "Estimate one first."
            )
        self._pass, self.passes = 1, 1
        self._make_room()

    def add(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        if self._pass == 0:
            self._add_moments(record, grads, last)
            self._remember(record, column, grads, last)
        else:
            self._add_lambdas(record, column, grads, last)

    def end_pass(self) -> None:
        """After the first pass: eigendecompose the sides, and replay what was remembered."""
        self._pass += 1
        if self._pass > 1:
            return
        for weight, (row, col) in self.moments.items():
            turned = None if row is None else self._decompose(row)
            self.bases[weight] = turned, self._decompose(col)
        self.moments.clear()
        self._make_room()
        if self._replay is not None:
            self.passes = 1
            for step in self._replay:
                self._add_lambdas(*step)
            self._replay.clear()

    def _make_room(self) -> None:
        for weight in self.bases:
            layout = self.layouts[weight]
            self.lambdas[weight] = torch.zeros_like(layout.join(self.params))
            for name in layout.names:
                self.rest.pop(name, None)
        self._settling = Settling(self.lambdas), Settling(self.rest)

    def _remember(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        if self._replay is None:
            return
        # the columns of a chunk share its inputs: these take memory once
        known = {use.a.data_ptr() for step in self._replay[-1:] for use in step[0].uses}
        inputs = [use.a for use in record.uses if use.a.data_ptr() not in known]
        tensors = [g for g in grads if g is not None] + inputs
        self.remembered += sum(t.numel() * t.element_size() for t in tensors)
        if self.remembered > REPLAY_BYTES:
            self._replay = None
            return
        self._replay.append((record.without_graph(), column, grads, last))

    def _add_moments(self, record: Record, grads: Grads, last: bool) -> None:
        for group in record.groups():
            layout = self._layout(group)
            if layout is None:
                continue
            row, col = self._moment(layout, group)
            for call in group.calls:
                use, g = record.uses[call], grads[call]
                rule = use.layer.rule
                if g is None or not isinstance(rule, MatrixRule):
                    continue
                if row is not None:
                    rule.add_row_moment(row, use.a, g)
                if last:  # all columns of a chunk share its inputs, which count once
                    rule.add_column_moment(col, use.a, g)

    def _moment(self, layout: Matrix, group: Group) -> tuple[Tensor | None, Tensor]:
        """Second moments of output gradients [O, O] and of inputs [I (+ 1), I (+ 1)] so far."""
        if layout.weight not in self.moments:
            rows, columns = layout.join(self.params).shape
            new = self.params[layout.weight].new_zeros
            rules = [use.layer.rule for use in group.uses]
            has_row = all(rule.has_row_basis() for rule in rules if isinstance(rule, MatrixRule))
            row = new(rows, rows) if has_row else None
            self.moments[layout.weight] = row, new(columns, columns)
        return self.moments[layout.weight]

    def _layout(self, group: Group) -> Matrix | None:
        """Weight and bias share a matrix where every call uses both; else the weight is alone."""
        layers = [use.layer for use in group.uses if isinstance(use.layer.rule, MatrixRule)]
        matrices = [layer for layer in layers if "weight" in layer.names]
        if not matrices:
            return None
        weight = matrices[0].names["weight"]
        if weight not in self.layouts:
            same = all(u.layer.names == matrices[0].names for u in group.uses)
            rule = matrices[0].rule
            assert isinstance(rule, MatrixRule)
            bias = matrices[0].names.get("bias") if same else None
            self.layouts[weight] = Matrix(rule, weight, bias)
        return self.layouts[weight]

    def _add_lambdas(self, record: Record, column: Tensor, grads: Grads, last: bool) -> None:
        for group in record.groups():
            layout = self._layout(group)
            if layout is None or layout.weight not in self.bases:
                self._square(group, grads, ())
                continue
            row = self.bases[layout.weight][0]
            thin = group.rank_one(grads)
            if thin is not None and set(layout.names) == set(group.names):
                # (Q_row^T g a^T Q_col)^2: the output gradients are rotated now, the inputs once
                a, g = thin
                self._thin.add(layout.weight, a, g if row is None else g @ row)
                continue
            self._add_shared(layout, group, grads)
            self._square(group, grads, layout.names)
        for name, value in record.stray(column).items():
            self.rest[name] += value.square().sum(0)
        if last:
            for weight, a, squares in self._thin.drained():
                if self.layouts[weight].bias is not None:
                    a = torch.cat([a, a.new_ones(len(a), 1)], 1)
                a = a @ self.bases[weight][1]
                self.lambdas[weight].addmm_(squares.T, a * a)
            for settling in self._settling:
                settling.end_chunk()

    def _add_shared(self, layout: Matrix, group: Group, grads: Grads) -> None:
        """Lambda of a layer at several positions: rotates these or, where cheaper, M_n."""
        row, col = self.bases[layout.weight]
        use, g = group.uses[0], grads[group.calls[0]]
        rule = use.layer.rule
        rows, columns = self.lambdas[layout.weight].shape
        if len(group.calls) == 1 and g is not None and isinstance(rule, MatrixRule):
            # multiplications a sample: R positions from both sides, or one matrix from both
            count = rule.position_count(g)
            by_positions = count * (columns**2 + (0 if row is None else rows**2))
            by_matrix = rows * columns * (columns + (0 if row is None else rows))
            if by_positions < by_matrix and rule.positions(use.a[:1], g[:1]) is not None:
                self._turn_positions(layout, rule, use.a, g)
            else:
                self._turn_matrices(layout, rule, use.a, g)
            return
        for piece in group.pieces(grads):
            if all(name in piece for name in layout.names):
                self.lambdas[layout.weight] += turn(layout.join(piece), row, col).square_().sum(0)

    def _turn_positions(self, layout: Matrix, rule: MatrixRule, a: Tensor, g: Tensor) -> None:
        """Q_row^T M_n Q_col = sum_r (Q_row^T g_nr) (Q_col^T a_nr)^T."""
        row, col = self.bases[layout.weight]
        step = max(1, PATCH_BYTES // (4 * rule.position_count(g) * len(col)))
        for start in range(0, len(g), step):
            seen = rule.positions(a[start : start + step], g[start : start + step])
            assert seen is not None
            x, y = seen
            turned = x @ col[: x.shape[-1]]
            if layout.bias is not None:
                turned += col[-1]  # the constant 1 below each input
            y = y if row is None else y @ row
            add_squared_products(self.lambdas[layout.weight], y.transpose(1, 2), turned)

    def _turn_matrices(self, layout: Matrix, rule: MatrixRule, a: Tensor, g: Tensor) -> None:
        """Q_row^T M_n Q_col, from M_n = [weight gradient, bias gradient]."""
        row, col = self.bases[layout.weight]
        step = max(1, PATCH_BYTES // (4 * self.lambdas[layout.weight].numel()))
        for start in range(0, len(g), step):
            gradients = rule.per_sample(a[start : start + step], g[start : start + step])
            m = rule.to_matrix(gradients["weight"])
            m = m if row is None else row.T @ m
            turned = m @ col[: m.shape[-1]]
            if layout.bias is not None:  # the last column, without joining the two in memory
                b = gradients["bias"] if row is None else gradients["bias"] @ row
                turned.addcmul_(b.unsqueeze(-1), col[-1])
            self.lambdas[layout.weight] += turned.square_().sum(0)

    def _square(self, group: Group, grads: Grads, done: tuple[str, ...]) -> None:
        """The exact diagonal of the group's other parameters."""
        if set(group.names) <= set(done):
            return
        if not done:
            group.add_squares(self.rest, grads)
            return
        for piece in group.pieces(grads):
            for name, value in piece.items():
                if name not in done:
                    self.rest[name] += value.square().sum(0)

    def result(self, count: float) -> BlockDiagonal:
        parts: list[tuple[tuple[str, ...], Spectral]] = []
        lambdas, rest = (settling.mean(count) for settling in self._settling)
        for weight, eigenvalues in lambdas.items():
            (row, col), layout = self.bases[weight], self.layouts[weight]
            block = Kronecker(eigenvalues={KEY: eigenvalues}, layout=layout, row=row, col=col)
            parts.append((layout.names, block))
        if rest:
            parts.append((tuple(rest), Diagonal(rest)))
        return BlockDiagonal(tuple(parts), tuple(self.params))


def _estimate(walk: Walk) -> tuple[Curvature, float]:
    return walk.estimate(EkfacSum(walk.tape, walk.options.basis))


def _cost(walk: Walk) -> CostEstimate:
    """Eigendecompositions are left out of the timed runs, and added by their size: what stands in
    for a basis is as large, which is all that timing needs."""
    sides: list[int] = []

    def standing_in(moment: Tensor) -> Tensor:
        sides.append(len(moment))
        return moment

    look, basis = walk.first(cost.FEW), walk.options.basis
    probe = EkfacSum(walk.tape, basis, decompose=standing_in)
    look.accumulate(probe)
    seconds = sum(cost.eigh_seconds(walk, side) for side in sides)
    remembered = probe.remembered * len(walk.samples) // len(look.samples)
    replay = remembered <= REPLAY_BYTES
    timed = cost.of_columns(
        walk, lambda: EkfacSum(walk.tape, basis, decompose=standing_in, replay=replay)
    )
    peak = timed.bytes_peak + (remembered if replay else 0)
    return replace(timed, seconds=timed.seconds + seconds, bytes_peak=peak)


EKFAC = StructureSpec(
    "ekfac",
    (BlockDiagonal, Kronecker, Diagonal),
    _estimate,
    _cost,
    refused={
        "hessian": "Kronecker factors are second moments of layer gradients, and the Hessian is no "
        "sum of such squares; use kind='exact' or 'sketch', or structure='diagonal', 'dense' or "
        "'matrix_free'."
    },
    additive=True,
    takes_basis=True,
)
