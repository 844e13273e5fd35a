"""The objective behind the softmax, differentiated by hand: what gradient-in-forward needs from each token.

Writing L for the loss, every path hands the row operations two numbers a token,
    g_t = dL / d lp_t    and    h_t = dL / d H_t = -entropy_coef * w_t,
and a row's logits z then receive, with p = softmax(z / temperature) and y the target,
    dL / dz_j = (g * (1[j = y] - p_j) - h * p_j * (log p_j + H)) / temperature.
g_t depends on row t alone and on values known beforehand, unless the ratio is a sequence's:
there s = exp(mean over its n scored tokens of lp - old), so that every scored token of the sequence receives
    g_t = (s / n) * sum over the sequence of w * c * d surrogate / d s.
A surrogate of one's own is differentiated by autograd (custom_terms.py).

reference.token_loss states the same by plain formulas and lets autograd differentiate; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.kernels.custom_terms import custom_terms, sequences_of
from fastgrpo.kernels.objective import MAX_LOG_RATIO, LossInputs, Objective

# What is recorded of every token, in the order of the rows of `records` (R, T). One sum over T yields the loss
# and all metrics; kernels/policy_kernels.py writes the same rows from Triton.
RECORDS = (
    "loss",
    "logprob_sum",
    "entropy_sum",
    "ratio_sum",
    "clip_low_count",
    "clip_high_count",
    "dual_clip_count",
    "old_kl_sum",
    "kl_sum",
    "num_tokens",
)
LOGPROB_ROW, ENTROPY_ROW = RECORDS.index("logprob_sum"), RECORDS.index("entropy_sum")


@dataclass(frozen=True)
class TokenTerms:
    """records (R, T) in the order of `record_names`, and the row coefficients g and h (T,)."""

    records: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor


def token_terms(log_p: Tensor, entropy: Tensor | None, batch: LossInputs, objective: Objective) -> TokenTerms:
    """Loss, metrics and dL/dlp of scored tokens (all weights non-zero), in log_p's precision."""
    dtype = log_p.dtype
    advantages, weights = batch.advantages.to(dtype), batch.token_weights.to(dtype)
    old = log_p if batch.old_logprobs is None else batch.old_logprobs.to(dtype)
    log_ratio = torch.zeros_like(log_p) if batch.old_logprobs is None else log_p - old
    token_ratio, token_slope = clamped_exp(log_ratio)

    scale = weights if batch.importance_weights is None else weights * batch.importance_weights.to(dtype)
    reported: tuple[Tensor, ...] = ()
    if objective.custom is not None:
        custom = custom_terms(log_p, entropy, batch, objective, scale)
        ratio, loss, grad, reported = custom.ratio, scale * custom.value, custom.grad_logprob, custom.metrics
        clip_counts = (torch.zeros_like(log_p),) * 3
    elif objective.ratio_level == "sequence":
        sequences = sequences_of(batch)
        ratio, ratio_slope = clamped_exp(sequences.mean(log_ratio))
        value, by_ratio, direct, clip_counts = _surrogate(ratio, log_p, advantages, objective)
        loss, grad = scale * value, sequences.mean(scale * by_ratio * ratio_slope) + scale * direct
    else:
        ratio = token_ratio
        value, by_ratio, direct, clip_counts = _surrogate(ratio, log_p, advantages, objective)
        loss, grad = scale * value, scale * (by_ratio * token_slope + direct)

    kl_sum = torch.zeros_like(log_p)
    if batch.ref_logprobs is not None:
        ref = batch.ref_logprobs.to(dtype)
        kl_sum = _kl(log_p, ref, "k3")[0]
        if objective.kl_coef > 0:
            kl, kl_slope = _kl(log_p, ref, objective.kl_estimator)
            if objective.kl_times_ratio:
                kl, kl_slope = kl * token_ratio, kl_slope * token_ratio + kl * token_slope
            loss = loss + objective.kl_coef * weights * kl
            grad = grad + objective.kl_coef * weights * kl_slope

    grad_entropy = -objective.entropy_coef * weights
    entropy = torch.zeros_like(log_p) if entropy is None else entropy
    if objective.entropy_coef:
        loss = loss + grad_entropy * entropy
    old_kl, _ = _kl(log_p, old, "k3")
    rows = [loss, log_p, entropy, ratio, *clip_counts, old_kl, kl_sum, torch.ones_like(log_p), *reported]
    return TokenTerms(torch.stack([row.to(dtype) for row in rows]), grad, grad_entropy)


def record_names(objective: Objective) -> tuple[str, ...]:
    """What is recorded of every token: RECORDS, then what a surrogate of one's own reports."""
    return RECORDS if objective.custom is None else RECORDS + objective.custom.record_names


def metrics_from(sums: Tensor, objective: Objective, *, entropy: bool, reference: bool) -> dict[str, Tensor]:
    """LossOutput.metrics from the sums (R,) of the records over the tokens."""
    absent = {"loss"}
    if not entropy:
        absent.add("entropy_sum")
    if not reference:
        absent.add("kl_sum")
    if objective.custom is not None:  # which of its tokens are clipped is for it to say
        absent |= {"clip_low_count", "clip_high_count", "dual_clip_count"}
    narrow = sums.float()
    return {name: narrow[row] for row, name in enumerate(record_names(objective)) if name not in absent}


def clamped_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(clamp(x, +-20)) and its slope, which is 0 once the clamp holds."""
    clamped = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    value = clamped.exp()
    return value, torch.where(clamped == x, value, 0.0)


def _surrogate(
    ratio: Tensor, log_p: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, Tensor | float, Tensor | float, tuple[Tensor, Tensor, Tensor]]:
    """The surrogate's value, its slope by the ratio, its slope by lp directly, and (low, high, dual) clip flags."""
    low, high = 1.0 - objective.clip_ratio_low, 1.0 + objective.clip_ratio_high
    none = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.surrogate == "clip":
        below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
        dual = none
        used = torch.where(below, low, torch.where(above, high, ratio))
        if objective.dual_clip is not None:
            dual = (ratio > objective.dual_clip) & (advantages < 0)
            used = torch.where(dual, objective.dual_clip, used)
        return -used * advantages, torch.where(below | above | dual, 0.0, -advantages), 0.0, (below, above, dual)
    if objective.surrogate == "cispo":
        slope = -ratio.clamp(low, high) * advantages
        return slope * log_p, 0.0, slope, (ratio < low, ratio > high, none)
    if objective.surrogate == "sapo":
        tau = torch.where(advantages > 0, torch.full_like(advantages, objective.sapo_tau_pos), objective.sapo_tau_neg)
        gate = torch.sigmoid(tau * (ratio - 1.0))
        return -(4.0 / tau) * gate * advantages, -4.0 * gate * (1.0 - gate) * advantages, 0.0, (none, none, none)
    return -advantages * log_p, 0.0, -advantages, (none, none, none)


def _kl(log_p: Tensor, other: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """An estimate of KL(policy || other) per token, and its slope by log_p (k3's passes through its clamp)."""
    difference = log_p - other
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return 0.5 * difference.square(), difference
    drift = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    growth = torch.expm1(drift)
    return growth - drift, -growth
