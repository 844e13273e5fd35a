"""Which experts a sampling Hugging Face model sends its tokens to.

Letters: B prompts, R rows (completions), T tokens of a pass, L layers with experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgrpo.models.experts import choice_dtype, routers_of
from fastgrpo.models.hf import CausalLM


class ExpertRecord:
    """The choices of one batch of prompts and of their completions, on the host."""

    def __init__(self) -> None:
        self._pass: list[Tensor] = []
        self._prompts: tuple[Tensor, ...] = ()
        self._completions = torch.empty(0)

    def add(self, router: Any, _: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """A router's forward hook."""
        self._pass.append(output[2].to(choice_dtype(router.num_experts)))

    def _take(self) -> Tensor:
        """(T, L, k) of the pass that has just ended."""
        taken = torch.stack(self._pass, 1).cpu()
        self._pass.clear()
        return taken

    def start(self, lengths: list[int], num_rows: int, limit: int) -> None:
        """Call after the pass over the prompts, which have so many tokens."""
        self._prompts = self._take().split(lengths)
        first = self._prompts[0]
        self._completions = first.new_zeros(num_rows, limit, *first.shape[1:])

    def step(self, rows: Tensor, position: int) -> None:
        """Call after a pass over the completions' tokens at `position`, one of each row."""
        self._completions[rows.cpu(), position] = self._take()

    def prompt(self, number: int) -> Tensor:
        """(P, L, k), see RolloutGroup.prompt_routed_experts."""
        return self._prompts[number].clone()

    def completion(self, row: int, length: int) -> Tensor:
        """(length - 1, L, k), see Rollout.routed_experts."""
        return self._completions[row, : length - 1].clone()


@contextmanager
def recording(model: CausalLM) -> Iterator[ExpertRecord]:
    """Record what the model's routers choose meanwhile."""
    record = ExpertRecord()
    hooks = [router.register_forward_hook(record.add) for router in routers_of(model)]
    assert hooks, "a dense model has no experts to record"
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
