r"""Rows s^T J_n of many samples, and the products of all with each other, within a bound on memory.

The rows of a linear layer that sees one input a sample are g a^T, with a its input and g what comes
back to its output. They stay factors, since the product of g a^T and h b^T is (g, h) (a, b): I + O
numbers in place of I O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fisher_forget import params as P
from fisher_forget._util.checks import check_model
from fisher_forget.curvature.record import Record
from fisher_forget.curvature.tape import Tape
from fisher_forget.data.batches import Batch
from fisher_forget.data.split import Indices, Split
from fisher_forget.errors import ConfigError
from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params

# (outputs, targets) -> vectors of the outputs' shape
Columns = Callable[[Tensor, Tensor], Sequence[Tensor]]
MEMORY = 1 << 29
ALIVE = 4  # blocks of rows that may exist at one moment, copies included
SQUARES = 3  # matrices of the Gram matrix's size that a solve needs


def most_rows(memory: int) -> int:
    """Rows whose Gram matrix can be solved with within so many bytes."""
    return math.isqrt(memory // (SQUARES * 8))


@dataclass(frozen=True)
class Factors:
    """Rows g a^T of one linear layer.

    Attributes:
        weight, bias: Names; without a bias `None`.
        a: Inputs [n, I], with a 1 appended where there is a bias.
        g: What comes back to its outputs: [n, columns, O].
    """

    weight: str
    bias: str | None
    a: Tensor
    g: Tensor

    def part(self, matrix: Tensor) -> Params:
        """Parameters from [O, I (+ 1)]."""
        if self.bias is None:
            return {self.weight: matrix}
        return {self.weight: matrix[:, :-1].contiguous(), self.bias: matrix[:, -1].contiguous()}

    def join(self, v: Params) -> Tensor:
        """Inverse of `part`."""
        weight = v[self.weight]
        return weight if self.bias is None else torch.cat([weight, v[self.bias][:, None]], 1)


@dataclass(frozen=True)
class RowBlock:
    """The rows of n samples, all columns of a sample after each other.

    Attributes:
        thin: Of linear layers.
        rest: Of all other parameters: [n, columns, *shape] by name.
    """

    thin: tuple[Factors, ...]
    rest: Params

    def gram(self, other: RowBlock) -> Tensor:
        """Products with the rows of another block: [r, r']."""
        total = self._rest() @ other._rest().T
        for left, right in zip(self.thin, other.thin, strict=True):
            (n, columns, _), m = left.g.shape, len(right.g)
            # (g a^T, h b^T) = (g, h) (a, b), where all columns of a sample share its a
            products = (left.g.flatten(0, 1) @ right.g.flatten(0, 1).T).view(n, columns, m, columns)
            products = products * (left.a @ right.a.T)[:, None, :, None]
            total += products.view(n * columns, m * columns)
        return total

    def times(self, v: Params) -> Tensor:
        """Products with a vector: [r]."""
        rest = self._rest()
        total = rest @ torch.cat([rest.new_zeros(0), *(v[name].reshape(-1) for name in self.rest)])
        for layer in self.thin:
            # (g a^T, V) = g^T V a
            total += (layer.g * (layer.a @ layer.join(v).T)[:, None]).sum(-1).flatten()
        return total

    def transposed(self, c: Tensor) -> Params:
        """Sum of the rows, each times its c [r]."""
        total: Params = {}
        for layer in self.thin:
            weighted = (c.view(layer.g.shape[:2])[..., None] * layer.g).sum(1)
            total |= layer.part(weighted.T @ layer.a)
        for name, rows in self.rest.items():
            total[name] = (c @ flat_rows(rows)).view(rows.shape[2:])
        return total

    def matrix(self, like: Params) -> Tensor:
        """[r, d], parameters in the order of `like`."""
        full = dict(self.rest)
        for layer in self.thin:
            outer = layer.g[..., None] * layer.a[:, None, None]
            full[layer.weight] = outer if layer.bias is None else outer[..., :-1]
            if layer.bias is not None:
                full[layer.bias] = outer[..., -1]
        return torch.cat([flat_rows(full[name]) for name in like], 1)

    def _rest(self) -> Tensor:
        """[r, d'] of the parameters that are no factors."""
        if not self.rest:
            g = self.thin[0].g
            return g.new_zeros(len(g) * g.shape[1], 0)
        return torch.cat([flat_rows(rows) for rows in self.rest.values()], 1)

    def numbers(self) -> int:
        """Held for each row."""
        count = sum(x.numel() for x in self.rest.values()) + sum(
            f.a.numel() + f.g.numel() for f in self.thin
        )
        shape = next(iter(self.rest.values())).shape if self.rest else self.thin[0].g.shape
        return -(-count // (shape[0] * shape[1]))


def flat_rows(rows: Tensor) -> Tensor:
    """[n, k, *shape] as [n k, d], for parameters of any shape."""
    return rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2:].numel())


class Rows:
    """The rows s_nk^T J_n of G [R, d] by sample; blocks that do not fit the memory are made again.

    Args:
        model: Copied; never touched.
        split: The data.
        parts: Samples, in this order; no block reaches over the end of a part.
        likelihood: Gives residuals and counts.
        columns: The vectors s that are back-propagated.
        memory: Bytes that rows may take at a time, and that a solve with the Gram matrix may take.

    Attributes:
        gradients: Sample gradients so far; a forward pass is 1/3, a backward pass 2/3.

    Raises:
        ConfigError: If the Gram matrix does not fit the memory.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        parts: Sequence[Indices],
        likelihood: Likelihood,
        columns: Columns,
        memory: int,
    ) -> None:
        check_model(model)
        self.tape, self.split, self.likelihood = Tape(model), split, likelihood
        self.columns, self.gradients = columns, 0.0
        self.like = P.detached(self.tape.params)
        few = split.few(np.concatenate(list(parts))).on(self.tape.model)
        probe = self.tape.verify(few)
        likelihood.check(probe.outputs, probe.batch.targets)
        self.per_sample = len(columns(probe.outputs, probe.batch.targets))
        total = self.per_sample * sum(map(len, parts))
        if total > most_rows(memory):
            raise ConfigError(
                f"{total:,} rows, whose products with each other need "
                f"{SQUARES * 8 * total**2 / 2**30:,.1f} GiB",
                f"at most {most_rows(memory):,} rows within memory={memory}",
                "Raise `memory`, or give the method fewer samples.",
            )
        numbers = self.tape.settled(lambda: self._rows(self.tape.run(few), few)).numbers()
        size = numbers * P.flatten(self.like).element_size()  # bytes of a row
        step = max(1, memory // (ALIVE * self.per_sample * size))
        self._blocks = [part[i : i + step] for part in parts for i in range(0, len(part), step)]
        self._parts = [k for k, part in enumerate(parts) for _ in range(0, len(part), step)]
        self._count = len(parts)
        self._held: tuple[int, RowBlock] | None = None
        self.gradients = 0.0  # the probe's are not counted

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks [r, d], in order."""
        return (self._block(i).matrix(self.like) for i in range(len(self._blocks)))

    def _batch(self, index: int) -> Batch:
        rows = self._blocks[index]
        return next(self.split.read([rows])).on(self.tape.model)

    def _block(self, index: int) -> RowBlock:
        if self._held is not None and self._held[0] == index:
            return self._held[1]
        self._held = None  # frees its memory before the next one is made
        batch = self._batch(index)

        def rows() -> RowBlock:
            record = self.tape.run(batch)
            self.likelihood.check(record.outputs.detach(), batch.targets)
            return self._rows(record, batch)

        block = self.tape.settled(rows)
        self._held = (index, block)
        return block

    def _rows(self, record: Record, batch: Batch) -> RowBlock:
        """Of one forward pass."""
        columns = self.columns(record.outputs.detach(), batch.targets)
        pulled = [record.pull(column) for column in columns]
        thin: list[Factors] = []
        rest: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for group in record.groups():
                names = group.layer.names
                factors = [f for grads in pulled if (f := group.rank_one(grads)) is not None]
                if "weight" in names and len(factors) == len(pulled):
                    a, g = factors[0][0], torch.stack([g for _, g in factors], 1)
                    bias = names.get("bias")
                    a = a if bias is None else torch.cat([a, a.new_ones(len(a), 1)], 1)
                    thin.append(Factors(names["weight"], bias, a, g))
                    continue
                for grads in pulled:
                    for name, value in group.per_sample(grads, slice(0, len(batch))).items():
                        rest.setdefault(name, []).append(value)
            for column in columns:
                for name, value in record.stray(column).items():
                    rest.setdefault(name, []).append(value)
            held = {name: torch.stack(values, 1) for name, values in rest.items()}
            covered = held.keys() | {name for f in thin for name in (f.weight, f.bias)}
            for name, p in self.like.items():
                if name not in covered:  # a parameter that this batch does not use
                    held[name] = p.new_zeros(len(batch), len(columns), *p.shape)
        self.gradients += len(batch) * (1 + 2 * len(columns)) / 3
        return RowBlock(tuple(thin), {name: held[name] for name in self.like if name in held})

    def outputs(self, read: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """What `read` makes of outputs and targets: one vector a part, float64, on the CPU."""
        empty = torch.zeros(0, dtype=torch.float64)
        values: list[list[Tensor]] = [[empty] for _ in range(self._count)]
        for index, part in enumerate(self._parts):
            batch = self._batch(index)
            with torch.no_grad():
                outputs = P.call(self.tape.model, {}, batch.args, batch.kwargs)
            values[part].append(read(outputs, batch.targets).double().cpu().reshape(-1))
            self.gradients += len(batch) / 3
        return [torch.cat(pieces) for pieces in values]

    def positions(self) -> list[float]:
        """Scored positions of each part, which its mean loss is over."""
        counts = [0.0] * self._count
        for index, part in enumerate(self._parts):
            targets = self._batch(index).targets
            counts[part] += float(self.likelihood.counts(targets).double().sum())
        return counts

    def gram(self) -> Tensor:
        """G G^T [R, R], float64, on the CPU."""
        lines: list[list[Tensor]] = []  # the lower triangle, block by block
        for i in range(len(self._blocks)):
            block = self._block(i)  # held by its name while the blocks before it are made again
            before = [block.gram(self._block(j)).double().cpu() for j in range(i)]
            lines.append([*before, block.gram(block).double().cpu()])
        # the upper triangle is the lower one, mirrored
        mirrored = ([below[i].T for below in lines[i + 1 :]] for i in range(len(lines)))
        pairs = zip(lines, mirrored, strict=True)
        return torch.cat([torch.cat([*left, *right], 1) for left, right in pairs])

    def times(self, v: Params) -> Tensor:
        """G v [R], float64, on the CPU."""
        return torch.cat([self._block(i).times(v).double().cpu() for i in range(len(self._blocks))])

    def transposed(self, c: Tensor) -> list[Params]:
        """G^T c for every column of c [R, k]."""
        totals = [
            {name: p.double() * 0 for name, p in self.like.items()} for _ in range(c.shape[1])
        ]
        kind = next(iter(self.like.values()))
        at = 0
        for i, rows in enumerate(self._blocks):
            block, end = self._block(i), at + len(rows) * self.per_sample
            for total, column in zip(totals, c[at:end].T, strict=True):
                for name, value in block.transposed(column.to(kind)).items():
                    total[name] += value.double()  # sums over blocks in double precision
            at = end
        return [
            {name: x.to(self.like[name].dtype) for name, x in total.items()} for total in totals
        ]
