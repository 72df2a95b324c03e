"""Bytes of the tensors that are alive, counted operation by operation: what the package itself does
not use to bound its memory."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within, every storage that an operation makes counts until it is freed.

    Attributes:
        now: Bytes alive.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if self._counts(x)}
        for x in tree_leaves(out):
            if self._counts(x) and self._key(x) not in given | self._known:
                storage = x.untyped_storage()
                self._known.add(self._key(x))
                weakref.finalize(storage, self._gone, self._key(x), storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes

    @staticmethod
    def _counts(x: Any) -> bool:
        return isinstance(x, Tensor) and x.layout is strided

    @staticmethod
    def _key(x: Tensor) -> int:
        return x.untyped_storage()._cdata
