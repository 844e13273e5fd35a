"""What an environment says, as the tokens that the policy reads between two turns of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.encode import encode
from fastgrpo.data.render import apply_template, uses_chat_template

# Stands for the policy's turn while the chat template is asked what follows one.
TURN = "7d1f2c9e"


class ReplyEncoder:
    """Callable (messages, the policy's last token, whose reply it is, for errors) -> (E,) int64.

    With a chat template: whatever the template writes after the policy's turn, the messages and what leads to the next
    turn. The policy's own tokens are never made again from their text, so its logprobs stay those it drew them with.
    Without one the messages' contents, one after the other.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._config = config
        self._tokenizer = tokenizer
        self._chat = uses_chat_template(config, tokenizer)
        self._written: set[tuple[str, ...]] = set()
        """Roles of replies that the template is known to write out."""

    def __call__(self, messages: Sequence[dict[str, str]], last_token: int, place: str) -> Tensor:
        """Raises UserError for what the template refuses, the tokenizer cannot encode or the model cannot read."""
        text = self._after_turn(messages, place) if self._chat else "".join(message["content"] for message in messages)
        (ids,) = encode(self._tokenizer, [text], [place], special_tokens=False)
        if (largest := int(ids.max())) >= self._vocab_size:
            raise UserError(
                f"{place}: its token {largest} is none of the model's 0 to {self._vocab_size - 1}; change it"
            )
        # The token that ended the policy's turn is what the template, too, puts behind one.
        return ids[1:] if self._chat and ids[0] == last_token else ids

    def _after_turn(self, messages: Sequence[dict[str, str]], place: str) -> str:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._written:
            marks = [f"{TURN[::-1]}x{number}x" for number in range(len(roles))]
            marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
            text = self._render(marked, place)
            lost = next((role for role, mark in zip(roles, marks, strict=True) if mark not in text), None)
            if lost is not None:  # many templates pass over a role that they do not know
                raise UserError(f"{place}: the chat template leaves out a message of role {lost}; give it another role")
            self._written.add(roles)
        return self._render(messages, place)

    def _render(self, messages: Sequence[dict[str, str]], place: str) -> str:
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": TURN}, *messages]
        text = apply_template(self._tokenizer, asked, self._config, place)
        _, found, after = text.rpartition(TURN)
        if not found:
            raise UserError("environment: the chat template leaves out what the assistant said before; use another one")
        return after
