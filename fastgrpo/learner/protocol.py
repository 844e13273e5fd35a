"""What the loop asks of a learner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastgrpo.kernels.objective import Objective
from fastgrpo.ranks import Ranks
from fastgrpo.types import PackedBatch, StepResult, WeightSlice


@dataclass(frozen=True, kw_only=True)
class PendingSave:
    """A save that has begun. Example: PendingSave(files={path: partial(torch.save, state, path)})."""

    files: Mapping[Path, Callable[[], object]]
    """This rank's files and what writes each: nothing that waits for other ranks, so threads may do it."""
    finish: Callable[[], None] = lambda: None
    """Comes once every rank has written its files; all ranks together."""


class Learner(Protocol):
    """Holds the policy and improves it."""

    policy_version: int
    """Optimizer steps taken."""
    ranks: Ranks
    """Where this process's part of the policy stands in the job."""

    def update(self, batches: Iterable[PackedBatch], objective: Objective) -> StepResult:
        """One optimizer step on the sum of the losses of all data ranks' micro-batches, of which each passes its own;
        a non-finite one leaves the weights untouched."""
        ...

    def logprobs(self, batch: PackedBatch, *, temperature: float, reference: bool = False) -> Tensor:
        """(N,) float32 on the CPU: the scored tokens' logprobs under the policy, or under the reference."""
        ...

    def logprobs_of(
        self, batches: Sequence[PackedBatch], *, temperature: float, reference: bool = False
    ) -> list[Tensor]:
        """`logprobs` of each; of many at once no slower, and much faster where a batch passes through a pipeline."""
        ...

    def logprobs_and_entropies(
        self, batches: Sequence[PackedBatch], *, temperature: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The policy's `logprobs_of` the batches, and from the same pass the entropies of the distributions that their
        tokens are drawn from, (N,) float32 each."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy under its Hugging Face names, one whole tensor at a time; all ranks go through it together."""
        ...

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Where adapters are trained, they alone, whole, named as by model.layers.0.self_attn.q_proj.lora_A.weight; all
        ranks go through it together."""
        ...

    def weight_slices(self) -> list[WeightSlice]:
        """What this rank holds of the policy, as views whose addresses stay while the learner lives."""
        ...

    def move_reference(self, share: float) -> None:
        """reference += share * (policy - reference)."""
        ...

    def begin_save(self, directory: Path, *, copy: bool = False) -> PendingSave:
        """Begin to write all that `load` needs to go on bit-identically; every rank of the job calls it with one empty
        directory. With `copy` the state of now is written even where updates follow before it is: it has been copied
        to the host, to memory that the next call takes again."""
        ...

    def load(self, directory: Path) -> None:
        """Go on from what was saved. Raises UserError where it does not fit."""
        ...

    def offload(self) -> None:
        """Move to host memory what only an update needs, and give its memory back to the device: optimizer state and
        gradient buffers. The weights stay where they are, so `logprobs` and samplers work on."""
        ...

    def onload(self) -> None:
        """Bring back what `offload` moved, bit for bit; an update, a save and `load` need it. Nothing is done where
        nothing was offloaded."""
        ...
