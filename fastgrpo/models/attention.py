"""Attention for packed batches, as the decoder's hook."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention


class PackedAttention:
    """Every token sees its segment's past and its segment's prefix; made once a batch, used by every layer."""

    def __init__(self, segments: Tensor, device: torch.device | str = "cpu") -> None:
        self.plan = SegmentPlan(segments, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return segment_attention(q, k, v, self.plan, scale=scale)
