"""What the loss head is asked to compute, what it is given, and what it returns.

Every path (reference, torch, Triton, tensor-parallel) takes these dataclasses and computes every objective.

Letters: T scored tokens, n of them at a time, S sequences, H hidden size, V vocabulary (or its local shard).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

SURROGATES = ("clip", "cispo", "sapo", "reinforce")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
# |log-ratio| is clamped before exp so that one drifted token cannot overflow the loss: e^20 = 4.9e8.
MAX_LOG_RATIO = 20.0


class Sequences:
    """Which tokens belong together, for what relates the tokens of a sequence.

    ids: (n,) int64 in [0, num_sequences), each token's sequence; not every one need own a token.
    """

    def __init__(self, ids: Tensor, num_sequences: int) -> None:
        self.ids, self.num_sequences = ids, num_sequences

    @cached_property
    def lengths(self) -> Tensor:
        """(n,) int64: how many tokens each token's sequence has."""
        return self.sum(torch.ones_like(self.ids))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over each token's sequence, given back to each of its tokens; values and result (n,). Booleans are
        counted."""
        values = values.long() if values.dtype == torch.bool else values
        return values.new_zeros(self.num_sequences).index_add(0, self.ids, values)[self.ids]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over each token's sequence, given back to each of its tokens; values and result (n,)."""
        return self.sum(values) / self.lengths


@dataclass(frozen=True, kw_only=True)
class SurrogateInputs:
    """What a surrogate of one's own is computed from, (n,) float32 each unless said; logprobs and ratio carry the
    gradient. What it does not ask for may be None."""

    logprobs: Tensor
    """The policy's."""
    ratio: Tensor
    """exp(lp - old) of the token, or of its sequence, as Objective.ratio_level says; clamped as there."""
    advantages: Tensor
    old_logprobs: Tensor
    """On-policy the policy's own, without gradient."""
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    """Of the next-token distribution at each token, without gradient."""
    sequences: Sequences | None = None


SurrogateValues = tuple[Tensor, dict[str, Tensor]]
"""The surrogate of each token (n,), and named (n,) values whose means over the tokens are to be reported."""


@dataclass(frozen=True, kw_only=True)
class CustomSurrogate:
    """A surrogate of one's own, which autograd differentiates by logprobs and ratio.

    Its value is multiplied by w_t and c_t like any other. A token's value may depend on that token alone, or, with
    `sequences` in `asks`, on the tokens of its sequence: more are not there together, wherever chunks end.

    Example: CustomSurrogate(name="reinforce", function=lambda x: (-x.advantages * x.logprobs, {}))
    """

    name: str
    function: Callable[[SurrogateInputs], SurrogateValues]
    asks: frozenset[str] = frozenset()
    """Which of SurrogateInputs' fields that may be None it reads."""
    metrics: tuple[str, ...] = ()
    """The names it reports, in the order of their records."""

    @property
    def record_names(self) -> tuple[str, ...]:
        return tuple(f"surrogate/{name}" for name in self.metrics)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The GRPO family in one formula.

    loss = sum_t w_t * [surrogate(rho_t, A_t) * c_t + kl_coef * kl_t] - entropy_coef * sum_t w_t * H_t
    with rho_t = exp(clamp(lp_t - old_t, +-20)). Everything that normalises (1/|o_i|, 1/G, ...) is in w_t.

    Sources: GRPO arXiv 2402.03300 eq. 3-4; DAPO 2503.14476; Dr.GRPO 2503.20783; GSPO 2507.18071;
    CISPO 2506.13585; SAPO 2511.20347; dual clip 1912.09729.

    Raises ValueError, naming the field, on a value outside its range.
    """

    surrogate: str | CustomSurrogate = "clip"
    """clip: -min(rho*A, clip(rho, 1-low, 1+high)*A).  cispo: -sg(clip(rho, 1-low, 1+high))*A*lp.
    sapo: -(4/tau)*sigmoid(tau*(rho-1))*A.  reinforce: -A*lp.  Or one's own."""
    ratio_level: str = "token"
    """token, or sequence: rho becomes exp(mean of lp - old over the sequence's tokens with w != 0) (GSPO)."""
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float | None = None
    """c > 1: where A < 0 the clip surrogate's loss is at most -c*A."""
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    kl_coef: float = 0.0
    """beta; 0 needs no reference logprobs."""
    kl_estimator: str = "k3"
    """k1 = lp - ref;  k2 = (lp - ref)^2 / 2;  k3 = e^d - d - 1 with d = clamp(ref - lp, +-20). The clamp bounds
    k3's value and lets the gradient 1 - e^d through, so that the tokens furthest from ref are still pulled back."""
    kl_times_ratio: bool = False
    """Multiply the KL estimate by the token's rho, with gradient through both factors (unbiased gradient)."""
    entropy_coef: float = 0.0
    temperature: float = 1.0
    """Divides the logits, as the sampler did."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, mend: str) -> None:
            if not ok:
                raise ValueError(f"Objective.{name}={getattr(self, name)!r}: {mend}")

        known = isinstance(self.surrogate, CustomSurrogate) or self.surrogate in SURROGATES
        require(known, "surrogate", f"choose one of {', '.join(SURROGATES)}, or give a CustomSurrogate")
        require(self.ratio_level in RATIO_LEVELS, "ratio_level", f"choose one of {', '.join(RATIO_LEVELS)}")
        require(self.kl_estimator in KL_ESTIMATORS, "kl_estimator", f"choose one of {', '.join(KL_ESTIMATORS)}")
        require(0.0 <= self.clip_ratio_low <= 1.0, "clip_ratio_low", "use a value in [0, 1]")
        require(self.clip_ratio_high >= 0.0, "clip_ratio_high", "use a value >= 0")
        require(self.dual_clip is None or self.dual_clip > 1.0, "dual_clip", "use a value > 1, or null")
        require(
            self.dual_clip is None or self.surrogate == "clip", "dual_clip", "it belongs to surrogate=clip; use null"
        )
        require(self.sapo_tau_pos > 0.0, "sapo_tau_pos", "use a value > 0")
        require(self.sapo_tau_neg > 0.0, "sapo_tau_neg", "use a value > 0")
        require(self.kl_coef >= 0.0, "kl_coef", "use a value >= 0")
        require(self.temperature > 0.0, "temperature", "use a value > 0")

    @property
    def custom(self) -> CustomSurrogate | None:
        """The caller's own surrogate, or None."""
        return self.surrogate if isinstance(self.surrogate, CustomSurrogate) else None

    def asks(self, name: str) -> bool:
        """Whether a surrogate of one's own reads this field of SurrogateInputs."""
        return self.custom is not None and name in self.custom.asks

    @property
    def relates_tokens(self) -> bool:
        """Whether a token's gradient depends on others of its sequence, which must then be there together."""
        return self.ratio_level == "sequence" or self.asks("sequences")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.asks("ref_logprobs")

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0 or self.asks("entropy")


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Everything known about the scored tokens before the forward pass; each field (T,) unless said.

    A token with token_weights == 0 contributes nothing and may hold NaN, or any target, elsewhere.

    Example, two sequences of 2 and 1 tokens with GRPO's weights 1/(S*|o_i|):
        LossInputs(targets=[5, 7, 2], advantages=[1., 1., -1.], token_weights=[.25, .25, .5],
                   old_logprobs=[-1.2, -.3, -2.], cu_seqlens=[0, 2, 3])    # tensors, written as lists
    """

    targets: Tensor
    """int64; the sampled token ids, in [0, V) where token_weights != 0."""
    advantages: Tensor
    """float32."""
    token_weights: Tensor
    """float32; the aggregation, from global counts. 0 masks the token."""
    old_logprobs: Tensor | None = None
    """float32; None on-policy: the detached current logprobs stand in, so rho = 1 with its gradient."""
    ref_logprobs: Tensor | None = None
    """float32; needed when kl_coef > 0 or a CustomSurrogate asks."""
    sampler_logprobs: Tensor | None = None
    """float32; for a CustomSurrogate that asks."""
    importance_weights: Tensor | None = None
    """float32; c_t, no gradient; None means 1."""
    cu_seqlens: Tensor | None = None
    """(S+1,) int32 or int64, from 0 to T; where each sequence's tokens start; needed where the objective relates a
    sequence's tokens. Leave it on the CPU beside CUDA tensors: chunks are planned from it without waiting for the
    device."""

    def __post_init__(self) -> None:
        num_tokens = self.targets.shape[0] if self.targets.ndim == 1 else None
        if num_tokens is None:
            raise ValueError(f"LossInputs.targets has shape {tuple(self.targets.shape)}: expected (T,)")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cu_seqlens" or value is None:
                continue
            if value.shape != (num_tokens,):
                raise ValueError(f"LossInputs.{field.name} has shape {tuple(value.shape)}: expected ({num_tokens},)")

    def require_for(self, objective: Objective) -> None:
        """Raise ValueError, naming the field, if the objective needs data that is not here."""
        if objective.kl_coef > 0 and self.ref_logprobs is None:
            raise ValueError("LossInputs.ref_logprobs is None: kl_coef > 0 needs the reference's logprobs")
        if objective.relates_tokens and self.cu_seqlens is None:
            which = "ratio_level=sequence" if objective.custom is None else f"the surrogate {objective.custom.name}"
            raise ValueError(f"LossInputs.cu_seqlens is None: {which} needs the sequences' bounds")
        for name in ("ref_logprobs", "sampler_logprobs"):
            if objective.asks(name) and getattr(self, name) is None:
                assert objective.custom is not None
                raise ValueError(f"LossInputs.{name} is None: the surrogate {objective.custom.name} asks for it")

    def tokens_from(self, start: int, stop: int) -> LossInputs:
        """The tokens [start, stop); sequences outside stay as empty ones."""
        cu = None if self.cu_seqlens is None else self.cu_seqlens.clamp(start, stop) - start
        return self._index(slice(start, stop), cu)

    def tokens_at(self, kept: Tensor | None) -> LossInputs:
        """The tokens at ascending positions, all for None; sequences shrink to what is kept of them."""
        if kept is None:
            return self
        cu = None if self.cu_seqlens is None else torch.searchsorted(kept, self.cu_seqlens.to(kept))
        return self._index(kept, cu)

    def _index(self, index: Tensor | slice, cu_seqlens: Tensor | None) -> LossInputs:
        values: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        for name in (field.name for field in fields(self) if field.name != "cu_seqlens"):
            value = getattr(self, name)
            values[name] = None if value is None else value[index]
        return LossInputs(**values)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss and what the forward pass learned on the way.

    metrics are detached float32 scalars, unweighted sums and counts over the tokens with w != 0, so that
    micro-batches and ranks can be added: num_tokens, logprob_sum, entropy_sum (where the entropy is computed),
    ratio_sum (the ratio of ratio_level), clip_low_count, clip_high_count, dual_clip_count, kl_sum (k3 against
    ref, present when ref_logprobs is given), old_kl_sum (k3 against old). A surrogate of one's own has no clip counts,
    and a sum surrogate/NAME of each value that it reports.
    """

    loss: Tensor
    """scalar float32 (float64 from the float64 reference), with gradient."""
    logprobs: Tensor
    """(T,) float32, detached; 0 where token_weights == 0."""
    entropy: Tensor | None
    """(T,) float32, detached; 0 where token_weights == 0."""
    metrics: dict[str, Tensor]
