"""What the loss heads are compared on: the objectives, and small batches with everything a batch may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective, SurrogateInputs, SurrogateValues

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
MASKS = ("none", "scattered", "one_sequence", "everything")


def _by_token(x: SurrogateInputs) -> SurrogateValues:
    """A soft clip, where policy and sampler agree; more from undecided tokens."""
    assert x.sampler_logprobs is not None
    assert x.entropy is not None
    assert x.ref_logprobs is not None
    agree = ((x.logprobs - x.sampler_logprobs).abs() < 0.4).to(x.logprobs)
    gain = x.advantages * (1.0 + 0.1 * x.entropy) - 0.1 * (x.logprobs.detach() - x.ref_logprobs)
    return -torch.tanh(x.ratio - 1.0) * gain * agree, {"agree": agree}


def _by_sequence(x: SurrogateInputs) -> SurrogateValues:
    """The geometric mean of a sequence's clipped ratios, more for long ones."""
    assert x.sequences is not None
    log_ratio = x.logprobs - x.old_logprobs
    mean = x.sequences.mean(log_ratio.clamp(-0.2, 0.2))
    return -x.advantages * mean.exp() * x.sequences.lengths.sqrt(), {"clipped": log_ratio.abs() > 0.2}


_SHAPED: dict[str, Any] = {"kl_coef": 0.05, "entropy_coef": 0.01, "temperature": 0.9}
OBJECTIVES: dict[str, Objective] = {
    "clip": Objective(),
    "clip higher": Objective(clip_ratio_high=0.28, **_SHAPED),
    "dual clip": Objective(dual_clip=1.5, **_SHAPED),
    "cispo": Objective(surrogate="cispo", **_SHAPED),
    "sapo": Objective(surrogate="sapo", **_SHAPED),
    "reinforce": Objective(surrogate="reinforce", **_SHAPED),
    "clip, sequence (GSPO)": Objective(ratio_level="sequence", clip_ratio_low=0.02, clip_ratio_high=0.02, **_SHAPED),
    "dual clip, sequence": Objective(ratio_level="sequence", dual_clip=1.05, **_SHAPED),
    "cispo, sequence": Objective(surrogate="cispo", ratio_level="sequence", clip_ratio_high=0.02, **_SHAPED),
    "sapo, sequence": Objective(surrogate="sapo", ratio_level="sequence", **_SHAPED),
    "clip, k1": Objective(kl_coef=0.1, kl_estimator="k1"),
    "clip, k2": Objective(kl_coef=0.1, kl_estimator="k2"),
    "clip, k1 x ratio": Objective(kl_coef=0.1, kl_estimator="k1", kl_times_ratio=True),
    "clip, k2 x ratio": Objective(kl_coef=0.1, kl_estimator="k2", kl_times_ratio=True),
    "clip, k3 x ratio": Objective(kl_coef=0.1, kl_times_ratio=True, entropy_coef=-0.01),
    "one's own": Objective(
        surrogate=CustomSurrogate(
            name="soft",
            function=_by_token,
            asks=frozenset({"sampler_logprobs", "ref_logprobs", "entropy"}),
            metrics=("agree",),
        ),
        **_SHAPED,
    ),
    "one's own, sequence": Objective(
        surrogate=CustomSurrogate(
            name="geometric", function=_by_sequence, asks=frozenset({"sequences"}), metrics=("clipped",)
        ),
        ratio_level="sequence",
        **_SHAPED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """hidden (T, H), weight (V, H) and the batch that goes with them; masked tokens hold NaN throughout."""

    hidden: Tensor
    weight: Tensor
    batch: LossInputs


def make_case(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    aggregation: str = "token_mean",
    mask: str = "none",
    on_policy: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random tokens in ragged sequences (one of them empty), old and ref logprobs a little off the policy's."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    hidden = normal(num_tokens, hidden_size).to(dtype)
    weight = (normal(vocab_size, hidden_size) * (2.0 / hidden_size**0.5)).to(dtype)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=rng)
    cu = torch.tensor([0, num_tokens // 8, num_tokens // 8, num_tokens // 2, num_tokens])
    scored = _mask(mask, num_tokens, cu, rng)
    log_p = reference.linear_logprobs(hidden, weight, targets, temperature=temperature)
    assert isinstance(log_p, Tensor)
    nan = torch.nan
    batch = LossInputs(
        targets=torch.where(scored, targets, -7).to(device),
        advantages=torch.where(scored, normal(num_tokens), nan).to(device),
        token_weights=_weights(aggregation, scored, cu).to(device),
        old_logprobs=None if on_policy else torch.where(scored, log_p + 0.3 * normal(num_tokens), nan).to(device),
        ref_logprobs=torch.where(scored, log_p + 0.3 * normal(num_tokens), nan).to(device),
        sampler_logprobs=torch.where(scored, log_p + 0.3 * normal(num_tokens), nan).to(device),
        importance_weights=torch.where(scored, 0.5 + torch.rand(num_tokens, generator=rng), nan).to(device),
        cu_seqlens=cu,
    )
    hidden = torch.where(scored[:, None], hidden, nan).to(device)
    return Case(hidden=hidden.requires_grad_(), weight=weight.to(device).requires_grad_(), batch=batch)


def _mask(mask: str, num_tokens: int, cu: Tensor, rng: torch.Generator) -> Tensor:
    scored = torch.ones(num_tokens, dtype=torch.bool)
    if mask == "scattered":
        scored = torch.rand(num_tokens, generator=rng) > 0.3
    elif mask == "one_sequence":
        scored[int(cu[2]) : int(cu[3])] = False
    elif mask == "everything":
        scored[:] = False
    return scored


def _weights(aggregation: str, scored: Tensor, cu: Tensor) -> Tensor:
    """(T,) the three aggregations of docs/objective.md over the scored tokens."""
    sequence = reference.sequence_of_token(cu, scored.shape[0])
    num_sequences = cu.shape[0] - 1
    lengths = torch.zeros(num_sequences).index_add_(0, sequence, scored.float()).clamp(min=1.0)
    weights = {
        "sequence_mean": 1.0 / (num_sequences * lengths[sequence]),
        "token_mean": torch.full(scored.shape, 1.0 / max(int(scored.sum()), 1)),
        "constant": torch.full(scored.shape, 1.0 / (num_sequences * 64)),
    }[aggregation]
    return torch.where(scored, weights, 0.0)


def logits_of(case: Case) -> Tensor:
    """Logits (T, V) in the case's dtype, NaN rows where masked."""
    logits = case.hidden.detach().float() @ case.weight.detach().float().T
    return logits.to(case.hidden.dtype).requires_grad_()


def max_logit(case: Case) -> float:
    """The largest |logit| of the scored rows."""
    logits = case.hidden.detach().float().nan_to_num() @ case.weight.detach().float().T
    return logits.abs().max().item()
