"""A decoder's dimensions, and what follows from them: parameters, bytes, and how long its parts take.

Letters: H hidden, F feed-forward size, A / C query / key heads, D head size, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgrpo.models.storage import VOCAB_MULTIPLE

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""The families that every room computes: one architecture, whose options Shape.of tells apart."""
KV_BLOCK = 128
"""Tokens; no block of a sampler's cache is larger."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's dimensions. Example, Qwen3-0.6B: Shape(num_layers=28, hidden_size=1024, ffn_size=3072, num_heads=16,
    num_kv_heads=8, head_size=128, vocab_size=151936, tied=True, qkv_bias=False, qk_norm=True)"""

    num_layers: int
    hidden_size: int
    ffn_size: int
    """Of one expert where there are any."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    experts_per_token: int = 1

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration."""
        num_experts = getattr(config, "num_experts", None) or 0
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_size=config.moe_intermediate_size if num_experts else config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type.startswith("qwen3"),
            num_experts=num_experts,
            experts_per_token=config.num_experts_per_tok if num_experts else 1,
        )

    def num_layer_parameters(self, tp: int = 1, ep: int = 1) -> int:
        """One layer's parameters on one rank."""
        heads, width = self.num_heads + 2 * max(self.num_kv_heads, tp), self.head_size
        qkv, out = heads * width * (self.hidden_size + self.qkv_bias), self.num_heads * width * self.hidden_size
        attention = (qkv + out) // tp
        norms = 2 * self.hidden_size + 2 * width * self.qk_norm
        if self.num_experts:
            return attention + norms + self.num_expert_parameters(tp, ep) + self.hidden_size * self.num_experts
        return attention + norms + 3 * self.hidden_size * self.ffn_size // tp

    def num_expert_parameters(self, tp: int = 1, ep: int = 1) -> int:
        """Those of one layer's experts on one rank: whole ones where they are dealt out, else a cut of each."""
        return 3 * self.hidden_size * self.ffn_size * self.num_experts // (ep if ep > 1 else tp)

    def num_vocabulary_parameters(self, tp: int = 1) -> int:
        """The embedding's, or the head's, on one rank."""
        return (self.padded_vocab_size(tp) if tp > 1 else self.vocab_size) * self.hidden_size // tp

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary with rows added until every rank's shard is equally large."""
        multiple = VOCAB_MULTIPLE if VOCAB_MULTIPLE % tp == 0 else VOCAB_MULTIPLE * tp
        return -(-self.vocab_size // multiple) * multiple

    @property
    def head_in_layers(self) -> float:
        """The head's time over a layer's: their products' multiplications for one token."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        ffn = 3 * self.ffn_size * self.experts_per_token
        return self.vocab_size / (heads * self.head_size + ffn)

    def num_parameters(self, tp: int = 1, stages: Sequence[int] = (), ep: int = 1) -> int:
        """The parameters of the rank that holds most; stages: the layers of each rank of a pipeline."""
        layer, vocabulary = self.num_layer_parameters(tp, ep), self.num_vocabulary_parameters(tp)
        if len(stages) < 2:
            return self.num_layers * layer + vocabulary * (1 if self.tied else 2) + self.hidden_size
        first, *middle, last = (num_layers * layer for num_layers in stages)
        return max(first + vocabulary, *middle, last + vocabulary + self.hidden_size)

    def kv_bytes_per_token(self, size: int, tp: int = 1) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // tp) * self.head_size * size

    def kv_cache_bytes(self, num_sequences: int, length: int, size: int, tp: int = 1) -> int:
        """Room for so many sequences of `length` tokens at once, in whole blocks."""
        return num_sequences * -(-length // KV_BLOCK) * KV_BLOCK * self.kv_bytes_per_token(size, tp)
