"""Advantages of groups, and what may change rewards before."""

from dataclasses import replace

import pytest
import torch
from builders import make_groups

from fastgrpo.algorithms.advantages import compare, is_constant, soften_overlong, token_advantages
from fastgrpo.algorithms.importance import importance_weights
from fastgrpo.algorithms.reference import policy_share
from fastgrpo.config import AlgorithmConfig, ReferenceConfig, UserError


def groups_with(*rewards):
    groups = make_groups([(3, [2] * len(r)) for r in rewards])
    return [replace(g, rewards=torch.tensor(r), advantages=None) for g, r in zip(groups, rewards, strict=True)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"advantage": "std", "std_ddof": 0}, [[1.0, -1.0, 1.0, -1.0], [0.0, 0.0]]),
        ({"advantage": "std"}, [[0.8660, -0.8660, 0.8660, -0.8660], [0.0, 0.0]]),
        ({"advantage": "mean"}, [[0.5, -0.5, 0.5, -0.5], [0.0, 0.0]]),
        ({"advantage": "leave_one_out"}, [[0.6667, -0.6667, 0.6667, -0.6667], [0.0, 0.0]]),
        ({"advantage": "batch_std", "std_ddof": 0}, [[1.1933, -1.1933, 1.1933, -1.1933], [0.0, 0.0]]),
        ({"advantage": "batch_std"}, [[1.0894, -1.0894, 1.0894, -1.0894], [0.0, 0.0]]),
        ({"advantage": "batch_std", "min_std": 2.0}, [[0.25, -0.25, 0.25, -0.25], [0.0, 0.0]]),
        ({"advantage": "std", "min_std": 2.0}, [[0.25, -0.25, 0.25, -0.25], [0.0, 0.0]]),
    ],
)
def test_outcome_advantages(settings, expected):
    groups = compare(groups_with([1.0, 0.0, 1.0, 0.0], [0.7, 0.7]), AlgorithmConfig(**settings))
    for group, literal in zip(groups, expected, strict=True):
        torch.testing.assert_close(group.advantages, torch.tensor(literal), atol=1e-4, rtol=0)
    assert groups[1].advantages.tolist() == [0.0, 0.0]  # exactly
    assert token_advantages(groups[0], 1).tolist() == [groups[0].advantages[1].item()] * 2


def test_a_batch_of_equal_rewards_has_no_advantage_to_scale():
    groups = compare(groups_with([0.3, 0.3], [0.3, 0.3]), AlgorithmConfig(advantage="batch_std"))
    assert [group.advantages.tolist() for group in groups] == [[0.0, 0.0]] * 2


def test_process_advantages_add_up_from_each_token_on():
    """Section 4.1.3: steps ending at tokens 1 and 3 with rewards 1, 0 and one at token 0 with reward 0.5."""
    (group,) = make_groups([(3, [4, 2])])
    group = replace(group, step_rewards=(((1, 1.0), (3, 0.0)), ((0, 0.5),)), advantages=None)
    (compared,) = compare([group], AlgorithmConfig(advantage="process"))
    first, second = (token_advantages(compared, i).tolist() for i in range(2))
    assert first == pytest.approx([0.0, 0.0, -1.0, -1.0])  # mean 0.5, std 0.5: steps are worth +1, -1, 0
    assert second == pytest.approx([0.0, 0.0])


def test_process_supervision_needs_step_rewards():
    with pytest.raises(UserError, match=r"algorithm\.advantage=process: the reward function returned no step rewards"):
        compare(groups_with([1.0, 0.0]), AlgorithmConfig(advantage="process"))


def test_no_groups_are_no_groups():
    assert compare([], AlgorithmConfig()) == []


def test_constant_means_exactly_equal():
    assert is_constant(torch.tensor([0.3, 0.3]))
    assert not is_constant(torch.tensor([0.3, 0.3 + 1e-7]))


def test_overlong_completions_lose_up_to_the_penalty():
    """DAPO eq. 13 with a limit of 10 and a buffer of 4: free up to 6, then a quarter a token, -1 at 10."""
    (group,) = make_groups([(2, [5, 6, 7, 9, 10])])
    shaped = soften_overlong(torch.ones(5), group.group, max_new_tokens=10, buffer=4, penalty=1.0)
    assert shaped.tolist() == [1.0, 1.0, 0.75, 0.25, 0.0]


def test_importance_weights_are_capped_per_token_or_per_sequence():
    old, sampler = torch.log(torch.tensor([0.5, 0.9, 0.2])), torch.log(torch.tensor([0.25, 0.1, 0.4]))
    bounds = torch.tensor([0, 2, 3])
    token = importance_weights(old, sampler, bounds, level="token", cap=3.0)
    torch.testing.assert_close(token, torch.tensor([2.0, 3.0, 0.5]))
    sequence = importance_weights(old, sampler, bounds, level="sequence", cap=20.0)
    torch.testing.assert_close(sequence, torch.tensor([18.0, 18.0, 0.5]))


def test_importance_weights_outside_the_bounds_are_masked():
    old, sampler = torch.log(torch.tensor([0.5, 0.9, 0.2])), torch.log(torch.tensor([0.25, 0.1, 0.4]))
    bounds = torch.tensor([0, 2, 3])
    token = importance_weights(old, sampler, bounds, level="token", mode="mask", floor=0.6, cap=3.0)
    torch.testing.assert_close(token, torch.tensor([2.0, 0.0, 0.0]))
    sequence = importance_weights(old, sampler, bounds, level="sequence", mode="mask", cap=17.0)
    torch.testing.assert_close(sequence, torch.tensor([0.0, 0.0, 0.5]))


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (ReferenceConfig(schedule="fixed"), [0, 0, 0, 0]),
        (ReferenceConfig(schedule="refresh", refresh_every=2), [0, 1, 0, 1]),
        (ReferenceConfig(schedule="ema", ema_decay=0.75), [0.25] * 4),
    ],
)
def test_reference_schedules(config, shares):
    assert [policy_share(config, step) for step in (1, 2, 3, 4)] == shares
