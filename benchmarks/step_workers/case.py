"""What both sides are given: one model, one tokenizer, one file of prompts, one reward, one set of numbers."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

SPECIAL_TOKENS = ("<pad>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen2 made from nothing. The default has 4.2M parameters."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 1024
    vocab_size: int = 512

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of every matrix of one layer: q, k, v, o, gate, up, down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_heads * self.num_kv_heads
        attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting that both sides run. Every completion has exactly new_tokens tokens: its end token is forbidden."""

    directory: str
    """Holds model/, prompts.jsonl and what the sides write."""
    prompt_length: int
    shape: Shape = Shape()
    prompts_per_step: int = 8
    group_size: int = 8
    new_tokens: int = 64
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    clip_ratio: float = 0.2
    num_prompts: int = 256
    groups_per_microbatch: int = 1
    """Groups in one forward and backward pass of the update; prompts_per_step must be divisible by it."""

    @property
    def model_path(self) -> str:
        return str(Path(self.directory) / "model")

    @property
    def prompts_path(self) -> str:
        return str(Path(self.directory) / "prompts.jsonl")

    @property
    def num_microbatches(self) -> int:
        return self.prompts_per_step // self.groups_per_microbatch

    @property
    def num_sequences(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def completion_tokens(self) -> int:
        """Sampled and scored tokens a step."""
        return self.num_sequences * self.new_tokens

    @property
    def sequence_tokens(self) -> int:
        """Prompt and completion tokens of every sequence, each with its own prompt, as peers count."""
        return self.num_sequences * (self.prompt_length + self.new_tokens)


def prepare(case: Case) -> None:
    """Write the model, its tokenizer and the prompts: the same bytes for every call with the same case."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    transformers.utils.logging.disable_progress_bar()
    shape = case.shape
    byte_tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    unused = [f"<unused{i}>" for i in range(shape.vocab_size - len(byte_tokens))]  # can be sampled all the same
    vocabulary = {token: i for i, token in enumerate(byte_tokens + unused)}
    # A token a byte: Qwen2's tokenizer without its merges.
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(case.model_path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=case.prompt_length + case.new_tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(case.model_path)
    generator = random.Random(0)
    with open(case.prompts_path, "w", encoding="utf-8") as file:
        for _ in range(case.num_prompts):
            prompt = "".join(generator.choices(string.ascii_letters, k=case.prompt_length))
            file.write(json.dumps({"prompt": prompt}) + "\n")


class EvenShare:
    """The reward of both sides: the share of a completion's tokens that are even. It counts the tokens it is shown."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def fastgrpo(self, completions: list[str], token_ids: list[list[int]]) -> list[float]:
        return self._score(token_ids)

    def trl(self, completion_ids: list[list[int]], **_: object) -> list[float]:
        return self._score(completion_ids)

    def _score(self, completions: list[list[int]]) -> list[float]:
        self.num_tokens += sum(map(len, completions))
        return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completions]

    def take_count(self) -> int:
        """The tokens since the last call."""
        count, self.num_tokens = self.num_tokens, 0
        return count
