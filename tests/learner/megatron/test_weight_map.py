"""Which rows of a rank's parameter are which part of a Hugging Face tensor, literally."""

import pytest
import transformers

from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.weight_map import Box, Place, boxes_of

ARCHITECTURE = Architecture.of(
    transformers.Qwen2Config(
        vocab_size=70,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
)  # head size 2


@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (1, 0, [("q", 0, 8, 0), ("k", 0, 4, 8), ("v", 0, 4, 12)]),
        (2, 1, [("q", 4, 4, 0), ("k", 2, 2, 4), ("v", 2, 2, 6)]),
        # Two ranks for each key/value head: equal cuts of its [Q; K; V].
        (4, 2, [("q", 4, 4, 0)]),
        (4, 3, [("k", 2, 2, 0), ("v", 2, 2, 2)]),
    ],
)
def test_a_rank_holds_its_queries_then_its_keys_then_its_values(tp, tp_rank, expected):
    boxes = boxes_of("decoder.layers.0.self_attention.linear_qkv.bias", ARCHITECTURE, Place(tp=tp, tp_rank=tp_rank))
    assert [(box.name, *box.start, *box.shape, box.row) for box in boxes] == [
        (f"model.layers.0.self_attn.{letter}_proj.bias", *rest) for letter, *rest in expected
    ]


def test_a_rank_holds_its_gate_then_its_up_projection():
    boxes = boxes_of("decoder.layers.0.mlp.linear_fc1.weight", ARCHITECTURE, Place(tp=2, tp_rank=1))
    common = {"full_shape": (4, 8), "start": (2, 0), "shape": (2, 8)}
    assert boxes == [
        Box(name="model.layers.0.mlp.gate_proj.weight", row=0, **common),
        Box(name="model.layers.0.mlp.up_proj.weight", row=2, **common),
    ]


def test_a_row_parallel_matrix_is_cut_along_its_columns():
    (box,) = boxes_of("decoder.layers.0.mlp.linear_fc2.weight", ARCHITECTURE, Place(tp=2, tp_rank=1))
    assert (box.full_shape, box.start, box.shape) == ((8, 4), (0, 2), (8, 2))


@pytest.mark.parametrize(
    ("tp", "tp_rank", "start", "rows", "padding"),
    [(1, 0, 0, 70, 58), (2, 0, 0, 64, 0), (2, 1, 64, 6, 58), (4, 2, 64, 6, 26), (4, 3, 70, 0, 32)],
)
def test_the_vocabulary_ends_in_rows_of_padding(tp, tp_rank, start, rows, padding):
    (box,) = boxes_of("embedding.word_embeddings.weight", ARCHITECTURE, Place(tp=tp, tp_rank=tp_rank))
    assert (box.start, box.shape, box.num_padding_rows) == ((start, 0), (rows, 8), padding)
    assert box.name == "model.embed_tokens.weight"


MIXTURE = Architecture.of(
    transformers.Qwen3MoeConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        moe_intermediate_size=4, head_dim=2,
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("place", "kind", "expected"),
    [
        # Whole experts, of which this rank holds the last two.
        (Place(tp=2, tp_rank=0, ep=2, ep_rank=1), "gate_up_proj", [
            ("2.gate", (0, 0), (4, 8), 0), ("2.up", (0, 0), (4, 8), 4),
            ("3.gate", (0, 0), (4, 8), 8), ("3.up", (0, 0), (4, 8), 12),
        ]),
        (Place(ep=4, ep_rank=1), "down_proj", [("1.down", (0, 0), (8, 4), 0)]),
        # All experts, of each of which this rank holds half.
        (Place(tp=2, tp_rank=1), "down_proj", [(f"{e}.down", (0, 2), (8, 2), 8 * e) for e in range(4)]),
    ],
)  # fmt: skip
def test_a_rank_holds_whole_experts_or_parts_of_all(place, kind, expected):
    boxes = boxes_of(f"decoder.layers.0.mlp.experts.{kind}", MIXTURE, place)
    assert [(box.name, box.start, box.shape, box.row) for box in boxes] == [
        (f"model.layers.0.mlp.experts.{name}_proj.weight", *rest) for name, *rest in expected
    ]
