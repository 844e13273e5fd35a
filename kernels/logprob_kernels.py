"""A row's statistics, and its gradient under given upstream gradients: the Triton kernels behind logprobs.

The policy loss takes its statistics here too, where one launch cannot do everything.
Letters: T tokens, n rows of a tile, V vocabulary (shard), R vocabulary shards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels.chunks import Span
from fastgrpo.kernels.launch import row_shape, unspecialized
from fastgrpo.kernels.row_math import LOG2E, combine_ranks, row_statistics, write_row_gradient, write_zeros
from fastgrpo.kernels.vocab_parallel import VocabShard


@triton.jit(**unspecialized("TARGETS", "WEIGHTS", "STATS", "LOGPROBS", "ENTROPY", "first_token", "first_column"))
def statistics_kernel(
    LOGITS,
    logits_stride,
    TARGETS,
    WEIGHTS,
    STATS,
    LOGPROBS,
    ENTROPY,
    first_token,
    first_column,
    num_valid,
    inverse_temperature,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row: (m, l, s, y) into STATS (n, 4), and without other shards its logprob and entropy.

    s is 0 without HAS_ENTROPY, and the entropy then meaningless.
    A row is skipped where its weight is 0, or without WEIGHTS where its target is -100.
    """
    row_index = tl.program_id(0).to(tl.int64)
    row = LOGITS + row_index * logits_stride
    token = first_token + row_index
    target = tl.load(TARGETS + token)
    skip = target == -100
    if WEIGHTS is not None:
        skip = tl.load(WEIGHTS + token) == 0.0
    row_max = 0.0
    total = 1.0
    moment = 0.0
    target_logit = 0.0
    if not skip:
        column = target - first_column
        owned = (column >= 0) & (column < num_valid)
        target_logit = tl.load(row + column, mask=owned, other=float("-inf")).to(tl.float32)
        row_max, total, moment = row_statistics(row, num_valid, inverse_temperature * LOG2E, HAS_ENTROPY, BLOCK, VECTOR)
    out = STATS + row_index * 4
    tl.store(out, row_max)
    tl.store(out + 1, total)
    tl.store(out + 2, moment)
    tl.store(out + 3, target_logit)
    if LOGPROBS is not None:
        log_sum = tl.log(total)
        log_p = (target_logit - row_max) * inverse_temperature - log_sum
        if (not skip) & ((target < 0) | (target >= num_valid)):
            log_p = float("nan")  # no such token: loud, without waiting for the device
        tl.store(LOGPROBS + token, log_p)
        tl.store(ENTROPY + token, log_sum - moment / total)


@triton.jit(
    **unspecialized(
        "STATS", "num_ranks", "rank_stride", "TARGETS", "GRAD_LOGPROBS", "GRAD_ENTROPY", "first_token", "first_column"
    )
)
def gradient_kernel(
    LOGITS,
    logits_stride,
    GRAD,
    grad_stride,
    STATS,
    num_ranks,
    rank_stride,
    TARGETS,
    GRAD_LOGPROBS,
    GRAD_ENTROPY,
    first_token,
    first_column,
    num_valid,
    num_columns,
    inverse_temperature,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row's dL/dlogits from the statistics (R, T, 4) of all shards; GRAD may be LOGITS."""
    row_index = tl.program_id(0).to(tl.int64)
    row = LOGITS + row_index * logits_stride
    out = GRAD + row_index * grad_stride
    token = first_token + row_index
    target = tl.load(TARGETS + token)
    if target == -100:
        write_zeros(out, 0, num_columns, BLOCK)
    else:
        column = target - first_column
        column = tl.where((column >= 0) & (column < num_valid), column, -1)
        own_logit = tl.load(row + column, mask=column >= 0, other=float("-inf")).to(tl.float32)
        row_max, log_sum, mean_shift, _logit = combine_ranks(
            STATS + token * 4, num_ranks, rank_stride, inverse_temperature
        )
        grad_entropy = 0.0
        if GRAD_ENTROPY is not None:
            grad_entropy = tl.load(GRAD_ENTROPY + token) * inverse_temperature
        tl.debug_barrier()  # GRAD may be LOGITS: every thread has read the target's logit
        write_row_gradient(
            row,
            out,
            num_valid,
            num_columns,
            column,
            own_logit,
            row_max,
            log_sum,
            log_sum - mean_shift,
            tl.load(GRAD_LOGPROBS + token) * inverse_temperature,
            grad_entropy,
            inverse_temperature * LOG2E,
            GRAD_ENTROPY is not None,
            BLOCK,
            VECTOR,
        )


def launch_statistics(
    tile: Tensor,
    span: Span,
    targets: Tensor,
    weights: Tensor | None,
    shard: VocabShard,
    inverse_temperature: float,
    *,
    entropy: bool,
) -> Tensor:
    """(n, 4) float32 statistics of a tile (n, V) of undivided logits whose rows are the tokens of span."""
    stats = torch.empty(tile.shape[0], 4, dtype=torch.float32, device=tile.device)
    statistics_kernel[(tile.shape[0],)](
        tile,
        tile.stride(0),
        targets,
        weights,
        stats,
        None,
        None,
        span[0],
        shard.first_column,
        shard.num_valid,
        inverse_temperature,
        HAS_ENTROPY=entropy,
        **row_shape(tile),
    )
    return stats


def launch_gradient(
    tile: Tensor,
    out: Tensor,
    span: Span,
    stats: Tensor,
    targets: Tensor,
    upstream: tuple[Tensor, Tensor | None],
    shard: VocabShard,
    inverse_temperature: float,
) -> Tensor:
    """dL/dlogits of a tile into out, which may be the tile; upstream: gradients (T,) of logprobs and entropies."""
    gradient_kernel[(tile.shape[0],)](
        tile,
        tile.stride(0),
        out,
        out.stride(0),
        stats,
        stats.shape[0],
        stats.stride(0),
        targets,
        *upstream,
        span[0],
        shard.first_column,
        shard.num_valid,
        tile.shape[1],
        inverse_temperature,
        **row_shape(tile),
    )
    return out
