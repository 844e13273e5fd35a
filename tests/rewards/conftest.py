"""Builders for groups whose tokens are the characters of their texts."""

import pytest
import torch

from fastgrpo.types import Prompt, Rollout, RolloutGroup


def make_prompt(prompt_id="train/17", answer="5", **metadata):
    return Prompt(prompt_id=prompt_id, token_ids=torch.tensor([50]), text="2+3=", answer=answer, metadata=metadata)


def make_group(texts, prompt_id="train/17", answer="5", finish_reasons=None, number=0, **metadata):
    rollouts = tuple(
        Rollout(
            prompt_id=prompt_id,
            token_ids=torch.tensor([ord(c) for c in text]),
            loss_mask=torch.ones(len(text), dtype=torch.bool),
            sampler_logprobs=torch.zeros(len(text)),
            finish_reason=finish_reasons[i] if finish_reasons else "stop",
            policy_version=0,
            conversation_id=f"train-1-0-{number}-{i}",
        )
        for i, text in enumerate(texts)
    )
    return RolloutGroup(prompt=make_prompt(prompt_id, answer, **metadata), rollouts=rollouts)


def decode_characters(token_ids):
    return "".join(chr(i) for i in token_ids.tolist())


@pytest.fixture
def prompt():
    return make_prompt


@pytest.fixture
def group():
    return make_group


@pytest.fixture
def decode():
    return decode_characters


@pytest.fixture
def reward_file(tmp_path):
    """Writes a module of reward functions and returns the path of one of them as the configuration names it."""

    def write(source, function="score"):
        file = tmp_path / "my_rewards.py"
        file.write_text(source)
        return f"{file}:{function}"

    return write
