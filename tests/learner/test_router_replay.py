"""The sampler's experts taken in the update, against separate Hugging Face sequences whose routers are told."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from builders import RAGGED, make_groups, make_model

from fastgrpo.config import LoraConfig, TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models import lora
from fastgrpo.models.decoder import recompute_activations
from fastgrpo.models.experts import routers_of
from fastgrpo.sampler.torch_sampler import TorchSampler
from fastgrpo.types import Prompt, SamplingParams

NUM_LAYERS, NUM_EXPERTS, NUM_CHOSEN = 2, 4, 2
# transformers' routers compute in float32 whatever the model's type.
TOLERANCE = 1e-6


def choices(num_rows, generator):
    """(rows, L, k) experts that no router would choose."""
    return torch.rand(num_rows, NUM_LAYERS, NUM_EXPERTS, generator=generator).topk(NUM_CHOSEN).indices.byte()


def sequences(given: bool = True):
    """Of ragged groups, with experts of their own for every row but each completion's last."""
    generator, found = torch.Generator().manual_seed(5), []
    for number, scored in enumerate(make_groups(RAGGED)):
        prompt_experts = choices(len(scored.group.prompt.token_ids), generator)
        for i, rollout in enumerate(scored.group.rollouts):
            length = len(rollout.token_ids)
            found.append(
                Sequence(
                    sequence_id=len(found),
                    group_id=number,
                    prompt_ids=scored.group.prompt.token_ids,
                    token_ids=rollout.token_ids,
                    advantages=scored.advantages[i].expand(length),
                    token_weights=torch.full((length,), 0.1),
                    sampler_logprobs=rollout.sampler_logprobs,
                    prompt_routed_experts=prompt_experts if given else None,
                    routed_experts=choices(length - 1, generator) if given else None,
                )
            )
    return found


def tell(model, experts):
    """Have the routers of a transformers model take (T, L, k) experts."""

    def forward(router, layer, hidden):
        logits = F.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        index = experts[:, layer].long()
        weights = torch.stack([logits.softmax(-1, dtype=torch.float)[i, index[i]] for i in range(len(index))])
        total = weights.sum(-1, keepdim=True) if router.norm_topk_prob else 1.0
        return logits, (weights / total).to(logits.dtype), index

    for layer, router in enumerate(routers_of(model)):
        router.forward = partial(forward, router, layer)


def told_logprobs(model, sequence):
    """(R,) of one sequence by itself."""
    last = sequence.routed_experts.new_tensor([[[0, 1]] * NUM_LAYERS])  # of the row that predicts nothing
    tell(model, torch.cat([sequence.prompt_routed_experts, sequence.routed_experts, last]))
    tokens = torch.cat([sequence.prompt_ids, sequence.token_ids])[None]
    logprobs = model(tokens).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, sequence.token_ids[:, None])[:, 0]


def moe(normalized=True, **more):
    model = make_model("qwen3_moe", **more)
    for router in routers_of(model):
        router.norm_topk_prob = normalized
    model.set_experts_implementation("eager")  # its grouped product knows no float64
    return model


def updated(model, batches, config=None, **more):
    """One update's result and the gradients that its optimizer saw."""
    learner = TorchLearner(model, config or TrainConfig(max_grad_norm=1e9), num_updates=1, **more)
    seen = []
    learner.optimizer.step = lambda rate: seen.extend(p.grad.clone() for p in learner.optimizer.masters)
    return learner.update(batches, Objective()), seen


def assert_same_gradients(found, expected, tolerance):
    norm = torch.stack([g.norm() for g in expected]).norm()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= tolerance * norm


@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "own prompts"])
@pytest.mark.parametrize(("max_tokens", "normalized"), [(200, True), (30, True), (30, False)])
def test_given_experts_compute_what_separate_sequences_compute_with_them(share, max_tokens, normalized):
    plain, loss = moe(normalized, dtype=torch.float64), 0.0
    logprobs = {}
    for sequence in sequences():
        logprobs[sequence.sequence_id] = told_logprobs(plain, sequence)
        surrogate = (logprobs[sequence.sequence_id] - logprobs[sequence.sequence_id].detach()).exp()
        loss = loss - (sequence.token_weights * sequence.advantages * surrogate).sum()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    batches = pack(sequences(), max_tokens=max_tokens, share_prompts=share)
    model = moe(normalized, dtype=torch.float64)
    learner = TorchLearner(model, TrainConfig(), num_updates=1)
    for batch in batches:
        found = learner.logprobs(batch, temperature=1.0).split(batch.cu_scored.diff().tolist())
        for number, values in zip(batch.sequence_ids.tolist(), found, strict=True):
            torch.testing.assert_close(values, logprobs[number], atol=TOLERANCE, rtol=TOLERANCE)
    result, gradients = updated(model, batches)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(gradients, list(expected.values()), TOLERANCE)
    routers = [g for name, g in zip(expected, gradients, strict=True) if name.endswith("gate.weight")]
    assert len(routers) == NUM_LAYERS
    assert all(g.norm() > 1e-4 for g in routers)
    assert 0.2 < result.metrics["moe/replayed_difference"] < 0.8


def sampled(model):
    """Sequences that the torch sampler draws from the model, with what it says of their experts."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(prompt_id=f"p{i}", token_ids=torch.randint(7, 60, (n,), generator=generator), text="")
        for i, n in enumerate([9, 3, 1, 14])
    ]
    params = SamplingParams(max_new_tokens=10, stop_token_ids=(1, 2, 3, 4, 5, 6), return_routed_experts=True)
    return TorchSampler(model, max_sequences=8).generate(prompts, 4, params, seed=0)


def packed(groups, given=True):
    found = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            length = len(rollout.token_ids)
            found.append(
                Sequence(
                    sequence_id=len(found),
                    group_id=number,
                    prompt_ids=group.prompt.token_ids,
                    token_ids=rollout.token_ids,
                    advantages=torch.full((length,), 1.0 + len(found)),
                    token_weights=torch.full((length,), 0.1),
                    sampler_logprobs=rollout.sampler_logprobs,
                    prompt_routed_experts=group.prompt_routed_experts if given else None,
                    routed_experts=rollout.routed_experts if given else None,
                )
            )
    return pack(found, max_tokens=100, share_prompts=True)


def test_the_sampler_says_which_experts_a_full_forward_pass_takes():
    model, lengths = moe(), set()
    for group in sampled(model):
        assert group.prompt_routed_experts.dtype == torch.uint8
        for rollout in group.rollouts:
            tokens, chosen = torch.cat([group.prompt.token_ids, rollout.token_ids]), []
            hooks = [r.register_forward_hook(lambda *a, c=chosen: c.append(a[2][2])) for r in routers_of(model)]
            with torch.no_grad():
                model(tokens[None])
            for hook in hooks:
                hook.remove()
            expected = torch.stack(chosen, 1)[:-1]  # (P + R - 1, L, k)
            found = torch.cat([group.prompt_routed_experts, rollout.routed_experts])
            assert torch.equal(found.long().sort(-1).values, expected.sort(-1).values)
            lengths.add(len(rollout.token_ids))
    assert len(lengths) > 3  # so rows really left the batch on the way
    assert not any(router._forward_hooks for router in routers_of(model))


def test_nothing_is_recorded_unasked():
    model = moe()
    prompt = Prompt(prompt_id="p", token_ids=torch.tensor([7, 8]), text="")
    (group,) = TorchSampler(model).generate([prompt], 2, SamplingParams(max_new_tokens=3), seed=0)
    assert group.prompt_routed_experts is None
    assert group.rollouts[0].routed_experts is None


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_a_routers_own_choices_change_no_bit(coef):
    groups = sampled(moe())
    config = TrainConfig(max_grad_norm=1e9, moe_aux_loss_coef=coef)
    plain, expected = updated(moe(), packed(groups, given=False), config)
    result, gradients = updated(moe(), packed(groups), config)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert "moe/replayed_difference" not in plain.metrics
    assert result.metrics == {**plain.metrics, "moe/replayed_difference": 0.0}


def test_activations_computed_again_take_the_same_experts():
    batches = pack(sequences(), max_tokens=30, share_prompts=True)
    assert len(batches) > 1
    _, expected = updated(moe(), batches)
    recomputing = moe()
    recompute_activations(recomputing)
    _, gradients = updated(recomputing, batches)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_experts_are_given_for_a_pass_and_no_longer():
    model = moe()
    learner = TorchLearner(model, TrainConfig(), num_updates=1, reference=moe(seed=1))
    (batch,) = pack(sequences(), max_tokens=200, share_prompts=True)
    without = replace(batch, routed_experts=None)
    plain, told = (learner.logprobs(b, temperature=1.0) for b in (without, batch))
    assert (told - plain).abs().max() > 0.1
    assert torch.equal(learner.logprobs(without, temperature=1.0), plain)
    reference = [learner.logprobs(b, temperature=1.0, reference=True) for b in (batch, without)]
    assert torch.equal(*reference)  # it routes by itself
    learner.optimizer.step = lambda rate: None
    learner.update([batch], Objective())
    assert torch.equal(learner.logprobs(without, temperature=1.0), plain)


def test_the_model_below_adapters_is_a_reference_that_routes_by_itself():
    model = moe()
    adapters = lora.add_adapters(model, LoraConfig(rank=2, target_modules=["q_proj"]), seed=0)
    learner = TorchLearner(model, TrainConfig(), num_updates=1, adapters=adapters)
    (batch,) = pack(sequences(), max_tokens=200, share_prompts=True)
    without = replace(batch, routed_experts=None)
    pair = [learner.logprobs(b, temperature=1.0, reference=True) for b in (batch, without)]
    assert torch.equal(*pair)
    assert not torch.equal(learner.logprobs(batch, temperature=1.0), pair[0])
