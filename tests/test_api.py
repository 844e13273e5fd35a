"""fastgrpo from a notebook: one's own prompts and reward function in a dozen lines."""

import os
import signal

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

import fastgrpo
from fastgrpo.config import UserError

SMALL = [
    "run.console=none",
    "run.trackers=[]",
    "reward.num_workers=0",
    "train.num_steps=2",
    "train.prompts_per_step=4",
    "train.learning_rate=1e-3",
    "algorithm.group_size=4",
    "sampling.max_new_tokens=6",
]


def test_a_dozen_lines_train_on_own_prompts_and_reward(workplace, tiny_qwen2, monkeypatch):
    calls = []

    def vowels(completion, answer):
        calls.append((completion, answer))
        return sum(letter in "aeiou" for letter in completion.lower())

    monkeypatch.setenv("HOME", str(workplace))
    questions = [{"question": f"Say {i}: ", "answer": np.int64(i)} for i in range(20)]
    overrides = [f"model.path={tiny_qwen2}", 'run.dir="~/mine"', *SMALL]
    result = fastgrpo.train(questions, reward=vowels, overrides=overrides)

    assert [row["step"] for row in result.metrics] == [0, 1, 2]
    assert result.metrics[-1]["policy_version"] == 2
    assert result.model_path == result.run_dir / "hf"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(result.model_path)
    assert {answer for _, answer in calls} <= set(range(20))
    assert len(calls) >= 2 * 4 * 4
    assert (result.run_dir / "report.html").exists()


def test_texts_alone_are_prompts_and_a_tenth_is_held_out(workplace, tiny_qwen2):
    def seen(completion, prompt, question):
        return float(prompt == question and question in texts)

    texts = [f"Say {i}: " for i in range(20)]
    result = fastgrpo.train(texts, reward=seen, overrides=[f"model.path={tiny_qwen2}", "run.dir=run", *SMALL])
    assert str(result.run_dir) == "run"
    assert result.metrics[-1]["reward/mean"] == 1.0
    assert result.metrics[0]["eval/accuracy"] == 1.0


def test_a_closure_is_sent_to_worker_processes(workplace, tiny_qwen2):
    bonus = 0.5
    overrides = [f"model.path={tiny_qwen2}", *SMALL, "reward.num_workers=1", "train.num_steps=1"]
    result = fastgrpo.train(["a", "b", "c", "d"], reward=lambda completion: bonus, overrides=overrides)
    assert result.metrics[-1]["reward/mean"] == 0.5


def test_a_stopped_training_goes_on(workplace, tiny_qwen2):
    def length(completion):
        return len(completion) / 10

    sent = []

    def stopping(completion):
        if completion != "0" and not sent:  # no made-up one; and a second signal would not wait for the step
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return len(completion) / 10

    overrides = [f"model.path={tiny_qwen2}", *SMALL, "run.dir=run"]
    prompts = [f"{i}=" for i in range(8)]
    result = fastgrpo.train(prompts, reward=stopping, overrides=overrides)
    assert result.stopped
    assert [row["step"] for row in result.metrics] == [0, 1]
    result = fastgrpo.train(prompts, reward=length, overrides=[*overrides, "resume=auto"])
    assert not result.stopped
    assert [row["step"] for row in result.metrics] == [0, 1, 2]
    limited = fastgrpo.train(prompts, length, [*overrides, "run.dir=limited", "train.time_limit_minutes=1e-6"])
    assert (limited.stopped, limited.metrics[-1]["step"]) == (True, 1)
    whole = fastgrpo.train(prompts, reward=length, overrides=[*overrides, "run.dir=whole"])
    assert (result.model_path / "model.safetensors").read_bytes() == (
        whole.model_path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("prompts", "overrides", "message"),
    [
        ([3], [], "prompts: 3 is neither a text nor a mapping of columns"),
        ("What is 2 + 3?", [], "prompts: a str is no list of prompts; give a list of texts"),
        ([{"question": "a", "answer": {1}}], [], "holds what JSON cannot (a set); give texts, numbers or lists"),
        ([{"question": "a", "answer": "1"}, {"question": "b"}], [], "line 2 has no column 'answer'"),
        (["a"], ["train.learning_rat=1"], "train.learning_rat: no such key; did you mean train.learning_rate"),
        ([], [], "prompts: an empty list; give at least one, or None for the configured data"),
        (["a"], "train.num_steps=1", "overrides: 'train.num_steps=1' is one text; give a list of KEY=VALUE texts"),
        ([{"text": "a"}], [], "has no column 'question' (data.prompt_column); its columns are text"),
    ],
)
def test_mistakes_are_raised_in_one_line(prompts, overrides, message, workplace, tiny_qwen2):
    if isinstance(overrides, list):
        overrides = [f"model.path={tiny_qwen2}", *SMALL, *overrides]
    with pytest.raises(UserError) as error:
        fastgrpo.train(prompts, reward=lambda completion: 0.0, overrides=overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_prompts_it_trains_on_the_configured_data(workplace, tiny_qwen2):
    more = ["data=arithmetic", "data.num_problems=20", "data.eval_size=2", "run.dir=run"]
    with hydra.initialize_config_dir(str(workplace), version_base="1.3"):  # the caller's script uses Hydra too
        result = fastgrpo.train(overrides=[f"model.path={tiny_qwen2}", *SMALL, *more])
        assert GlobalHydra.instance().is_initialized()
    assert len(result.metrics) == 3
