"""Reads the samples of a data set by index, through one loader a call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from fisher_forget._util.calls import current_call
from fisher_forget.data.batches import (
    Batch,
    Layout,
    Unpack,
    check_targets,
    layout_of,
    make_batch,
    unpacked,
    warn_of_weights,
)
from fisher_forget.data.samples import KeywordDataset
from fisher_forget.errors import DataError, FisherForgetError

Indices = NDArray[np.int64]
Collate = Callable[[list[Any]], Any]
T = TypeVar("T")
# What is kept of a user's loader. Its order, its generator and its batches are not: batches are
# read by index, always the same.
KEPT = (
    "collate_fn",
    "num_workers",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "timeout",
)


class Reader:
    """A data set, and how batches of its samples are made.

    Worker processes live as long as the call of the package that they are started in
    (`_util.calls`), or as the pass, outside of one.

    Args:
        base: The data set.
        unpack: Takes (inputs, targets) out of a batch.
        settings: Keywords of `DataLoader`, those of `KEPT`.

    Attributes:
        layout: Which inputs have a row for every sample; `None` until `probe`.
    """

    def __init__(
        self,
        base: Dataset[Any],
        unpack: Unpack | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.base, self.unpack = base, unpack
        self.settings = {"collate_fn": default_collate, "num_workers": 0} | dict(settings or {})
        self.layout: Layout | None = None
        self._idle: list[_Loader] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_idle": []}  # processes stay where they are

    def batches(self, plan: Sequence[Indices]) -> Iterator[Batch]:
        """A batch of each of the given lots of samples.

        Raises:
            DataError: If samples cannot be read, or are no batch.
        """
        with closing(self.collated(plan)) as collated:
            for rows, raw in zip(plan, collated, strict=True):
                batch = make_batch(raw, self.unpack, self.layout, len(rows))
                yield replace(batch, samples=torch.tensor(rows))

    def probe(self, rows: Indices) -> bool:
        """Read a batch twice, and the first samples of it once more.

        Tells which inputs have a row for every sample: those that have fewer in the smaller batch.

        Returns:
            Whether both reads agree.

        Raises:
            DataError: If samples cannot be read, or are no batch.
        """
        # other samples than the batch's might not fit together: of a single one, two are made
        fewer = rows[:2] if len(rows) > 2 else rows[:1].repeat(3 - len(rows))
        plan = [rows, rows, fewer]
        raws = list(self.collated(plan))
        reads = [unpacked(raw, self.unpack) for raw in raws]
        for (inputs, targets), lot in zip(reads, plan, strict=True):
            check_targets(inputs, targets, len(lot))
        (first, _), _, (small, _) = reads
        if self.unpack is None:
            warn_of_weights(raws[0], len(rows))
        self.layout = layout_of([first, small], [len(rows), len(fewer)])
        leaves = [pytree.tree_leaves(read) for read in reads[:2]]
        return not any(differ(a, b) for a, b in zip(*leaves, strict=False))

    def collated(self, plan: Sequence[Indices]) -> Generator[Any]:
        """What the collate function makes of each of the given lots of samples."""
        if self.indexed:
            # Indexing tensors directly is two orders of magnitude faster than collating single
            # samples.
            yield from (list(self.base[torch.from_numpy(rows)]) for rows in plan)
            return
        yield from self._loaded(plan, self._collate)

    @property
    def indexed(self) -> bool:
        """Whether many samples are taken at once, as rows of tensors."""
        if type(self.base) not in (TensorDataset, KeywordDataset):
            return False
        tensors = cast(TensorDataset, self.base).tensors
        dense = all(t.layout is torch.strided and not t.is_nested for t in tensors)
        return dense and self._collate is default_collate

    @property
    def _collate(self) -> Collate:
        return cast(Collate, self.settings["collate_fn"])

    def alone(self, of: Callable[[Any], T], indices: Indices, lot: int) -> Iterator[T]:
        """A function of what the collate function makes of each sample by itself; or of the sample,
        where it makes nothing of it: a data set may be given for its indices alone.

        Args:
            of: Called where the samples are read; at the top of a module.
            indices: Of the samples.
            lot: How many are read at a time.

        Raises:
            DataError: If samples cannot be read.
        """
        if self.indexed:
            singles = [indices[at : at + 1] for at in range(len(indices))]
            yield from map(of, self.collated(singles))
            return
        plan = [indices[at : at + lot] for at in range(0, len(indices), lot)]
        for results in self._loaded(plan, _Alone(self._collate, of)):
            yield from results

    def _loaded(self, plan: Sequence[Indices], collate: Collate) -> Generator[Any]:
        """What a function makes of each of the given lots of samples."""
        loader, done = self._loader(collate), 0
        try:
            for raw in loader.read(plan):
                yield raw
                done += 1
        except Exception as error:
            loader.close()
            if isinstance(error, FisherForgetError):
                raise
            raise _unreadable(error, plan[done]) from error
        finally:
            if loader.call is None:
                loader.close()
            elif not loader.closed:
                self._idle.append(loader)

    def _loader(self, collate: Collate) -> _Loader:
        """One that is not in use: passes may overlap."""
        call = current_call()
        self._idle = [loader for loader in self._idle if not loader.closed]
        for loader in self._idle:
            if (
                loader.call is call and loader.collate == collate
            ):  # another thread's belong to its own call
                self._idle.remove(loader)
                return loader
        loader = _Loader(self.base, self.settings | {"collate_fn": collate}, call)
        if call is not None:
            call.callback(loader.close)
        return loader


@dataclass(frozen=True)
class _Alone:
    """Makes a batch of each sample, and something of that."""

    collate: Collate
    of: Callable[[Any], Any]

    def __call__(self, samples: list[Any]) -> list[Any]:
        return [self.of(self._batch(sample)) for sample in samples]

    def _batch(self, sample: Any) -> Any:
        try:
            return self.collate([sample])
        except Exception:  # whatever a user's function raises
            return sample


class _Loader:
    """A `DataLoader` whose workers stay for the next pass.

    Attributes:
        call: What it lives as long as; `None` for a single pass.
        collate: What makes batches.
        closed: Whether it is over.
    """

    def __init__(
        self, base: Dataset[Any], settings: Mapping[str, Any], call: ExitStack | None
    ) -> None:
        self.call, self.closed, self.collate = call, False, settings["collate_fn"]
        # What the sampler yields is asked for in this process at the start of each pass.
        self._plan: list[list[int]] = []
        self._loader: DataLoader[Any] = DataLoader(
            base,
            batch_sampler=self._plan,
            persistent_workers=settings["num_workers"] > 0,
            generator=torch.Generator(),  # leaves the global generator alone
            **settings,
        )

    def read(self, plan: Sequence[Indices]) -> Iterator[Any]:
        self._plan[:] = [rows.tolist() for rows in plan]
        return iter(self._loader)

    def close(self) -> None:
        """End the worker processes, also in the middle of a pass."""
        self.closed, workers = True, getattr(self._loader, "_iterator", None)
        if workers is not None:
            workers._shutdown_workers()


def differ(first: Any, second: Any) -> bool:
    """Whether two reads of a tensor differ; NaN equals NaN: broken data are not random data."""
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    if first.shape != second.shape:
        return True
    both_nan = (first != first) & (second != second)
    return not bool(((first == second) | both_nan).all())


def _unreadable(error: Exception, rows: Indices) -> DataError:
    """What to say where the data set, the collate function or a worker failed."""
    lines = str(error).strip().splitlines() or [""]
    reason = lines[-1 if "Original Traceback" in str(error) else 0]  # a worker puts its own first
    few = f"{rows[:4].tolist()}{' ...' if len(rows) > 4 else ''}"
    return DataError(
        f"{type(error).__name__} while a batch of the samples {few} was read: {reason}",
        "a data set whose samples can be read by index and collated into batches",
        "Correct the data set or the collate function; a data set that needs a collate function "
        "is passed as a DataLoader with collate_fn=.",
    )
