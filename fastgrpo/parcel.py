"""An object with many small tensors as one message: pickled without their numbers, which lie one after the other.

Pickling a tensor costs some 70 microseconds whatever its size, and a step's rollouts have three to five of them each.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 8
"""Bytes: any dtype can be viewed at a multiple of it."""


def pack(content: Any) -> Tensor:
    """The message, (bytes,) uint8 on the CPU. content: whatever pickle takes; its tensors lose gradients and device."""
    tensors = _Tensors()
    pickled = io.BytesIO()
    _Pickler(pickled, tensors).dump(content)
    text = pickled.getvalue()
    numbers = torch.empty(tensors.num_bytes, dtype=torch.uint8)
    for tensor, offset in zip(tensors.found, tensors.offsets, strict=True):
        if tensor.numel():
            numbers[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
    padded = text + bytes(-len(text) % ALIGNMENT)
    head = torch.tensor([len(text)]).view(torch.uint8)
    return torch.cat([head, torch.frombuffer(bytearray(padded), dtype=torch.uint8), numbers])


def unpack(message: Tensor) -> Any:
    """What was packed; its tensors are views of the message."""
    size = int(message[:ALIGNMENT].view(torch.int64))
    text, first = message[ALIGNMENT : ALIGNMENT + size], ALIGNMENT + size + -size % ALIGNMENT
    return _Unpickler(io.BytesIO(text.numpy().tobytes()), message[first:]).load()


class _Tensors:
    """The tensors that were met, and where their bytes go."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.offsets: list[int] = []
        self.num_bytes = 0

    def add(self, tensor: Tensor) -> int:
        offset = self.num_bytes
        self.found.append(tensor)
        self.offsets.append(offset)
        self.num_bytes += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        return offset


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: _Tensors) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> tuple[torch.dtype, tuple[int, ...], int] | None:
        return (obj.dtype, tuple(obj.shape), self._tensors.add(obj)) if isinstance(obj, Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, numbers: Tensor) -> None:
        super().__init__(file)
        self._numbers = numbers
        self._viewed: dict[torch.dtype, Tensor] = {}  # once a dtype: each look at a tensor takes microseconds, too

    def persistent_load(self, pid: tuple[torch.dtype, tuple[int, ...], int]) -> Tensor:
        dtype, shape, offset = pid
        if dtype not in self._viewed:
            self._viewed[dtype] = self._numbers.view(dtype)
        tensor = self._viewed[dtype].narrow(0, offset // dtype.itemsize, math.prod(shape))
        return tensor if len(shape) == 1 else tensor.view(shape)
