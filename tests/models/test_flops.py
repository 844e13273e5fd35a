"""The arithmetic of an update, counted by hand, by torch, and by going through a batch pair by pair."""

from unittest.mock import patch

import pytest
import torch
from builders import small_shape
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fastgrpo.data.packing import Sequence, pack
from fastgrpo.models.flops import attended_pairs, peak_flops, update_flops
from fastgrpo.models.shape import Shape


def batch_of(*lengths: tuple[int, int], share_prompts: bool = True):
    """One packed batch of sequences with these (prompt, completion) lengths; equal prompts are one group's."""
    sequences = [
        Sequence(
            sequence_id=i,
            group_id=prompt,
            prompt_ids=torch.arange(prompt),
            token_ids=torch.arange(completion),
            advantages=torch.ones(completion),
            token_weights=torch.ones(completion),
            sampler_logprobs=torch.zeros(completion),
        )
        for i, (prompt, completion) in enumerate(lengths)
    ]
    (batch,) = pack(sequences, max_tokens=1000, share_prompts=share_prompts)
    return batch


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_matrices_and_attention_are_what_torch_counts(kind):
    """Of one sequence whose every token is scored: torch counts all of attention's square, we the half it may see."""
    config = small_shape(kind)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    batch, shape = batch_of((1, 13)), Shape.of(config)
    with FlopCounterMode(display=False) as counted:
        model(batch.token_ids[None])
    counts = counted.get_flop_counts()
    of_all = counts["Global"]
    products = sum(count for name, count in of_all.items() if "bmm" in str(name))
    matrices = sum(of_all.values()) - products
    # transformers 5.16 multiplies positions by frequencies with bmm, too
    attention = products - sum(sum(of.values()) for name, of in counts.items() if name.endswith(".rotary_emb"))
    squares = 4 * shape.num_layers * shape.num_heads * shape.head_size * batch.num_tokens**2
    seen = squares * (batch.num_tokens + 1) // (2 * batch.num_tokens)
    assert batch.num_tokens == batch.num_scored == 13
    assert attention == squares
    assert update_flops(shape, batch) == 3 * (matrices + seen)
    assert update_flops(shape, batch, frozen=True) == 2 * matrices + 3 * seen


@pytest.mark.parametrize("share_prompts", [True, False])
def test_pairs_are_those_that_attention_may_see(share_prompts):
    batch = batch_of((4, 3), (4, 6), (4, 1), (7, 2), share_prompts=share_prompts)
    seen = 0
    for start, end, prefix_start, prefix_end in batch.segments.tolist():
        for query in range(start, end):
            seen += sum(start <= key <= query or prefix_start <= key < prefix_end for key in range(batch.num_tokens))
    assert attended_pairs(batch.segments) == seen


def test_a_long_sequence_is_more_work_than_as_many_tokens_in_short_ones():
    shape = Shape.of(small_shape("qwen3"))
    long, short = batch_of((10, 101)), batch_of((10, 10), (11, 10), (12, 10), (13, 10))
    per_token = [update_flops(shape, batch) / batch.num_tokens for batch in (long, short)]
    assert per_token[0] > per_token[1]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_what_a_gpu_could_do(name, peak):
    with patch.object(torch.cuda, "get_device_name", return_value=name):
        assert peak_flops("cuda", torch.bfloat16) == peak
        assert peak_flops("cuda", torch.float32) is None
        assert peak_flops("cpu", torch.bfloat16) is None
