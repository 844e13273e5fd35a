"""From a group to the keyword arguments of each call. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastgrpo.functions.binding import arguments_of
from fastgrpo.rewards.contract import RewardFunction


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A group as plain values.

    Example: Sample(prompt_id="train/17", prompt="2+3=", answer="5", metadata={}, completions=["5", "6"],
                    conversations=[[{"role": "assistant", "content": "5"}], [{"role": "assistant", "content": "6"}]],
                    conversation_ids=["train-1-0-3-0", "train-1-0-3-1"], token_ids=[[8, 2], [9, 2]],
                    turn_ends=[[1], [1]], finish_reasons=["stop", "stop"])
    """

    prompt_id: str
    prompt: str
    answer: Any
    metadata: dict[str, Any]
    completions: list[str]
    """With an environment the policy's last turns."""
    conversations: list[list[dict[str, str]]]
    """Everything said after the prompt."""
    conversation_ids: list[str | None]
    token_ids: list[list[int]]
    turn_ends: list[list[int]]
    """Where in token_ids the policy's turns end."""
    finish_reasons: list[str]


def joined(samples: Sequence[Sample]) -> Sample:
    """Parts of a group as one."""
    first, *rest = samples
    lists = [name for name, value in vars(first).items() if isinstance(value, list) and name != "answer"]
    return replace(first, **{name: sum((getattr(part, name) for part in rest), getattr(first, name)) for name in lists})


def bind(function: RewardFunction, sample: Sample) -> list[dict[str, Any]]:
    """The keyword arguments of the function's calls: one call per completion, or one for the group.

    Raises UserError for a parameter that nothing fills.
    """
    shared = {"prompt": sample.prompt, "answer": sample.answer, "metadata": dict(sample.metadata)}
    return [
        arguments_of(function, {**shared, **own}, sample.metadata, sample.prompt_id)
        for own in _own_arguments(function, sample)
    ]


def _own_arguments(function: RewardFunction, sample: Sample) -> list[dict[str, Any]]:
    """What differs between the calls."""
    named = {
        "completion": sample.completions,
        "conversation": sample.conversations,
        "conversation_id": sample.conversation_ids,
        "finish_reason": sample.finish_reasons,
    }
    lists = {"token_ids": sample.token_ids, "turn_ends": sample.turn_ends}
    if function.per_group:
        return [{f"{name}s": values for name, values in named.items()} | lists]
    values = named | lists
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
