"""What only an update needs, out of the device's memory while the sampler works, and back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgrpo.learner.host_memory import HostMemory


class Offload:
    """Releases tensors' storages and brings them back. The tensors stay the objects that they are, so whoever holds
    them, or views of them, need not know; only their addresses change."""

    def __init__(self) -> None:
        self._host = HostMemory()
        self._released: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []

    @property
    def is_out(self) -> bool:
        """Whether the tensors are released now."""
        return bool(self._released)

    def out(self, keep: Iterable[Tensor], drop: Iterable[Tensor] = ()) -> None:
        """Release the storages of `keep`, whose values come back, and of `drop`, which come back as zeros.

        Storages that other tensors share are released under them too. Nothing happens where they are out already.
        """
        if self.is_out:
            return
        kept, dropped = _storages(keep), _storages(drop)
        host = self._host.copy_of([_bytes_of(storage) for storage in kept])
        self._released = [(s, s.nbytes(), copy) for s, copy in zip(kept, host, strict=True)]
        self._released += [(s, s.nbytes(), None) for s in dropped]
        for storage, _, _ in self._released:
            storage.resize_(0)
        if any(storage.device.type == "cuda" for storage, _, _ in self._released):
            torch.cuda.empty_cache()  # to the device, so that a sampler with an allocator of its own gets it

    def back(self) -> None:
        """Undo `out`; nothing happens where nothing is out."""
        for storage, num_bytes, copy in self._released:
            storage.resize_(num_bytes)
            into = _bytes_of(storage)
            into.zero_() if copy is None else into.copy_(copy, non_blocking=True)
        for device in {storage.device for storage, _, _ in self._released if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        self._released = []


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each of the tensors' storages once."""
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
