"""The objective from hidden states, with its gradient computed in the forward pass.

A chunk of rows at a time:   Z = X_c W^T   ->   row operations: loss and dZ in place of Z
                             dX_c = dZ W   ->   dW += dZ^T X_c
The (T, V) logits never exist in full, and no GEMM runs twice: 6 T H V operations, where autograd through a checkpointed
chunk needs 8. This is possible because row t of dZ depends on nothing that is still unknown when its chunk
is computed (see token_terms.py); where a sequence's ratio is needed, chunks end at sequence boundaries (see
chunks.plan_units). The upstream gradient is a scalar and is multiplied in later, on the device.

Letters: T scored tokens, H hidden, V vocabulary (shard).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import chunks
from fastgrpo.kernels.backend import on_device, refuse_second_derivative, take_once, use_triton
from fastgrpo.kernels.chunks import ChunkRows
from fastgrpo.kernels.heads import LinearHead
from fastgrpo.kernels.objective import LossInputs, LossOutput, Objective
from fastgrpo.kernels.policy_rows import walk
from fastgrpo.kernels.reference import check_targets
from fastgrpo.kernels.scale_gradient import scale_in_place, scaled_as
from fastgrpo.kernels.token_terms import metrics_from
from fastgrpo.kernels.vocab_parallel import VocabShard, check_hidden_and_weight

_NAME = "fastgrpo.kernels.linear_policy_loss"


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Everything about a call except its two differentiable tensors."""

    batch: LossInputs
    objective: Objective
    shard: VocabShard
    triton: bool
    rows: ChunkRows
    tile_dtype: torch.dtype
    entropy: bool
    grad_weight_buffer: Tensor | None
    grad_scale: float
    reduce_grad_hidden: bool


def _run(
    hidden: Tensor, weight: Tensor, call: _Call, need_hidden: bool, need_weight: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """((loss, sums (R,) of the records, logprobs (T,), entropy (T,)), (dHidden, dWeight))."""
    batch, objective, shard = call.batch, call.objective, call.shard
    head = LinearHead(
        hidden,
        weight,
        batch.token_weights != 0,
        shard,
        triton=call.triton,
        rows=call.rows,
        tile_dtype=call.tile_dtype,
        temperature=objective.temperature,
    )
    head.want_gradients(
        hidden=need_hidden,
        weight=need_weight,
        buffer=call.grad_weight_buffer,
        buffer_scale=call.grad_scale,
        reduce_hidden=call.reduce_grad_hidden,
    )
    outputs = walk(
        head,
        batch,
        objective,
        shard,
        entropy=call.entropy,
        finite=True,
        gradient=need_hidden or need_weight,
    )
    return outputs, head.finish()


class _LinearPolicyLoss(torch.autograd.Function):
    """Forward: loss and unscaled gradients. Backward: multiply by the scalar upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, call: _Call, need_hidden: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.call, ctx.weight, ctx.unit = call, weight, None
        if hidden.dtype == torch.float16 and call.grad_weight_buffer is None and hidden.shape[0]:
            call, ctx.unit = _in_units(call)
        (loss, sums, log_p, row_entropy), ctx.grads = _run(hidden, weight, call, need_hidden, need_weight)
        ctx.mark_non_differentiable(sums, log_p, row_entropy)
        ctx.set_materialize_grads(False)
        return loss if ctx.unit is None else loss * ctx.unit, sums, log_p, row_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        refuse_second_derivative(_NAME)
        grad_hidden, grad_weight = take_once(ctx, _NAME)
        if grad_loss is None:
            return None, None, None, None, None
        scale = grad_loss if ctx.unit is None else grad_loss * ctx.unit
        if ctx.call.grad_weight_buffer is not None:
            scale = torch.where(scale == ctx.call.grad_scale, scale, torch.nan)
        grad_hidden = scale_in_place(grad_hidden, scale)
        if grad_weight is not None:
            grad_weight = scaled_as(grad_weight, scale, ctx.weight.dtype)
        elif ctx.call.grad_weight_buffer is not None:
            grad_weight = _announce_buffer(ctx.weight)
        return grad_hidden, grad_weight, None, None, None


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: LossInputs,
    objective: Objective,
    *,
    tp_group: Any = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_buffer: Tensor | None = None,
    grad_scale: float = 1.0,
    reduce_grad_hidden: bool = True,
    entropy: bool = True,
    backend: str = "auto",
) -> LossOutput:
    """The objective on logits hidden @ weight^T, of which only a chunk of rows is held at any time.

    Args:
        hidden: (T, H) float32, bfloat16 or float16 (float64 on the torch backend).
        weight: (V, H), same dtype; under tensor parallelism this rank's shard, of equal size on all ranks.
            Neither hidden nor weight has to require a gradient.
        batch, objective: see objective.py. Rows of hidden with token_weights == 0 may hold NaN.
        tp_group: the process group that splits the vocabulary; hidden and batch are the same on all its ranks.
        vocab_size: the number of tokens in the whole vocabulary, if the weight ends in padding rows.
        chunk_size: rows of logits that may exist at once; None chooses from V and the device's memory.
        logits_dtype: dtype of the tile of logits; None means float32. hidden's own bfloat16 halves the tile's memory
            and costs about 4e-2 at worst in a logprob (docs/kernels.md). Triton backend only.
        grad_weight_buffer: (V, H); dWeight is *added* to it during the forward pass (Megatron's main_grad), and
            weight's own gradient stays None. If weight has the attribute grad_added_to_main_grad, that is set to
            True and weight receives zeros, as Megatron's hooks expect. Meant for bfloat16 and float32: in
            float16, gradients made small by a batch's token weights are lost.
        grad_scale: the upstream gradient to expect with grad_weight_buffer, which must be known in advance; any
            other one in the backward pass turns hidden's gradient into NaN rather than leaving the two inconsistent.
        reduce_grad_hidden: whether to sum hidden's gradient over tp_group; False if the caller reduces (or
            reduce-scatters) it, as Megatron's sequence parallelism does.
        entropy: report the entropy even if the objective does not need it.
        backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".

    Returns: LossOutput; loss is float32 (float64 from float64). It can be backpropagated through once, without second
        derivatives.
    Raises: ValueError, naming the field, for wrong shapes or dtypes, missing data and, on a CPU, targets outside the
        vocabulary. On a GPU, where checking would mean waiting for the device, such a target makes the loss NaN.
    """
    batch.require_for(objective)
    check_hidden_and_weight(hidden, weight, batch.targets)
    shard = VocabShard.of(weight.shape[0], vocab_size, tp_group)
    triton = use_triton(backend, hidden)
    if not (triton and hidden.device.type == "cuda"):  # there, looking would wait for the device
        check_targets(batch.targets, batch.token_weights != 0, shard.vocab_size)
    tile_dtype = chunks.tile_dtype(logits_dtype, hidden.dtype, triton)
    if grad_weight_buffer is not None:
        _check_buffer(grad_weight_buffer, weight)
    with_entropy = entropy or objective.needs_entropy
    recording = torch.is_grad_enabled()
    need_hidden, need_weight = recording and hidden.requires_grad, recording and weight.requires_grad
    strips = not objective.relates_tokens
    rows = chunks.chunk_rows(chunk_size, weight, tile_dtype, gradient=need_hidden or need_weight, strips=strips)
    call = _Call(
        batch=batch,
        objective=objective,
        shard=shard,
        triton=triton,
        rows=rows,
        tile_dtype=tile_dtype,
        entropy=with_entropy,
        grad_weight_buffer=grad_weight_buffer,
        grad_scale=grad_scale if grad_weight_buffer is not None else 1.0,
        reduce_grad_hidden=reduce_grad_hidden,
    )
    with on_device(hidden):
        loss, sums, logprobs, row_entropy = _LinearPolicyLoss.apply(hidden, weight, call, need_hidden, need_weight)
    return LossOutput(
        loss=loss,
        logprobs=logprobs,
        entropy=row_entropy if with_entropy else None,
        metrics=metrics_from(sums, objective, entropy=with_entropy, reference=batch.ref_logprobs is not None),
    )


def _check_buffer(buffer: Tensor, weight: Tensor) -> None:
    if buffer.shape != weight.shape or buffer.device != weight.device or not buffer.is_contiguous():
        raise ValueError(
            f"grad_weight_buffer {tuple(buffer.shape)} on {buffer.device}: give a contiguous "
            f"{tuple(weight.shape)} tensor on {weight.device}"
        )


def _in_units(call: _Call) -> tuple[_Call, Tensor]:
    """The call with token weights near 1, and the power of two they were divided by; loss and gradients are linear.

    A weight is one over a batch's tokens, and times a probability it is nothing to float16, whatever loss scale is
    multiplied in later.
    """
    largest = call.batch.token_weights.abs().amax()
    unit = torch.where(largest > 0.0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)
    return replace(call, batch=replace(call.batch, token_weights=call.batch.token_weights / unit)), unit


def _announce_buffer(weight: Tensor) -> Tensor | None:
    """What autograd receives for a weight whose gradient already lies in its buffer."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
