"""A row's prompt as the text that the model reads: through the chat template, or plain."""

from __future__ import annotations

from typing import Any

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.messages import read_messages
from fastgrpo.data.rows import Row


class Renderer:
    """Callable (row, prompt value) -> text. `chat` says whether the tokenizer's chat template is applied."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self.chat = uses_chat_template(config, tokenizer)
        why = "data.chat_template=false" if not config.chat_template else "a tokenizer without a chat template"
        self._no_chat = f"{why} cannot use"
        if config.system_prompt is not None and not self.chat:
            raise UserError(f"data.system_prompt: {self._no_chat} it; put it into data.prompt_template instead")

    def __call__(self, row: Row, prompt: Any) -> str:
        """Raises UserError, naming the row's place, for a prompt that is neither text nor chat messages."""
        column = f"{row.place}, column {self._config.prompt_column!r}"
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UserError(f"{column} is empty; give a prompt or remove the row")
            text = self._config.prompt_template.replace("{prompt}", prompt)
            return self._chat([{"role": "user", "content": text}], column) if self.chat else text
        messages = read_messages(prompt, column)
        if not self.chat:
            raise UserError(f"{column} holds chat messages, which {self._no_chat}; give texts")
        if self._config.prompt_template != "{prompt}":
            raise UserError(f"{column} holds chat messages, which data.prompt_template cannot wrap; remove it")
        return self._chat(messages, column)

    def _chat(self, messages: list[dict[str, Any]], column: str) -> str:
        if self._config.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise UserError(f"{column} has a system message of its own; remove data.system_prompt")
            messages = [{"role": "system", "content": self._config.system_prompt}, *messages]
        return apply_template(self._tokenizer, messages, self._config, column)


def uses_chat_template(config: DataConfig, tokenizer: Any) -> bool:
    """Whether there is a chat template and it is to be applied."""
    return bool(config.chat_template and getattr(tokenizer, "chat_template", None))


def apply_template(tokenizer: Any, messages: list[dict[str, Any]], config: DataConfig, place: str) -> str:
    """The messages as text, up to where the assistant begins. Raises UserError, naming the place, where it refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except Exception as error:  # the template is a program of the model's author
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{place}: the chat template refuses it ({reason}); change the messages") from error
