"""From rewards to advantages: the group compared with itself (DeepSeekMath, arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastgrpo.algorithms.custom_advantage import CustomAdvantage
from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.functions.inline import is_path
from fastgrpo.kernels.group_advantages import group_advantages, process_advantages
from fastgrpo.types import RolloutGroup, ScoredGroup

Compare = Callable[[list[ScoredGroup]], list[ScoredGroup]]
"""From a step's groups to the same with their advantages."""


def comparison(config: AlgorithmConfig) -> Compare:
    """The configured one. Raises UserError for a function of the user's own that cannot be called."""
    return CustomAdvantage(config) if is_path(config.advantage) else partial(compare, config=config)


def compare(groups: list[ScoredGroup], config: AlgorithmConfig) -> list[ScoredGroup]:
    """The groups with their advantages: (G,) each for outcome rewards, G tensors (R_i,) for process supervision.

    A group of equal rewards gets exactly 0.

    Raises UserError where algorithm.advantage=process meets rewards without steps.
    """
    if not groups:
        return []
    if config.advantage == "process":
        return _compare_steps(groups, config)
    sizes = torch.tensor([len(group.rewards) for group in groups])
    rewards = torch.cat([group.rewards for group in groups])
    advantages = group_advantages(
        rewards,
        torch.arange(len(groups)).repeat_interleave(sizes),
        normalize="std" if config.advantage == "std" else "none",
        std_ddof=config.std_ddof,
        min_std=config.min_std,
        leave_one_out=config.advantage == "leave_one_out",
    )
    if config.advantage == "batch_std":
        advantages = _scaled_by_all(advantages, rewards, config)
    parts = advantages.split(sizes.tolist())
    return [replace(group, advantages=part) for group, part in zip(groups, parts, strict=True)]


def _scaled_by_all(centered: Tensor, rewards: Tensor, config: AlgorithmConfig) -> Tensor:
    """r - mean of the group, over the std of all (S,) rewards of the step (Lite PPO, arXiv 2508.08221)."""
    if is_constant(rewards):
        return centered
    std = rewards.double().std(correction=config.std_ddof).clamp(min=config.min_std)
    return (centered / std).float()


def _compare_steps(groups: list[ScoredGroup], config: AlgorithmConfig) -> list[ScoredGroup]:
    rewards: list[float] = []
    token_index: list[int] = []
    sequence_ids: list[int] = []
    group_ids: list[int] = []
    lengths: list[int] = []
    for number, group in enumerate(groups):
        if group.step_rewards is None:
            raise UserError(
                "algorithm.advantage=process: the reward function returned no step rewards; "
                "return fastgrpo.rewards.StepRewards, or choose another algorithm.advantage"
            )
        for rollout, steps in zip(group.group.rollouts, group.step_rewards, strict=True):
            for index, reward in steps:
                rewards.append(reward)
                token_index.append(index)
                sequence_ids.append(len(lengths))
            group_ids.append(number)
            lengths.append(len(rollout.token_ids))
    advantages = process_advantages(
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(token_index, dtype=torch.int64),
        torch.tensor(sequence_ids, dtype=torch.int64),
        torch.tensor(group_ids),
        torch.tensor([0, *lengths]).cumsum(0),
        std_ddof=config.std_ddof,
        min_std=config.min_std,
    )
    parts = iter(advantages.split(lengths))
    return [replace(group, advantages=tuple(next(parts) for _ in group.group.rollouts)) for group in groups]


def token_advantages(group: ScoredGroup, sample: int) -> Tensor:
    """(R,) float32: a completion's advantage at each of its tokens."""
    assert group.advantages is not None
    advantage, length = group.advantages[sample], len(group.group.rollouts[sample].token_ids)
    return advantage if isinstance(group.advantages, tuple) else advantage.expand(length)


def is_constant(rewards: Tensor) -> bool:
    """Whether the group has nothing to compare: all rewards exactly equal."""
    return bool((rewards == rewards[0]).all())


def soften_overlong(
    rewards: Tensor, group: RolloutGroup, *, max_new_tokens: int, buffer: int, penalty: float
) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), added to the (G,) rewards.

    0 up to L = max_new_tokens - buffer tokens, then linearly to -penalty at max_new_tokens.
    """
    lengths = torch.tensor([len(rollout.token_ids) for rollout in group.rollouts], dtype=rewards.dtype)
    return rewards - penalty * ((lengths - (max_new_tokens - buffer)) / buffer).clamp(0.0, 1.0)
