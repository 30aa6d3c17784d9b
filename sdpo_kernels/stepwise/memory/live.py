"""Count the bytes of all tensors that exist while a block of code runs, and the most there were at once.

    with LiveBytes() as live:
        loss.backward()
    live.peak

Tensors are counted by storage, so views cost nothing. Fake tensors, which have sizes and no memory, are counted alike.
What a C++ kernel allocates for itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`, in bytes, of the tensors that were made or used inside."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """`existing` are not counted, whatever is done with them inside."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[int, weakref.ref]] = {}  # storage → its bytes
        for tensor in existing:
            self._add(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it takes and what it returns."""
        self._count((args, kwargs))
        found = func(*args, **(kwargs or {}))
        self._count(found)
        return found

    def _count(self, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._add(leaf, leaf.untyped_storage().nbytes())

    def _add(self, tensor: Tensor, size: int) -> None:
        key, storage = storage_of(tensor), tensor.untyped_storage()
        if key in self._known:
            return
        self._known[key] = (size, weakref.ref(storage, lambda _: self._remove(key)))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._known.pop(key)[0]


def storage_of(tensor: Tensor) -> int:
    """What tells the storage of one tensor from that of another while both exist."""
    return tensor.untyped_storage()._cdata
