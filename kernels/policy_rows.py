"""The walk over a batch that every policy loss makes: logits of a unit, its loss and gradient, next unit.

Two backends do the row work in the same three steps: statistics of a tile, combine them (over the shards of a
vocabulary) into the loss and its row coefficients, turn the tile into dlogits.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.kernels.chunks import Span, plan_units
from fastgrpo.kernels.heads import Head
from fastgrpo.kernels.objective import LossInputs, Objective
from fastgrpo.kernels.policy_rows_torch import TorchPolicyRows
from fastgrpo.kernels.policy_rows_triton import TritonPolicyRows
from fastgrpo.kernels.token_terms import ENTROPY_ROW, LOGPROB_ROW
from fastgrpo.kernels.vocab_parallel import VocabShard


class PolicyRows(Protocol):
    """What a backend does with a tile (n, V) of logits whose rows are the tokens of `span`."""

    records: Tensor
    """(R, T) in the order of `record_names`, filled as units are processed."""

    def one_pass(self, tile: Tensor, span: Span, gradient: bool) -> Tensor | None:
        """Records and gradient at once, where rows need nothing but themselves; None: take the steps below."""

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        """(n, 4): max, sum, shifted sum and target logit of each row."""

    def combine(self, gathered: Tensor, span: Span) -> None:
        """Take in a unit's statistics (R, n, 4) from all shards, in rank order."""

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        """Records and dL/dlogits of the tile, in place where the dtype allows."""

    def finish(self, tile: Tensor, span: Span) -> None:
        """Records of a unit whose gradient nobody wants; the tile holds anything."""

    def sums(self) -> tuple[Tensor, Tensor]:
        """The records' sums over the tokens (R,), and the loss, which is the first of them, on its own."""


def walk(
    head: Head,
    batch: LossInputs,
    objective: Objective,
    shard: VocabShard,
    *,
    entropy: bool,
    finite: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every unit once: logits from the head, loss and gradient by the backend's rows, the gradient to the head.

    A unit of several chunks holds one sequence too long for a chunk; its logits are computed a second time
    once the sequence's ratio is known.

    Returns: the loss (scalar), sums (R,) of the records over the tokens, logprobs (T,), entropies (T,).
    """
    batch = batch.tokens_at(head.kept)
    rows = _rows(head, batch, objective, shard, entropy=entropy, finite=finite)
    bounds = None
    if objective.relates_tokens:
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
    for unit in plan_units(head.num_rows, head.chunk_size, bounds):
        whole = (unit[0][0], unit[-1][1])
        if len(unit) == 1:
            tile = head.logits(whole)
            dlogits = rows.one_pass(tile, whole, gradient)
            if dlogits is not None:
                if gradient:
                    head.accumulate(dlogits, whole)
                continue
            stats = rows.statistics(tile, whole)
        else:
            stats = torch.cat([rows.statistics(head.logits(span), span) for span in unit])
        rows.combine(shard.gather(stats), whole)
        if not gradient:
            rows.finish(head.tile, whole)
            continue
        for span in unit:
            dlogits = rows.gradient(tile if len(unit) == 1 else head.logits(span), span)
            head.accumulate(dlogits, span)
    sums, loss = rows.sums()
    return loss, sums, head.spread(rows.records[LOGPROB_ROW]), head.spread(rows.records[ENTROPY_ROW])


def _rows(
    head: Head, batch: LossInputs, objective: Objective, shard: VocabShard, *, entropy: bool, finite: bool
) -> PolicyRows:
    if head.triton:
        return TritonPolicyRows(batch, objective, shard, head.gradient_tile)
    return TorchPolicyRows(batch, objective, shard, head.tile, entropy=entropy, finite=finite)
