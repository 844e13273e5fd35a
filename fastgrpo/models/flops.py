"""The arithmetic that an update needs, and what a GPU could do in its time.

In floating point operations: a multiplication and its addition are two. What a packed batch holds counts, a pair of a
query and a key only where attention may look, and nothing that is computed again.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.models.shape import Shape

PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""A part of a GPU's name, the first that fits, to its bfloat16 operations a second: dense, from NVIDIA's data
sheets, which print twice as many for sparse matrices."""


class Batch(Protocol):
    """A packed batch, or what is to become one."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_scored(self) -> int: ...
    @property
    def segments(self) -> Tensor: ...


def update_flops(shape: Shape, batch: Batch, *, frozen: bool = False) -> float:
    """Forward and backward of one batch: 3 (2 P T + 2 V H N + 4 L A D pairs).

    P: weights of the layers' matrices that a token meets, T packed tokens, V vocabulary, H hidden size, N scored
    tokens, L layers, A heads of size D, pairs as in `attended_pairs`. Backward needs twice what forward does; frozen:
    only as much for the matrices, because their weights have no gradient (adapters' own work is left out).
    """
    ffn = 3 * shape.hidden_size * shape.ffn_size * shape.experts_per_token
    attention = shape.hidden_size * shape.head_size * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    layer = attention + ffn + shape.hidden_size * shape.num_experts
    tokens = 2 * shape.num_layers * layer * batch.num_tokens
    scored = 2 * shape.vocab_size * shape.hidden_size * batch.num_scored
    pairs = 4 * shape.num_layers * shape.num_heads * shape.head_size * attended_pairs(batch.segments)
    return (2.0 if frozen else 3.0) * (tokens + scored) + 3.0 * pairs


def attended_pairs(segments: Tensor) -> int:
    """How many (query, key) pairs there are: a token sees its segment up to itself, and all of the segment's prefix.

    segments: PackedBatch.segments.
    """
    start, end, prefix_start, prefix_end = segments.unbind(1)
    length = end - start
    return int((length * (length + 1) // 2 + length * (prefix_end - prefix_start)).sum())


def peak_flops(device: str, dtype: torch.dtype) -> float | None:
    """Operations a second of a device of this machine, such as "cuda:0"; None where PEAKS does not say: a CPU, another
    GPU, another type."""
    if not device.startswith("cuda") or dtype != torch.bfloat16:
        return None
    device_name = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
