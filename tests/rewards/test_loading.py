"""How reward functions are found, and what is said where they are not."""

import functools
import sys

import pytest

from fastgrpo.config import RewardConfig, RewardTerm, UserError
from fastgrpo.rewards import Rewards, load_reward
from fastgrpo.rewards.loading import describe_reward


def test_a_module_and_a_file(reward_file):
    from_module = load_reward("fastgrpo.rewards.verifiable:exact_match")
    assert (from_module.name, from_module.per_group, from_module.is_async) == ("exact_match", False, False)
    from_file = load_reward(reward_file("async def score(completions):\n    return [1]"), name="mine")
    assert (from_file.name, from_file.per_group, from_file.is_async) == ("mine", True, True)


def test_a_file_imports_its_neighbours_and_two_files_of_one_name_stay_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"neighbour_{folder}.py").write_text(f"VALUE = {value}")
        (tmp_path / folder / "json.py").write_text(
            f"from neighbour_{folder} import VALUE\ndef score(completion):\n    return VALUE"
        )
    functions = [load_reward(f"{tmp_path}/{folder}/json.py:score").function for folder in "ab"]
    assert [function("") for function in functions] == [1, 2]
    assert "loads" in vars(sys.modules["json"])
    (tmp_path / "a/json.py").write_text("def score(completion):\n    return 3")  # between two runs of a notebook
    assert load_reward(f"{tmp_path}/a/json.py:score").function("") == 3


def test_methods_and_callable_objects():
    class Judge:
        def __init__(self, reward):
            self.reward = reward

        async def __call__(self, completion):
            return self.reward

        def group(self, completions, scale):
            return [scale] * len(completions)

    assert describe_reward(Judge(1), path="judge").is_async
    assert describe_reward(functools.partial(Judge(1)), path="judge").is_async
    assert describe_reward(Judge(1).group, path="judge", kwargs={"scale": 2}).required == ("completions", "scale")


SOURCE = """
import math
LIMIT = 3
def score(completion, scale=1): return 1
def neither(text): return 1
def both(completion, completions): return 1
def plural(completion, finish_reasons): return 1
def singular(completions, completion_): return [1]
def positional(completion, /): return 1
def nothing(): return 1
class Judge:
    def score(self, completion): return 1
"""
NAMES = "score, neither, both, plural, singular, positional, nothing, Judge"
SINGULAR = (
    "`completion`, `prompt`, `answer`, `metadata`, `conversation`, `conversation_id`, `token_ids`, `turn_ends`, "
    "`finish_reason`"
)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("scor", "{path}: {file} has no 'scor'; it has " + NAMES),
        ("Judge.rank", "{path}: {file} has no 'Judge.rank'; it has " + NAMES),
        ("LIMIT", "{path} is not a function but 3; name a function"),
        ("neither", "{path} must ask for either `completion` or `completions`; it asks for `text`"),
        ("nothing", "{path} must ask for either `completion` or `completions`; it asks for nothing"),
        (
            "both",
            "{path} must ask for either `completion` or `completions`; it asks for `completion`, `completions`",
        ),
        ("plural", "{path} asks for `finish_reasons`, but with `completion` there are " + SINGULAR),
        ("positional", "{path} has positional-only parameters, but all are passed by name; remove the `/`"),
    ],
)
def test_functions_that_break_the_contract(reward_file, function, message):
    path = reward_file(SOURCE, function)
    with pytest.raises(UserError) as error:
        load_reward(path)
    assert str(error.value) == "reward.path=" + message.format(path=path, file=path.rpartition(":")[0])


def test_a_configured_argument_that_the_function_does_not_have(reward_file):
    path = reward_file(SOURCE)
    assert load_reward(path, kwargs={"scale": 2}).kwargs == {"scale": 2}
    with pytest.raises(UserError) as error:
        load_reward(path, kwargs={"scal": 2})
    assert str(error.value) == f"reward.kwargs.scal: {path} has no parameter of that name to set; it has `scale`"
    with pytest.raises(UserError, match=r"reward.extra.style.kwargs.completion: .* to set; it has `scale`"):
        Rewards(RewardConfig(extra={"style": RewardTerm(path=path, kwargs={"completion": "x"})}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", "reward.path=my_rewards names no function; write module:function or file.py:function"),
        (":score", "reward.path=:score names no function; write module:function or file.py:function"),
        ("json:", "reward.path=json: names no function; write module:function or file.py:function"),
        (
            "no_such_module:score",
            "reward.path=no_such_module:score does not import (ModuleNotFoundError: No module named 'no_such_module'); "
            "install it, or name a file: FILE.py:FUNCTION",
        ),
    ],
)
def test_paths_that_lead_nowhere(path, message):
    with pytest.raises(UserError) as error:
        load_reward(path)
    assert str(error.value) == message


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_reward("rewards.py:score", key="reward.extra.style.path")
    assert str(error.value) == (
        "reward.extra.style.path=rewards.py:score: there is no file rewards.py "
        f"(looked in {tmp_path}); correct the path"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def score(:", "SyntaxError: invalid syntax (my_rewards.py, line 1)"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
    ],
)
def test_a_file_that_does_not_import(reward_file, source, reason):
    path = reward_file(source)
    for _ in range(2):  # nothing half-imported stays behind
        with pytest.raises(UserError) as error:
            load_reward(path)
        assert str(error.value) == f"reward.path={path} does not import ({reason}); mend the file"


def test_a_builtin_without_a_signature():
    with pytest.raises(UserError, match="does not tell its parameters; wrap it in a Python function"):
        describe_reward(max, path="builtins:max")
