"""Correction for a sampler whose probabilities differ from the learner's: truncated importance weights c_t."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.objective import MAX_LOG_RATIO


def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, cu_scored: Tensor, *, level: str, cap: float
) -> Tensor:
    """min(exp(old - sampler), cap) per token, or of the sequence's sum of log-ratios, as data without gradient.

    old_logprobs, sampler_logprobs: (N,) float32; cu_scored: (S+1,) int64; level: token | sequence. Returns (N,).
    """
    log_ratio = old_logprobs - sampler_logprobs
    if level == "sequence":
        lengths = cu_scored.diff()
        sums = torch.stack([part.sum() for part in log_ratio.split(lengths.tolist())])
        log_ratio = sums.repeat_interleave(lengths.to(sums.device))
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
