"""Environments: what their functions are given, what may come back, and what happens where they fail."""

import time
from dataclasses import replace

import pytest
import torch

from fastgrpo.config import EnvironmentConfig, UserError
from fastgrpo.environment.asking import Environment, load_environment
from fastgrpo.functions.loading import name_of
from fastgrpo.types import Prompt, Reply, Rollout

END = 0


def encode(messages, last_token, place):
    return torch.tensor([ord(c) for m in messages for c in f"{m['role'][0]}:{m['content']}"])


class Characters:
    """A tokenizer whose END is a special token."""

    def decode(self, token_ids, skip_special_tokens):
        return "".join(chr(i) if i != END else "<end>" * (not skip_special_tokens) for i in token_ids.tolist())


def said(text, *replies, prompt_id="train/3", **metadata):
    prompt = Prompt(prompt_id=prompt_id, token_ids=torch.tensor([50]), text="2+3=", answer="5", metadata=metadata)
    token_ids = torch.tensor([*map(ord, text), END])
    mask = torch.ones(len(token_ids), dtype=torch.bool)
    for reply in replies:
        mask[reply.start : reply.end] = False
    return prompt, Rollout(
        prompt_id=prompt_id,
        token_ids=token_ids,
        loss_mask=mask,
        sampler_logprobs=torch.zeros(len(token_ids)),
        finish_reason="stop",
        policy_version=0,
        replies=replies,
        conversation_id="train-1-0-3-2",
    )


def opened(config, function=None):
    if function is not None:
        config = replace(config, path=name_of(function, "environment"))
    return Environment(config, load_environment(config, function), encode, Characters())


def ask(function, *turns, **settings):
    with opened(EnvironmentConfig(**{"num_workers": 0, **settings}), function) as environment:
        return environment.replies(list(turns))


def test_the_function_gets_what_it_asks_for():
    seen = []

    def respond(turn, conversation, num_turns, conversation_id, prompt, answer, metadata, level, tone="calm", **others):
        seen.append((turn, conversation, num_turns, prompt, answer, metadata, level, tone, others))
        assert conversation_id == "train-1-0-3-2"

    reply = Reply(start=2, token_ids=torch.tensor([99, 99]), messages=({"role": "tool", "content": "no"},))
    ask(respond, said("a\0??b", reply, level=3, source="x"), kwargs={"tone": "harsh"})
    conversation = [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "b"},
    ]
    metadata = {"level": 3, "source": "x"}
    assert seen == [("b", conversation, 2, "2+3=", "5", metadata, 3, "harsh", {"source": "x"})]
    seen[0][1][1]["content"] = "yes"
    assert reply.messages[0]["content"] == "no"


def test_a_raw_turn_has_its_special_tokens():
    seen = []

    def respond(turn, raw_turn):
        seen.append((turn, raw_turn))

    reply = Reply(start=2, token_ids=torch.tensor([99, 99]), messages=({"role": "tool", "content": "no"},))
    ask(respond, said("a\0??b\0c", reply), said("d"))
    assert seen == [("bc", "b<end>c<end>"), ("d", "d<end>")]


TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("result", "messages"),
    [
        (None, ()),
        ("more", ({"role": "user", "content": "more"},)),
        (TOOL, (TOOL,)),
        ([TOOL, {"role": "user", "content": "so?"}], (TOOL, {"role": "user", "content": "so?"})),
        ("half \ud83d", ({"role": "user", "content": "half ?"},)),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_function_may_return(result, messages, num_workers):
    (reply,) = ask(lambda turn: result, said("ab"), num_workers=num_workers)
    assert (reply.start, reply.messages, reply.failure) == (3, messages, None)
    assert Characters().decode(reply.token_ids, True) == "".join(f"{m['role'][0]}:{m['content']}" for m in messages)


def test_a_text_need_not_cross_processes_as_what_it_was():
    def respond(turn):
        class Node(str):  # as a parser of pages makes them, each with the whole page
            pass

        return Node("found")

    (reply,) = ask(respond, said("ab"), num_workers=1)
    assert reply.messages == ({"role": "user", "content": "found"},)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (7, "7 (int)"),
        ([], "[] (list)"),
        ({"role": "tool"}, "{'role': 'tool'} (dict)"),
        ({"role": "tool", "content": 4}, "{'role': 'tool', 'content': 4} (dict)"),
        ({"role": "assistant", "content": "I"}, "{'role': 'assistant', 'content': 'I'} (dict)"),
        ([TOOL, "text"], "[{'role': 'tool', 'content': '42'}, 'text'] (list)"),
    ],
)
@pytest.mark.parametrize("on_error", ["fail", "tell"])
def test_what_it_may_not_return(result, shown, on_error):
    with pytest.raises(UserError) as error:
        ask(lambda turn: result, said("a"), on_error=on_error)
    assert str(error.value) == (
        f"environment=<lambda> on prompt train/3 returned {shown}; return a text, a message {{role, content}} or None"
    )


def test_replies_come_in_the_order_of_the_turns():
    def respond(turn):
        time.sleep(0.05 * (turn == "a"))
        return turn.upper()

    replies = ask(respond, said("a"), said("b"), said("c"), num_workers=2)
    assert [r.messages[0]["content"] for r in replies] == ["A", "B", "C"]
    assert ask(respond) == []


NOTING = """
from pathlib import Path
def respond(turn):
    with open(Path(__file__).with_name("calls"), "a") as file:
        file.write(turn)
    return turn.upper()
async def respond_later(turn):
    return respond(turn)
"""


@pytest.mark.parametrize(("function", "at_once"), [("respond", "abxy"), ("respond_later", "ab")])
def test_a_turn_that_has_begun_is_asked_about_at_once_and_not_again(function, at_once, tmp_path):
    (tmp_path / "tools.py").write_text(NOTING)
    calls = tmp_path / "calls"
    calls.touch()
    named = {
        text: (prompt, replace(rollout, conversation_id="train-1-0-0-0"))
        for text in ("ab", "xy")
        for prompt, rollout in [said(text)]
    }
    with opened(EnvironmentConfig(path=f"{tmp_path / 'tools.py'}:{function}", num_workers=1)) as environment:
        for text in ("ab", "ab", "xy"):  # again, and in other words: drawn anew after an engine had failed
            environment.begin(*named[text])
        deadline = time.monotonic() + 20
        while calls.read_text() != at_once and time.monotonic() < deadline:
            time.sleep(0.02)
        assert calls.read_text() == at_once
        replies = environment.replies([named["xy"], said("c")])
        assert [reply.messages[0]["content"] for reply in replies] == ["XY", "C"]
        assert calls.read_text() == "abxyc"
        assert [r.messages[0]["content"] for r in environment.replies([named["xy"]])] == ["XY"]  # another round's


def test_async_functions_run_all_at_once_in_all_workers():
    async def respond(turn):
        import asyncio
        import os

        await asyncio.sleep(0.4)
        return f"{turn}{os.getpid()}"

    turns = [chr(ord("0") + number) for number in range(51)]
    begin = time.monotonic()
    replies = [reply.messages[0]["content"] for reply in ask(respond, *map(said, turns), num_workers=2, timeout_s=5)]
    assert time.monotonic() - begin < 8  # one after the other in each worker would take ten seconds
    assert [reply[0] for reply in replies] == turns
    assert len({reply[1:] for reply in replies}) == 2
    assert ask(respond) == []


def raises(turn):
    if turn == "bad":
        raise ValueError("no such thing")


def hangs(turn):
    while turn == "bad":
        pass


@pytest.mark.parametrize(
    ("function", "fails", "told", "kind"),
    [
        (raises, "raised ValueError: no such thing (", "Error: ValueError: no such thing (", "error"),
        (hangs, "exceeded environment.timeout_s=0.5; raise the limit", "Error: timed out after 0.5 s", "timeout"),
    ],
)
def test_a_failure_ends_the_run_or_is_told_to_the_policy(function, fails, told, kind):
    config = {"num_workers": 1, "timeout_s": 0.5}
    with pytest.raises(UserError, match="on prompt train/3 ") as error:
        ask(function, said("bad"), **config)
    assert fails in str(error.value)
    assert str(error.value).endswith("or set environment.on_error=tell")
    bad, good = ask(function, said("bad"), said("good"), on_error="tell", **config)
    assert bad.messages[0]["role"] == "user"
    assert bad.messages[0]["content"].startswith(told)
    assert (bad.failure, good.failure, good.messages) == (kind, None, ())


def test_a_user_error_ends_the_run_under_every_policy():
    def respond(turn):
        raise UserError("the search index is not there; build it with make index")

    with pytest.raises(UserError, match="on prompt train/3: the search index is not there"):
        ask(respond, said("a"), on_error="tell")


def test_a_broken_function_is_found_before_the_run(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text("def respond(turn, level): return 3\n")
    config = EnvironmentConfig(path=f"{file}:respond", num_workers=0)
    with opened(config) as environment:
        prompt, _ = said("a")
        with pytest.raises(UserError, match=r"environment.path=.* asks for `level`.* set environment.kwargs.level"):
            environment.check(prompt)
        with pytest.raises(UserError, match=rf"asks for `level`, .* nor a column of {prompt.prompt_id} \("):
            environment.check(replace(prompt, prompt_id="other", metadata={"level": 1}), prompt)
    config.kwargs = {"level": 1}
    with (
        opened(config) as environment,
        pytest.raises(UserError, match=r"returned 3 \(int\); return a text"),
    ):
        environment.check(prompt)
    config.path = f"{file}:reply"
    with pytest.raises(UserError, match=r"environment.path=.* has no 'reply'; it has respond"):
        opened(config)


def test_workers_import_no_torch():
    def respond(turn):
        import sys

        return str("torch" in sys.modules)

    (reply,) = ask(respond, said("a"), num_workers=1)
    assert reply.messages[0]["content"] == "False"
