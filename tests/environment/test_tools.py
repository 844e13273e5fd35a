"""Ready-made environments."""

import pytest

from fastgrpo.config import UserError
from fastgrpo.environment.tools import tool_calls, try_again


@pytest.fixture
def tools(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text(
        "def add(a, b=1): return a + b\n"
        "def search(query): return f'nothing on {query}'\n"
        "def fail(): raise RuntimeError('out of order')\n"
        "def pairs(): return {(1, 2): 3}\n"
        "async def later(): pass\n"
    )
    return [f"{file}:{name}" for name in ("add", "search", "fail", "pairs")]


def call(text):
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('{"name": "add", "arguments": {"a": 2, "b": 40}}', "42"),
        ('{"name": "add", "arguments": {"a": 2}}', "3"),
        ('{"name": "search", "arguments": {"query": "x"}}', "nothing on x"),
        ('{"name": "fail"}', "Error: RuntimeError: out of order"),
        ('{"name": "add", "arguments": {"c": 2}}', "Error: not a call of a tool: missing a required argument: 'a'"),
        ('{"name": "add", "arguments": [1]}', "Error: not a call of a tool: "),
        ('{"name": "rm"}', "Error: there is no tool 'rm'; there are add, search, fail, pairs"),
        ('{"name": "pairs"}', "Error: TypeError: keys must be str"),
        ('{"name": ["add"]}', "Error: not a call of a tool: "),
        ("add(2, 3)", "Error: not a call of a tool: "),
        ("[1, 2]", "Error: not a call of a tool: "),
        ("{}", "Error: not a call of a tool: 'name'"),
        pytest.param("[" * 20_000, "Error: not a call of a tool: maximum recursion", id="deep"),
    ],
)
def test_a_call_is_made_or_what_is_wrong_with_it_is_told(tools, text, content):
    (message,) = tool_calls(f"Let me see.{call(text)}", tools)
    assert message["role"] == "tool"
    assert message["content"].startswith(content)


def test_several_calls_are_made_in_their_order_and_none_ends_the_conversation(tools):
    two = call('{"name": "add", "arguments": {"a": 1}}') + call('{"name": "add", "arguments": {"a": 2}}')
    assert [message["content"] for message in tool_calls(two, tools)] == ["2", "3"]
    assert tool_calls("The answer is 3.", tools) is None


def test_a_tool_that_is_not_there_ends_the_run(tools):
    with pytest.raises(UserError, match=r"environment.kwargs=.* has no 'subtract'"):
        tool_calls("", [tools[0].replace("add", "subtract")])
    with pytest.raises(UserError, match="is async; name a plain function"):
        tool_calls("", [tools[0].replace("add", "later")])


def test_another_try_until_it_is_right():
    grade = "fastgrpo.rewards.verifiable:exact_match"
    assert try_again("2+3=#5", "5", grade) is None
    assert try_again("2+3=#6", "5", grade) == "That is not right. Try again."
    assert try_again("2+3=#6", "5", grade, says="=") == "="
