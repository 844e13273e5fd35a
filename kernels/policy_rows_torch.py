"""The policy loss on tiles of logits, in plain torch: the CPU's counterpart of policy_rows_triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels import torch_rows
from fastgrpo.kernels.chunks import Span
from fastgrpo.kernels.objective import LossInputs, Objective
from fastgrpo.kernels.token_terms import record_names, token_terms
from fastgrpo.kernels.vocab_parallel import VocabShard


class TorchPolicyRows:
    """PolicyRows in float32 or float64. Tiles hold logits already divided by the temperature.

    batch: scored tokens only. tile: the one that will be reused; entropy, finite: see TorchRows.
    """

    def __init__(
        self,
        batch: LossInputs,
        objective: Objective,
        shard: VocabShard,
        tile: Tensor,
        *,
        entropy: bool,
        finite: bool,
    ) -> None:
        self.batch, self.objective, self.rank, self.entropy = batch, objective, shard.rank, entropy
        self.columns = torch_rows.local_columns(batch.targets, shard)
        self.rows = torch_rows.TorchRows(tile.shape[0], shard.num_valid, tile, entropy=entropy, finite=finite)
        self.records = tile.new_empty(len(record_names(objective)), batch.targets.shape[0])
        self._unit = (0, 0)

    def one_pass(self, tile: Tensor, span: Span, gradient: bool) -> None:
        return None

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        return self.rows.statistics(tile, self.columns[slice(*span)])

    def combine(self, gathered: Tensor, span: Span) -> None:
        total_max, log_total, (log_p, row_entropy) = torch_rows.combine(gathered)
        entropy = row_entropy if self.entropy else None
        terms = token_terms(log_p, entropy, self.batch.tokens_from(*span), self.objective)
        self.records[:, slice(*span)] = terms.records
        self._unit = span
        self._own_max = gathered[self.rank, :, 0]
        self._log_sum = torch_rows.log_sum_from(self._own_max, total_max, log_total)
        self._row_entropy = row_entropy
        per_logit = 1.0 / self.objective.temperature
        self._grad_logprob = terms.grad_logprob * per_logit
        self._grad_entropy = terms.grad_entropy * per_logit if self.objective.entropy_coef else None

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        rows = slice(span[0] - self._unit[0], span[1] - self._unit[0])
        return self.rows.gradient(
            tile,
            self.columns[slice(*span)],
            self._own_max[rows],
            self._log_sum[rows],
            self._row_entropy[rows],
            self._grad_logprob[rows],
            None if self._grad_entropy is None else self._grad_entropy[rows],
            reuse=span == self._unit,  # otherwise the tile has held other chunks in between
        )

    def finish(self, tile: Tensor, span: Span) -> None:
        pass  # combine has recorded everything

    def sums(self) -> tuple[Tensor, Tensor]:
        sums = self.records.sum(1, dtype=torch.float64)
        return sums, sums[0].to(self.records.dtype, copy=True)
