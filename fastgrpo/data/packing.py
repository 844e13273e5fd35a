"""Completions and their prompts laid out for the learner: no padding, and each prompt once for its group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastgrpo.types import PackedBatch


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A completion that is ready to be learned from; all tensors (R,).

    Example: Sequence(sequence_id=5, group_id=0, prompt_ids=tensor([5, 9]), token_ids=tensor([8, 2]),
                      advantages=tensor([.7, .7]), token_weights=tensor([.1, .1]), sampler_logprobs=tensor([-.1, -.2]))
    """

    sequence_id: int
    """Its place in the step."""
    group_id: int
    prompt_ids: Tensor
    """(P,) int64."""
    token_ids: Tensor
    advantages: Tensor
    token_weights: Tensor
    """0 where the token carries no loss."""
    sampler_logprobs: Tensor
    prompt_routed_experts: Tensor | None = None
    """(P, L, k): RolloutGroup.prompt_routed_experts, to be replayed; given for all sequences or for none."""
    routed_experts: Tensor | None = None
    """(R - 1, L, k): Rollout.routed_experts."""

    @cached_property
    def _scored(self) -> tuple[int, int]:
        """How many tokens carry loss, and the place of the last that does."""
        places = self.token_weights.nonzero()
        return len(places), int(places[-1]) if len(places) else 0

    @property
    def num_scored(self) -> int:
        """How many of its tokens carry loss."""
        return self._scored[0]

    @property
    def num_read(self) -> int:
        """How many of its tokens are packed: those before the last one with loss, for nothing later predicts any."""
        return self._scored[1]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which sequences a micro-batch holds, and where. What it costs is known from lengths alone, so that a rank plans
    every rank's micro-batches and makes the tensors of its own."""

    units: list[list[Sequence]]
    """Sequences that share one copy of their prompt."""
    share_prompts: bool

    @property
    def num_tokens(self) -> int:
        """PackedBatch.num_tokens."""
        return sum(map(_num_tokens, self.units))

    @property
    def num_scored(self) -> int:
        """PackedBatch.num_scored."""
        return sum(sequence.num_scored for unit in self.units for sequence in unit)

    @cached_property
    def segments(self) -> Tensor:
        """PackedBatch.segments."""
        segments, at = [], 0
        for unit in self.units:
            prompt_start, prompt_end = at, at + len(unit[0].prompt_ids)
            at = prompt_end
            if self.share_prompts:
                segments.append((prompt_start, prompt_end, 0, 0))
            for sequence in unit:
                start, at = at, at + sequence.num_read
                segments.append(
                    (start, at, prompt_start, prompt_end) if self.share_prompts else (prompt_start, at, 0, 0)
                )
        return torch.tensor(segments)

    def pack(self) -> PackedBatch:
        """The micro-batch itself."""
        token_ids, position_ids, hidden_rows = [], [], []
        routed: list[Tensor | None] = []
        scored: list[tuple[Sequence, Tensor]] = []
        at = 0
        for unit in self.units:
            prompt = unit[0].prompt_ids
            token_ids.append(prompt)
            position_ids.append(torch.arange(len(prompt)))
            routed.append(unit[0].prompt_routed_experts)
            at += len(prompt)
            prompt_end = at
            for sequence in unit:
                end = at + sequence.num_read
                token_ids.append(sequence.token_ids[: sequence.num_read])
                position_ids.append(torch.arange(len(prompt), len(prompt) + end - at))
                routed.append(None if sequence.routed_experts is None else sequence.routed_experts[: sequence.num_read])
                # The row that predicts a token is the one before it; the prompt's last row predicts every first token.
                predictors = torch.cat([torch.tensor([prompt_end - 1]), torch.arange(at, end)])
                keep = sequence.token_weights != 0
                hidden_rows.append(predictors[keep[: len(predictors)]])
                scored.append((sequence, keep))
                at = end
        return PackedBatch(
            token_ids=torch.cat(token_ids),
            position_ids=torch.cat(position_ids),
            segments=self.segments,
            hidden_rows=torch.cat(hidden_rows),
            targets=torch.cat([sequence.token_ids[keep] for sequence, keep in scored]),
            advantages=torch.cat([sequence.advantages[keep] for sequence, keep in scored]),
            token_weights=torch.cat([sequence.token_weights[keep] for sequence, keep in scored]),
            sampler_logprobs=torch.cat([sequence.sampler_logprobs[keep] for sequence, keep in scored]),
            cu_scored=torch.tensor([0, *(sequence.num_scored for sequence, _ in scored)]).cumsum(0),
            sequence_ids=torch.tensor([sequence.sequence_id for sequence, _ in scored]),
            routed_experts=_all_or_none(routed),
        )


def pack(sequences: list[Sequence], *, max_tokens: int, share_prompts: bool) -> list[PackedBatch]:
    """The micro-batches that `plan` lays out."""
    return [layout.pack() for layout in plan(sequences, max_tokens=max_tokens, share_prompts=share_prompts)]


def plan(sequences: list[Sequence], *, max_tokens: int, share_prompts: bool) -> list[Layout]:
    """Micro-batches of at most max_tokens packed tokens that hold all sequences with any loss.

    With share_prompts a group's prompt appears once in each micro-batch that holds part of the group; without, each
    sequence carries its own copy. Loss and gradient are the same for every max_tokens and either way of sharing.

    Raises ValueError where one sequence with its prompt is longer than max_tokens.
    """
    units = list(_units(_learned(sequences), max_tokens, share_prompts))
    bins: list[list[list[Sequence]]] = [[] for _ in units]
    room = np.full(len(units), max_tokens)
    for unit in sorted(units, key=lambda unit: -_num_tokens(unit)):  # first fit, largest first
        size = _num_tokens(unit)
        at = (room >= size).argmax()
        bins[at].append(unit)
        room[at] -= size
    in_order = (sorted(units, key=lambda unit: unit[0].sequence_id) for units in bins if units)
    return [Layout(units=units, share_prompts=share_prompts) for units in in_order]


def fair_budget(sequences: list[Sequence], num_ranks: int) -> int:
    """A token budget under which the sequences make about as many equal micro-batches as there are ranks, at least."""
    learned = _learned(sequences)
    total = sum(sequence.num_read for sequence in learned)
    total += sum({sequence.group_id: len(sequence.prompt_ids) for sequence in learned}.values())
    longest = max((_num_tokens([sequence]) for sequence in learned), default=1)
    return max(longest, -(-total // num_ranks))


def _learned(sequences: list[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.num_scored]


def _num_tokens(unit: list[Sequence]) -> int:
    return len(unit[0].prompt_ids) + sum(sequence.num_read for sequence in unit)


def _units(sequences: list[Sequence], max_tokens: int, share_prompts: bool) -> Iterator[list[Sequence]]:
    """Sequences that share one copy of their prompt: a group, or as much of it as fits."""
    unit: list[Sequence] = []
    size = 0
    for sequence in sequences:
        alone = _num_tokens([sequence])
        if alone > max_tokens:
            raise ValueError(
                f"learner.max_tokens_per_microbatch={max_tokens}: a completion and its prompt pack to "
                f"{alone} tokens; raise it to at least that"
            )
        same_group = bool(unit) and unit[0].group_id == sequence.group_id
        if share_prompts and same_group and size + sequence.num_read <= max_tokens:
            unit.append(sequence)
            size += sequence.num_read
            continue
        if unit:
            yield unit
        unit, size = [sequence], alone
    if unit:
        yield unit


def _all_or_none(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    assert len(given) in (0, len(parts)), "experts of some rows only"
    return torch.cat(given) if given else None
