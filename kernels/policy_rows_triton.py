"""The policy loss on tiles of logits, in Triton: one program a row, loss and dlogits in one launch.

Where the ratio is a sequence's, or other ranks hold part of the vocabulary, the row's statistics come from a launch of
their own, and sequence_kernel turns them into each sequence's ratio and shared gradient in between. A surrogate of the
caller's own takes its place with torch's operations on vectors of the tile's rows.

Letters: T scored tokens, n rows of a tile, S sequences, V vocabulary (shard), R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels import torch_rows
from fastgrpo.kernels.chunks import Span
from fastgrpo.kernels.custom_terms import custom_terms
from fastgrpo.kernels.launch import options, row_shape
from fastgrpo.kernels.logprob_kernels import launch_statistics
from fastgrpo.kernels.objective import LossInputs, Objective
from fastgrpo.kernels.policy_kernels import policy_kernel, sequence_kernel, sum_kernel
from fastgrpo.kernels.token_terms import RECORDS, record_names
from fastgrpo.kernels.vocab_parallel import VocabShard


class TritonPolicyRows:
    """PolicyRows on tiles of undivided logits (n, V), V including the shard's padding.

    gradient_tile: where a tile's gradient goes; the tile itself, or memory in the dtype of the GEMMs.
    """

    def __init__(
        self,
        batch: LossInputs,
        objective: Objective,
        shard: VocabShard,
        gradient_tile: Callable[[Tensor, Span], Tensor],
    ) -> None:
        self.objective, self.shard, self.gradient_tile = objective, shard, gradient_tile
        num_tokens = batch.targets.shape[0]
        per_token = {
            "TARGETS": batch.targets,
            "WEIGHTS": batch.token_weights,
            "ADVANTAGES": batch.advantages,
            "OLD": batch.old_logprobs,
            "REF": batch.ref_logprobs,
            "IMPORTANCE": batch.importance_weights,
        }
        self.per_token = {name: None if x is None else x.contiguous() for name, x in per_token.items()}
        self.batch = batch
        self.records = batch.token_weights.new_empty(len(record_names(objective)), num_tokens, dtype=torch.float32)
        self.by_sequence = objective.ratio_level == "sequence"
        self.shared: dict[str, Tensor | None] = {"SHARED_RATIO": None, "SHARED_GRAD": None, "SHARED_VALUE": None}
        if self.by_sequence or objective.custom is not None:
            names = list(self.shared)[: 2 if objective.custom is None else 3]
            self.shared |= dict(zip(names, self.records.new_empty(len(names), num_tokens), strict=True))
        if self.by_sequence:
            assert batch.cu_seqlens is not None
            self.cu_seqlens = batch.cu_seqlens.to(batch.targets.device, non_blocking=True)
        self._gathered: Tensor | None = None
        self._unit: Span = (0, 0)

    def one_pass(self, tile: Tensor, span: Span, gradient: bool) -> Tensor | None:
        if self.by_sequence or self.objective.custom is not None or self.shard.num_ranks > 1:
            return None
        return self._launch(tile, span, self.gradient_tile(tile, span) if gradient else None)

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        targets, weights = self.per_token["TARGETS"], self.per_token["WEIGHTS"]
        assert targets is not None
        # the entropy too: policy_kernel records it whether or not it is asked for
        return launch_statistics(
            tile, span, targets, weights, self.shard, 1.0 / self.objective.temperature, entropy=True
        )

    def combine(self, gathered: Tensor, span: Span) -> None:
        self._gathered, self._unit = gathered, span
        if self.objective.custom is not None:
            self._combine_custom(gathered, span)
        elif self.by_sequence:
            sequence_kernel[(self.cu_seqlens.shape[0] - 1,)](
                gathered,
                gathered.shape[0],
                gathered.stride(0),
                self.cu_seqlens,
                *(self.per_token[name] for name in ("WEIGHTS", "ADVANTAGES", "OLD", "IMPORTANCE")),
                self.shared["SHARED_RATIO"],
                self.shared["SHARED_GRAD"],
                *span,
                **self._surrogate_arguments(),
                BLOCK=1024,
                **options(num_warps=4),
            )

    def _combine_custom(self, gathered: Tensor, span: Span) -> None:
        batch = self.batch.tokens_from(*span)
        _, _, (log_p, entropy) = torch_rows.combine(gathered, 1.0 / self.objective.temperature)
        scale = (
            batch.token_weights if batch.importance_weights is None else batch.token_weights * batch.importance_weights
        )
        terms = custom_terms(log_p, entropy, batch, self.objective, scale)
        for name, values in zip(self.shared, (terms.ratio, terms.grad_logprob, terms.value), strict=True):
            shared = self.shared[name]
            assert shared is not None
            shared[slice(*span)] = values
        for record, values in zip(self.records[len(RECORDS) :], terms.metrics, strict=True):
            record[slice(*span)] = values

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        return self._launch(tile, span, self.gradient_tile(tile, span))

    def finish(self, tile: Tensor, span: Span) -> None:
        self._launch(tile, span, None)  # looks at the statistics alone

    def sums(self) -> tuple[Tensor, Tensor]:
        num_records, num_tokens = self.records.shape
        sums, loss = self.records.new_empty(num_records), self.records.new_empty(())
        sum_kernel[(num_records,)](self.records, sums, loss, num_tokens, BLOCK=4096, **options(num_warps=8))
        return sums, loss

    def _launch(self, tile: Tensor, span: Span, out: Tensor | None) -> Tensor:
        objective, gathered, shard = self.objective, self._gathered, self.shard
        policy_kernel[(span[1] - span[0],)](
            tile,
            tile.stride(0),
            out,
            0 if out is None else out.stride(0),
            gathered,
            0 if gathered is None else gathered.shape[0],
            0 if gathered is None else gathered.stride(0),
            **self.per_token,
            **self.shared,
            RECORDS=self.records,
            first_token=span[0],
            unit_token=self._unit[0],
            num_tokens=self.records.shape[1],
            first_column=shard.first_column,
            num_valid=shard.num_valid,
            num_columns=tile.shape[1],
            vocab_size=shard.vocab_size,
            kl_coef=float(objective.kl_coef),
            entropy_coef=float(objective.entropy_coef),
            **self._surrogate_arguments(),
            KL=objective.kl_estimator if objective.kl_coef > 0 else "none",
            KL_TIMES_RATIO=objective.kl_times_ratio,
            HAS_ENTROPY=objective.entropy_coef != 0,
            **row_shape(tile),
        )
        return tile if out is None else out

    def _surrogate_arguments(self) -> dict[str, Any]:
        objective = self.objective
        return {
            "inverse_temperature": 1.0 / objective.temperature,
            "clip_low": 1.0 - objective.clip_ratio_low,
            "clip_high": 1.0 + objective.clip_ratio_high,
            "dual_clip": float(objective.dual_clip or 0.0),  # an integer would be compiled in
            "tau_pos": float(objective.sapo_tau_pos),
            "tau_neg": float(objective.sapo_tau_neg),
            "SURROGATE": "custom" if objective.custom is not None else objective.surrogate,
            "DUAL_CLIP": objective.dual_clip is not None,
        }
