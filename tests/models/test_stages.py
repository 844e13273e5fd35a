"""How the layers of a pipeline are dealt out."""

import itertools

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from fastgrpo.models.shape import Shape
from fastgrpo.models.stages import balanced_stages


def slowest(stages, head):
    return max(*stages[:-1], stages[-1] + head)


@pytest.mark.parametrize("head", [0.0, 0.4, 1.0, 3.2, 50.0])
@pytest.mark.parametrize(("num_layers", "num_stages"), [(4, 2), (7, 3), (8, 4), (9, 4), (5, 5)])
def test_no_other_deal_has_a_faster_slowest_stage(num_layers, num_stages, head):
    stages = balanced_stages(num_layers, head, num_stages)
    assert (len(stages), sum(stages)) == (num_stages, num_layers)
    every = (s for s in itertools.product(range(1, num_layers), repeat=num_stages) if sum(s) == num_layers)
    assert slowest(stages, head) == min(slowest(other, head) for other in every)
    assert list(stages[:-1]) == sorted(stages[:-1])


def test_without_a_head_that_counts_stages_are_equal():
    assert balanced_stages(28, 0.3, 4) == (7, 7, 7, 7)
    assert balanced_stages(28, 9.0, 1) == (28,)


def test_the_heads_of_known_models():
    """Qwen3-8B's head takes as long as 3.2 layers, Qwen3-30B-A3B's, of whose experts a token takes 8, as 5.5."""
    sizes = {"num_attention_heads": 32, "head_dim": 128, "vocab_size": 151936}
    dense = Qwen3Config(hidden_size=4096, intermediate_size=12288, num_key_value_heads=8, **sizes)
    experts = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        **sizes,
    )
    for config, head, stages in ((dense, 3.2, (10, 10, 10, 6)), (experts, 5.5, (13, 13, 14, 8))):
        found = Shape.of(config).head_in_layers
        assert found == pytest.approx(head, abs=0.1)
        assert balanced_stages(sum(stages), found, 4) == stages
