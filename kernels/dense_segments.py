"""Attention over segments in batched dense calls: the CPU's way, and a GPU's for what flash attention cannot compute.

Segments of like length share one call. The padding that this needs stays inside the call: at most an eighth, or 15 rows
of short segments.
Letters: B blocks of L rows in one call, M keys, A query heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.dense_attention import attention_backward, attention_with_lse, merge
from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_pieces import Piece, Range, Rows, add, compact, length, row_numbers, take

_ALONE = 256
"""Rows that lie together and are worth a call of their own, as a view, rather than a part in a gathered one."""


@dataclass(frozen=True)
class Call:
    """One batched dense attention: which rows are its queries and its keys."""

    q_rows: Rows
    """B*L rows, padded by repeating each block's last row."""
    kv_rows: Rows
    """B*M rows."""
    num_blocks: int
    causal: bool
    q_valid: Tensor | None
    """Indices into B*L that are not padding; None where there is none."""
    q_padding: Tensor | None
    """(B, 1, L, 1) bool, the others."""


class DenseSegments:
    """The calls for these pieces, and attention by them."""

    def __init__(self, pieces: list[Piece], share: RowShare | None, device: torch.device | str) -> None:
        # What of its segment and of its prefix a query sees beside its own piece, each key range with its queries. The
        # two are apart, so that no call holds a query twice.
        earlier: dict[Range, list[Range]] = defaultdict(list)
        sharers: dict[Range, list[Range]] = defaultdict(list)
        for own, before, prefix in pieces:
            if before[0] < before[1]:
                earlier[before].append(own)
            if prefix[0] < prefix[1]:
                sharers[prefix].append(own)
        self.own = [
            _causal_call([piece for run in bucket for piece in run], share, device)
            for bucket in _buckets(
                _runs([piece.own for piece in pieces]), lambda run: run, lambda run: _padded(length(run[:1]))
            )
        ]
        # Keys cannot be padded without a mask, so only prefixes of the very same length share a call.
        self.prefix = [
            _prefix_call(bucket, share, device)
            for seen in (earlier, sharers)
            for bucket in _buckets(
                list(seen.items()),
                lambda item: item[1],
                lambda item: (length([item[0]]), _padded(length(item[1]))),
            )
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The output (T, A, D) and its log-sum-exp (T, A)."""
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for call in self.own:
            part, part_lse = _forward_call(call, q, k, v, scale)
            rows = _valid(call, call.q_rows)
            out[rows], lse[rows] = part, part_lse
        for call in self.prefix:
            part, part_lse = _forward_call(call, q, k, v, scale)
            rows = _valid(call, call.q_rows)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v from that of forward's output; out and lse are forward's."""
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call in (*self.own, *self.prefix):
            block_grad = _blocks(call, grad, call.q_rows)
            if call.q_padding is not None:  # padding repeats a row: its gradient must not count again
                block_grad = block_grad.masked_fill(call.q_padding, 0.0)
            block_dq, block_dk, block_dv = attention_backward(
                block_grad,
                _blocks(call, q, call.q_rows),
                _blocks(call, k, call.kv_rows),
                _blocks(call, v, call.kv_rows),
                _blocks(call, out, call.q_rows),
                _blocks(call, lse, call.q_rows).contiguous(),
                causal=call.causal,
                scale=scale,
            )
            add(dq, _valid(call, call.q_rows), _valid(call, _flat(block_dq)))
            kv_valid = call if call.causal else None
            add(dk, _valid(kv_valid, call.kv_rows), _valid(kv_valid, _flat(block_dk)))
            add(dv, _valid(kv_valid, call.kv_rows), _valid(kv_valid, _flat(block_dv)))
        return dq, dk, dv


def _padded(rows: int) -> int:
    """The length's bucket: multiples of 16, then of an eighth of the power of two below it."""
    step = max(16, (1 << max(rows.bit_length() - 1, 0)) // 8)
    return -(-rows // step) * step


def _runs(pieces: list[Range]) -> list[list[Range]]:
    """Neighbours of equal length together."""
    runs: list[list[Range]] = []
    for piece in pieces:
        if runs and runs[-1][-1][1] == piece[0] and length(runs[-1][-1:]) == length([piece]):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _buckets(items: list[Any], ranges_of: Callable[[Any], list[Range]], key: Callable[[Any], Any]):
    """Items that share a call: those of one key, but one alone whose many rows follow each other."""
    found = defaultdict(list)
    for number, item in enumerate(items):
        ranges = ranges_of(item)
        follow = all(before[1] == after[0] for before, after in pairwise(ranges))
        found[number if follow and length(ranges) >= _ALONE else (key(item),)].append(item)
    return list(found.values())


def _padded_rows(blocks: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    longest = max(len(block) for block in blocks)
    if all(len(block) == longest for block in blocks):
        return torch.cat(blocks), None
    rows = torch.stack([torch.cat([b, b[-1:].expand(longest - len(b))]) for b in blocks])
    valid = torch.cat([torch.arange(len(b)) + i * longest for i, b in enumerate(blocks)])
    return rows.flatten(), valid


def _causal_call(ranges: list[Range], share: RowShare | None, device) -> Call:
    rows, valid = _padded_rows([torch.arange(start, end) for start, end in ranges])
    return _call(rows, rows, valid, len(ranges), True, share, device)


def _prefix_call(bucket, share: RowShare | None, device) -> Call:
    rows, valid = _padded_rows([row_numbers(ranges) for _, ranges in bucket])
    return _call(rows, row_numbers([seen for seen, _ in bucket]), valid, len(bucket), False, share, device)


def _call(
    q_rows: Tensor,
    kv_rows: Tensor,
    valid: Tensor | None,
    num_blocks: int,
    causal: bool,
    share: RowShare | None,
    device,
) -> Call:
    """The call on the device, its packed rows turned into those of this rank's queries and of the gathered keys."""
    if share is not None:
        held = torch.empty(share.num_rows, dtype=torch.int64)
        held[share.rows] = torch.arange(len(share.rows))
        q_rows, kv_rows = held[q_rows], share.gathered[kv_rows]
    padding = None
    if valid is not None:
        padding = torch.ones(len(q_rows), dtype=torch.bool)
        padding[valid] = False
        padding = padding.view(num_blocks, 1, -1, 1).to(device)
        valid = valid.to(device)
    return Call(compact(q_rows, device), compact(kv_rows, device), num_blocks, causal, valid, padding)


def _forward_call(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    blocks = (_blocks(call, q, call.q_rows), _blocks(call, k, call.kv_rows), _blocks(call, v, call.kv_rows))
    out, lse = attention_with_lse(*blocks, causal=call.causal, scale=scale)
    return _valid(call, _flat(out)), _valid(call, _flat(lse))


def _blocks(call: Call, x: Tensor, rows: Rows) -> Tensor:
    """(T, A, ...) -> (B, A, L, ...)."""
    return take(x, rows).unflatten(0, (call.num_blocks, -1)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(B, A, L, ...) -> (B*L, A, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _valid(call: Call | None, x: Any) -> Any:
    """x, rows or a tensor of them, without padding."""
    return x if call is None or call.q_valid is None else x.index_select(0, call.q_valid)
