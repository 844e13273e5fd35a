"""What an environment's function is given and what it may return. Imports no torch: workers start from here."""

from __future__ import annotations

from typing import Any

from fastgrpo.functions.contract import Unusable, shown

OFFERED = ("turn", "raw_turn", "conversation", "num_turns", "conversation_id", "prompt", "answer", "metadata")
"""What the function can ask for."""


def normalize(result: Any) -> list[dict[str, str]] | Unusable:
    """Turns what the function returned into messages: none to end, a text as the user's, a message or several."""
    if result is None:
        return []
    if isinstance(result, str):
        result = {"role": "user", "content": result}
    messages = [result] if isinstance(result, dict) else result
    if not isinstance(messages, list | tuple) or not messages or not all(map(_is_message, messages)):
        return Unusable(shown(result))
    return [{plain(name): plain(value) for name, value in message.items()} for message in messages]


def plain(text: str) -> str:
    """The text as a str that crosses processes (a page's parser returns ones that hold the page), of characters that a
    tokenizer takes: half of a pair, such as a policy may write in JSON, becomes a question mark."""
    return str.__str__(text).encode("utf-8", "replace").decode("utf-8")


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        return False
    return all(isinstance(part, str) for part in [*value, *value.values()]) and value["role"] != "assistant"
