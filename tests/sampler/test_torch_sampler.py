"""The torch sampler against a plain Hugging Face model that has no cache to get wrong."""

from dataclasses import replace

import pytest
import torch
from builders import CONFIGS, make_model

from fastgrpo.sampler.torch_sampler import TorchSampler
from fastgrpo.types import Prompt, SamplingParams

STOPS = (1, 2, 3, 4, 5, 6)


def make_prompts(lengths):
    generator = torch.Generator().manual_seed(1)
    return [
        Prompt(prompt_id=f"p{i}", token_ids=torch.randint(7, 60, (n,), generator=generator), text=str(i))
        for i, n in enumerate(lengths)
    ]


def plain_logprobs(model, prompt, rollout, temperature=1.0):
    ids = torch.cat([prompt.token_ids, rollout.token_ids])[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, rollout.token_ids[:, None])[:, 0]


@pytest.mark.parametrize("kind", [*CONFIGS, "mistral"])
@pytest.mark.parametrize("lengths", [[9, 3, 1, 14], [6, 6]], ids=["ragged", "uniform"])
def test_logprobs_are_the_plain_models(kind, lengths):
    params = SamplingParams(temperature=0.7, max_new_tokens=20, stop_token_ids=STOPS)
    prompts = make_prompts(lengths)
    groups = TorchSampler(make_model(kind)).generate(prompts, 6, params, seed=0)
    plain = make_model(kind).eval()
    seen = set()
    for group in groups:
        for rollout in group.rollouts:
            expected = plain_logprobs(plain, group.prompt, rollout, temperature=0.7)
            torch.testing.assert_close(rollout.sampler_logprobs, expected, atol=2e-5, rtol=1e-5)
            seen.add(len(rollout.token_ids))
    assert len(seen) > 3  # completions of many lengths, so rows really left the batch on the way


def test_greedy_is_what_transformers_generates():
    params = SamplingParams(temperature=0.0, max_new_tokens=12, stop_token_ids=(1,))
    plain = make_model().eval()
    for group in TorchSampler(make_model()).generate(make_prompts([5, 8]), 1, params, seed=0):
        expected = plain.generate(group.prompt.token_ids[None], max_new_tokens=12, do_sample=False, eos_token_id=1)
        assert group.rollouts[0].token_ids.tolist() == expected[0, len(group.prompt.token_ids) :].tolist()


def test_a_prompts_own_limit_cuts_its_completions_alone():
    params = SamplingParams(max_new_tokens=10, stop_token_ids=STOPS)
    sampler, prompts = TorchSampler(make_model()), make_prompts([9, 3, 5])
    free = tokens_of(sampler.generate(prompts, 8, params, seed=3))
    limits = {"p0": 2, "p1": 99, "p2": 1}
    bound = [replace(prompt, max_new_tokens=limits[prompt.prompt_id]) for prompt in prompts]
    groups = sampler.generate(bound, 8, params, seed=3)
    for prompt_id, cut in tokens_of(groups).items():
        assert cut == [ids[: limits[prompt_id]] for ids in free[prompt_id]]
    assert any(len(ids) > 2 for ids in free["p0"])
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.finish_reason == ("stop" if int(rollout.token_ids[-1]) in STOPS else "length")


def tokens_of(groups):
    return {g.prompt.prompt_id: [r.token_ids.tolist() for r in g.rollouts] for g in groups}


def test_samples_depend_on_seed_prompt_and_index_alone():
    params = SamplingParams(max_new_tokens=10, stop_token_ids=STOPS)
    prompts, sampler = make_prompts([9, 3, 1, 14]), TorchSampler(make_model())
    whole = tokens_of(sampler.generate(prompts, 4, params, seed=3))
    assert tokens_of(sampler.generate(prompts[::-1], 4, params, seed=3)) == whole
    assert tokens_of(sampler.generate(prompts[1:2], 4, params, seed=3))["p1"] == whole["p1"]
    assert tokens_of(TorchSampler(make_model(), max_sequences=5).generate(prompts, 4, params, seed=3)) == whole
    assert [x[:2] for x in tokens_of(sampler.generate(prompts, 2, params, seed=3)).values()] == [
        x[:2] for x in whole.values()
    ]
    assert tokens_of(sampler.generate(prompts, 4, params, seed=4)) != whole


def test_completions_end_with_their_stop_token_or_at_the_limit():
    params = SamplingParams(max_new_tokens=15, min_new_tokens=3, stop_token_ids=STOPS)
    rollouts = [r for g in TorchSampler(make_model()).generate(make_prompts([4] * 6), 8, params, 0) for r in g.rollouts]
    for rollout in rollouts:
        ids = rollout.token_ids.tolist()
        assert not set(ids[:-1]) & set(STOPS)
        assert (ids[-1] in STOPS) == (rollout.finish_reason == "stop")
        assert len(ids) == 15 or rollout.finish_reason == "stop"
        assert len(ids) > 3
        assert rollout.loss_mask.all()
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


def test_completions_are_told_of_as_they_end():
    sampler, ended, drawn = TorchSampler(make_model(), max_sequences=8), [], []
    params = SamplingParams(max_new_tokens=15, stop_token_ids=STOPS)
    prompts = [*make_prompts([4] * 4), replace(make_prompts([5])[0], max_new_tokens=2)]

    def tell(i, sample, rollout):
        ended.append((i, sample))
        drawn.append(rollout)

    groups = sampler.generate(prompts, 4, params, 0, tell)
    assert sorted(ended) == [(i, sample) for i in range(5) for sample in range(4)]
    for (i, sample), rollout in zip(ended, drawn, strict=True):
        expected = groups[i].rollouts[sample]
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs(rollout, expected))
    for chunk in ([0, 1], [2, 3], [4]):
        lengths = [len(rollout.token_ids) for (i, _), rollout in zip(ended, drawn, strict=True) if i in chunk]
        assert lengths == sorted(lengths)


def pairs(one, other):
    return zip(vars(one).values(), vars(other).values(), strict=True)


def test_a_stop_token_as_the_very_last_is_a_stop():
    model = make_model()
    params = SamplingParams(max_new_tokens=1, stop_token_ids=tuple(range(61)))
    (group,) = TorchSampler(model).generate(make_prompts([3]), 1, params, seed=0)
    assert group.rollouts[0].finish_reason == "stop"


def test_rollouts_carry_the_policy_version_and_the_model_keeps_its_mode():
    model = make_model().train()
    sampler = TorchSampler(model)
    sampler.policy_version = 7
    (group,) = sampler.generate(make_prompts([3]), 2, SamplingParams(max_new_tokens=2), seed=0)
    assert [r.policy_version for r in group.rollouts] == [7, 7]
    assert model.training
