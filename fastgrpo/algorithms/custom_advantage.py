"""Advantages of the user's own: a function from a group's rewards to its advantages, found by path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.functions.inline import Inline
from fastgrpo.types import Prompt, Rollout, RolloutGroup, ScoredGroup

KEY = "algorithm.advantage"
OFFERED = ("rewards", "reward_terms", "batch_rewards", "lengths", "truncated", "prompt", "answer", "metadata")


class CustomAdvantage:
    """Calls the function that algorithm.advantage names, once a group, on every rank: it must be a function of what it
    is given alone. Raises UserError where there is none, or it asks for something else than OFFERED."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._function = Inline(config.advantage, KEY, config.advantage_kwargs, OFFERED)

    def __call__(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """The groups with their advantages. Raises UserError where the function returns none."""
        if not groups:
            return []
        batch_rewards = torch.cat([group.rewards for group in groups])  # (S,)
        return [replace(group, advantages=self._of(group, batch_rewards)) for group in groups]

    def check(self, prompt: Prompt, reward_names: Sequence[str], group_size: int) -> None:
        """Calls it with made-up rewards of a real prompt, different ones and equal ones, so that a broken function ends
        the run before it starts, and twice, because each rank calls it for itself."""
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            token_ids=torch.zeros(2, dtype=torch.int64),
            loss_mask=torch.ones(2, dtype=torch.bool),
            sampler_logprobs=torch.zeros(2),
            finish_reason="stop",
            policy_version=0,
        )
        group = RolloutGroup(prompt=prompt, rollouts=(rollout,) * group_size)
        different = torch.arange(group_size, dtype=torch.float32) / group_size
        for rewards in (different, torch.zeros(group_size)):
            made_up = [ScoredGroup(group=group, rewards=rewards, reward_terms=dict.fromkeys(reward_names, rewards))]
            (first,), (again,) = self(made_up), self(made_up)
            if not all(map(torch.equal, _parts(first), _parts(again))):
                raise UserError(
                    f"{self._function.where} depends on chance or on earlier calls; make it a function of what it is "
                    "given, because ranks must find the same"
                )

    def _of(self, group: ScoredGroup, batch_rewards: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(G,) float32, or a (R_i,) a completion."""
        rollouts, prompt = group.group.rollouts, group.group.prompt
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        given = {
            "rewards": group.rewards.clone(),
            "reward_terms": {name: values.clone() for name, values in group.reward_terms.items()},
            "batch_rewards": batch_rewards.clone(),
            "lengths": torch.tensor(lengths),
            "truncated": torch.tensor([rollout.finish_reason == "length" for rollout in rollouts]),
            "prompt": prompt.text,
            "answer": prompt.answer,
            "metadata": dict(prompt.metadata),
        }
        where = f"{self._function.where} on prompt {prompt.prompt_id}"
        return _read(self._function(given), lengths, where)


def _parts(group: ScoredGroup) -> tuple[Tensor, ...]:
    advantages = group.advantages
    assert advantages is not None
    return (advantages,) if isinstance(advantages, Tensor) else advantages


def _read(result: Any, lengths: list[int], where: str) -> Tensor | tuple[Tensor, ...]:
    """What the function returned, as float32. Raises UserError where that is no advantage for each completion."""
    try:
        whole = isinstance(result, Tensor) or all(getattr(item, "ndim", 0) == 0 for item in result)
        parts = [torch.as_tensor(item, dtype=torch.float32).detach() for item in ([result] if whole else result)]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{where} returned a {type(result).__name__}; return {_WANTED}") from None
    shapes = [(len(lengths),)] if whole else [(length,) for length in lengths]
    if [tuple(part.shape) for part in parts] != shapes:
        found = ", ".join(str(tuple(part.shape)) for part in parts[:4])
        raise UserError(f"{where} returned {found} for {len(lengths)} completions; return {_WANTED}")
    if not all(bool(part.isfinite().all()) for part in parts):
        raise UserError(f"{where} returned an advantage that is not finite; mend the function")
    return parts[0] if whole else tuple(parts)


_WANTED = "one number a completion, or for each a tensor of one a token"
