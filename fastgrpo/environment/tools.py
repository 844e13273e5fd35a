"""Ready-made environments: tool calls as chat models write them, and another try. Imports no torch."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from fastgrpo.config import UserError
from fastgrpo.functions.loading import load_function

TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ANSWERED = 1.0
"""A turn is right where the grading function gives it at least this."""


def tool_calls(turn: str, functions: list[str]) -> list[dict[str, str]] | None:
    """Calls the tools that a turn asks for, and says what each returned; a turn without a call ends the conversation.

    functions: module:function or file.py:function each, known to the policy by the function's name. A call is
    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Qwen2.5 and Qwen3 write it (the Hermes format). What is
    wrong with a call, or raised by a tool, is the reply to it.
    """
    tools = {path.rpartition(":")[2]: _load(path) for path in functions}
    calls = TOOL_CALL.findall(turn)
    return [{"role": "tool", "content": _call(text, tools)} for text in calls] or None


def _call(text: str, tools: dict[str, Callable[..., Any]]) -> str:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        if name not in tools:
            return f"Error: there is no tool {name!r}; there are {', '.join(tools)}"
        inspect.signature(tools[name]).bind(**arguments)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"Error: not a call of a tool: {error}"
    try:
        result = tools[name](**arguments)
        return result if isinstance(result, str) else json.dumps(result, default=str)
    except Exception as error:  # a tool may raise and return what it likes; the policy chose the arguments
        return f"Error: {type(error).__name__}: {error}"


def try_again(turn: str, answer: Any, grade: str, says: str = "That is not right. Try again.") -> str | None:
    """Lets the policy try again until it is right.

    grade: module:function or file.py:function, a reward function of `completion` and `answer`, such as the run's own; a
    turn to which it gives 1 ends the conversation. says: the reply to any other.
    """
    return None if _load(grade)(completion=turn, answer=answer) >= ANSWERED else says


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    function = load_function(path, "environment.kwargs")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"environment.kwargs: {path} is async; name a plain function")
    return function
