"""Tokenization in batches, which refuses text that the tokenizer would lose."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import UserError

BATCH = 1000


def encode(tokenizer: Any, texts: list[str], places: list[str], *, special_tokens: bool) -> list[Tensor]:
    """Every text's token ids, int64, with the tokenizer's own special tokens (such as BOS) where asked for. A text that
    begins with BOS itself, as one that a chat template has written does, gets no second one.

    `places[i]` says where texts[i] came from. Raises UserError for a character that the tokenizer maps to nothing
    or to its unknown token, and for a tokenizer that puts its end token behind a prompt.
    """
    _refuse_lost_characters(tokenizer, texts, places)
    ids: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        batch = slice(start, start + BATCH)
        rows = tokenizer(texts[batch], add_special_tokens=special_tokens, return_attention_mask=False)["input_ids"]
        for text, row, place in zip(texts[batch], rows, places[batch], strict=True):
            _check(tokenizer, text, row, place, special_tokens)
            begins_twice = special_tokens and row[:2] == [tokenizer.bos_token_id] * 2
            # At once, as Python's integers take four times the memory; by NumPy, as torch.tensor took a fifth longer.
            ids.append(torch.from_numpy(np.array(row[1:] if begins_twice else row, np.int64)))
    return ids


def _check(tokenizer: Any, text: str, row: list[int], place: str, special_tokens: bool) -> None:
    if not row:
        raise UserError(f"{place}: the tokenizer makes no token of {text!r:.60}; give another text")
    if special_tokens and row[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        raise UserError(
            "the tokenizer puts its end token behind every prompt, so that the model has nothing to answer; "
            "set add_eos_token to false in its tokenizer_config.json"
        )


def _refuse_lost_characters(tokenizer: Any, texts: list[str], places: list[str]) -> None:
    """Few characters are suspect, lost where they stand alone; only texts that hold one are looked at."""
    unknown = _unknown_id(tokenizer)
    characters = sorted(set[str]().union(*texts))
    alone = {character: _encode_character(tokenizer, character) for character in characters}
    vanishing = {c for c, ids in alone.items() if ids == [] and not c.isspace()}  # words may swallow white space
    suspects = {c for c, ids in alone.items() if ids is None or unknown in ids} | vanishing
    for text, place in zip(texts, places, strict=True):
        held = sorted(suspects.intersection(text))
        lost = [c for c in held if c in vanishing or _is_unknown_in(tokenizer, text, c, unknown)]
        if lost:
            raise UserError(
                f"{place}: the tokenizer cannot encode {', '.join(map(repr, lost))}; "
                f"remove it or use a tokenizer that knows it"
            )


def _unknown_id(tokenizer: Any) -> int | None:
    """The unknown token, also where only the model inside the tokenizer knows that it has one."""
    if tokenizer.unk_token_id is not None or not tokenizer.is_fast:
        return tokenizer.unk_token_id
    token = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(token)


@functools.lru_cache(maxsize=1 << 16)
def _encode_character(tokenizer: Any, character: str) -> list[int] | None:
    """Remembered, because an environment's replies come by the thousand and one at a time."""
    return _encode_alone(tokenizer, character)


def _encode_alone(tokenizer: Any, text: str) -> list[int] | None:
    """The text's ids, or None where the tokenizer fails on it: a vocabulary without an unknown token."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception:  # the tokenizers library raises nothing more special
        return None


def _is_unknown_in(tokenizer: Any, text: str, character: str, unknown: int | None) -> bool:
    """Whether the character, unknown alone, is unknown in the text too, and not part of a known word."""
    ids = _encode_alone(tokenizer, text)
    if ids is None:
        return True
    if not tokenizer.is_fast:  # no offsets to tell which character it was
        return unknown in ids
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return any(character in text[start:end] for token, (start, end) in spans if token == unknown)
