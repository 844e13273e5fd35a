"""What torch allocates while something runs, and how much of it stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Sees every tensor that an operation returns in memory that was none of its arguments'.

    Example: with Allocations() as seen: kept = torch.zeros(4) + 1. Then seen.live_bytes() == 16: the zeros are gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {storage._cdata for _, storage in _storages((*args, *kwargs.values()))}
        for tensor, storage in _storages(result):
            if storage._cdata not in given:
                self.shapes[tuple(tensor.shape)] += 1
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def live_bytes(self) -> int:
        """Of all that was allocated and is still there."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def _storages(tree: Any) -> Iterator[tuple[Tensor, UntypedStorage]]:
    """torch's own walk through arguments takes longer than most operations."""
    if isinstance(tree, Tensor):
        if tree.device.type != "meta":
            yield tree, tree.untyped_storage()
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _storages(part)
