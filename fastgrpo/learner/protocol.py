"""What the loop asks of a learner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from fastgrpo.kernels.objective import Objective
from fastgrpo.types import PackedBatch, StepResult


class Learner(Protocol):
    """Holds the policy and improves it."""

    policy_version: int
    """Optimizer steps taken."""

    def update(self, batches: Iterable[PackedBatch], objective: Objective) -> StepResult:
        """One optimizer step on the sum of the micro-batches' losses; a non-finite one leaves the weights untouched."""
        ...

    def logprobs(self, batch: PackedBatch, *, temperature: float, reference: bool = False) -> Tensor:
        """(N,) float32 on the CPU: the scored tokens' logprobs under the policy, or under the reference."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy under its Hugging Face names, one tensor at a time."""
        ...

    def move_reference(self, share: float) -> None:
        """reference += share * (policy - reference)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit-identically."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
