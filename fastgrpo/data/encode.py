"""Tokenization in batches, which refuses text that the tokenizer would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgrpo.config import UserError

BATCH = 1000


def encode(tokenizer: Any, texts: list[str], places: list[str], *, special_tokens: bool) -> list[list[int]]:
    """The token ids of every text, with the tokenizer's own special tokens (such as BOS) where asked for.

    `places[i]` says where texts[i] came from. Raises UserError for a character that the tokenizer maps to nothing
    or to its unknown token, and for a tokenizer that puts its end token behind a prompt.
    """
    _refuse_lost_characters(tokenizer, texts, places)
    ids: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], add_special_tokens=special_tokens)
        ids.extend(list(row) for row in batch["input_ids"])
    for text, row, place in zip(texts, ids, places, strict=True):
        if not row:
            raise UserError(f"{place}: the tokenizer makes no token of the prompt {text!r:.60}; give another")
        if special_tokens and row[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            raise UserError(
                "the tokenizer puts its end token behind every prompt, so that the model has nothing to answer; "
                "set add_eos_token to false in its tokenizer_config.json"
            )
    return ids


def _refuse_lost_characters(tokenizer: Any, texts: list[str], places: list[str]) -> None:
    """Few characters are suspect (alone they give nothing or <unk>); only texts that hold one are looked at."""
    characters = sorted({character for text in texts for character in text})
    suspects = {character for character in characters if _is_lost(tokenizer, character)}
    if not suspects:
        return
    for text, place in zip(texts, places, strict=True):
        held = sorted(suspects.intersection(text))
        lost = [character for character in held if _is_lost_in(tokenizer, text, character)]
        if lost:
            raise UserError(
                f"{place}: the tokenizer cannot encode {', '.join(map(repr, lost))}; "
                f"remove it from the prompt or use a tokenizer that knows it"
            )


def _is_lost(tokenizer: Any, text: str) -> bool:
    try:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:  # a vocabulary without an unknown token makes the tokenizers library raise plain Exception
        return True
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return True
    return not ids and not text.isspace()  # many tokenizers fold white space into words


def _is_lost_in(tokenizer: Any, text: str, character: str) -> bool:
    """Whether an occurrence of the character, in its place in the text, is in the unknown token or in none."""
    if not tokenizer.is_fast:
        return _is_lost(tokenizer, text)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception:  # as above: the text holds something outside the vocabulary
        return True
    known = [character.isspace()] * len(text)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        known[start:end] = [token != tokenizer.unk_token_id] * (end - start)
    return any(not known[i] for i, other in enumerate(text) if other == character)
