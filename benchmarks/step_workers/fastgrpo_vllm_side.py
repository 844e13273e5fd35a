"""Our side with sampler=vllm: the same loop and learner, completions from vLLM on the learner's tensors."""

from __future__ import annotations

from step_workers import fastgrpo_side
from step_workers.case import Case
from step_workers.gate import Gate


def run(case: Case, gate: Gate) -> None:
    """See fastgrpo_side.run."""
    fastgrpo_side.run(case, gate, sampler="vllm")
