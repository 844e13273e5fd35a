"""Functions that raise, hang or die: what the run does about it, and what it counts."""

import pytest

from fastgrpo.config import RewardConfig, UserError
from fastgrpo.rewards import Rewards

RAISES = """
def score(completion):
    if completion == "bad":
        raise ValueError("two\\nlines")
    return 1
"""
# Exponential backtracking: it holds the interpreter's lock and heeds no Python signal handler.
STUCK_IN_A_REGEX = """
import re
def score(completion):
    if completion == "bad":
        re.fullmatch(r"(a+)+b", "a" * 60)
    return 1
"""
SLEEPS = """
import time
def score(completion):
    if completion == "bad":
        time.sleep(60)
    return 1
"""
SLEEPS_ASYNC = """
import asyncio
async def score(completion):
    if completion == "bad":
        await asyncio.sleep(60)
    return 1
"""
BLOCKS_THE_LOOP = """
import time
async def score(completion):
    if completion == "bad":
        time.sleep(60)
    return 1
"""
STOPS_THE_LOOP = """
import asyncio
async def score(completion):
    if completion == "bad":
        asyncio.get_running_loop().stop()
    await asyncio.sleep(0.1)
    return 1
"""
DIES = """
import os
def score(completion):
    if completion == "bad":
        os._exit(7)
    return 1
"""
EXITS = """
import sys
def score(completion):
    if completion == "bad":
        sys.exit("enough")
    return 1
"""
GROUP_RAISES = """
def score(completions):
    if "bad" in completions:
        raise KeyError("x")
    return [1.0 for _ in completions]
"""


def rewards(path, **changes):
    return Rewards(RewardConfig(**{"path": path, "timeout_s": 0.4, **changes}))


def groups(group):
    return [group(["a", "bad", "c"], "train/0"), group(["d", "e", "f"], "train/1")]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "what", "mend"),
    [
        (RAISES, "raised ValueError: two lines (my_rewards.py line 4)", "mend the function"),
        (EXITS, "raised SystemExit: enough (my_rewards.py line 5)", "mend the function"),
        (SLEEPS, "exceeded reward.timeout_s=0.4", "raise the limit"),
        (SLEEPS_ASYNC, "exceeded reward.timeout_s=0.4", "raise the limit"),
    ],
)
def test_fail_names_the_sample_and_the_reason(group, decode, reward_file, source, what, mend, num_workers):
    path = reward_file(source)
    with rewards(path, num_workers=num_workers) as scorer, pytest.raises(UserError) as error:
        scorer.score(groups(group), decode)
    where = f"reward.path={path} on prompt train/0, completion 1"
    assert str(error.value) == f"{where} {what}; {mend} or set reward.on_error=zero or drop"


def test_fail_names_the_group_of_a_group_function(group, decode, reward_file):
    path = reward_file(GROUP_RAISES)
    with rewards(path, num_workers=0) as scorer, pytest.raises(UserError) as error:
        scorer.score(groups(group), decode)
    assert str(error.value).startswith(f"reward.path={path} on prompt train/0 raised KeyError: 'x' (")


@pytest.mark.parametrize(
    ("source", "num_workers", "errors", "timeouts"),
    [
        (RAISES, 0, 1, 0),
        (RAISES, 2, 1, 0),
        (SLEEPS, 0, 0, 1),
        (SLEEPS, 2, 0, 1),
        (SLEEPS_ASYNC, 0, 0, 1),
        (SLEEPS_ASYNC, 2, 0, 1),
        (STUCK_IN_A_REGEX, 2, 0, 1),
        (STUCK_IN_A_REGEX, 1, 0, 1),
        (DIES, 2, 1, 0),
        (DIES, 1, 1, 0),
    ],
)
def test_zero_and_drop_touch_only_what_failed(group, decode, reward_file, source, num_workers, errors, timeouts):
    path = reward_file(source)
    counts = {"reward/error_count": errors, "reward/timeout_count": timeouts}
    limit = {} if timeouts else {"timeout_s": 60.0}  # a busy machine takes its time to see that a worker died
    with rewards(path, num_workers=num_workers, on_error="zero", **limit) as scorer:
        for _ in range(2):  # the pool is as good as new afterwards
            result = scorer.score(groups(group), decode)
            assert [scored.rewards.tolist() for scored in result.groups] == [[1, 0, 1], [1, 1, 1]]
            assert result.metrics == {**counts, "reward/dropped_groups": 0}
    with rewards(path, num_workers=num_workers, on_error="drop", **limit) as scorer:
        result = scorer.score(groups(group), decode)
        assert [scored.group.prompt.prompt_id for scored in result.groups] == ["train/1"]
        assert result.metrics == {**counts, "reward/dropped_groups": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("source", "kind"), [(BLOCKS_THE_LOOP, "timeout"), (STOPS_THE_LOOP, "error")])
def test_an_async_function_that_holds_up_its_loop_takes_its_group_along(
    group, decode, reward_file, num_workers, source, kind
):
    with rewards(reward_file(source), num_workers=num_workers, on_error="zero") as scorer:
        result = scorer.score(groups(group), decode)
    assert [scored.rewards.tolist() for scored in result.groups] == [[0, 0, 0], [1, 1, 1]]
    assert result.metrics[f"reward/{kind}_count"] == 3


def test_a_failing_group_call_zeroes_or_drops_the_group(group, decode, reward_file):
    path = reward_file(GROUP_RAISES)
    with rewards(path, num_workers=0, on_error="zero") as scorer:
        result = scorer.score(groups(group), decode)
    assert [scored.rewards.tolist() for scored in result.groups] == [[0, 0, 0], [1, 1, 1]]
    assert result.metrics["reward/error_count"] == 1
    with rewards(path, num_workers=0, on_error="drop") as scorer:
        result = scorer.score(groups(group)[:1], decode)
    assert result.groups == []
    assert result.metrics == {"reward/error_count": 1, "reward/timeout_count": 0, "reward/dropped_groups": 1}


@pytest.mark.parametrize("on_error", ["fail", "zero", "drop"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_function_ends_the_run_with_user_error(prompt, reward_file, num_workers, on_error):
    path = reward_file(
        "from fastgrpo.config import UserError\ndef score(completion):\n    raise UserError('no key set')"
    )
    with rewards(path, num_workers=num_workers, on_error=on_error) as scorer, pytest.raises(UserError) as error:
        scorer.check(prompt())
    assert str(error.value) == f"reward.path={path} on prompt train/17, completion 0: no key set"


def test_check_leaves_what_the_policy_excuses_to_training(prompt, reward_file):
    path = reward_file("def score(completion):\n    return completion.split('####')[1]")
    with rewards(path, num_workers=0, on_error="zero") as scorer:
        scorer.check(prompt())
    with rewards(path, num_workers=0) as scorer, pytest.raises(UserError, match=r"raised IndexError: .* \(my_rewards"):
        scorer.check(prompt())


def test_the_limit_is_one_calls_not_the_queues_nor_the_imports(group, decode, reward_file):
    path = reward_file("import time\ntime.sleep(0.5)\ndef score(completion):\n    time.sleep(0.1)\n    return 1")
    with rewards(path, num_workers=1, timeout_s=0.4) as scorer:
        result = scorer.score([group(list("abcdefgh"))], decode)
    assert result.groups[0].rewards.tolist() == [1] * 8
