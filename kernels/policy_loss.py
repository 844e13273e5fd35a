"""The objective on logits, with dlogits computed in the same pass.

Moves 4 bytes per bfloat16 logit where the cache serves the second read of a row; two separate passes move 6.

See token_terms.py for the mathematics: dL/dz_j = (g (1[j = target] - p_j) - h p_j (log p_j + H)) / temperature.
The upstream gradient is a scalar and is multiplied in later.

Letters: T scored tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.backend import on_device, refuse_second_derivative, take_once, use_triton
from fastgrpo.kernels.heads import GivenLogits, LogitsInPlace
from fastgrpo.kernels.objective import LossInputs, LossOutput, Objective
from fastgrpo.kernels.policy_rows import walk
from fastgrpo.kernels.reference import check_targets
from fastgrpo.kernels.scale_gradient import scale_in_place
from fastgrpo.kernels.token_terms import metrics_from
from fastgrpo.kernels.vocab_parallel import VocabShard

_NAME = "fastgrpo.kernels.policy_loss"


class _PolicyLoss(torch.autograd.Function):
    """Forward: loss and unscaled dlogits. Backward: multiply by the scalar upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        batch: LossInputs,
        objective: Objective,
        entropy: bool,
        in_place: bool,
        gradient: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head: GivenLogits | LogitsInPlace
        if triton:
            head = LogitsInPlace(logits)
        else:
            head = GivenLogits(logits, batch.token_weights != 0, temperature=objective.temperature)
        if gradient:
            head.want_gradient(in_place=in_place)
        loss, sums, log_p, row_entropy = walk(
            head,
            batch,
            objective,
            VocabShard.of(logits.shape[1], None, None),
            entropy=entropy,
            finite=False,
            gradient=gradient,
        )
        ctx.grads = head.grad_logits
        ctx.mark_non_differentiable(sums, log_p, row_entropy)
        ctx.set_materialize_grads(False)
        return loss, sums, log_p, row_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(_NAME)
        grad_logits = take_once(ctx, _NAME)
        if grad_loss is None:
            grad_logits = None
        return scale_in_place(grad_logits, grad_loss), None, None, None, None, None, None


def policy_loss(
    logits: Tensor,
    batch: LossInputs,
    objective: Objective,
    *,
    entropy: bool = True,
    in_place: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """The objective on logits (T, V), which autograd differentiates through.

    Args:
        logits: (T, V) float32, bfloat16 or float16, computed in float32 (float64 on the torch backend).
        batch, objective: see objective.py. Rows of logits with token_weights == 0 may hold NaN.
        entropy: report the entropy even if the objective does not need it.
        in_place: let the gradient overwrite the logits. Their values are lost, so nothing else may read them.
        backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".

    Returns: LossOutput; loss is float32 (float64 from float64). It can be backpropagated through once, without second
        derivatives.
    Raises: ValueError, naming the field, for wrong shapes or dtypes, missing data and, on a CPU, targets outside the
        vocabulary. On a GPU, where checking would mean waiting for the device, such a target makes the loss NaN.
    """
    batch.require_for(objective)
    if logits.ndim != 2 or batch.targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be (T, V) with T = {batch.targets.shape[0]} targets")
    if in_place and logits.stride(1) != 1:
        raise ValueError("in_place=True needs logits whose rows are contiguous: call .contiguous(), or leave it False")
    triton = use_triton(backend, logits)
    if triton and logits.stride(1) != 1:
        logits = logits.contiguous()
    if not (triton and logits.device.type == "cuda"):
        check_targets(batch.targets, batch.token_weights != 0, logits.shape[1])
    gradient = torch.is_grad_enabled() and logits.requires_grad
    with_entropy = entropy or objective.needs_entropy
    with on_device(logits):
        loss, sums, logprobs, row_entropy = _PolicyLoss.apply(
            logits, batch, objective, with_entropy, in_place, gradient, triton
        )
    return LossOutput(
        loss=loss,
        logprobs=logprobs,
        entropy=row_entropy if with_entropy else None,
        metrics=metrics_from(sums, objective, entropy=with_entropy, reference=batch.ref_logprobs is not None),
    )
