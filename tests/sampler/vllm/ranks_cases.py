"""Layouts of a Megatron learner and a vLLM sampler over the same two processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    learner_tp: int = 1
    learner_pp: int = 1
    learner_cp: int = 1
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
        more = "".join(f" {n}={size}" for n, size in (("cp", self.learner_cp), ("ep", self.learner_ep)) if size > 1)
        adapters = " adapters" if self.lora_rank else ""
        return f"{self.model}{adapters} tp={self.learner_tp} pp={self.learner_pp}{more} -> tp={self.sampler_tp}"


CASES = (
    Case(model="qwen2-tied", learner_tp=2, sampler_tp=2),
    Case(model="llama", learner_tp=1, sampler_tp=1, fail=True),
    Case(model="qwen3", learner_tp=2, sampler_tp=1, spoil=True),
    Case(model="llama-tied", learner_tp=1, sampler_tp=2),
    Case(model="qwen2-tied", learner_pp=2, sampler_tp=1, fail=True),
    Case(model="qwen2", learner_pp=2, sampler_tp=2),
    Case(model="qwen3-tied", learner_cp=2, sampler_tp=1),
    Case(model="qwen3_moe", learner_tp=2, sampler_tp=2),
    Case(model="qwen3_moe-tied", learner_ep=2, sampler_tp=1),
    Case(model="mistral", learner_tp=2, sampler_tp=2, lora_rank=3),
    Case(model="llama-tied", learner_pp=2, sampler_tp=2, lora_rank=3),
)
"""Every family, with its head tied and untied: shared (Llama, Qwen2, Qwen3), and moved from tensor-parallel ranks, from
whole copies and from stages."""
