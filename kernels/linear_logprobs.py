"""Logprobs and entropies from hidden states; only a chunk of rows of the logits is held at any time.

    lp = log softmax(X W^T / temperature)[target],      H = -sum p log p,
    dL/dZ = (g (1[target] - p) - h p (log p + H)) / temperature   for upstream gradients g of lp and h of H.

The upstream gradients of individual tokens are unknown in the forward pass, so the backward pass computes each chunk's
logits again: 8 T H V operations instead of the policy loss's 6. Under tensor parallelism, the statistics of all rows
travel in one all-gather of 16 bytes per row and rank.

Letters: T tokens, H hidden, V vocabulary (shard), R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import chunks
from fastgrpo.kernels.backend import on_device, refuse_second_derivative, use_triton
from fastgrpo.kernels.heads import LinearHead
from fastgrpo.kernels.logprobs import LogprobRows, TorchLogprobRows, TritonLogprobRows, check_row_targets
from fastgrpo.kernels.reference import IGNORE_INDEX
from fastgrpo.kernels.vocab_parallel import VocabShard, check_hidden_and_weight


@dataclass(frozen=True, kw_only=True)
class _Call:
    targets: Tensor
    temperature: float
    entropy: bool
    shard: VocabShard
    triton: bool
    chunk_size: int | None
    tile_dtype: torch.dtype
    reduce_grad_hidden: bool

    def head(self, hidden: Tensor, weight: Tensor, *, gradient: bool) -> tuple[LinearHead, LogprobRows]:
        """The chunked head on the scored rows, and the row operations on its tile."""
        head = LinearHead(
            hidden,
            weight,
            self.targets != IGNORE_INDEX,
            self.shard,
            triton=self.triton,
            rows=chunks.chunk_rows(self.chunk_size, weight, self.tile_dtype, gradient=gradient),
            tile_dtype=self.tile_dtype,
            temperature=self.temperature,
        )
        targets = head.keep(self.targets).contiguous()
        rows: LogprobRows
        if self.triton:
            rows = TritonLogprobRows(
                targets, self.shard, head.gradient_tile, temperature=self.temperature, entropy=self.entropy
            )
        else:
            rows = TorchLogprobRows(
                targets, self.shard, head.tile, temperature=self.temperature, entropy=self.entropy, finite=True
            )
        return head, rows


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        head, rows = call.head(hidden, weight, gradient=False)
        parts = [rows.statistics(head.logits(span), span) for span in head.spans()]
        stats = torch.cat(parts) if parts else head.tile.new_empty(0, 4)
        log_p, entropy = rows.finish(call.shard.gather(stats))
        ctx.save_for_backward(hidden, weight, *rows.state())
        ctx.call = call
        ctx.set_materialize_grads(False)
        return head.spread(log_p), head.spread(entropy)

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_second_derivative("fastgrpo.kernels.linear_logprobs")
        hidden, weight, *state = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None
        call: _Call = ctx.call
        head, rows = call.head(hidden, weight, gradient=True)
        head.want_gradients(
            hidden=ctx.needs_input_grad[0],
            weight=ctx.needs_input_grad[1],
            reduce_hidden=call.reduce_grad_hidden,
        )
        rows.resume(
            state,
            None if grad_logprobs is None else head.keep(grad_logprobs),
            None if grad_entropy is None else head.keep(grad_entropy),
        )
        for span in head.spans():
            head.accumulate(rows.gradient(head.logits(span), span), span)
        grad_hidden, grad_weight = head.finish()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    tp_group: Any = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    reduce_grad_hidden: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`logprobs` of hidden @ weight^T, with gradients for hidden and weight.

    Args:
        hidden: (T, H) float32, bfloat16 or float16 (float64 on the torch backend). weight: (V, H), same dtype;
            under tensor parallelism this rank's shard, of equal size on all ranks.
        targets: (T,) int64 in [0, V), or -100 for a row that yields zeros and whose hidden state may hold NaN.
        temperature, entropy: see logprobs.
        tp_group, vocab_size, chunk_size, logits_dtype, reduce_grad_hidden, backend: see linear_policy_loss.

    Returns: (T,) float32 (float64 from float64), or with `entropy` a pair (logprobs, entropy) of these.
    Raises: ValueError, naming the argument. On a GPU, a target outside the vocabulary yields NaN instead.
    """
    check_hidden_and_weight(hidden, weight, targets)
    shard = VocabShard.of(weight.shape[0], vocab_size, tp_group)
    triton = use_triton(backend, hidden)
    check_row_targets(targets, shard.vocab_size, temperature, triton=triton)
    tile_dtype = chunks.tile_dtype(logits_dtype, hidden.dtype, triton)
    call = _Call(
        targets=targets,
        temperature=temperature,
        entropy=entropy,
        shard=shard,
        triton=triton,
        chunk_size=chunk_size,
        tile_dtype=tile_dtype,
        reduce_grad_hidden=reduce_grad_hidden,
    )
    with on_device(hidden):
        log_p, row_entropy = _LinearLogprobs.apply(hidden, weight, call)
    return (log_p, row_entropy) if entropy else log_p
