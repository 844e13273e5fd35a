"""Answers the policy's turns: calls the function, checks what comes back, applies the error policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import EnvironmentConfig, UserError
from fastgrpo.conversation import CHECK, Message, conversation, last_turn
from fastgrpo.environment.contract import OFFERED, normalize, plain
from fastgrpo.functions.binding import arguments_of
from fastgrpo.functions.contract import Failure, Unusable, UserFunction
from fastgrpo.functions.lane import Ticket
from fastgrpo.functions.loading import describe, load_function
from fastgrpo.functions.pool import Executor, ProcessExecutor, ThreadExecutor
from fastgrpo.types import Prompt, Reply, Rollout

PATH_KEY = "environment.path"
Encode = Callable[[Sequence[Message], int, str], Tensor]
"""(messages, the policy's last token, whose reply it is) -> the tokens between the policy's turns."""


def load_environment(config: EnvironmentConfig, function: Callable[..., Any] | None = None) -> UserFunction | None:
    """The configured function, None without a path; `function` in its place, whose name the path then is. Raises
    UserError where it does not load, or does not ask for what the contract offers."""
    if config.path is None:
        return None
    key = PATH_KEY if function is None else "environment"
    contract = OFFERED, normalize
    return describe(
        function or load_function(config.path, key),
        path=config.path,
        key=key,
        kwargs=config.kwargs,
        reserved=OFFERED,
        contract=lambda names: contract,
    )


class Environment:
    """The configured function, ready to be called. A context manager: leaving it ends the workers.

    Example:
        function = load_environment(config.environment)
        with Environment(config.environment, function, encode, tokenizer) as environment:
            environment.check(prompts.train[0])
            unfinished.reply(environment.replies(unfinished.turns()))
    """

    def __init__(self, config: EnvironmentConfig, function: UserFunction, encode: Encode, tokenizer: Any) -> None:
        """tokenizer: anything with transformers' `decode`. Raises UserError where the function cannot be sent to the
        workers."""
        self._config, self._function, self._encode = config, function, encode
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._decode_raw = partial(tokenizer.decode, skip_special_tokens=False)
        self._begun: dict[tuple[str | None, int], tuple[Tensor, Ticket]] = {}
        """By the turn, which its conversation and its end name: the tokens that it was asked with."""
        limit, by_path = config.timeout_s, [function.key == PATH_KEY]
        self._executor: Executor
        if config.num_workers == 0:
            self._executor = ThreadExecutor([function], timeout_s=limit)
        else:
            self._executor = ProcessExecutor(
                [function], by_path=by_path, num_workers=config.num_workers, timeout_s=limit
            )

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes, also those in the middle of a call."""
        self._executor.close()

    def begin(self, prompt: Prompt, rollout: Rollout) -> None:
        """Ask about a turn while others are still drawn; `replies` has the answer. Raises UserError where the function
        cannot be called."""
        if self._asked_about(rollout) is None:  # else it had to be drawn anew
            self._begun[_key(rollout)] = rollout.token_ids, self._ask(prompt, self._said(rollout))

    def replies(self, turns: list[tuple[Prompt, Rollout]]) -> list[Reply]:
        """What is said to each completion whose turn has ended, all that have not begun asked at once.

        Raises UserError where the function returns what is no reply, and under environment.on_error=fail where it
        raises or exceeds environment.timeout_s.
        """
        tickets = [self._asked_about(rollout) or self._ask(prompt, self._said(rollout)) for prompt, rollout in turns]
        self._begun.clear()
        outcomes = [outcome for ticket in tickets for outcome in ticket()]
        return [
            self._reply(prompt, len(rollout.token_ids), int(rollout.token_ids[-1]), outcome)
            for (prompt, rollout), outcome in zip(turns, outcomes, strict=True)
        ]

    def check(self, prompt: Prompt, *others: Prompt) -> None:
        """Answers a made-up turn, so that a broken function ends the run before it starts, and sees whether it could be
        called for the others, which may have other columns. Raises UserError as `replies` does."""
        made_up = [{"role": "assistant", "content": "0"}]
        said = {"turn": "0", "raw_turn": "0", "conversation": made_up, "num_turns": 1, "conversation_id": CHECK}
        for other in others:
            self._arguments(other, said)
        (outcome,) = self._ask(prompt, said)()
        self._reply(prompt, 1, -1, outcome)

    def _said(self, rollout: Rollout) -> dict[str, Any]:
        """What the function can ask for of a conversation."""
        messages = conversation(rollout, self._decode)
        said = {
            "turn": last_turn(messages),
            "conversation": messages,
            "num_turns": rollout.num_turns,
            "conversation_id": rollout.conversation_id,
        }
        if "raw_turn" in self._function.parameters:  # hardly ever
            start = rollout.replies[-1].end if rollout.replies else 0
            said["raw_turn"] = self._decode_raw(rollout.token_ids[start:])
        return said

    def _asked_about(self, rollout: Rollout) -> Ticket | None:
        token_ids, ticket = self._begun.get(_key(rollout), (None, None))
        return ticket if token_ids is not None and torch.equal(token_ids, rollout.token_ids) else None

    def _ask(self, prompt: Prompt, said: dict[str, Any]) -> Ticket:
        return self._executor.submit(0, [self._arguments(prompt, said)])

    def _arguments(self, prompt: Prompt, said: dict[str, Any]) -> dict[str, Any]:
        row = {"prompt": prompt.text, "answer": prompt.answer, "metadata": dict(prompt.metadata)}
        return arguments_of(self._function, said | row, prompt.metadata, prompt.prompt_id)

    def _reply(self, prompt: Prompt, start: int, last_token: int, outcome: Any) -> Reply:
        where = f"{self._function.key}={self._function.path} on prompt {prompt.prompt_id}"
        failure: Any = None
        if isinstance(outcome, Failure):
            failure = outcome.kind
            outcome = [{"role": "user", "content": plain(self._told(where, outcome))}]
        if isinstance(outcome, Unusable):
            raise UserError(f"{where} returned {outcome.shown}; return a text, a message {{role, content}} or None")
        token_ids = self._encode(outcome, last_token, where) if outcome else torch.empty(0, dtype=torch.int64)
        return Reply(start=start, token_ids=token_ids, messages=tuple(outcome), failure=failure)

    def _told(self, where: str, failure: Failure) -> str:
        """What the policy reads in place of a reply. Raises UserError where the run is to end instead."""
        limit = self._config.timeout_s
        if failure.kind == "refused":
            raise UserError(f"{where}: {failure.message}")
        if self._config.on_error == "fail":
            late = failure.kind == "timeout"
            what = f"exceeded environment.timeout_s={limit:g}" if late else f"raised {failure.message}"
            mend = "raise the limit" if late else "mend the function"
            raise UserError(f"{where} {what}; {mend} or set environment.on_error=tell")
        return f"Error: timed out after {limit:g} s" if failure.kind == "timeout" else f"Error: {failure.message}"


def _key(rollout: Rollout) -> tuple[str | None, int]:
    return rollout.conversation_id, len(rollout.token_ids)
