"""A surrogate of the caller's own, differentiated by autograd where the built-in ones are by hand (token_terms.py).

It sees tokens once their logprobs are known and before their gradient is wanted, a chunk at a time, so that a loss of
one's own costs no logits in memory either: g_t = d (sum w c surrogate) / d lp_t is all that the rows need of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.kernels.objective import MAX_LOG_RATIO, LossInputs, Objective, Sequences, SurrogateInputs
from fastgrpo.kernels.reference import sequence_of_token


@dataclass(frozen=True)
class CustomTerms:
    """Of n tokens: the surrogate, its part of dL/dlp, the ratio, what else it reports; (n,) each, 0 where masked."""

    value: Tensor
    grad_logprob: Tensor
    ratio: Tensor
    metrics: tuple[Tensor, ...]


def custom_terms(
    log_p: Tensor, entropy: Tensor | None, batch: LossInputs, objective: Objective, scale: Tensor
) -> CustomTerms:
    """The terms of n tokens, in log_p's precision; masked ones may hold NaN.

    scale: (n,) w_t c_t. Raises ValueError where the surrogate returns anything but a value a token.
    """
    custom, scored = objective.custom, batch.token_weights != 0
    assert custom is not None

    def clean(field: Tensor) -> Tensor:
        return torch.where(scored, field.to(log_p.dtype), 0.0)

    def clean_if_known(field: Tensor | None) -> Tensor | None:
        return None if field is None else clean(field)

    with torch.enable_grad():
        leaf = clean(log_p).detach().requires_grad_()
        # Memory of its own, as recorded_ratio has: the function may write into what it is given.
        old = clean(log_p.detach() if batch.old_logprobs is None else batch.old_logprobs)
        sequences = sequences_of(batch, scored) if objective.relates_tokens else None
        log_ratio = leaf - old
        if objective.ratio_level == "sequence":
            assert sequences is not None
            log_ratio = sequences.mean(log_ratio)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        recorded_ratio = ratio.detach().clone()
        inputs = SurrogateInputs(
            logprobs=leaf,
            ratio=ratio,
            advantages=clean(batch.advantages),
            old_logprobs=old,
            ref_logprobs=clean_if_known(batch.ref_logprobs),
            sampler_logprobs=clean_if_known(batch.sampler_logprobs),
            entropy=clean_if_known(entropy),
            sequences=sequences,
        )
        value, metrics = custom.function(inputs)
        for name, given in {"its value": value, **{name: metrics.get(name) for name in custom.metrics}}.items():
            if not isinstance(given, Tensor) or given.shape != log_p.shape:
                what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"the surrogate {custom.name}: {name} is {what}; return ({len(log_p)},), one a token")
        value = torch.where(scored, value.to(log_p.dtype), 0.0)
        total = (torch.where(scored, scale, 0.0) * value).sum()
        grad = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    reported = (metrics[name].detach().to(log_p.dtype) for name in custom.metrics)
    return CustomTerms(
        value=value.detach(),
        grad_logprob=torch.zeros_like(log_p) if grad is None else torch.where(scored, grad, 0.0),
        ratio=recorded_ratio,
        metrics=tuple(torch.where(scored, given, 0.0) for given in reported),
    )


def sequences_of(batch: LossInputs, scored: Tensor | None = None) -> Sequences:
    """Whose token is whose; tokens that are not scored form a sequence of their own, behind the others."""
    assert batch.cu_seqlens is not None
    num_sequences = batch.cu_seqlens.shape[0] - 1
    ids = sequence_of_token(batch.cu_seqlens.to(batch.targets.device, non_blocking=True), batch.targets.shape[0])
    if scored is not None:
        ids = torch.where(scored, ids, num_sequences)
    return Sequences(ids, num_sequences + 1)
