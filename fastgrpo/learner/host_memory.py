"""Copies in host memory of what lives on a device or goes on changing."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")


class HostMemory:
    """Holds one copy at a time. Its memory is kept for the next one, and pinned for tensors of a GPU, because pinning
    costs as much as copying."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def copy_of(self, tree: T) -> T:
        """The same dicts, lists and tuples with every tensor copied; the next call writes over the copies."""
        leaves, structure = tree_flatten(tree)
        sources = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        copies = iter([self._copy(index, source) for index, source in enumerate(sources)])
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.synchronize(device)
        return tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    def _copy(self, index: int, source: Tensor) -> Tensor:
        """The tensor in the memory of that number, or on its way there."""
        if index == len(self._kept):
            self._kept.append(torch.empty(0, dtype=torch.uint8))
        if self._kept[index].numel() != source.nbytes:
            self._kept[index] = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=source.is_cuda)
        return self._kept[index].view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
