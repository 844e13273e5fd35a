"""The policy's weights between a learner and a sampler.

Both describe what they hold as slices of checkpoint tensors. An Exchange compares the two once: what is the same memory
needs nothing, ever; the rest is copied on the rank or moved between ranks, in buckets of bounded size, whenever the
weights are shared. Each time it proves the result: addresses, a checksum for every piece, and the logprobs of a canary.
Memory beside the weights: what a rank sends and what it receives of one bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.checksum import checksums
from fastgrpo.data import packing
from fastgrpo.learner.protocol import Learner
from fastgrpo.sampler.protocol import Sampler
from fastgrpo.transfer_plan import Piece, WeightsError, describe, plan_transfers, volume

CANARY_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""How far the two sides' logprobs may be apart, where nothing else is configured."""


class Exchange:
    """Keeps a sampler on the learner's newest weights; every rank of the job makes one and calls it together.

    sampler: None on a rank that does not sample. canary: (P,) token ids that both sides score whenever the weights are
    shared, or None where the sampler computes with the learner's own model. full_proof: checksums over every element
    instead of a sample that changes with every step.
    """

    def __init__(
        self,
        learner: Learner,
        sampler: Sampler | None,
        *,
        bucket_bytes: int,
        canary: Tensor | None = None,
        canary_tolerance: float | None = None,
        full_proof: bool = False,
    ) -> None:
        self.learner, self.sampler = learner, sampler
        self.bucket_bytes, self.full_proof = bucket_bytes, full_proof
        self.canary, self.canary_tolerance = canary, canary_tolerance
        self.rank, self.num_ranks = learner.ranks.rank, learner.ranks.num_ranks
        self.prepare()

    def prepare(self) -> None:
        """Plan anew; after either side got other memory."""
        self.sources = self.learner.weight_slices()
        self.targets = self.sampler.weight_slices() if self.sampler is not None else []
        mine = describe(self.sources, self.rank), describe(self.targets, self.rank)
        everyone = self.learner.ranks.everyone(mine)
        learners = [held for part, _ in everyone for held in part]
        samplers = [held for _, part in everyone for held in part]
        self.plan = plan_transfers(learners, samplers, self.bucket_bytes)
        self.addresses = [[held.address for held in part] for part in mine]
        pieces = [*self.plan.copied, *(piece for bucket in self.plan.buckets for piece in bucket)]
        self.proven = pieces
        """What has a checksum on both sides, and which of them this rank gives and takes."""
        self.given = [i for i, piece in enumerate(pieces) if piece.source.rank == self.rank]
        self.taken = [i for i, piece in enumerate(pieces) if piece.target.rank == self.rank]

    def share(self) -> None:
        """Let the sampler see the learner's newest weights, and prove that it does. Raises WeightsError."""
        self.move()
        if self.sampler is not None:
            self.sampler.policy_version = self.learner.policy_version
        self.prove()

    def restore(self) -> None:
        """The same for a sampler whose engine was rebuilt, but for the canary, which would ask that engine."""
        self.prepare()
        self.move()
        self._refuse([self._differing_checksum()])

    @torch.no_grad()
    def move(self) -> None:
        """Bring what is not shared to where it belongs."""
        for piece in self.plan.copied:
            if piece.source.rank == self.rank:
                self._target(piece).copy_(self._source(piece))
        for bucket in self.plan.buckets:
            self._exchange(bucket)

    def _source(self, piece: Piece) -> Tensor:
        return piece.of(piece.source, self.sources[piece.source.index].tensor)

    def _target(self, piece: Piece) -> Tensor:
        return piece.of(piece.target, self.targets[piece.target.index].tensor)

    def _exchange(self, bucket: Sequence[Piece]) -> None:
        outgoing = sorted((p for p in bucket if p.source.rank == self.rank), key=lambda p: p.target.rank)
        incoming = sorted((p for p in bucket if p.target.rank == self.rank), key=lambda p: p.source.rank)
        send, send_sizes = self._buffer(outgoing, [p.target.rank for p in outgoing])
        receive, receive_sizes = self._buffer(incoming, [p.source.rank for p in incoming])
        for piece, part in _parts(outgoing, send):
            part.copy_(self._source(piece))
        dist.all_to_all_single(receive, send, receive_sizes, send_sizes)
        for piece, part in _parts(incoming, receive):
            self._target(piece).copy_(part)

    def _buffer(self, pieces: Sequence[Piece], ranks: Sequence[int]) -> tuple[Tensor, list[int]]:
        sizes = [0] * self.num_ranks
        for piece, rank in zip(pieces, ranks, strict=True):
            sizes[rank] += piece.num_bytes
        return torch.empty(sum(sizes), dtype=torch.uint8, device=self._device), sizes

    @property
    def _device(self) -> torch.device:
        return (self.sources or self.targets)[0].tensor.device

    # --- proof ------------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Raise WeightsError, on every rank, where a sampler does not hold the learner's weights."""
        found = [self._moved_away(), self._differing_checksum()]
        if self.canary is not None:
            found.append(self._differing_logprob(self.canary))
        self._refuse(found)

    def _refuse(self, found: Sequence[str | None]) -> None:
        first = self.learner.ranks.any_of(next((error for error in found if error), None))
        if first is not None:
            raise WeightsError(f"{first}; learner and sampler do not hold the same policy")

    def _moved_away(self) -> str | None:
        """Memory is shared as long as nobody moves to another."""
        now = self.learner.weight_slices(), self.sampler.weight_slices() if self.sampler is not None else []
        for side, slices, planned in zip(("learner", "sampler"), now, self.addresses, strict=True):
            if len(slices) != len(planned):
                return f"the {side} of rank {self.rank} holds {len(slices)} tensors, no longer {len(planned)}"
            for held, address in zip(slices, planned, strict=True):
                if held.tensor.data_ptr() != address:
                    return f"{held.name}: the {side} of rank {self.rank} has moved it to other memory"
        return None

    @torch.no_grad()
    def _differing_checksum(self) -> str | None:
        """Compare both sides of everything that was copied or moved."""
        pieces = self.proven
        if not pieces:
            return None
        phase = None if self.full_proof else self.learner.policy_version
        sums = torch.zeros(2, len(pieces), dtype=torch.int64, device=self._device)  # (sides, pieces)
        if self.given:
            dtypes = [pieces[i].target.dtype for i in self.given]
            sums[0, self.given] = checksums([self._source(pieces[i]) for i in self.given], phase, dtypes=dtypes)
        if self.taken:
            sums[1, self.taken] = checksums([self._target(pieces[i]) for i in self.taken], phase)
        if self.num_ranks > 1:
            dist.all_reduce(sums)  # each entry has one writer
        differing = (sums[0] != sums[1]).nonzero()
        if len(differing) == 0:
            return None
        piece = pieces[int(differing[0])]
        sides = f"the learner (rank {piece.source.rank}) and the sampler (rank {piece.target.rank})"
        return f"{piece.target.name}: the checksums of {sides} differ"

    def _differing_logprob(self, canary: Tensor) -> str | None:
        theirs = self.sampler.score(canary) if self.sampler is not None else None
        ours = self.learner.logprobs(_scored(canary), temperature=1.0)
        if theirs is None:
            return None
        dtype = self.targets[0].tensor.dtype
        allowed = CANARY_TOLERANCE[dtype] if self.canary_tolerance is None else self.canary_tolerance
        worst = (ours - theirs).abs().max().item()
        if worst <= allowed:  # False for NaN
            return None
        return (
            f"the canary's logprobs differ by {worst:.1e} on rank {self.rank}, more than {allowed:.0e} "
            "(sampler.canary_tolerance)"
        )


def _parts(pieces: Sequence[Piece], buffer: Tensor):
    """Each piece with its place in the buffer, as a tensor of its shape."""
    offset = 0
    for piece in pieces:
        size = piece.target.dtype.itemsize * volume(piece.shape)
        yield piece, buffer[offset : offset + size].view(piece.target.dtype).view(piece.shape)
        offset += piece.num_bytes


def _scored(token_ids: Tensor):
    """The tokens as one packed sequence, all but the first scored."""
    ones = torch.ones(len(token_ids) - 1)
    sequence = packing.Sequence(
        sequence_id=0,
        group_id=0,
        prompt_ids=token_ids[:1],
        token_ids=token_ids[1:],
        advantages=ones,
        token_weights=ones,
        sampler_logprobs=torch.zeros_like(ones),
    )
    (batch,) = packing.pack([sequence], max_tokens=len(token_ids), share_prompts=True)
    return batch
