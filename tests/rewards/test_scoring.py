"""What functions are given, how their values become rewards, and what is refused."""

import numpy
import pytest
import torch

from fastgrpo.config import RewardConfig, RewardTerm, UserError
from fastgrpo.rewards import Rewards, StepRewards

EXACT = "fastgrpo.rewards.verifiable:exact_match"


def score(groups, decode, function=None, **changes):
    with Rewards(RewardConfig(**{"num_workers": 0, **changes}), function) as rewards:
        return rewards.score(groups, decode)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_default_reward(group, decode, num_workers):
    groups = [group(["#5", "5", "#6"]), group(["x#7 ", "#5#7", "7"], prompt_id="train/3", answer="7")]
    result = score(groups, decode, num_workers=num_workers)
    assert [scored.rewards.tolist() for scored in result.groups] == [[1, 0, 0], [1, 1, 0]]
    assert [scored.group for scored in result.groups] == groups
    assert result.groups[0].rewards.dtype == torch.float32
    assert result.groups[0].step_rewards is None
    assert result.metrics == {"reward/error_count": 0, "reward/timeout_count": 0, "reward/dropped_groups": 0}


def test_everything_a_completion_function_is_given(group, decode):
    seen = []

    def reward(completion, prompt, answer, metadata, token_ids, turn_ends, finish_reason, level, scale=1, **others):
        seen.append((completion, prompt, answer, metadata, token_ids, turn_ends, finish_reason, level, scale, others))
        return 0

    one = group(["a", "bc"], finish_reasons=["stop", "length"], level=3, topic="sums", prompt="a column")
    score([one], decode, reward, kwargs={"scale": 2, "other": 4})
    metadata = {"level": 3, "topic": "sums", "prompt": "a column"}
    rest = {"topic": "sums", "other": 4}
    assert seen == [
        ("a", "2+3=", "5", metadata, [97], [0], "stop", 3, 2, rest),
        ("bc", "2+3=", "5", metadata, [98, 99], [1], "length", 3, 2, rest),
    ]


def test_conversations_have_names(group, decode):
    def reward(completion, conversation_id):
        return {"train-1-0-0-0": 3, "train-1-0-0-1": 4}[conversation_id]

    assert score([group(["a", "b"])], decode, reward).groups[0].rewards.tolist() == [3, 4]


def test_everything_a_group_function_is_given(group, decode):
    seen = []

    def reward(completions, prompt, answer, metadata, conversation_ids, token_ids, turn_ends, finish_reasons):
        seen.append((completions, prompt, answer, metadata, token_ids, turn_ends, finish_reasons))
        assert conversation_ids == ["train-1-0-0-0", "train-1-0-0-1"]
        return [len(text) for text in completions]

    result = score([group(["a", "bc"], finish_reasons=["stop", "length"], level=3)], decode, reward)
    assert seen == [(["a", "bc"], "2+3=", "5", {"level": 3}, [[97], [98, 99]], [[0], [1]], ["stop", "length"])]
    assert result.groups[0].rewards.tolist() == [1, 2]


def test_a_configured_argument_comes_before_a_column(group, decode):
    def reward(completion, level):
        return level

    assert score([group(["a"], level=3)], decode, reward, kwargs={"level": 9}).groups[0].rewards.tolist() == [9]
    assert score([group(["a"], level=3)], decode, reward).groups[0].rewards.tolist() == [3]


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (True, 1.0),
        (3, 3.0),
        (-0.5, -0.5),
        (numpy.float32(0.25), 0.25),
        (numpy.bool_(True), 1.0),
        (torch.tensor(2.0), 2.0),
        (StepRewards([(0, 1.0), (1, 0.5)]), 1.5),
    ],
)
def test_what_counts_as_a_number(group, decode, value, reward):
    assert score([group(["ab"])], decode, lambda completion: value).groups[0].rewards.tolist() == [reward]


@pytest.mark.parametrize("values", [[1, 0], (1, 0), numpy.array([1, 0]), torch.tensor([1.0, 0.0]), [True, False]])
def test_what_counts_as_a_list(group, decode, values):
    assert score([group(["a", "b"])], decode, lambda completions: values).groups[0].rewards.tolist() == [1, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_async_functions_of_a_group_run_together(group, decode, num_workers):
    async def reward(completion, first=[]):  # noqa: B006
        import asyncio

        first.append(completion)
        while len(first) < 3:  # returns only once all three have begun
            await asyncio.sleep(0.01)
        return completion == "b"

    result = score([group(["a", "b", "c"])], decode, reward, num_workers=num_workers, timeout_s=10)
    assert result.groups[0].rewards.tolist() == [0, 1, 0]


def test_several_functions_are_weighted_and_told_apart(group, decode, reward_file):
    path = reward_file("def score(completions, scale=1):\n    return [scale * len(text) for text in completions]")
    extra = {"length": RewardTerm(path=path, weight=-0.5, kwargs={"scale": 2})}
    result = score([group(["#5", "abc"]), group(["#5", "#5"])], decode, path=EXACT, weight=2.0, extra=extra)
    assert [scored.rewards.tolist() for scored in result.groups] == [[0, -3], [0, 0]]
    terms = result.groups[0].reward_terms
    assert {name: values.tolist() for name, values in terms.items()} == {"exact_match": [1, 0], "length": [4, 6]}
    assert result.metrics["reward/exact_match"] == 0.75
    assert result.metrics["reward/length"] == 4.5


def test_step_rewards_are_weighted_and_an_outcome_is_a_last_step(group, decode, reward_file):
    path = reward_file(
        "from fastgrpo.rewards import StepRewards\n"
        "def score(completion):\n"
        "    return StepRewards([(2, 0.5), (0, 1.0)], total=4.0) if completion == 'abcd' else 3"
    )
    extra = {"exact": RewardTerm(path=EXACT)}
    result = score([group(["abcd", "#5"])], decode, path=path, weight=2.0, extra=extra)
    assert result.groups[0].rewards.tolist() == [8, 7]
    assert result.groups[0].step_rewards == (((0, 2.0), (2, 1.0), (3, 0.0)), ((1, 1.0), (1, 6.0)))


WHERE = "reward=bad on prompt train/17"
NUMBER = "return a finite number"
LIST = "return a list with one number per completion (2)"


@pytest.mark.parametrize("on_error", ["fail", "zero", "drop"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("good", f"{WHERE}, completion 0 returned 'good' (str); {NUMBER}"),
        (None, f"{WHERE}, completion 0 returned None; {NUMBER}"),
        (float("nan"), f"{WHERE}, completion 0 returned nan; {NUMBER}"),
        (float("-inf"), f"{WHERE}, completion 0 returned -inf; {NUMBER}"),
        (1e39, f"{WHERE}, completion 0 returned 1e+39; {NUMBER}"),
        ([1.0], f"{WHERE}, completion 0 returned [1.0] (list); {NUMBER}"),
        (StepRewards([(2, 1.0)]), f"{WHERE}, completion 0 returned a step that ends at token 2 of 2; count from 0"),
        (
            StepRewards([(0, "x")]),
            f"{WHERE}, completion 0 returned StepRewards with the step (0, 'x') (tuple); {NUMBER}",
        ),
        (
            StepRewards([], total=float("nan")),
            f"{WHERE}, completion 0 returned StepRewards with the total nan; {NUMBER}",
        ),
    ],
)
def test_no_policy_excuses_a_value_that_is_no_reward(group, decode, on_error, value, message):
    def bad(completion):
        return value

    with pytest.raises(UserError) as error:
        score([group(["ab", "cd"])], decode, bad, on_error=on_error)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], f"{WHERE} returned 3 values; return one per completion (2)"),
        ([], f"{WHERE} returned 0 values; return one per completion (2)"),
        (1.0, f"{WHERE} returned 1.0; {LIST}"),
        ("ab", f"{WHERE} returned 'ab' (str); {LIST}"),
        (None, f"{WHERE} returned None; {LIST}"),
        ([1.0, None], f"{WHERE}, completion 1 returned None; {NUMBER}"),
    ],
)
def test_values_of_a_group_function_that_are_no_rewards(group, decode, values, message):
    def bad(completions):
        return values

    with pytest.raises(UserError) as error:
        score([group(["ab", "cd"])], decode, bad, on_error="zero")
    assert str(error.value) == message


def test_check_finds_a_broken_function_with_a_real_prompt(prompt):
    def bad(completions):
        return [1.0]

    with (
        Rewards(RewardConfig(num_workers=0), bad) as rewards,
        pytest.raises(UserError, match=r"^reward=bad on prompt train/17 returned 1 values; return one per completion"),
    ):
        rewards.check(prompt())


def test_check_finds_a_parameter_that_nothing_fills(prompt):
    def bad(completion, level):
        return level

    with Rewards(RewardConfig(num_workers=0), bad) as rewards:
        rewards.check(prompt(level=1))
        with pytest.raises(UserError) as error:  # of a file, or a row, with other columns
            rewards.check(prompt(level=1), prompt("train/23", topic="sums"))
    assert str(error.value) == (
        "reward=bad asks for `level`, which is neither one of completion, prompt, answer, metadata, "
        "conversation, conversation_id, token_ids, turn_ends, finish_reason nor a column of train/23 (topic); rename "
        "it, give it a default or set reward.kwargs.level"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_error": "ignore"}, "reward.on_error=ignore is unknown; use fail, zero or drop"),
        ({"timeout_s": 0.0}, "reward.timeout_s=0.0 must be positive"),
        ({"num_workers": -1}, "reward.num_workers=-1 is negative; use 0 for the trainer's own process"),
        ({"weight": float("nan")}, "reward.weight=nan must be a finite number"),
        (
            {"extra": {"x": RewardTerm(path=EXACT, weight=float("inf"))}},
            "reward.extra.x.weight=inf must be a finite number",
        ),
        (
            {"extra": {"exact_match": RewardTerm(path=EXACT)}},
            "reward.extra.exact_match has the name of the first reward function; rename it",
        ),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError) as error:
        Rewards(RewardConfig(**changes))
    assert str(error.value) == message


def test_a_notebooks_reward_must_be_a_function():
    with pytest.raises(UserError, match=r"the reward is a str \('len'\); give a function"):
        Rewards(RewardConfig(), "len")
