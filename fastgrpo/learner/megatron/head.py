"""The loss head on the last stage: scored rows out of the hidden states, the objective on the vocabulary's shard."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import LossOutput, Objective
from fastgrpo.learner.loss_inputs import loss_inputs
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.types import PackedBatch


def policy_loss(
    model: HiddenStatesModel, hidden: Tensor, batch: PackedBatch, objective: Objective, parallel: Parallel
) -> LossOutput:
    """The micro-batch's loss, whole on every tensor-parallel rank.

    hidden: (T, 1, H), or (T / tp, 1, H) under sequence parallelism. The head's gradient goes to its main_grad while
    the loss is computed; hidden's is summed over tensor parallelism, by the head or on its way back to the shards.
    """
    return linear_policy_loss(
        scored_rows(hidden, batch, parallel),
        model.head_weight,
        loss_inputs(batch),
        objective,
        tp_group=_split(parallel),
        vocab_size=model.architecture.vocab_size,
        grad_weight_buffer=getattr(model.head_weight, "main_grad", None),  # none where it is frozen
        reduce_grad_hidden=not parallel.layout.sp,
    )


def logprobs(
    model: HiddenStatesModel,
    hidden: Tensor,
    batch: PackedBatch,
    temperature: float,
    parallel: Parallel,
    *,
    entropy: bool = False,
) -> Tensor:
    """(1, N) float32 logprobs of the scored tokens, or (2, N) with the entropies, the same on every tensor-parallel
    rank; hidden as in policy_loss."""
    found = linear_logprobs(
        scored_rows(hidden, batch, parallel),
        model.head_weight,
        batch.targets,
        temperature=temperature,
        entropy=entropy,
        tp_group=_split(parallel),
        vocab_size=model.architecture.vocab_size,
    )
    return found[None] if isinstance(found, Tensor) else torch.stack(found)


def scored_rows(hidden: Tensor, batch: PackedBatch, parallel: Parallel) -> Tensor:
    """(N, H): the rows that predict a scored token."""
    if parallel.layout.sp:
        # Backward reduce-scatters: it sums the ranks' shares of the gradient, so the head must not.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    if parallel.layout.cp > 1:  # all ranks' rows, for the scored tokens are shared out anew, evenly
        hidden = gather_from_sequence_parallel_region(hidden, group=parallel.cp_group)
    return hidden[:, 0].index_select(0, batch.hidden_rows)


def _split(parallel: Parallel) -> torch.distributed.ProcessGroup | None:
    return parallel.tp_group if parallel.layout.tp > 1 else None
