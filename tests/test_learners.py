"""Layouts that cannot be, refused before a model loads."""

import pytest
from builders import small_shape

from fastgrpo import learners
from fastgrpo.config import UserError
from fastgrpo.learners import check_layout
from fastgrpo.main import compose
from fastgrpo.ranks import Ranks

HEADS = "cannot cut the model's 12 attention and 6 key/value heads"


@pytest.mark.parametrize(
    ("tp", "num_ranks", "line"),
    [
        (4, 4, f"{HEADS}; possible with 4 processes: 1, 2"),
        (5, 12, f"{HEADS}; possible with 12 processes: 1, 2, 3, 6, 12"),
        (
            3,
            4,
            "does not divide the number of processes (torchrun can start a multiple of 3); possible with 4 processes: "
            "1, 2",
        ),
    ],
)
def test_an_impossible_cut_of_the_sampler_is_refused_with_the_possible_ones(tp, num_ranks, line):
    six = small_shape("llama", vocab_size=61, hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    check_layout(compose("train", ["sampler=vllm", "sampler.tp=12"])[0], six, 12)  # each twice
    with pytest.raises(UserError) as error:
        check_layout(compose("train", ["sampler=vllm", f"sampler.tp={tp}"])[0], six, num_ranks)
    assert str(error.value) == f"sampler.tp={tp}: {line}"


def test_nodes_compare_the_model_and_the_adapters_that_a_run_goes_on_from(monkeypatch):
    pytest.importorskip("megatron.core")
    compared = []
    monkeypatch.setattr(learners, "started_by_torchrun", lambda: True)
    monkeypatch.setattr(learners, "check_prompts", lambda *_: None)
    monkeypatch.setattr(learners, "check_model", lambda *of: compared.append(of[:2]))
    config, _ = compose("train", ["model=hf", "model.path=policy", "model.lora.path=adapters", "learner=megatron"])
    with pytest.raises(UserError):  # neither is there
        learners.make_learner(config, None, None, Ranks(), print)
    assert compared == [("model.path", "policy"), ("model.lora.path", "adapters")]
