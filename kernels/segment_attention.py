"""Attention over packed segments that may share a prefix, so that a group's prompt is computed once for G completions.

A packed row attends to the past of its own segment and to all of its segment's prefix. This amounts to two ordinary
attentions whose results can be merged exactly through their log-sum-exp: (1) causal attention within every segment;
(2) non-causal attention of all segments that share a prefix to that prefix. With lse = log(e^lse1 + e^lse2), the merged
output is e^(lse1-lse) out1 + e^(lse2-lse) out2. Running the backward pass of each part with the *merged* out and lse
gives that part's share of the gradient, because p = e^(s-lse) is then the probability under the full softmax (as in
ring attention, arXiv 2310.01889). No keys or values are copied per completion, and no mask is built.

Letters: T packed rows, K segments, A query heads, C key/value heads, D head size.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.kernels.dense_segments import DenseSegments
from fastgrpo.kernels.row_share import RowShare
from fastgrpo.kernels.segment_pieces import pieces_of
from fastgrpo.kernels.varlen_kernels import VarlenKernel, chosen
from fastgrpo.kernels.varlen_segments import VarlenSegments


class SegmentPlan:
    """How to compute attention over `segments`: built once per batch and used by every layer.

    segments: (K, 4) int64 on the CPU: start, end, prefix_start, prefix_end; the last two are equal if there is no
    prefix. Segments follow each other without gaps and cover [0, T).
    share: the rows that this context-parallel rank computes; None for all rows. With a share, attention takes the
    queries of those rows, and the keys and values of all rows, gathered in rank order; a cut segment sees the part
    before the cut as one more prefix.
    kernel: the variable-length kernel. None selects the process's choice (varlen_kernels) on a GPU, and none on a CPU.

    Raises ValueError if segments do not follow each other or a prefix lies outside the batch's rows.
    """

    def __init__(
        self,
        segments: Tensor,
        device: torch.device | str = "cpu",
        share: RowShare | None = None,
        kernel: VarlenKernel | None = None,
    ) -> None:
        self.device, self.share = torch.device(device), share
        self.num_rows = int(segments[-1, 1])
        self.num_queries = self.num_rows if share is None else self.num_rows // share.num_ranks
        self.pieces = pieces_of(segments, share)
        self.kernel = chosen() if kernel is None and self.device.type == "cuda" else kernel

    @cached_property
    def dense(self) -> DenseSegments:
        return DenseSegments(self.pieces, self.share, self.device)

    @cached_property
    def varlen(self) -> VarlenSegments:
        assert self.kernel is not None
        return VarlenSegments(self.pieces, self.share, self.device, self.kernel)

    def way(self, q: Tensor) -> DenseSegments | VarlenSegments:
        """How queries of this dtype and head size are computed: by the kernel, if there is one that supports them."""
        return self.varlen if self.kernel is not None and self.kernel.takes(q) else self.dense


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, scale: float) -> Tensor:
        ctx.way, ctx.scale = plan.way(q), scale
        out, lse = ctx.way.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return *ctx.way.backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def segment_attention(q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan, *, scale: float) -> Tensor:
    """Attention over packed segments with shared prefixes, equal to a dense softmax under the segments' mask.

    q: (T, A, D), or the plan's share of these rows; k, v: (T, C, D), where A is a multiple of C. All have the same
    dtype (float64, float32, bfloat16 or float16). Returns a tensor of q's shape. Deterministic on a CPU.

    Raises ValueError if the plan was made for a different number of rows.
    """
    for name, x, planned in (("q", q, plan.num_queries), ("k", k, plan.num_rows), ("v", v, plan.num_rows)):
        if x.shape[0] != planned:
            raise ValueError(f"{name} has {x.shape[0]} rows but the plan is for {planned}")
    return _SegmentAttention.apply(q, k, v, plan, scale)
