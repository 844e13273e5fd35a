"""Merge the attention of the same queries over two sets of keys, in place, into that over their union.

    lse = log(e^lse1 + e^lse2),   out = out1 + sigmoid(lse2 - lse1) (out2 - out1)

computed in float32 and rounded once. Both outputs are read and one is written: 6 bytes per element in bfloat16, without
temporaries.

Letters: T queries, A heads, D head size.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.dense_attention import merge
from fastgrpo.kernels.launch import options, unspecialized

_ELEMENTS = 2048
"""In one program: 16 for each of 128 threads."""


@triton.jit(**unspecialized("num_queries"))
def merge_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    num_queries,
    num_heads,
    out_stride_t,
    out_stride_a,
    part_stride_t,
    part_stride_a,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS pairs of a query and a head."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = pair < num_queries.to(tl.int64) * num_heads
    t, a = pair // num_heads, pair % num_heads
    lse = tl.load(lse_ptr + a * num_queries + t, mask=inside, other=0.0)
    part_lse = tl.load(part_lse_ptr + a * num_queries + t, mask=inside, other=0.0)
    part_lse = tl.where(part_lse == float("inf"), float("-inf"), part_lse)
    part_share = 1.0 / (1.0 + tl.exp(lse - part_lse))
    both = tl.maximum(lse, part_lse) + tl.log(1.0 + tl.exp(-tl.abs(lse - part_lse)))
    tl.store(lse_ptr + a * num_queries + t, both, mask=inside)
    d = tl.arange(0, COLUMNS)
    valid = inside[:, None] & (d < HEAD_SIZE)[None, :]
    out_at = out_ptr + (t * out_stride_t + a * out_stride_a)[:, None] + d[None, :]
    part_at = part_ptr + (t * part_stride_t + a * part_stride_a)[:, None] + d[None, :]
    out = tl.load(out_at, mask=valid, other=0.0).to(tl.float32)
    part = tl.load(part_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_at, (out + part_share[:, None] * (part - out)).to(out_ptr.dtype.element_ty), mask=valid)


def merge_in_place(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, backend: str = "auto") -> None:
    """Update `out` and `lse` to those of the attention over both sets of keys.

    out, part: (T, A, D), contiguous in D. lse, part_lse: (A, T), contiguous, float32 (float64 for float64).
    Where part_lse is infinite, with either sign, the part has no keys: `part` is 0 there and changes nothing.
    backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".
    """
    num_queries, num_heads, size = out.shape
    if not use_triton(backend, out):
        part_lse = part_lse.masked_fill(part_lse == math.inf, -math.inf)
        merged, both = merge(out, lse.T, part, part_lse.T)
        out.copy_(merged)
        lse.copy_(both.T)
        return
    columns = triton.next_power_of_2(size)
    rows = max(1, _ELEMENTS // columns)
    with on_device(out):
        merge_kernel[(triton.cdiv(num_queries * num_heads, rows),)](
            out,
            lse,
            part,
            part_lse,
            num_queries,
            num_heads,
            *out.stride()[:2],
            *part.stride()[:2],
            HEAD_SIZE=size,
            ROWS=rows,
            COLUMNS=columns,
            **options(num_warps=4),
        )
