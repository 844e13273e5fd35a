"""Runs that compute a mixture of experts with the sampler's choice of them."""

import pytest
from builders import save_tiny_model, small_run
from runs import rows_of, without_clock

from fastgrpo.config import UserError
from fastgrpo.main import compose, with_shorthands
from fastgrpo.validate import validate

REPLAYED = "moe/replayed_difference"


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def config_of(*options):
    return compose("train", with_shorthands([*options, "learner.router_replay=true"]))[0]


def trained(*options):
    return rows_of(*options, "learner.router_replay=true")


def test_replay_is_exact_while_the_policy_stands_still_and_tells_how_far_it_has_moved(workplace, tiny_moe):
    rows = trained(
        *small_run(tiny_moe, "train.updates_per_rollout=3", "train.learning_rate=0.05", "algorithm.kl_coef=0.1")
    )
    assert rows[-1][REPLAYED] > 0  # of the updates after a step's first
    assert rows[-1]["sampler_mismatch/max_abs"] < 1e-4  # the old policy's logprobs are of the same experts
    assert rows[-1]["eval/accuracy"] >= 0
    first = trained(*small_run(tiny_moe, "run.dir=single", "train.num_steps=1"))[-1]
    assert first[REPLAYED] == 0.0


def test_choices_of_unfinished_completions_survive_a_stop(workplace, tiny_moe):
    oversampled = ("sampler.oversample=0.5", "sampler.round_tokens=2", "algorithm.importance_level=token")
    rates = ("train.learning_rate=0.05", "sampling.max_new_tokens=16", "eval.every=0")
    saved = ("checkpoint.every=1", "checkpoint.keep=9", "train.num_steps=4")
    options = small_run(tiny_moe, *oversampled, *rates, *saved)
    whole = trained(*options)
    assert whole[-1]["staleness/max"] >= 1
    assert whole[-1][REPLAYED] > 0
    trained(*options, "run.dir=other")
    again = trained(*options, "run.dir=other", "resume=other/checkpoints/step-000002")
    assert without_clock(whole) == without_clock(again)


def test_a_model_without_experts_is_refused(workplace, tiny_qwen2, monkeypatch):
    monkeypatch.setattr("fastgrpo.assemble.make_learner", None)  # before any model is loaded
    with pytest.raises(UserError, match=r"^learner.router_replay=true: the model of model.path=.* has no experts; use"):
        trained(*small_run(tiny_qwen2))
    with pytest.raises(UserError, match=r"^learner.router_replay=true: the quickstart's model has no experts"):
        validate(config_of())


def test_a_sampler_that_cannot_tell_its_experts_is_refused(workplace, tiny_moe, monkeypatch):
    monkeypatch.setattr("fastgrpo.assemble.make_learner", None)
    with pytest.raises(UserError, match=r"^learner.router_replay=true: on a CPU vLLM .*; use sampler=torch$"):
        trained(*small_run(tiny_moe, "sampler=vllm", "cluster.device=cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^sampler.tp=2: .*; with learner.router_replay use 1$"):
        validate(config_of(*small_run(tiny_moe, "learner=megatron", "sampler=vllm", "sampler.tp=2")))
