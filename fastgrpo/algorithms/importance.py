"""Correction for a sampler whose probabilities differ from the learner's: importance weights c_t, as data."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.objective import MAX_LOG_RATIO


def importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    cu_scored: Tensor,
    *,
    level: str,
    mode: str = "truncate",
    floor: float = 0.0,
    cap: float,
) -> Tensor:
    """r = exp(old - sampler) per token, or of the sequence's sum of log-ratios, bounded; without gradient.

    truncate: min(r, cap), truncated importance sampling (Ionides 2008). mask: r within [floor, cap] and 0 outside, so
    that a token (or sequence) on which the two disagree too much carries no loss.

    old_logprobs, sampler_logprobs: (N,) float32; cu_scored: (S+1,) int64; level: token | sequence. Returns (N,).
    """
    log_ratio = old_logprobs - sampler_logprobs
    if level == "sequence":
        lengths = cu_scored.diff()
        sums = torch.stack([part.sum() for part in log_ratio.split(lengths.tolist())])
        log_ratio = sums.repeat_interleave(lengths.to(sums.device))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        return ratio.clamp(max=cap)
    return ratio.where((ratio >= floor) & (ratio <= cap), torch.zeros_like(ratio))
