"""What every kernel must compute, written as plainly as torch allows.

These functions are the specification, the float64 oracle of the tests and of `fastgrpo verify`, and the
fallback nobody has to read twice. They hold whole logits and let autograd differentiate; the kernels do not.
float64 in gives float64 throughout; anything narrower is computed in float32.

Letters: T scored tokens, S sequences, H hidden size, V vocabulary; A query and C key/value heads, D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.objective import (
    MAX_LOG_RATIO,
    CustomSurrogate,
    LossInputs,
    LossOutput,
    Objective,
    Sequences,
    SurrogateInputs,
)

IGNORE_INDEX = -100
"""A target that asks for nothing: logprob, entropy and gradient are 0."""


def logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the target, and on request the entropy of that distribution.

    Args: logits (T, V), any float type; targets (T,) int64 in [0, V), or -100 for a row that yields zeros.
    Returns: (T,) float32 (float64 from float64), or a pair (logprobs, entropy).
    """
    scored = targets != IGNORE_INDEX
    logits = torch.where(scored[:, None], _wide(logits), 0.0)  # (T, V); where, so that a NaN row has no gradient
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    target_log_p = log_p.gather(1, torch.where(scored, targets, 0)[:, None])[:, 0]
    target_log_p = torch.where(scored, target_log_p, 0.0)
    if not entropy:
        return target_log_p
    # p * log p is 0 where p is 0; the finite stand-in keeps 0 * inf out of the gradient too.
    terms = log_p.exp() * torch.where(log_p == -torch.inf, 0.0, log_p)
    return target_log_p, torch.where(scored, -terms.sum(-1), 0.0)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`logprobs` of hidden (T, H) @ weight (V, H) transposed."""
    return logprobs(_wide(hidden) @ _wide(weight).T, targets, temperature=temperature, entropy=entropy)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: str = "std",
    std_ddof: int = 1,
    min_std: float = 0.0,
    leave_one_out: bool = False,
) -> Tensor:
    """How much better a completion is than its siblings: (r - baseline) / std over its group.

    Args: rewards (S,) float; group_ids (S,) integers, in any order, groups of any size.
        normalize: "std" divides by max(std, min_std) with the given ddof; "none" does not (Dr.GRPO).
        leave_one_out: the baseline is the mean of the *other* rewards (RLOO).
    Returns: (S,) float32 (float64 from float64). Exactly 0 for a group whose rewards are all equal, which
        a group of one is: equality is detected, since (0.7 - mean of 0.7s) / (tiny std) is rounding noise.
        A NaN reward makes its own group NaN and no other.
    Source: arXiv 2402.03300 section 4.1.2; Dr.GRPO 2503.20783; RLOO 2402.14740.
    """
    advantages = torch.zeros_like(_wide(rewards))
    for group in group_ids.unique():
        members = group_ids == group
        r = rewards[members].double()
        if (r == r[0]).all():
            continue
        mean = r.mean()
        centred = r - mean
        if leave_one_out:
            centred_on_others = centred * (len(r) / (len(r) - 1))
        a = centred_on_others if leave_one_out else centred
        if normalize == "std":
            std = (centred.square().sum() / (len(r) - std_ddof)).sqrt()
            a = a / std.clamp(min=min_std)
        advantages[members] = a.to(advantages.dtype)
    return advantages


def process_advantages(
    step_rewards: Tensor,
    step_token_index: Tensor,
    step_sequence_ids: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    normalize: str = "std",
    std_ddof: int = 1,
    min_std: float = 0.0,
) -> Tensor:
    """Per-token advantages from a reward at the end of every reasoning step.

    The paper's section 4.1.3: with R the rewards of all steps of all completions of the group,
    r~ = (r - mean(R)) / std(R), and the advantage of token t of completion i is the sum of r~_j over
    completion i's steps whose last token index(j) >= t. Tokens behind the last step get 0.

    Args: step_rewards (K,) float; step_token_index (K,) integers, index(j): the step's last token, counted
        from the start of its completion; step_sequence_ids (K,) integers in [0, S), the completion of each
        step; group_ids (S,) integers, the group of each completion; cu_seqlens (S+1,) integers, where each
        completion's tokens start. Steps may come in any order. normalize, std_ddof, min_std as above.
    Returns: (T,) with T = cu_seqlens[-1].
    """
    relative = group_advantages(
        step_rewards, group_ids[step_sequence_ids], normalize=normalize, std_ddof=std_ddof, min_std=min_std
    )
    bounds = cu_seqlens.tolist()
    advantages = relative.new_zeros(bounds[-1])
    for reward, index, sequence in zip(relative, step_token_index.tolist(), step_sequence_ids.tolist(), strict=True):
        start = bounds[sequence]
        advantages[start : start + index + 1] += reward
    return advantages


def policy_loss(logits: Tensor, batch: LossInputs, objective: Objective) -> LossOutput:
    """The objective of `Objective` on logits (T, V): loss with gradient, logprobs, entropy, metrics."""
    batch.require_for(objective)
    scored = batch.token_weights != 0
    check_targets(batch.targets, scored, logits.shape[1])
    targets = torch.where(scored, batch.targets, IGNORE_INDEX)
    log_p, entropy = logprobs(logits, targets, temperature=objective.temperature, entropy=True)
    loss, metrics = token_loss(log_p, entropy, batch, objective)
    return LossOutput(loss=loss, logprobs=log_p.detach(), entropy=entropy.detach(), metrics=metrics)


def linear_policy_loss(hidden: Tensor, weight: Tensor, batch: LossInputs, objective: Objective) -> LossOutput:
    """`policy_loss` of hidden (T, H) @ weight (V, H) transposed."""
    scored = batch.token_weights != 0
    hidden = torch.where(scored[:, None], _wide(hidden), 0.0)  # a masked row may hold NaN
    return policy_loss(hidden @ _wide(weight).T, batch, objective)


def token_loss(
    log_p: Tensor, entropy: Tensor, batch: LossInputs, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything behind the softmax: (T,) logprobs and entropies to the scalar loss and its metrics."""
    scored = batch.token_weights != 0

    def clean(field: Tensor) -> Tensor:
        """The field in the loss's precision, with 0 for whatever a masked token holds."""
        return torch.where(scored, field.to(log_p.dtype), 0.0)

    advantages, weights = clean(batch.advantages), clean(batch.token_weights)
    old = log_p.detach() if batch.old_logprobs is None else clean(batch.old_logprobs)

    token_ratio = torch.exp((log_p - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    ratio = token_ratio
    if objective.ratio_level == "sequence":
        assert batch.cu_seqlens is not None
        ratio = _sequence_ratio(log_p - old, scored, batch.cu_seqlens)
    if objective.custom is None:
        loss, counts = _surrogate(ratio, log_p, advantages, objective)
    else:
        loss, counts = _custom(objective.custom, ratio, log_p, entropy.detach(), batch)
    if batch.importance_weights is not None:
        loss = loss * clean(batch.importance_weights)
    if objective.kl_coef > 0:
        assert batch.ref_logprobs is not None
        kl = _kl(log_p, clean(batch.ref_logprobs), objective.kl_estimator)
        loss = loss + objective.kl_coef * (kl * token_ratio if objective.kl_times_ratio else kl)
    loss = loss - objective.entropy_coef * entropy

    sums = {
        "num_tokens": scored,
        "logprob_sum": log_p,
        "entropy_sum": entropy,
        "ratio_sum": ratio * scored,
        **{name: torch.where(scored, count, 0) for name, count in counts.items()},
        "old_kl_sum": _kl(log_p, old, "k3") * scored,
    }
    if batch.ref_logprobs is not None:
        sums["kl_sum"] = _kl(log_p, clean(batch.ref_logprobs), "k3") * scored
    metrics = {name: value.detach().to(log_p.dtype).sum().float() for name, value in sums.items()}
    return torch.where(scored, weights * loss, 0.0).sum(), metrics


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *, scale: float) -> Tensor:
    """softmax(q k^T * scale) v where a row sees the past of its own segment and the whole of its segment's prefix.

    Args: q (T, A, D) packed rows of A heads; k, v (T, C, D), A a multiple of C; segments (K, 4) integers: start, end,
        prefix_start, prefix_end (equal where there is no prefix), which cover [0, T).
    Returns: (T, A, D) float32 (float64 from float64), through a dense mask (T, T) and all scores (A, T, T).
    """
    rows = torch.arange(q.shape[0], device=q.device)
    sees = torch.zeros(len(rows), len(rows), dtype=torch.bool, device=q.device)  # (T, T): row, key
    for start, end, prefix_start, prefix_end in segments.tolist():
        own, prefix = (rows >= start) & (rows <= rows[:, None]), (rows >= prefix_start) & (rows < prefix_end)
        sees[start:end] = (own | prefix)[start:end]
    heads_each = q.shape[1] // k.shape[1]
    k, v = (_wide(x).repeat_interleave(heads_each, 1) for x in (k, v))  # (T, A, D)
    scores = torch.einsum("iad,jad->aij", _wide(q), k) * scale
    return torch.einsum("aij,jad->iad", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis: x (..., D), weight (D,)."""
    x = _wide(x)
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * _wide(weight)


def add_norm(stream: Tensor, change: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """stream + change (..., D), and its rms_norm."""
    total = _wide(stream) + _wide(change)
    return total, rms_norm(total, weight, epsilon)


def rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    weight: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of qkv (T, A + 2C, D); the first two rotated by cos and sin (T, 1, D).

    weight: (A + C, D), by which they are normalised over D before, or None.
    """
    q, k, v = _wide(qkv).split([num_heads, num_kv_heads, num_kv_heads], 1)
    qk = torch.cat([q, k], 1)
    if weight is not None:
        qk = rms_norm(qk, weight, epsilon)
    first, second = qk.chunk(2, -1)
    qk = qk * _wide(cos) + torch.cat([-second, first], -1) * _wide(sin)
    return *qk.split([num_heads, num_kv_heads], 1), v


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up: (..., I) twice -> (..., I)."""
    gate = _wide(gate)
    return gate * torch.sigmoid(gate) * _wide(up)


def check_targets(targets: Tensor, scored: Tensor, vocab_size: int) -> None:
    """Raise ValueError where a scored token's target is no token of the vocabulary."""
    wrong = scored & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"LossInputs.targets[{token}]={int(targets[token])} is outside [0, {vocab_size}): "
            "give the sampled token's id, or mask the token with token_weights=0"
        )


def _surrogate(
    ratio: Tensor, log_p: Tensor, advantages: Tensor, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token surrogate loss (T,), and which tokens were clipped on which side."""
    low, high = 1.0 - objective.clip_ratio_low, 1.0 + objective.clip_ratio_high
    none = torch.zeros_like(ratio, dtype=torch.bool)
    counts = {"clip_low_count": none, "clip_high_count": none, "dual_clip_count": none}
    clipped = ratio.clamp(low, high)
    if objective.surrogate == "clip":
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        counts["clip_low_count"] = (ratio < low) & (advantages < 0)
        counts["clip_high_count"] = (ratio > high) & (advantages > 0)
        if objective.dual_clip is not None:
            counts["dual_clip_count"] = (advantages < 0) & (ratio > objective.dual_clip)
            loss = torch.where(counts["dual_clip_count"], -objective.dual_clip * advantages, loss)
    elif objective.surrogate == "cispo":
        loss = -clipped.detach() * advantages * log_p
        counts["clip_low_count"], counts["clip_high_count"] = ratio < low, ratio > high
    elif objective.surrogate == "sapo":
        tau = torch.where(advantages > 0, torch.full_like(advantages, objective.sapo_tau_pos), objective.sapo_tau_neg)
        loss = -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * advantages
    else:
        loss = -advantages * log_p
    return loss, counts


def _custom(
    custom: CustomSurrogate, ratio: Tensor, log_p: Tensor, entropy: Tensor, batch: LossInputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The caller's own surrogate of the scored tokens, given nothing of the others; 0 for those."""
    kept = (batch.token_weights != 0).nonzero()[:, 0]
    part = batch.tokens_at(kept)

    def wide(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.to(log_p.dtype)

    def spread(values: Tensor) -> Tensor:
        return torch.zeros_like(log_p).index_copy(0, kept, values.to(log_p.dtype))

    sequences = None
    if part.cu_seqlens is not None:
        sequences = Sequences(sequence_of_token(part.cu_seqlens.to(kept), len(kept)), part.cu_seqlens.shape[0] - 1)
    logprobs = log_p[kept]
    inputs = SurrogateInputs(
        logprobs=logprobs,
        ratio=ratio[kept],
        advantages=part.advantages.to(log_p.dtype),
        old_logprobs=logprobs.detach().clone() if part.old_logprobs is None else part.old_logprobs.to(log_p.dtype),
        ref_logprobs=wide(part.ref_logprobs),
        sampler_logprobs=wide(part.sampler_logprobs),
        entropy=entropy[kept],
        sequences=sequences,
    )
    value, metrics = custom.function(inputs)
    return spread(value), {f"surrogate/{name}": spread(metrics[name]) for name in custom.metrics}


def _sequence_ratio(log_ratio: Tensor, scored: Tensor, cu_seqlens: Tensor) -> Tensor:
    """exp of the mean log-ratio over each sequence's scored tokens, given back to each of its tokens (T,)."""
    sequence = sequence_of_token(cu_seqlens.to(log_ratio.device), log_ratio.shape[0])  # (T,)
    num_sequences = cu_seqlens.shape[0] - 1
    total = log_ratio.new_zeros(num_sequences).index_add(0, sequence, torch.where(scored, log_ratio, 0.0))
    count = log_ratio.new_zeros(num_sequences).index_add(0, sequence, scored.to(log_ratio.dtype))
    mean = total / count.clamp(min=1.0)
    return torch.exp(mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))[sequence]


def sequence_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(T,) int64: the sequence each token belongs to. Empty sequences own no token."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def _kl(log_p: Tensor, other: Tensor, estimator: str) -> Tensor:
    """The per-token estimate of KL(policy || other).

    k3's log-ratio is clamped so that its value stays finite, but the gradient passes through the clamp:
    a clamp that also stopped it would release exactly the tokens that have drifted furthest.
    """
    if estimator == "k1":
        return log_p - other
    if estimator == "k2":
        return 0.5 * (log_p - other).square()
    drift = torch.nan_to_num(other - log_p, nan=torch.nan, posinf=1e30, neginf=-1e30)
    drift = drift.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach() + (drift - drift.detach())
    return torch.expm1(drift) - drift


def _wide(x: Tensor) -> Tensor:
    """float64 stays; everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()
