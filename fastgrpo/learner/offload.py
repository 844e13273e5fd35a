"""What only an update needs, out of the device's memory while the sampler works, and back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Offload:
    """Releases tensors' storages and brings them back. The tensors stay the objects that they are, so whoever holds
    them, or views of them, need not know; only their addresses change.

    On a GPU the host's copies are pinned and kept for the next time, because pinning costs as much as copying.
    """

    def __init__(self) -> None:
        self._host: list[Tensor] = []
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
        host = [self._host_copy(i, storage) for i, storage in enumerate(kept)]
        _synchronize(kept)
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
        _synchronize([storage for storage, _, _ in self._released])
        self._released = []

    def _host_copy(self, index: int, storage: torch.UntypedStorage) -> Tensor:
        """The storage's bytes in host memory, on their way."""
        pinned = storage.device.type == "cuda"
        if index == len(self._host):
            self._host.append(torch.empty(0, dtype=torch.uint8))
        if self._host[index].numel() != storage.nbytes():
            self._host[index] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        return self._host[index].copy_(_bytes_of(storage), non_blocking=True)


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each of the tensors' storages once."""
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(storages: list[torch.UntypedStorage]) -> None:
    for device in {storage.device for storage in storages if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
