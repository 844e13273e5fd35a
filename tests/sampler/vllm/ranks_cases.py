"""Layouts of a Megatron learner and a vLLM sampler over the same two processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    learner_tp: int = 1
    learner_pp: int = 1
    learner_ep: int = 1
    sampler_tp: int = 1
    lora_rank: int = 0
    """Train adapters, which vLLM computes beside the frozen matrices."""
    bucket_bytes: int = 1 << 14
    """Smaller than a matrix, so that matrices are cut."""
    spoil: bool = False
    """Permute a tensor on the last rank and ask for the proof."""
    fail: bool = False
    """Let the last rank's engine fail in the middle of a rollout."""

    @property
    def name(self) -> str:
        experts = f" ep={self.learner_ep}" if self.learner_ep > 1 else ""
        adapters = " adapters" if self.lora_rank else ""
        return f"{self.model}{adapters} tp={self.learner_tp} pp={self.learner_pp}{experts} -> tp={self.sampler_tp}"


CASES = (
    Case(model="qwen2", learner_tp=2, sampler_tp=2),
    Case(model="llama", learner_tp=1, sampler_tp=1, fail=True),
    Case(model="qwen3", learner_tp=2, sampler_tp=1, spoil=True),
    Case(model="llama", learner_tp=1, sampler_tp=2),
    Case(model="qwen2", learner_pp=2, sampler_tp=1, fail=True),
    Case(model="llama", learner_pp=2, sampler_tp=2),
    Case(model="qwen3_moe", learner_tp=2, sampler_tp=2),
    Case(model="qwen3_moe", learner_ep=2, sampler_tp=1),
    Case(model="qwen2", learner_tp=2, sampler_tp=2, lora_rank=3),
    Case(model="llama", learner_pp=2, sampler_tp=2, lora_rank=3),
)
