"""The objective of one token as Triton device functions: token_terms.py, scalar by scalar.

Strings are compile-time flags; every coefficient is a run-time argument.
"""

import triton
import triton.language as tl

from fastgrpo.kernels.row_math import MAX_LOG_RATIO


@triton.jit
def clamped_exp(x):
    """exp(clamp(x, +-20)) and its slope, which is 0 once the clamp holds."""
    clamped = tl.minimum(tl.maximum(x, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    value = tl.where(x != x, x, tl.exp(clamped))
    return value, tl.where(clamped == x, value, 0.0)


@triton.jit
def surrogate(
    ratio,
    log_p,
    advantage,
    clip_low,
    clip_high,
    dual_clip,
    tau_pos,
    tau_neg,
    SURROGATE: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
):
    """(value, slope by the ratio, slope by log_p directly, clipped low, clipped high, dual-clipped)."""
    zero = ratio * 0.0
    below = ratio < clip_low
    above = ratio > clip_high
    dual = ratio != ratio
    value = -advantage * log_p
    by_ratio = zero
    direct = -advantage + zero
    if SURROGATE == "clip":
        below = below & (advantage < 0.0)
        above = above & (advantage > 0.0)
        used = tl.where(below, clip_low, tl.where(above, clip_high, ratio))
        if DUAL_CLIP:
            dual = (ratio > dual_clip) & (advantage < 0.0)
            used = tl.where(dual, dual_clip, used)
        value = -used * advantage
        by_ratio = tl.where(below | above | dual, 0.0, -advantage)
        direct = zero
    elif SURROGATE == "cispo":
        direct = -tl.minimum(tl.maximum(ratio, clip_low), clip_high) * advantage + zero
        value = direct * log_p
    elif SURROGATE == "sapo":
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        value = -(4.0 / tau) * gate * advantage
        by_ratio = -4.0 * gate * (1.0 - gate) * advantage
        direct = zero
    elif SURROGATE == "custom":  # the caller has its value and all of its gradient
        direct = zero
    if SURROGATE == "sapo" or SURROGATE == "reinforce" or SURROGATE == "custom":
        below = dual
        above = dual
    return value, by_ratio, direct, below, above, dual


@triton.jit
def kl_estimate(log_p, other, ESTIMATOR: tl.constexpr):
    """(estimate of KL(policy || other), its slope by log_p); k3's slope passes through its clamp."""
    difference = log_p - other
    if ESTIMATOR == "k1":
        return difference, difference * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        return 0.5 * difference * difference, difference
    else:
        drift = tl.minimum(tl.maximum(-difference, -MAX_LOG_RATIO), MAX_LOG_RATIO)
        drift = tl.where(difference != difference, difference, drift)
        # near 0, e^d - 1 - d is what rounding leaves of three larger numbers: take the series there
        rest = (
            drift * drift * 0.5 * (1.0 + drift / 3.0 * (1.0 + drift * 0.25 * (1.0 + drift * 0.2 * (1.0 + drift / 6.0))))
        )
        small = tl.abs(drift) < 0.25
        growth = tl.where(small, drift + rest, tl.exp(drift) - 1.0)
        return tl.where(small, rest, growth - drift), -growth
