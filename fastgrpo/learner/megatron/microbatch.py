"""Micro-batches as the schedule wants them: on the device, with their attention planned, and enough of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.kernels.segment_attention import SegmentPlan
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.model import SegmentParams
from fastgrpo.types import PackedBatch


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device and its attention's plan. Example: MicroBatch(batch, SegmentParams(plan=plan))."""

    batch: PackedBatch
    packed: SegmentParams


def prepare(batches: Iterable[PackedBatch], layout: Layout, device: torch.device) -> list[MicroBatch]:
    """The batches, ready for a schedule, followed by empty ones where it needs more.

    A schedule runs at least one micro-batch, and the interleaved one a multiple of the pipeline's stages. Empty
    micro-batches score nothing, so data-parallel ranks may hold different numbers of batches, also none. With experts
    dealt over data-parallel ranks too, all run as many as the one with most: collective over all ranks then.
    """
    listed = list(batches)
    multiple = layout.pp if layout.vpp > 1 else 1
    count = max(1, len(listed))
    if layout.ep > 1:
        most = torch.tensor([count], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        count = int(most)
    missing = -(-count // multiple) * multiple - len(listed)
    return [_ready(batch, layout, device) for batch in [*listed, *[empty_batch()] * missing]]


def _ready(batch: PackedBatch, layout: Layout, device: torch.device) -> MicroBatch:
    batch = pad_rows(batch, layout.tp if layout.sp else 1).to(device)
    return MicroBatch(batch, SegmentParams(plan=SegmentPlan(batch.segments, device)))


def pad_rows(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with rows appended up to a multiple; they are a segment of their own that no token sees or scores."""
    extra = -batch.num_tokens % multiple
    if extra == 0:
        return batch
    segment = torch.tensor([[batch.num_tokens, batch.num_tokens + extra, 0, 0]])
    return replace(
        batch,
        token_ids=_append(batch.token_ids, torch.zeros(extra)),
        position_ids=_append(batch.position_ids, torch.arange(extra)),
        segments=_append(batch.segments, segment),
    )


def _append(tensor: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([tensor, rows.to(tensor)])


def empty_batch() -> PackedBatch:
    """One token, nothing scored, for any objective."""
    integers, floats = torch.empty(0, dtype=torch.int64), torch.empty(0)
    return PackedBatch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        segments=torch.tensor([[0, 1, 0, 0]]),
        hidden_rows=integers,
        targets=integers,
        advantages=floats,
        token_weights=floats,
        sampler_logprobs=floats,
        cu_scored=torch.zeros(1, dtype=torch.int64),
        sequence_ids=integers,
        ref_logprobs=floats,
    )
