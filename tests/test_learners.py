"""Layouts that cannot be, refused before a model loads."""

import pytest
from builders import small_shape

from fastgrpo.config import UserError
from fastgrpo.learners import check_layout
from fastgrpo.main import compose


def test_a_sampler_that_can_neither_cut_nor_replicate_the_heads_is_refused_with_those_that_can():
    six = small_shape("llama", vocab_size=61, hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    check_layout(compose("train", ["sampler=vllm", "sampler.tp=12"])[0], six, 12)  # each twice
    message = "sampler.tp=4: cannot cut the model's 12 attention and 6 key/value heads; possible with 4 processes: 1, 2"
    with pytest.raises(UserError) as error:
        check_layout(compose("train", ["sampler=vllm", "sampler.tp=4"])[0], six, 4)
    assert str(error.value) == message
