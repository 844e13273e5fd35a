"""From the configuration to tokenized prompts: read the rows, hold some out, render, tokenize, check lengths."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.arithmetic import generate_rows
from fastgrpo.data.encode import encode
from fastgrpo.data.files import read_files
from fastgrpo.data.hub import read_hub
from fastgrpo.data.render import Renderer
from fastgrpo.data.rows import Row
from fastgrpo.data_files import names_in, shown
from fastgrpo.types import Prompt

SOURCES = ("jsonl", "parquet", "hub", "arithmetic")


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """The questions of a run. Example: PromptSets(train=[...], eval=[...], num_dropped=0, num_duplicates=2)."""

    train: list[Prompt]
    eval: list[Prompt]
    """Held out: no prompt of `train` says the same."""
    num_dropped: int
    """Prompts of either set left out for their length (data.long_prompts=drop)."""
    num_duplicates: int
    """Rows kept out of `train` because they repeat a held-out prompt."""
    num_files: int = 1
    """What data.path names."""

    @property
    def kinds(self) -> list[Prompt]:
        """The first prompt of each set of columns, in which files and rows of JSON Lines may differ."""
        kinds: dict[tuple[str, ...], Prompt] = {}
        for prompt in [*self.train, *self.eval]:
            kinds.setdefault(tuple(prompt.metadata), prompt)
        return list(kinds.values())

    @property
    def max_tokens(self) -> int:
        """The longest prompt's, of either set."""
        return max(len(prompt.token_ids) for prompt in [*self.train, *self.eval])


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What is read is no garbage, and to look through it again and again takes a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_nothing_collected()
def load_prompts(config: DataConfig, tokenizer: Any, *, seed: int, max_prompt_tokens: int) -> PromptSets:
    """Reads, splits, renders and tokenizes the data.

    `tokenizer` is a Hugging Face tokenizer. A prompt may have max_prompt_tokens tokens, or data.max_prompt_tokens
    where that is less. prompt_id is "train/17" or "eval/17" by the row's number over all files of the set, from 0;
    every column but the answer goes to `metadata`.

    The held-out rows are the data.eval_size prompts whose text has the smallest SHA-256: the same ones for every
    seed, row order and machine, and a larger eval_size only adds to them. Rows are compared by their prompt column,
    whitespace aside. Generated arithmetic draws its problems from `seed` (arithmetic.generate_rows).

    Raises UserError, one line naming the place and how to mend it, for anything wrong with the data.
    """
    _check(config)
    if config.source == "arithmetic":
        config = replace(config, prompt_column="prompt", answer_column="answer")
    train_rows, eval_rows, num_files = _read(config, seed)
    prompt_keys = {id(row): _prompt_key(row, config) for row in [*train_rows, *eval_rows]}
    if _splits(config):
        eval_rows = _hold_out(train_rows, prompt_keys, config)
    held_out = {prompt_keys[id(row)] for row in eval_rows}
    kept_rows = [row for row in train_rows if prompt_keys[id(row)] not in held_out]
    if not kept_rows:
        raise UserError("every training prompt is among the held-out ones; give data.path prompts of its own")
    limit = min(max_prompt_tokens, config.max_prompt_tokens or max_prompt_tokens)
    build = _PromptBuilder(config, tokenizer, limit)
    train, evaluation = build(kept_rows, "train"), build(eval_rows, "eval")
    if not train:
        raise UserError(f"data.long_prompts=drop left no training prompt within {limit} tokens; raise the limit")
    return PromptSets(
        train=train,
        eval=evaluation,
        num_dropped=len(kept_rows) + len(eval_rows) - len(train) - len(evaluation),
        num_duplicates=len(train_rows) - len(kept_rows) - (len(eval_rows) if _splits(config) else 0),
        num_files=num_files,
    )


def _splits(config: DataConfig) -> bool:
    """Whether questions are held out of the training file, because none of their own are given."""
    return config.source != "arithmetic" and config.eval_path is None and config.eval_split is None


def _check(config: DataConfig) -> None:
    if config.source not in SOURCES:
        raise UserError(f"data.source={config.source} is unknown; use one of {', '.join(SOURCES)}")
    if config.source == "arithmetic" and config.path is not None:
        raise UserError(
            f"data.path={shown(config.path)} is not read by data.source=arithmetic; set data=jsonl, parquet or hub"
        )
    if config.source != "arithmetic" and config.path is None:
        raise UserError(f"data.path is not set, which data.source={config.source} reads; set it or use data=arithmetic")
    if config.eval_path is not None and config.source in ("hub", "arithmetic"):
        mend = "use data.eval_split" if config.source == "hub" else "remove it"
        raise UserError(f"data.eval_path={shown(config.eval_path)} is not read by data.source={config.source}; {mend}")
    if config.eval_split is not None and config.source != "hub":
        raise UserError(f"data.eval_split={config.eval_split} is only read by data.source=hub; use data.eval_path")
    if config.source == "hub" and len(names_in(config.path, "data.path")) > 1:
        raise UserError(f"data.path={shown(config.path)}: data.source=hub reads one data set; name one")
    if config.long_prompts not in ("fail", "drop"):
        raise UserError(f"data.long_prompts={config.long_prompts} is unknown; use fail or drop")
    if config.prompt_template.count("{prompt}") != 1:
        raise UserError(f"data.prompt_template={config.prompt_template!r} must hold {{prompt}} once")


def _read(config: DataConfig, seed: int) -> tuple[list[Row], list[Row], int]:
    """The training rows, those that the user held out, and how many files the former are from."""
    if config.source == "arithmetic":
        return *generate_rows(config, seed=seed), 1
    if config.source == "hub":
        (name,) = names_in(config.path, "data.path")
        evaluation = read_hub(name, config.hub_config, config.eval_split) if config.eval_split else []
        return read_hub(name, config.hub_config, config.split), evaluation, 1
    train_rows, num_files = read_files(config.path, "data.path", config.source)
    held_out = config.eval_path is not None
    eval_rows = read_files(config.eval_path, "data.eval_path", config.source)[0] if held_out else []
    return train_rows, eval_rows, num_files


def _prompt_key(row: Row, config: DataConfig) -> str:
    """What makes two rows the same question."""
    value = _column(row, config.prompt_column, "data.prompt_column", "")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return " ".join(text.split())


def _column(row: Row, column: str, key: str, mend: str) -> Any:
    value: Any = row.values
    for name in [column] if column in row.values else column.split("."):  # a.b is the entry b of a column a
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(row.values) or "none"
            raise UserError(f"{row.place} has no column {column!r} ({key}); its columns are {there}{mend}")
        value = value[name]
    return value


def _hold_out(rows: list[Row], prompt_keys: dict[int, str], config: DataConfig) -> list[Row]:
    """The first row of each held-out prompt, in the data's order."""
    first_rows: dict[str, Row] = {}
    for row in rows:
        first_rows.setdefault(prompt_keys[id(row)], row)
    if config.eval_size >= len(first_rows):
        raise UserError(
            f"data.eval_size={config.eval_size} leaves nothing to train on: {shown(config.path)} has {len(first_rows)} "
            f"different prompts; lower it or give data.eval_path"
        )
    by_hash = sorted(first_rows, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return sorted((first_rows[text] for text in by_hash[: config.eval_size]), key=lambda row: row.index)


class _PromptBuilder:
    """Turns rows into prompts of at most `limit` tokens."""

    def __init__(self, config: DataConfig, tokenizer: Any, limit: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._renderer = Renderer(config, tokenizer)
        self._limit = limit

    def __call__(self, rows: list[Row], set_name: str) -> list[Prompt]:
        texts = [
            self._renderer(row, _column(row, self._config.prompt_column, "data.prompt_column", "")) for row in rows
        ]
        special_tokens = not self._renderer.chat  # a chat template writes its own
        all_ids = encode(self._tokenizer, texts, [row.place for row in rows], special_tokens=special_tokens)
        prompts = []
        for row, text, ids in zip(rows, texts, all_ids, strict=True):
            prompt_id = f"{set_name}/{row.index}"
            if self._fits(row, prompt_id, len(ids)):
                prompts.append(self._prompt(row, prompt_id, text, ids))
        return prompts

    def _fits(self, row: Row, prompt_id: str, length: int) -> bool:
        if length <= self._limit:
            return True
        if self._config.long_prompts == "drop":
            return False
        raise UserError(
            f"prompt {prompt_id} ({row.place}) has {length} tokens, more than the {self._limit} that fit; raise "
            f"data.max_prompt_tokens (or lower sampling.max_new_tokens), or set data.long_prompts=drop"
        )

    def _prompt(self, row: Row, prompt_id: str, text: str, ids: Tensor) -> Prompt:
        answer = None
        if self._config.answer_column is not None:
            mend = "; data.answer_column=null is for data without answers"
            answer = _column(row, self._config.answer_column, "data.answer_column", mend)
        return Prompt(
            prompt_id=prompt_id,
            token_ids=ids,
            text=text,
            answer=answer,
            metadata={name: value for name, value in row.values.items() if name != self._config.answer_column},
        )
