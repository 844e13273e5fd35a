"""Rewards: what a completion is worth, computed by functions that run outside the trainer's process.

A reward function asks by parameter name for what it needs, like a test asks for its fixtures:

    def score(completion, answer):              # called once per completion, returns its reward
        return answer in completion

    def score(completions, prompt, metadata):   # called once per group, returns one reward per completion
        longest = max(map(len, completions))
        return [len(text) / longest for text in completions]

docs/rewards.md has the whole contract. Worker processes import this package, so nothing here imports torch before
one of the trainer's names is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgrpo.rewards.contract import StepRewards
from fastgrpo.rewards.loading import load_reward

if TYPE_CHECKING:
    from fastgrpo.rewards.scoring import Rewards, ScoreResult

__all__ = ["Rewards", "ScoreResult", "StepRewards", "load_reward"]


def __getattr__(name: str) -> Any:
    if name in ("Rewards", "ScoreResult"):
        from fastgrpo.rewards import scoring

        return getattr(scoring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
