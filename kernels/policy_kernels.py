"""The policy loss's Triton kernels: a row's loss and gradient in one walk, a sequence's shared ratio, and the sums.

token_terms.py has the mathematics, row_math.py the walk along a row, policy_rows_triton.py who launches what.

Letters: T scored tokens, n rows of a tile, S sequences, V vocabulary (shard), R ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgrpo.kernels.launch import unspecialized
from fastgrpo.kernels.objective_math import clamped_exp, kl_estimate, surrogate
from fastgrpo.kernels.row_math import LOG2E, combine_ranks, row_statistics, write_row_gradient, write_zeros

_SHARED = ("SHARED_RATIO", "SHARED_GRAD", "SHARED_VALUE")
_PER_TOKEN = ("TARGETS", "WEIGHTS", "ADVANTAGES", "OLD", "REF", "IMPORTANCE", "RECORDS", *_SHARED)


@triton.jit(
    **unspecialized(
        *_PER_TOKEN, "STATS", "num_ranks", "rank_stride", "first_token", "unit_token", "num_tokens", "first_column"
    )
)
def policy_kernel(
    LOGITS,
    logits_stride,
    GRAD,
    grad_stride,
    STATS,
    num_ranks,
    rank_stride,
    TARGETS,
    WEIGHTS,
    ADVANTAGES,
    OLD,
    REF,
    IMPORTANCE,
    SHARED_RATIO,
    SHARED_GRAD,
    SHARED_VALUE,
    RECORDS,
    first_token,
    unit_token,
    num_tokens,
    first_column,
    num_valid,
    num_columns,
    vocab_size,
    inverse_temperature,
    clip_low,
    clip_high,
    dual_clip,
    tau_pos,
    tau_neg,
    kl_coef,
    entropy_coef,
    SURROGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_TIMES_RATIO: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row: its record, and where GRAD is given its gradient. STATS None: the row's statistics are taken here.

    With STATS and without GRAD the logits are not looked at.

    STATS (R, n, 4) and LOGITS start at token unit_token and first_token; per-token vectors start at token 0.
    """
    row_index = tl.program_id(0).to(tl.int64)
    token = first_token + row_index
    row = LOGITS + row_index * logits_stride
    record = RECORDS + token
    weight = tl.load(WEIGHTS + token).to(tl.float32)
    target = tl.load(TARGETS + token)  # with the weight: the row's own logit waits for it
    if weight == 0.0:
        for k in tl.static_range(10):
            tl.store(record + k * num_tokens, 0.0)
        if GRAD is not None:
            write_zeros(GRAD + row_index * grad_stride, 0, num_columns, BLOCK)
    else:
        scale = inverse_temperature * LOG2E
        column = target - first_column
        column = tl.where((column >= 0) & (column < num_valid), column, -1)
        own_logit = float("-inf")
        if STATS is None or GRAD is not None:
            own_logit = tl.load(row + column, mask=column >= 0, other=float("-inf")).to(tl.float32)
        if STATS is None:
            row_max, total, moment = row_statistics(row, num_valid, scale, True, BLOCK, VECTOR)
            log_sum = tl.log(total)
            mean_shift = moment / total
            target_logit = own_logit
        else:
            own = STATS + (token - unit_token) * 4
            row_max, log_sum, mean_shift, target_logit = combine_ranks(own, num_ranks, rank_stride, inverse_temperature)
        log_p = (target_logit - row_max) * inverse_temperature - log_sum
        if (target < 0) | (target >= vocab_size):
            log_p = float("nan")  # no such token: loud, without waiting for the device
        entropy = log_sum - mean_shift

        advantage = tl.load(ADVANTAGES + token).to(tl.float32)
        log_ratio = tl.where(log_p == log_p, 0.0, log_p)  # on-policy; a NaN stays visible
        if OLD is not None:
            log_ratio = log_p - tl.load(OLD + token).to(tl.float32)
        token_ratio, token_slope = clamped_exp(log_ratio)
        ratio = token_ratio
        if SHARED_RATIO is not None:
            ratio = tl.load(SHARED_RATIO + token)
        value, by_ratio, direct, below, above, dual = surrogate(
            ratio, log_p, advantage, clip_low, clip_high, dual_clip, tau_pos, tau_neg, SURROGATE, DUAL_CLIP
        )
        if SHARED_VALUE is not None:  # of a surrogate that is not ours; a NaN stays visible
            value = tl.where(log_p == log_p, tl.load(SHARED_VALUE + token), log_p)
        importance = weight
        if IMPORTANCE is not None:
            importance *= tl.load(IMPORTANCE + token).to(tl.float32)
        loss = importance * value
        if SHARED_GRAD is None:
            grad = importance * (by_ratio * token_slope + direct)
        else:
            grad = tl.load(SHARED_GRAD + token) + importance * direct

        kl_sum = 0.0
        if REF is not None:
            ref = tl.load(REF + token).to(tl.float32)
            kl_sum, _slope = kl_estimate(log_p, ref, "k3")
            if KL != "none":
                kl, kl_slope = kl_estimate(log_p, ref, KL)
                if KL_TIMES_RATIO:
                    kl_slope = kl_slope * token_ratio + kl * token_slope
                    kl = kl * token_ratio
                loss += kl_coef * weight * kl
                grad += kl_coef * weight * kl_slope
        grad_entropy = -entropy_coef * weight
        if HAS_ENTROPY:
            loss += grad_entropy * entropy
        old_kl, _slope = kl_estimate(log_ratio, 0.0, "k3")

        tl.store(record, loss)
        tl.store(record + num_tokens, log_p)
        tl.store(record + 2 * num_tokens, entropy)
        tl.store(record + 3 * num_tokens, ratio)
        tl.store(record + 4 * num_tokens, below.to(tl.float32))
        tl.store(record + 5 * num_tokens, above.to(tl.float32))
        tl.store(record + 6 * num_tokens, dual.to(tl.float32))
        tl.store(record + 7 * num_tokens, old_kl)
        tl.store(record + 8 * num_tokens, kl_sum)
        tl.store(record + 9 * num_tokens, 1.0)

        if GRAD is not None:
            tl.debug_barrier()  # GRAD may be LOGITS: every thread has read what it needs of the row
            write_row_gradient(
                row,
                GRAD + row_index * grad_stride,
                num_valid,
                num_columns,
                column,
                own_logit,
                row_max,
                log_sum,
                entropy,
                grad * inverse_temperature,
                grad_entropy * inverse_temperature if HAS_ENTROPY else 0.0,
                scale,
                HAS_ENTROPY,
                BLOCK,
                VECTOR,
            )


@triton.jit(
    **unspecialized(
        "STATS",
        "num_ranks",
        "rank_stride",
        "CU_SEQLENS",
        "WEIGHTS",
        "ADVANTAGES",
        "OLD",
        "IMPORTANCE",
        "SHARED_RATIO",
        "SHARED_GRAD",
        "unit_start",
        "unit_stop",
    )
)
def sequence_kernel(
    STATS,
    num_ranks,
    rank_stride,
    CU_SEQLENS,
    WEIGHTS,
    ADVANTAGES,
    OLD,
    IMPORTANCE,
    SHARED_RATIO,
    SHARED_GRAD,
    unit_start,
    unit_stop,
    inverse_temperature,
    clip_low,
    clip_high,
    dual_clip,
    tau_pos,
    tau_neg,
    SURROGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence: its ratio, and the gradient that its ratio gives to each of its scored tokens.

    Sequences outside [unit_start, unit_stop) are left alone. STATS (R, n, 4) start at token unit_start.
    """
    sequence = tl.program_id(0)
    start = tl.load(CU_SEQLENS + sequence).to(tl.int64)
    stop = tl.load(CU_SEQLENS + sequence + 1).to(tl.int64)
    if (start >= unit_start) & (stop <= unit_stop):
        lanes = tl.arange(0, BLOCK)
        log_ratio_sum = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, stop, BLOCK):
            token = first + lanes
            inside = token < stop
            scored = inside & (tl.load(WEIGHTS + token, mask=inside, other=0.0) != 0.0)
            count += scored.to(tl.float32)
            if OLD is not None:
                stats = STATS + (token - unit_start) * 4
                row_max = tl.full((BLOCK,), -1e30, tl.float32)
                target_logit = tl.full((BLOCK,), float("-inf"), tl.float32)
                for rank in range(num_ranks):
                    row_max = tl.maximum(row_max, tl.load(stats + rank * rank_stride, mask=scored, other=0.0))
                    own_logit = tl.load(stats + rank * rank_stride + 3, mask=scored, other=0.0)
                    target_logit = tl.maximum(target_logit, own_logit)
                total = tl.zeros((BLOCK,), tl.float32)
                for rank in range(num_ranks):
                    drop = tl.load(stats + rank * rank_stride, mask=scored, other=0.0) - row_max
                    total += tl.exp(drop * inverse_temperature) * tl.load(
                        stats + rank * rank_stride + 1, mask=scored, other=1.0
                    )
                log_p = (target_logit - row_max) * inverse_temperature - tl.log(total)
                old = tl.load(OLD + token, mask=scored, other=0.0).to(tl.float32)
                log_ratio_sum += tl.where(scored, log_p - old, 0.0)
        num_scored = tl.maximum(tl.sum(count, 0), 1.0)
        ratio, ratio_slope = clamped_exp(tl.sum(log_ratio_sum, 0) / num_scored)

        slope_sum = tl.zeros((BLOCK,), tl.float32)
        for first in range(start, stop, BLOCK):
            token = first + lanes
            inside = token < stop
            weight = tl.load(WEIGHTS + token, mask=inside, other=0.0).to(tl.float32)
            scored = inside & (weight != 0.0)
            advantage = tl.load(ADVANTAGES + token, mask=scored, other=0.0).to(tl.float32)
            if IMPORTANCE is not None:
                weight *= tl.load(IMPORTANCE + token, mask=scored, other=0.0).to(tl.float32)
            _value, by_ratio, _direct, _below, _above, _dual = surrogate(
                tl.full((BLOCK,), 0.0, tl.float32) + ratio,
                advantage * 0.0,
                advantage,
                clip_low,
                clip_high,
                dual_clip,
                tau_pos,
                tau_neg,
                SURROGATE,
                DUAL_CLIP,
            )
            slope_sum += tl.where(scored, weight * by_ratio, 0.0)
        shared = tl.sum(slope_sum, 0) * ratio_slope / num_scored
        for first in range(start, stop, BLOCK):
            token = first + lanes
            tl.store(SHARED_RATIO + token, ratio, mask=token < stop)
            tl.store(SHARED_GRAD + token, shared, mask=token < stop)


@triton.jit(**unspecialized("RECORDS", "SUMS", "LOSS", "num_tokens"))
def sum_kernel(RECORDS, SUMS, LOSS, num_tokens, BLOCK: tl.constexpr):
    """One record summed over the tokens, in float64; the first is the loss."""
    record = tl.program_id(0)
    own = RECORDS + record.to(tl.int64) * num_tokens
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_tokens, BLOCK):
        token = start + lanes
        total += tl.load(own + token, mask=token < num_tokens, other=0.0).to(tl.float64)
    value = tl.sum(total, 0).to(tl.float32)
    tl.store(SUMS + record, value)
    if record == 0:
        tl.store(LOSS, value)
