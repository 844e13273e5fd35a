"""A row's chat messages, checked, and as chat templates expect them."""

from __future__ import annotations

from typing import Any

from fastgrpo.config import UserError


def read_messages(prompt: Any, column: str) -> list[dict[str, Any]]:
    """The messages without keys of value None, which a column of Parquet or of the hub adds where messages differ and
    templates take for there, and with parts of text as one text, which many would print as a Python list.

    Raises UserError, naming the column's place, for what are no messages, or hold more than text.
    """
    if not isinstance(prompt, list):
        raise UserError(f"{column} is {prompt!r:.60}; give a text or a list of messages")
    if not prompt:
        raise UserError(f"{column} is an empty list of messages; give a prompt or remove the row")
    for number, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(f"{column}, message {number} is {message!r:.60}; give {{role: ..., content: ...}}")
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{column} ends with the assistant's message; the last one must be what it answers to")
    return [
        {**_without_none(message), "content": _text(message, f"{column}, message {number}")}
        for number, message in enumerate(prompt)
    ]


def _text(message: dict[str, Any], place: str) -> str | None:
    content = message["content"]
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: its content is {content!r:.60}, and models here read text alone; give a text")
    return "".join(texts)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value
