"""The learner against a plain Hugging Face model, one padded sequence at a time, with the formula written out."""

import copy
from dataclasses import replace

import pytest
import torch
from builders import CONFIGS, RAGGED, make_groups, make_model, save
from torch.utils._pytree import tree_leaves

from fastgrpo.algorithms.advantages import token_advantages
from fastgrpo.algorithms.aggregation import token_weights
from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
OBJECTIVE = Objective(kl_coef=0.1, entropy_coef=0.01, temperature=0.7)


def sequences_of(groups, aggregation="sequence_mean"):
    members = [(number, group, i) for number, group in enumerate(groups) for i in range(len(group.rewards))]
    masks = [group.group.rollouts[i].loss_mask for _, group, i in members]
    weights = token_weights(masks, aggregation, max_new_tokens=20)
    return [
        Sequence(
            sequence_id=k,
            group_id=number,
            prompt_ids=group.group.prompt.token_ids,
            token_ids=group.group.rollouts[i].token_ids,
            advantages=token_advantages(group, i),
            token_weights=weights[k],
            sampler_logprobs=group.group.rollouts[i].sampler_logprobs,
        )
        for k, (number, group, i) in enumerate(members)
    ]


def gradients(model, batches, objective=OBJECTIVE):
    """Loss, gradient norm and gradients of one update, as the optimizer sees them."""
    learner = TorchLearner(model, TrainConfig(max_grad_norm=1e9), num_updates=1, reference=reference_of(model))
    batches = [replace_ref(learner, batch, objective) for batch in batches]
    seen = []
    learner.optimizer.step = lambda rate: seen.extend(p.grad.clone() for p in learner.optimizer.masters)
    result = learner.update(batches, objective)
    return result, seen


def reference_of(model):
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype)).view_as(parameter)
    return reference


def replace_ref(learner, batch, objective):
    return replace(batch, ref_logprobs=learner.logprobs(batch, temperature=objective.temperature, reference=True))


def oracle(kind, dtype, groups, objective=OBJECTIVE, tied=False):
    """The objective of G separate sequences, by autograd through a model with torch's own attention."""
    model = make_model(kind, dtype=dtype, tied=tied)
    reference = reference_of(model)
    loss = torch.zeros((), dtype=dtype)
    for sequence in sequences_of(groups):
        ids = torch.cat([sequence.prompt_ids, sequence.token_ids])[None]
        start = len(sequence.prompt_ids) - 1

        def logprobs(network, ids=ids, start=start):
            return (network(ids).logits[0, start:-1] / objective.temperature).log_softmax(-1)

        current = logprobs(model)
        with torch.no_grad():
            ref = logprobs(reference).gather(-1, sequence.token_ids[:, None])[:, 0]
        lp = current.gather(-1, sequence.token_ids[:, None])[:, 0]
        entropy = -(current.exp() * current).sum(-1)
        ratio = (lp - lp.detach()).exp()
        kl = (ref - lp).exp() - (ref - lp) - 1
        term = -ratio * sequence.advantages + objective.kl_coef * kl - objective.entropy_coef * entropy
        loss = loss + (sequence.token_weights.to(dtype) * term).sum()
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def assert_same(gradient, expected, tolerance):
    norm = torch.stack([g.norm() for g in expected]).norm()
    for mine, theirs in zip(gradient, expected, strict=True):
        assert (mine - theirs).norm() <= tolerance * norm


@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "own prompts"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in CONFIGS), ("qwen3", True)])
def test_update_has_the_gradient_of_separate_sequences(kind, tied, dtype, share, ragged_groups):
    expected_loss, expected = oracle(kind, dtype, ragged_groups, tied=tied)
    batches = pack(sequences_of(ragged_groups), max_tokens=64, share_prompts=share)
    result, gradient = gradients(make_model(kind, dtype=dtype, tied=tied), batches)
    assert result.loss == pytest.approx(expected_loss, rel=1e-5 if dtype is torch.float32 else 1e-6)
    assert_same(gradient, expected, TOLERANCE[dtype])


LAYOUTS = {
    "ragged": RAGGED,
    "groups of one": [(6, [8]), (5, [3])],
    "one-token completions": [(6, [1, 1, 1]), (2, [1, 1])],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_sharing_prompts_changes_nothing(layout, dtype):
    sequences = sequences_of(make_groups(LAYOUTS[layout]))
    shared, own = (pack(sequences, max_tokens=200, share_prompts=share) for share in (True, False))
    assert sum(b.num_tokens for b in shared) <= sum(b.num_tokens for b in own)
    (result, gradient), (expected_result, expected) = (
        gradients(make_model(dtype=dtype), batches) for batches in (shared, own)
    )
    assert result.loss == pytest.approx(expected_result.loss, rel=1e-6)
    assert_same(gradient, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("share", [True, False], ids=["shared prompts", "own prompts"])
def test_any_split_into_microbatches_has_the_same_gradient(aggregation, share, dtype, tolerance, ragged_groups):
    sequences = sequences_of(ragged_groups, aggregation)
    whole = pack(sequences, max_tokens=1000, share_prompts=share)
    assert len(whole) == 1
    result, expected = gradients(make_model(dtype=dtype), whole)
    counts = set()
    for max_tokens in (60, 37, 20):  # the smallest splits the groups themselves
        batches = pack(sequences, max_tokens=max_tokens, share_prompts=share)
        counts.add(len(batches))
        split_result, gradient = gradients(make_model(dtype=dtype), batches)
        assert split_result.loss == pytest.approx(result.loss, rel=1e-5)
        assert_same(gradient, expected, tolerance)
    assert len(counts) >= 2
    assert min(counts) >= 2  # really split


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_sequences_dealt_to_n_microbatches_have_the_same_gradient(parts, dtype, tolerance, ragged_groups):
    sequences = sequences_of(ragged_groups)
    _, expected = gradients(make_model(dtype=dtype), pack(sequences, max_tokens=1000, share_prompts=True))
    dealt = [pack(sequences[i::parts], max_tokens=1000, share_prompts=True)[0] for i in range(parts)]
    _, gradient = gradients(make_model(dtype=dtype), dealt)
    assert_same(gradient, expected, tolerance)


def test_on_policy_ratio_is_one_whatever_the_microbatches(ragged_groups):
    """Old logprobs computed on the very batches of the update make the first ratio exactly 1."""
    model = make_model()
    learner = TorchLearner(model, TrainConfig(learning_rate=0.0), num_updates=1)
    batches = pack(sequences_of(ragged_groups), max_tokens=40, share_prompts=True)
    batches = [replace(b, old_logprobs=learner.logprobs(b, temperature=1.0)) for b in batches]
    metrics = learner.update(batches, Objective()).metrics
    assert metrics["ratio/mean"] == 1.0
    assert metrics["kl/old"] == 0.0


def test_nonfinite_gradient_leaves_everything_untouched(ragged_groups):
    model = make_model()
    learner = TorchLearner(model, TrainConfig(), num_updates=2)
    before = copy.deepcopy(learner.state_dict())
    batch = pack(sequences_of(ragged_groups), max_tokens=1000, share_prompts=True)[0]
    bad = replace(batch, advantages=torch.full_like(batch.advantages, float("inf")))
    result = learner.update([bad], Objective())
    assert result.skipped
    assert result.policy_version == 0
    assert all(torch.equal(a, b) for a, b in zip(before["model"].values(), model.state_dict().values(), strict=True))
    assert learner.optimizer.adam.state_dict()["state"] == {}
    assert not learner.update([batch], Objective()).skipped


def test_state_survives_a_round_trip_bit_by_bit(ragged_groups):
    batches = pack(sequences_of(ragged_groups), max_tokens=40, share_prompts=True)

    def fresh(seed):
        return TorchLearner(make_model(seed=seed), TrainConfig(learning_rate=1e-3), num_updates=9)

    straight, first, second = fresh(0), fresh(0), fresh(1)
    for _ in range(4):
        straight.update(batches, Objective())
    for _ in range(2):
        first.update(batches, Objective())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.update(batches, Objective())
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.policy_version == 4


def test_bfloat16_weights_follow_float32_masters(ragged_groups):
    """A step far below bfloat16's resolution is not lost: it adds up in the masters."""
    model = make_model(dtype=torch.bfloat16)
    learner = TorchLearner(model, TrainConfig(learning_rate=1e-6), num_updates=100)
    batches = pack(sequences_of(ragged_groups), max_tokens=40, share_prompts=True)
    start = [m.clone() for m in learner.optimizer.masters]
    for _ in range(3):
        learner.update(batches, Objective())
    moved = [(m - s).abs().max().item() for m, s in zip(learner.optimizer.masters, start, strict=True)]
    assert max(moved) == pytest.approx(3e-6, rel=0.2)
    for param, master in zip(model.parameters(), learner.optimizer.masters, strict=True):
        assert torch.equal(param, master.to(torch.bfloat16))
        assert param.grad is None


def test_weight_decay_spares_norms_and_biases():
    learner = TorchLearner(make_model(), TrainConfig(weight_decay=0.1), num_updates=1)
    decay = {id(p): group["weight_decay"] for group in learner.optimizer.adam.param_groups for p in group["params"]}
    for name, parameter in learner.named_weights():
        assert decay[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name


def test_reference_moves_by_the_share_asked_for():
    model = make_model(seed=0)
    learner = TorchLearner(model, TrainConfig(), num_updates=1, reference=make_model(seed=1))
    (policy, reference) = (next(m.parameters()).clone() for m in (model, learner.reference))
    learner.move_reference(0.25)
    torch.testing.assert_close(next(learner.reference.parameters()), reference + 0.25 * (policy - reference))
    learner.move_reference(1.0)
    assert torch.equal(next(learner.reference.parameters()), policy)


def test_offloaded_in_between_it_goes_on_bit_for_bit(tmp_path):
    batches = pack(sequences_of(make_groups(RAGGED)), max_tokens=10_000, share_prompts=True)
    results = []
    for offloads in (False, True):
        learner = TorchLearner(make_model().bfloat16(), TrainConfig(learning_rate=1e-3), num_updates=3)
        learner.update(batches, Objective())
        save(learner, tmp_path)
        learner.load(tmp_path)  # what was read from a file can be released too
        if offloads:
            learner.offload()
            assert sum(tensor.untyped_storage().nbytes() for tensor in learner.optimizer.state()) == 0
            learner.logprobs(batches[0], temperature=1.0)
            with pytest.raises(AssertionError, match="onload"):
                learner.update(batches, Objective())
            learner.onload()
        learner.update(batches, Objective())
        results.append([weight.clone() for _, weight in learner.named_weights()])
    assert all(map(torch.equal, *results))


def test_what_follows_a_copy_is_not_saved(tmp_path):
    batches = pack(sequences_of(make_groups(RAGGED)), max_tokens=10_000, share_prompts=True)
    config = TrainConfig(learning_rate=1e-3)
    learner = TorchLearner(make_model().bfloat16(), config, num_updates=9, reference=make_model().bfloat16())
    learner.update(batches, Objective())
    for _ in range(2):  # the host's memory is used again
        expected = copy.deepcopy(learner.state_dict())
        pending = learner.begin_save(tmp_path, copy=True)
        learner.update(batches, Objective())
        learner.move_reference(0.5)
        learner.offload()
        for write in pending.files.values():
            write()
        learner.onload()
        saved = torch.load(tmp_path / "learner.pt", weights_only=True)
        for mine, theirs in zip(tree_leaves(saved), tree_leaves(expected), strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
