"""Micro-batches as the schedule wants them: on the device, with their attention planned, and enough of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_attention import SegmentPlan
from fastgrpo.learner.expert_balance import row_weights
from fastgrpo.learner.megatron.experts import for_routers
from fastgrpo.learner.megatron.model import SegmentParams
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.types import PackedBatch

SCORED_FIELDS = (
    "hidden_rows",
    "targets",
    "advantages",
    "token_weights",
    "sampler_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "importance_weights",
)


@dataclass(frozen=True)
class MicroBatch:
    """A batch on the device and its attention's plan. Example: MicroBatch(batch, SegmentParams(plan=plan), notes)."""

    batch: PackedBatch
    packed: SegmentParams
    for_routers: Tensor
    """(1, T, bytes): what experts.for_routers says of the rows, the batch's routed_experts among it. On the host: of a
    large model it is a kilobyte a row, and a schedule is given all micro-batches of an update."""


def prepare(batches: Iterable[PackedBatch], parallel: Parallel, device: torch.device) -> list[MicroBatch]:
    """The batches, ready for a schedule, followed by empty ones where it needs more.

    A schedule runs at least one micro-batch, and the interleaved one a multiple of the pipeline's stages. Empty
    micro-batches score nothing, so data-parallel ranks may hold different numbers of batches, also none, unless experts
    are dealt over them too (Ranks.in_step).
    """
    listed, layout = list(batches), parallel.layout
    multiple = layout.pp if layout.vpp > 1 else 1
    missing = -(-max(1, len(listed)) // multiple) * multiple - len(listed)
    return [_ready(batch, parallel, device) for batch in [*listed, *[PackedBatch.empty()] * missing]]


def _ready(batch: PackedBatch, parallel: Parallel, device: torch.device) -> MicroBatch:
    """Under context parallelism the batch holds this rank's share of the rows, and hidden_rows, still for all scored
    tokens, are those of the ranks' hidden states gathered one after the other."""
    layout, share, weights = parallel.layout, None, row_weights(batch)
    batch = pad_rows(batch, (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1))
    segments, weights = batch.segments, F.pad(weights, (0, batch.num_tokens - len(weights)))
    if layout.cp > 1:
        share = RowShare(num_rows=batch.num_tokens, num_ranks=layout.cp, rank=parallel.cp_rank)
        weights = weights[share.rows]
        batch = replace(
            batch,
            token_ids=batch.token_ids[share.rows],
            position_ids=batch.position_ids[share.rows],
            hidden_rows=share.gathered[batch.hidden_rows],
            routed_experts=None if batch.routed_experts is None else batch.routed_experts[share.rows],
        )
    notes = for_routers(weights, batch.routed_experts)
    return MicroBatch(
        replace(batch, routed_experts=None).to(device),
        SegmentParams(plan=SegmentPlan(segments, device, share)),
        notes.pin_memory() if device.type == "cuda" else notes,  # so that nothing waits when it is computed
    )


def pad_rows(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with rows appended up to a multiple; they are a segment of their own that no token sees or scores."""
    extra = -batch.num_tokens % multiple
    if extra == 0:
        return batch
    segment = torch.tensor([[batch.num_tokens, batch.num_tokens + extra, 0, 0]])
    experts = batch.routed_experts
    return replace(
        batch,
        token_ids=_append(batch.token_ids, torch.zeros(extra)),
        position_ids=_append(batch.position_ids, torch.arange(extra)),
        segments=_append(batch.segments, segment),
        routed_experts=None if experts is None else _append(experts, experts[-1:].expand(extra, -1, -1)),
    )


def _append(tensor: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([tensor, rows.to(tensor)])


def scored_share(batch: PackedBatch, parallel: Parallel, *, whole_sequences: bool) -> tuple[PackedBatch, slice]:
    """The part of the scored tokens whose loss this context-parallel rank computes, and where it is among all.

    whole_sequences: cut only between sequences, for objectives that relate a sequence's tokens.
    """
    if parallel.layout.cp == 1:
        return batch, slice(0, batch.num_scored)
    edges = [batch.num_scored * rank // parallel.layout.cp for rank in range(parallel.layout.cp + 1)]
    if whole_sequences:
        starts = batch.cu_scored
        edges = [int(starts[(starts - edge).abs().argmin()]) for edge in edges]
    first, last = edges[parallel.cp_rank], edges[parallel.cp_rank + 1]
    part = {
        f.name: value[first:last]
        for f in fields(batch)
        if f.name in SCORED_FIELDS and (value := getattr(batch, f.name)) is not None
    }
    return replace(batch, cu_scored=batch.cu_scored.clamp(first, last) - first, **part), slice(first, last)
