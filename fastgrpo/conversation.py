"""A completion as messages: the policy's turns and the environment's between them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastgrpo.types import Rollout

Message = dict[str, str]
CHECK = "check"
"""The conversation_id of what functions are tried with before a run starts."""


def name_of(drawing: str, group: int, sample: int) -> str:
    """The conversation_id of a completion: its drawing's label, its group's number there and its own place in it."""
    return f"{drawing}-{group}-{sample}"


def parts_of(conversation_id: str) -> tuple[str, int, int]:
    """What `name_of` made the conversation_id of."""
    drawing, group, sample = conversation_id.rsplit("-", 2)
    return drawing, int(group), int(sample)


def conversation(rollout: Rollout, decode: Callable[[Tensor], str]) -> list[Message]:
    """Everything said after the prompt, {role, content} each; without an environment one message of the assistant's.

    The caller's to change: a function that runs in this process may."""
    messages: list[Message] = []
    start = 0
    for reply in rollout.replies:
        messages += [_turn(rollout.token_ids[start : reply.start], decode), *map(dict, reply.messages)]
        start = reply.end
    if start < len(rollout.token_ids):
        messages.append(_turn(rollout.token_ids[start:], decode))
    return messages


def last_turn(messages: list[Message]) -> str:
    """What the policy said last."""
    return next(message["content"] for message in reversed(messages) if message["role"] == "assistant")


def told(messages: list[Message]) -> str:
    """The messages for people to read; one alone is nothing but what it says."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def _turn(token_ids: Tensor, decode: Callable[[Tensor], str]) -> Message:
    return {"role": "assistant", "content": decode(token_ids)}
