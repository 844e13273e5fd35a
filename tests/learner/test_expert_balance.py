"""The balance of a mixture's experts and its auxiliary loss, against their definition."""

import pytest
import torch

from fastgrpo.config import TrainConfig, UserError
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.learner.expert_balance import ExpertBalance, row_weights
from fastgrpo.learner.routers import watch_routers

NUM_EXPERTS, NUM_CHOSEN, COEF = 4, 2, 0.3


def sequences():
    return [
        Sequence(
            sequence_id=i,
            group_id=group,
            prompt_ids=torch.arange(3 + group),
            token_ids=torch.arange(length),
            advantages=torch.zeros(length),
            token_weights=torch.ones(length),
            sampler_logprobs=torch.zeros(length),
        )
        for i, (group, length) in enumerate([(0, 2), (0, 4), (1, 1), (1, 1), (1, 3)])
    ]


def test_a_row_counts_once_for_every_sequence_it_is_part_of():
    (shared,) = pack(sequences(), max_tokens=100, share_prompts=True)
    assert row_weights(shared).tolist() == [2] * 3 + [1] * (1 + 3) + [3] * 4 + [1] * (0 + 0 + 2)
    (unshared,) = pack(sequences(), max_tokens=100, share_prompts=False)
    assert row_weights(unshared).tolist() == [1] * unshared.num_tokens
    split = pack(sequences(), max_tokens=6, share_prompts=True)
    assert len(split) > 2
    assert sum(float(row_weights(batch).sum()) for batch in split) == unshared.num_tokens


def routed(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(9, NUM_EXPERTS, generator=generator).double().requires_grad_() for _ in range(2)]
    weights = torch.randint(0, 3, (9,), generator=generator).float()
    chosen = [torch.zeros(9, NUM_EXPERTS).scatter(1, x.topk(NUM_CHOSEN).indices, 1.0).bool() for x in logits]
    return weights, logits, chosen


def defined_balance(updates, layer):
    weights = torch.cat([weights for weights, _, _ in updates]).double()
    probs = torch.cat([logits[layer].softmax(-1) for _, logits, _ in updates])
    chosen = torch.cat([chosen[layer] for _, _, chosen in updates]).double()
    shares = (weights[:, None] * chosen).sum(0) / (NUM_CHOSEN * weights.sum())
    return NUM_EXPERTS * (shares * (weights[:, None] * probs).sum(0) / weights.sum()).sum()


def test_the_gradient_is_the_whole_updates_however_it_is_cut_into_micro_batches():
    parts = [routed(seed) for seed in range(3)]
    balance = ExpertBalance(2, NUM_EXPERTS, NUM_CHOSEN, COEF, "cpu")

    def observe_all():
        for weights, logits, chosen in parts:
            passed = torch.ones(3, requires_grad=True)
            for layer in range(2):
                passed = balance.observe(layer, weights, logits[layer], chosen[layer], passed)
            if passed.grad_fn is not None:
                passed.sum().backward()

    balance.start("count")
    observe_all()
    balance.freeze()
    balance.start("train")
    observe_all()
    leaves = [x for _, logits, _ in parts for x in logits]
    found = [x.grad.clone() for x in leaves]
    defined = [defined_balance(parts, layer) for layer in range(2)]
    expected = torch.autograd.grad(COEF * sum(defined), leaves)
    torch.testing.assert_close(found, list(expected), atol=1e-7, rtol=1e-5)  # probabilities are float32
    metrics = balance.metrics()
    assert metrics["moe/balance"] == pytest.approx(sum(defined).item() / 2, rel=1e-6)
    assert 0 <= metrics["moe/expert_load/min"] < 1 < metrics["moe/expert_load/max"] <= NUM_EXPERTS / NUM_CHOSEN


def test_even_use_is_1_and_one_expert_for_all_is_their_number():
    weights, chosen = torch.ones(4), torch.eye(4).bool()
    balance = ExpertBalance(1, 4, 1, 0.0, "cpu")
    for which, expected in ((chosen, 1.0), (chosen[:1].expand(4, 4), 4.0)):
        balance.start("train")
        balance.observe(0, weights, which * 100.0, which, torch.zeros(1))
        metrics = balance.metrics()
        assert metrics["moe/balance"] == pytest.approx(expected)
        assert metrics["moe/expert_load/max"] == pytest.approx(expected)


def test_the_share_of_given_choices_that_the_router_would_not_have_made():
    def mask(*chosen):
        return torch.zeros(2, 4).scatter(1, torch.tensor(chosen), 1.0).bool()

    balance = ExpertBalance(1, 4, 2, 0.0, "cpu")
    balance.start("train")
    weights, logits = torch.tensor([2.0, 1.0]), torch.zeros(2, 4)
    balance.observe(0, weights, logits, mask([0, 1], [2, 3]), torch.zeros(1))
    assert "moe/replayed_difference" not in balance.metrics()
    balance.observe(0, weights, logits, mask([0, 1], [2, 3]), torch.zeros(1), own=mask([1, 0], [3, 1]))
    assert balance.metrics()["moe/replayed_difference"] == pytest.approx(1 / 6)


def test_without_tokens_there_are_no_metrics():
    assert ExpertBalance(1, 4, 1, 0.0, "cpu").metrics() == {}


def test_a_dense_model_has_nothing_to_balance():
    assert watch_routers(torch.nn.Linear(2, 2), TrainConfig().moe_aux_loss_coef) is None
    with pytest.raises(UserError, match=r"train.moe_aux_loss_coef=0.1: the model has no experts; use 0"):
        watch_routers(torch.nn.Linear(2, 2), 0.1)
