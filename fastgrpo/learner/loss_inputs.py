"""A packed batch as the loss head wants it."""

from __future__ import annotations

from fastgrpo.kernels.objective import LossInputs
from fastgrpo.types import PackedBatch


def loss_inputs(batch: PackedBatch) -> LossInputs:
    """Everything the objective needs about the batch's scored tokens, on the batch's device."""
    return LossInputs(
        targets=batch.targets,
        advantages=batch.advantages,
        token_weights=batch.token_weights,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        sampler_logprobs=batch.sampler_logprobs,
        importance_weights=batch.importance_weights,
        cu_seqlens=batch.cu_scored,
    )
