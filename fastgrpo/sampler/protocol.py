"""What the loop asks of a sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fastgrpo.types import LogprobContract, Prompt, Rollout, RolloutGroup, SamplingParams, WeightSlice

OnEnd = Callable[[int, int, Rollout], object]
"""(the prompt's place among those given, the sample's among its siblings, the completion)."""


class Sampler(Protocol):
    """Draws completions from the current policy."""

    policy_version: int
    """Stamped on every rollout; set when the weights are shared."""

    def contract(self, params: SamplingParams) -> LogprobContract:
        """What the logprobs of `generate` with these params mean."""
        ...

    def generate(
        self,
        prompts: list[Prompt],
        num_samples: int,
        params: SamplingParams,
        seed: int,
        on_end: OnEnd | None = None,
    ) -> list[RolloutGroup]:
        """num_samples completions of every prompt, in the order of the prompts.

        on_end: called with each completion as it ends, while others are still drawn, in no order and without
        routed_experts; once more for one that had to be drawn anew.

        The samples are a function of the weights, the prompt, `seed` and the sample's index: the order and the other
        members of the batch do not enter (beyond the rounding of a differently shaped product). With
        params.return_routed_experts they come with the experts that they were computed with.
        """
        ...

    def forget(self) -> None:
        """Let go of what was kept of earlier prompts to go on from. Between two calls of it the prompts that begin like
        one that was drawn for are computed from where they differ; after it a rollout is what it would be in a process
        that never drew another."""

    def weight_slices(self) -> list[WeightSlice]:
        """What this rank samples with, as views that may be written to; fastgrpo/weights.py keeps them the policy's."""
        ...

    def score(self, token_ids: Tensor) -> Tensor:
        """(P,) token ids -> (P - 1,) float32 on the CPU: the logprob of each after those before it, temperature 1."""
        ...

    def sleep(self) -> None:
        """Give the KV cache's memory back."""

    def wake(self) -> None:
        """Take it again."""

    def close(self) -> None:
        """Let go of everything that is not the learner's."""
