"""What recomputation saves, and what the plan says of it; that it computes the same is in test_learner.py's cases."""

import pytest
from adapters import TARGETS
from scenario import model_of

from fastgrpo.models.activations import Kept
from fastgrpo.models.shape import Shape


def test_selective_drops_what_feed_forwards_keep_and_full_all_but_the_layers_inputs(results_of):
    shape = Shape.of(model_of("qwen2-tied").config)
    none, selective, full = (
        results_of(1)["kept_activations"][f"qwen2-tied {k}"] for k in ("none", "selective", "full")
    )
    inputs = (shape.num_layers + 1) * shape.hidden_size * 4
    assert inputs < full < 1.2 * inputs  # and the last norm's, and what all layers rotate by
    assert none - selective == 4 * 3 * 96 * 4  # layers, gate and up and their product, feed-forward size, bytes


@pytest.mark.parametrize("case", ["qwen2-tied none", "qwen2-tied selective", "qwen3 none frozen", "qwen3_moe none"])
def test_the_plan_counts_what_autograd_keeps(case, results_of):
    model, kind, *frozen = case.split()
    shape = Shape.of(model_of(model).config)
    adapters = {"rank": 3, "targets": TARGETS[model]} if frozen else {}
    kept = Kept(shape=shape, size=4, megatron=True, selective=kind == "selective", **adapters)
    last_norm = 4 * shape.hidden_size
    expected = shape.num_layers * kept.per_token + last_norm
    assert results_of(1)["kept_activations"][case] == pytest.approx(expected, rel=0.03)
