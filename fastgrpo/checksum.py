"""A number that two equal tensors share, and that a stale, permuted or shifted one does not.

Each element's bits are mixed with its place, and the results are added up in 64-bit integers: exact, the same on every
device, and independent of the order of addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 1 << 16
"""Elements looked at of a larger tensor, unless all are asked for."""
CHUNK = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)


def checksum(tensor: Tensor, phase: int | None = None) -> Tensor:
    """A 64-bit checksum of a tensor of any shape, strides and dtype: int64 without dimensions, on the tensor's device.

    phase: None reads every element; a number reads about SAMPLE of them, others for the next number, so that a few
    steps see all.
    """
    every = 1 if phase is None else max(1, tensor.numel() // SAMPLE) | 1  # odd: rows of even length are cut everywhere
    first = 0 if phase is None else phase % every
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(first, tensor.numel(), CHUNK * every):
        end = min(begin + CHUNK * every, tensor.numel())
        total += _sum(tensor, torch.arange(begin, end, every, device=tensor.device))
    return total


def _sum(tensor: Tensor, places: Tensor) -> Tensor:
    """places: flat indices. Products and sums wrap around at 64 bits."""
    indices = torch.unravel_index(places, tensor.shape)
    bits = tensor[indices].view(_BITS[tensor.dtype.itemsize]).long()
    mixed = (places + 1) * _MIX[0]
    mixed = (mixed ^ (mixed >> 29)) * _MIX[1]
    return (((mixed ^ (mixed >> 32)) | 1) * (bits + 1)).sum()
