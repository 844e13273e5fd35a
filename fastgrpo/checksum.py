"""Numbers that equal tensors share, and that a stale, permuted or shifted one does not.

Each element's bits are mixed with its place, and the results are added up in 64-bit integers: exact, the same on every
device, and independent of the order of addition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 16
"""Elements looked at of a larger tensor, unless all are asked for."""
CHUNK = 1 << 20
"""Elements looked at at once: of one tensor, or of many of the same shape."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)


def checksums(
    tensors: Sequence[Tensor], phase: int | None = None, *, dtypes: Sequence[torch.dtype] | None = None
) -> Tensor:
    """64-bit checksums of tensors of any shapes, strides and dtypes: (len(tensors),) int64, on their device.

    phase: None reads every element; a number reads about SAMPLE of each tensor's, others for the next number, so that
    a few steps see all. dtypes: what each tensor's elements are converted to first.
    A mixture of experts has ten thousands of equal shape, which share what depends on the places alone, and launches.
    """
    alike: dict[tuple[torch.Size, torch.dtype, torch.dtype], list[int]] = {}
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes or [t.dtype for t in tensors], strict=True)):
        alike.setdefault((tensor.shape, tensor.dtype, dtype), []).append(i)
    sums = [_of_alike([tensors[i] for i in members], phase, key[2]) for key, members in alike.items()]
    if not sums:
        return torch.zeros(0, dtype=torch.int64)
    found = torch.cat(sums)
    order = torch.tensor([i for members in alike.values() for i in members], device=found.device)
    return torch.empty_like(found).scatter_(0, order, found)


def _of_alike(tensors: list[Tensor], phase: int | None, dtype: torch.dtype) -> Tensor:
    """Of tensors of one shape. Products and sums wrap around at 64 bits."""
    shape, device = tensors[0].shape, tensors[0].device
    size = shape.numel()
    every = 1 if phase is None else max(1, size // SAMPLE) | 1  # odd: rows of even length are cut everywhere
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    for begin in range(0 if phase is None else phase % every, size, CHUNK * every):
        places = torch.arange(begin, min(begin + CHUNK * every, size), every, device=device)
        indices, factors = torch.unravel_index(places, shape), _mixed(places)
        together = max(1, CHUNK // len(places))
        for at in range(0, len(tensors), together):
            looked_at = torch.stack([tensor[indices] for tensor in tensors[at : at + together]]).to(dtype)
            bits = looked_at.view(_BITS[dtype.itemsize]).long()
            sums[at : at + together] += (factors * (bits + 1)).sum(1)
    return sums


def _mixed(places: Tensor) -> Tensor:
    """An odd factor for each place."""
    mixed = (places + 1) * _MIX[0]
    mixed = (mixed ^ (mixed >> 29)) * _MIX[1]
    return (mixed ^ (mixed >> 32)) | 1
