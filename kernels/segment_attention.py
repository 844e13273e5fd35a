"""Attention over packed segments that may share a prefix: a group's prompt is computed once for its G completions.

A packed row attends to the past of its own segment and to the whole of its segment's prefix. That is two ordinary
attentions whose results merge exactly by their log-sum-exp: (1) causal, every segment for itself; (2) not causal,
the rows of all segments with one prefix against that prefix. With lse = log(e^lse1 + e^lse2) the merged output is
e^(lse1-lse) out1 + e^(lse2-lse) out2. The backward of each part run with the *merged* out and lse gives its share of
the gradient, because p = e^(s-lse) is then the probability under the whole softmax (as in ring attention,
arXiv 2310.01889). No key or value is copied per completion, and no mask is made.

Letters: T packed rows, K segments, B blocks of L rows in one call, A query heads, C key/value heads, D head size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastgrpo.kernels.row_share import RowShare

aten = torch.ops.aten


# --- one dense attention with its log-sum-exp -------------------------------------------------------------------------


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + bias) v and the softmax's log-sum-exp, without autograd.

    q: (B, A, L, D); k, v: (B, C, M, D) with A a multiple of C; causal needs L == M; bias: (B, 1, 1, M), q's dtype.
    Returns (B, A, L, D) in q's dtype and (B, A, L) in float32 (float64 for float64).
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if _has_flash(q) and bias is None:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse
    return _dense_forward(q, k, v, causal, scale, bias)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over both key sets, from the attention over each: (..., D) outputs and their (...) lse."""
    other_share = torch.sigmoid(other_lse - lse)[..., None]  # float32 for narrower outputs, which are rounded once
    wide = torch.promote_types(out.dtype, other_share.dtype)
    merged = out.to(wide).lerp(other_out.to(wide), other_share.to(wide))
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention_with_lse's output; `out` and `lse` may be those of a larger softmax that contains it."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    if _has_flash(q):
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
        )
    return _dense_backward(grad, q, k, v, out, lse, causal, scale)


def _has_flash(q: Tensor) -> bool:
    """Torch's own flash attention: half precision and a head size it has kernels for."""
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _dense_forward(q, k, v, causal: bool, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain torch, for devices and dtypes without a flash kernel."""
    scores = _scores(q, k, causal, scale)
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp().to(v.dtype)
    return probs @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def _dense_backward(grad, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    probs = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    dscores = (probs * ((grad @ v_all.transpose(-1, -2)) - delta) * scale).to(q.dtype)
    dk, dv = dscores.transpose(-1, -2) @ q, probs.to(q.dtype).transpose(-1, -2) @ grad
    return dscores @ k_all, dk.unflatten(1, (-1, groups)).sum(2), dv.unflatten(1, (-1, groups)).sum(2)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, float("-inf"))
    return scores


# --- the plan of a packed batch ---------------------------------------------------------------------------------------


Rows: TypeAlias = Tensor | slice
"""Rows of a tensor: their numbers, or a range, which is read and written without a copy."""
_ALONE = 256
"""Rows that lie together and are worth a call of their own, as a view, rather than a part in a gathered one."""


@dataclass(frozen=True)
class _Call:
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


class SegmentPlan:
    """How to compute attention over `segments`: made once a batch, used by every layer.

    segments: (K, 4) int64 on the CPU: start, end, prefix_start, prefix_end (equal where there is no prefix). Segments
    do not overlap and cover [0, T). Segments of like length share one batched call; the padding this needs is at most
    an eighth and stays inside the call.
    share: the rows that this context-parallel rank computes; None for all of them. The plan then takes the queries of
    those rows and the keys and values of all, gathered one rank's after the other's; a cut segment sees what is before
    the cut as one more prefix.

    Raises ValueError where a prefix is not in the batch's rows.
    """

    def __init__(self, segments: Tensor, device: torch.device | str = "cpu", share: RowShare | None = None) -> None:
        rows: list[tuple[int, int, int, int]] = [tuple(row) for row in segments.tolist()]
        self.num_rows = max(end for _, end, _, _ in rows)
        self.num_queries = self.num_rows if share is None else self.num_rows // share.num_ranks
        for _, _, prefix_start, prefix_end in rows:
            if not 0 <= prefix_start <= prefix_end <= self.num_rows:
                raise ValueError(f"segments: prefix [{prefix_start}, {prefix_end}) is outside [0, {self.num_rows})")
        own: list[tuple[int, int]] = []
        # What of its segment and of its prefix a query sees beside its own piece, each key range with its queries. The
        # two are apart, so that no call holds a query twice.
        earlier: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        sharers: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for first, last in ((0, self.num_rows),) if share is None else share.ranges:
            for start, end, prefix_start, prefix_end in rows:
                begin, stop = max(start, first), min(end, last)
                if begin >= stop:
                    continue
                own.append((begin, stop))
                if start < begin:
                    earlier[start, begin].append((begin, stop))
                if prefix_start < prefix_end:
                    sharers[prefix_start, prefix_end].append((begin, stop))
        self.own = [
            _causal_call([piece for run in bucket for piece in run], share, device)
            for bucket in _buckets(_runs(own), lambda run: run, lambda run: _padded(_length(run[:1])))
        ]
        # Keys cannot be padded without a mask, so only prefixes of the very same length share a call.
        self.prefix = [
            _prefix_call(bucket, share, device)
            for seen in (earlier, sharers)
            for bucket in _buckets(
                list(seen.items()),
                lambda item: item[1],
                lambda item: (_length([item[0]]), _padded(_length(item[1]))),
            )
        ]


def _padded(length: int) -> int:
    """The length's bucket: multiples of 16, then of an eighth of the power of two below it."""
    step = max(16, (1 << max(length.bit_length() - 1, 0)) // 8)
    return -(-length // step) * step


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _runs(pieces: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbours of equal length together."""
    runs: list[list[tuple[int, int]]] = []
    for piece in pieces:
        if runs and runs[-1][-1][1] == piece[0] and _length(runs[-1][-1:]) == _length([piece]):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _buckets(items: list[Any], ranges_of: Callable[[Any], list[tuple[int, int]]], key: Callable[[Any], Any]):
    """Items that share a call: those of one key, but one alone whose many rows follow each other."""
    found = defaultdict(list)
    for number, item in enumerate(items):
        ranges = ranges_of(item)
        follow = all(before[1] == after[0] for before, after in pairwise(ranges))
        found[number if follow and _length(ranges) >= _ALONE else (key(item),)].append(item)
    return list(found.values())


def _padded_rows(blocks: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    longest = max(len(block) for block in blocks)
    if all(len(block) == longest for block in blocks):
        return torch.cat(blocks), None
    rows = torch.stack([torch.cat([b, b[-1:].expand(longest - len(b))]) for b in blocks])
    valid = torch.cat([torch.arange(len(b)) + i * longest for i, b in enumerate(blocks)])
    return rows.flatten(), valid


def _causal_call(ranges: list[tuple[int, int]], share: RowShare | None, device) -> _Call:
    rows, valid = _padded_rows([torch.arange(start, end) for start, end in ranges])
    return _call(rows, rows, valid, len(ranges), True, share, device)


def _prefix_call(bucket, share: RowShare | None, device) -> _Call:
    queries = [torch.cat([torch.arange(start, end) for start, end in ranges]) for _, ranges in bucket]
    rows, valid = _padded_rows(queries)
    keys = torch.cat([torch.arange(start, end) for (start, end), _ in bucket])
    return _call(rows, keys, valid, len(bucket), False, share, device)


def _call(
    q_rows: Tensor,
    kv_rows: Tensor,
    valid: Tensor | None,
    num_blocks: int,
    causal: bool,
    share: RowShare | None,
    device,
) -> _Call:
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
    return _Call(_compact(q_rows, device), _compact(kv_rows, device), num_blocks, causal, valid, padding)


def _compact(rows: Tensor, device) -> Rows:
    first, count = int(rows[0]), len(rows)
    return slice(first, first + count) if torch.equal(rows, torch.arange(first, first + count)) else rows.to(device)


# --- the differentiable op --------------------------------------------------------------------------------------------


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)  # (T, A)
        for call in plan.own:
            part, part_lse = _forward_call(call, q, k, v, scale)
            rows = _valid(call, call.q_rows)
            out[rows], lse[rows] = part, part_lse
        for call in plan.prefix:
            part, part_lse = _forward_call(call, q, k, v, scale)
            rows = _valid(call, call.q_rows)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call in (*ctx.plan.own, *ctx.plan.prefix):
            block_grad = _take(call, grad, call.q_rows)
            if call.q_padding is not None:  # padding repeats a row: its gradient must not count again
                block_grad = block_grad.masked_fill(call.q_padding, 0.0)
            block_dq, block_dk, block_dv = attention_backward(
                block_grad,
                _take(call, q, call.q_rows),
                _take(call, k, call.kv_rows),
                _take(call, v, call.kv_rows),
                _take(call, out, call.q_rows),
                _take(call, lse, call.q_rows).contiguous(),
                causal=call.causal,
                scale=ctx.scale,
            )
            _add(dq, _valid(call, call.q_rows), _valid(call, _rows(block_dq)))
            kv_valid = call if call.causal else None
            _add(dk, _valid(kv_valid, call.kv_rows), _valid(kv_valid, _rows(block_dk)))
            _add(dv, _valid(kv_valid, call.kv_rows), _valid(kv_valid, _rows(block_dv)))
        return dq, dk, dv, None, None


def _add(total: Tensor, rows: Rows, part: Tensor) -> None:
    total[rows].add_(part) if isinstance(rows, slice) else total.index_add_(0, rows, part)


def _take(call: _Call, x: Tensor, rows: Rows) -> Tensor:
    """(T, A, ...) -> (B, A, L, ...)."""
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
    return taken.unflatten(0, (call.num_blocks, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, A, L, ...) -> (B*L, A, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _valid(call: _Call | None, x: Any) -> Any:
    """x, rows or a tensor of them, without padding."""
    return x if call is None or call.q_valid is None else x.index_select(0, call.q_valid)


def _forward_call(call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    blocks = (_take(call, q, call.q_rows), _take(call, k, call.kv_rows), _take(call, v, call.kv_rows))
    out, lse = attention_with_lse(*blocks, causal=call.causal, scale=scale)
    return _valid(call, _rows(out)), _valid(call, _rows(lse))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, *, scale: float) -> Tensor:
    """Attention over packed segments with shared prefixes.

    q: (T, A, D), or the plan's share of these rows; k, v: (T, C, D), A a multiple of C; one dtype (float64, float32,
    bfloat16, float16). Returns q's shape. Deterministic on a CPU. Exact: a dense softmax under the segments' mask.

    Raises ValueError where the plan was made for another number of rows.
    """
    for name, x, planned in (("q", q, plan.num_queries), ("k", k, plan.num_rows), ("v", v, plan.num_rows)):
        if x.shape[0] != planned:
            raise ValueError(f"{name} has {x.shape[0]} rows but the plan is for {planned}")
    return _SegmentAttention.apply(q, k, v, plan, scale)
