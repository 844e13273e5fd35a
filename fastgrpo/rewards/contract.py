"""What a reward function is given and what it may return. Imports no torch: worker processes start from here."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgrpo.functions.contract import Unusable, UserFunction, shown

PER_COMPLETION = (
    *("completion", "prompt", "answer", "metadata"),
    *("conversation", "conversation_id", "token_ids", "turn_ends", "finish_reason"),
)
"""What a function that asks for `completion` can ask for."""
PER_GROUP = (
    *("completions", "prompt", "answer", "metadata"),
    *("conversations", "conversation_ids", "token_ids", "turn_ends", "finish_reasons"),
)
"""What a function that asks for `completions` can ask for."""


LARGEST = 3.4e38
"""Rewards become float32, which has no larger number."""


@dataclass(frozen=True)
class StepRewards:
    """Rewards of a completion's steps, for process supervision.

    Example: StepRewards(steps=[(7, 1.0), (19, 0.0)]) rewards the step that ends with token 7 by 1, the next by 0.
    """

    steps: Sequence[tuple[int, float]]
    """(index of the step's last token within the completion, its reward) pairs."""
    total: float | None = None
    """The completion's reward as a whole; None is the sum over its steps."""


Value = float | StepRewards | Unusable


@dataclass(frozen=True, kw_only=True)
class RewardFunction(UserFunction):
    """A reward function together with how it is called."""

    name: str
    """The reward's name in the metrics."""
    weight: float
    per_group: bool
    """It asks for `completions`, not `completion`."""


def normalize(result: Any, *, per_group: bool) -> list[Value] | Unusable:
    """Turns what a function returned into plain values that cross processes: one, or one per completion."""
    if not per_group:
        return [_normalize_one(result)]
    if hasattr(result, "tolist") and getattr(result, "ndim", 0) == 1:  # an array or tensor
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        return Unusable(shown(result))
    return [_normalize_one(value) for value in result]


def _normalize_one(value: Any) -> Value:
    if isinstance(value, StepRewards):
        return _normalize_steps(value)
    number = _number(value)
    return Unusable(shown(value)) if number is None else number


def _normalize_steps(value: StepRewards) -> StepRewards | Unusable:
    steps = []
    for pair in value.steps:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return Unusable(f"StepRewards with the step {shown(pair)}")
        index, reward = _number(pair[0]), _number(pair[1])
        if index is None or index != int(index) or reward is None:
            return Unusable(f"StepRewards with the step {shown(pair)}")
        steps.append((int(index), reward))
    total = sum(reward for _, reward in steps) if value.total is None else _number(value.total)
    if total is None:
        return Unusable(f"StepRewards with the total {shown(value.total)}")
    return StepRewards(steps=sorted(steps), total=total)


def _number(value: Any) -> float | None:
    """The value as a finite float, or None where it is none. numpy's and torch's scalars count as numbers."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if abs(number) <= LARGEST else None
