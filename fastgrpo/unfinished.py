"""Groups whose completions take more than one draw: a conversation's turns, or the rounds of several steps."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.types import Prompt, Reply, Rollout, RolloutGroup

EVERYTHING = slice(None)


class Unfinished:
    """Groups in flight, oldest first. A group is complete when each of its completions is at its end or its limit.

    max_new_tokens: the limit, the environment's tokens included. max_turns: how often the policy may speak.
    Where several ranks share the work, each asks for its `share` alone of what is long to make.

    Example, with a limit of 1024 tokens and rounds of 256:
        unfinished.add(sampler.generate(prompts, 8, params, seed))                          # up to 256 tokens each
        more = sampler.generate(unfinished.continuations(), 1, params, seed)                # up to 256 more
        unfinished.extend(unfinished.news(more))
        unfinished.reply(environment.replies(unfinished.turns()))                           # what is said to them
        groups = unfinished.take(32)
    """

    def __init__(self, max_new_tokens: int, max_turns: int = 1) -> None:
        self.max_new_tokens, self.max_turns = max_new_tokens, max_turns
        self._groups: list[_Group] = []

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def num_complete(self) -> int:
        return sum(group.is_complete for group in self._groups)

    def add(self, groups: Iterable[RolloutGroup]) -> None:
        """Take in groups that have just begun."""
        for place, group in enumerate(groups):
            completions = [_Completion(place=place) for _ in group.rollouts]
            for completion, rollout in zip(completions, group.rollouts, strict=True):
                self._append(completion, rollout)
            self._groups.append(
                _Group(prompt=group.prompt, completions=completions, prompt_routed_experts=group.prompt_routed_experts)
            )

    def continuations(self, share: slice = EVERYTHING) -> list[Prompt]:
        """Every unfinished completion as a prompt of its own: the question and all that has been said so far."""
        return [
            replace(
                group.prompt,
                prompt_id=f"{name}/{group.prompt.prompt_id}",
                token_ids=torch.cat([group.prompt.token_ids, *(part.token_ids for part in completion.parts)]),
                max_new_tokens=self.max_new_tokens - completion.num_tokens,
            )
            for name, group, completion in self._waiting("draw")[share]
        ]

    def news(self, more: list[RolloutGroup], share: slice = EVERYTHING) -> list[Rollout]:
        """What one sample of each of `continuations(share)` adds to it."""
        going_on = self._waiting("draw")[share]
        return [_news(completion, group) for (_, _, completion), group in zip(going_on, more, strict=True)]

    def extend(self, news: list[Rollout]) -> None:
        """Take in the `news` of all `continuations()`, in their order."""
        for place, ((_, _, completion), part) in enumerate(zip(self._waiting("draw"), news, strict=True)):
            completion.place = place
            self._append(completion, part)

    def turns(self, share: slice = EVERYTHING) -> list[tuple[Prompt, Rollout]]:
        """The completions whose last turn has ended and that the environment has yet to answer: a share's are those
        whose turn ended in that share of a draw."""
        waiting = ((group.prompt, completion) for _, group, completion in self._waiting("reply"))
        return [(prompt, c.whole()) for prompt, c in waiting if c.place in range(c.place + 1)[share]]

    def turn_places(self) -> list[int]:
        """For each of `turns()` its place in the draw that its turn ended in."""
        return [completion.place for _, _, completion in self._waiting("reply")]

    def first_turn(self, prompt: Prompt, rollout: Rollout) -> tuple[Prompt, Rollout] | None:
        """What the environment is to answer where a completion begins like this; None where it has no turn."""
        return self._turn(prompt, _Completion(), rollout)

    def next_turn(self, continuation: Prompt, part: Rollout) -> tuple[Prompt, Rollout] | None:
        """The same where one of `continuations()` goes on like this, which `extend` has yet to be told."""
        number, sample, _ = continuation.prompt_id.split("/", 2)
        group = self._groups[int(number)]
        completion = group.completions[int(sample)]
        return self._turn(group.prompt, replace(completion, parts=[*completion.parts]), part)

    def _turn(self, prompt: Prompt, completion: _Completion, part: Rollout) -> tuple[Prompt, Rollout] | None:
        self._append(completion, part)
        return (prompt, completion.whole()) if completion.waits_for == "reply" else None

    def reply(self, replies: list[Reply]) -> None:
        """Take in an answer to each of `turns()`, in their order."""
        for (_, _, completion), reply in zip(self._waiting("reply"), replies, strict=True):
            last, room = completion.parts[-1], self.max_new_tokens - completion.num_tokens
            if reply.messages:
                self._append(completion, _heard_after(last, reply, room))
            else:
                completion.parts[-1] = replace(last, replies=(*last.replies, reply))
                completion.waits_for = None

    def ended(self) -> list[tuple[Prompt, Rollout, int]]:
        """The completions that have come to their end since this was asked last, and how many their groups have: a run
        that goes on may have set another size since."""
        ended = [(g, c) for g in self._groups for c in g.completions if c.waits_for is None and not c.was_told]
        for _, completion in ended:
            completion.was_told = True
        return [(group.prompt, completion.whole(), len(group.completions)) for group, completion in ended]

    def take(self, wanted: int) -> list[RolloutGroup]:
        """Remove and return the `wanted` oldest complete groups."""
        complete = [group for group in self._groups if group.is_complete][:wanted]
        taken = {id(group) for group in complete}
        self._groups = [group for group in self._groups if id(group) not in taken]
        for group in self._groups:
            group.whole()  # a part keeps the message it came in, with the parts of groups that are taken
        return [group.whole() for group in complete]

    def _waiting(self, what: Literal["draw", "reply"]) -> list[tuple[str, _Group, _Completion]]:
        """The completions that do, by the names of their continuations."""
        return [
            (f"{number}/{sample}", group, completion)
            for number, group in enumerate(self._groups)
            for sample, completion in enumerate(group.completions)
            if completion.waits_for == what
        ]

    def _append(self, completion: _Completion, part: Rollout) -> None:
        completion.parts.append(part)
        completion.num_tokens += len(part.token_ids)
        completion.waits_for = self._next_of(completion)

    def _next_of(self, completion: _Completion) -> Literal["draw", "reply"] | None:
        if completion.num_tokens >= self.max_new_tokens:
            return None
        if completion.parts[-1].finish_reason == "length":
            return "draw"
        replies = [reply for part in completion.parts for reply in part.replies]
        told_to_end = bool(replies) and replies[-1].end == completion.num_tokens
        return "reply" if not told_to_end and 1 + len(replies) < self.max_turns else None

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything in flight, as JSON holds it."""
        return [
            {
                "prompt_id": group.prompt.prompt_id,
                "prompt_routed_experts": _encoded(group.prompt_routed_experts),
                "rollouts": [
                    {
                        "token_ids": _encoded(rollout.token_ids),
                        "sampler_logprobs": _encoded(rollout.sampler_logprobs),
                        "token_versions": _encoded(rollout.token_versions),
                        "finish_reason": rollout.finish_reason,
                        "policy_version": rollout.policy_version,
                        "routed_experts": _encoded(rollout.routed_experts),
                        "replies": [_told(reply) for reply in rollout.replies],
                        "conversation_id": rollout.conversation_id,
                    }
                    for rollout in group.whole().rollouts
                ],
            }
            for group in self._groups
        ]

    def load_state_dict(self, state: list[dict[str, Any]], prompts: Iterable[Prompt]) -> None:
        """Go on with what `state_dict` told, of these prompts. Raises UserError where one that it needs is missing."""
        by_id = {prompt.prompt_id: prompt for prompt in prompts} if state else {}
        for group in state:
            if group["prompt_id"] not in by_id:
                raise UserError(
                    f"resume: the checkpoint is in the middle of prompt {group['prompt_id']}, which the data no longer "
                    "has; restore the data or start anew with resume=no"
                )
        self._groups = []
        self.add(
            RolloutGroup(
                prompt=by_id[group["prompt_id"]],
                rollouts=tuple(_loaded(group["prompt_id"], rollout) for rollout in group["rollouts"]),
                prompt_routed_experts=_decoded_experts(group["prompt_routed_experts"]),
            )
            for group in state
        )

    def check_routed_experts(self, wanted: bool) -> None:
        """Raise UserError where completions that have begun came without their experts, or with them unasked."""
        if any((group.prompt_routed_experts is not None) != wanted for group in self._groups):
            now, then = str(wanted).lower(), str(not wanted).lower()
            raise UserError(
                f"learner.router_replay={now}: the checkpoint's unfinished completions were begun with {then}; "
                f"resume with {then}"
            )


@dataclass(kw_only=True)
class _Completion:
    """A completion in flight. Its draws and the replies to them are joined when somebody needs the whole: after every
    round, what is long would be copied as often as it goes on."""

    parts: list[Rollout] = field(default_factory=list)
    num_tokens: int = 0
    waits_for: Literal["draw", "reply"] | None = None
    place: int = 0
    """That of its group, or its own, in the draw that made the last part."""
    was_told: bool = False
    """Whether `ended` has told of its end."""

    def whole(self) -> Rollout:
        """With `token_versions`."""
        if len(self.parts) > 1 or self.parts[0].token_versions is None:
            self.parts = [_joined(self.parts)]
        return self.parts[0]


@dataclass(kw_only=True)
class _Group:
    """A RolloutGroup in flight."""

    prompt: Prompt
    completions: list[_Completion]
    prompt_routed_experts: Tensor | None

    @property
    def is_complete(self) -> bool:
        return all(completion.waits_for is None for completion in self.completions)

    def whole(self) -> RolloutGroup:
        rollouts = tuple(completion.whole() for completion in self.completions)
        return RolloutGroup(prompt=self.prompt, rollouts=rollouts, prompt_routed_experts=self.prompt_routed_experts)


def _joined(parts: list[Rollout]) -> Rollout:
    experts = [part.routed_experts for part in parts if part.routed_experts is not None]
    return replace(
        parts[0],
        token_ids=torch.cat([part.token_ids for part in parts]),
        loss_mask=torch.cat([part.loss_mask for part in parts]),
        sampler_logprobs=torch.cat([part.sampler_logprobs for part in parts]),
        token_versions=torch.cat([_versions(part) for part in parts]),
        finish_reason=parts[-1].finish_reason,
        policy_version=parts[-1].policy_version,
        routed_experts=torch.cat(experts) if experts else None,
        replies=tuple(reply for part in parts for reply in part.replies),
    )


def _versions(part: Rollout) -> Tensor:
    if part.token_versions is not None:
        return part.token_versions
    return torch.full_like(part.token_ids, part.policy_version)


def _news(completion: _Completion, group: RolloutGroup) -> Rollout:
    """The only sample of the completion's continuation, as its next part.

    A token keeps the experts of when the one after it was drawn. The last one that was begun, and a reply to it, had
    none yet: the continuation has computed them, as the end of its prompt."""
    (rollout,) = group.rollouts
    last, rest = group.prompt_routed_experts, rollout.routed_experts
    if last is None or rest is None:
        return rollout
    known = sum(len(part.routed_experts) for part in completion.parts if part.routed_experts is not None)
    return replace(rollout, routed_experts=torch.cat([last[known - completion.num_tokens :], rest]))


def _heard_after(last: Rollout, reply: Reply, room: int) -> Rollout:
    """The reply as the part that follows, with as many of its tokens as there is room for."""
    token_ids = reply.token_ids[:room]
    return Rollout(
        prompt_id=last.prompt_id,
        token_ids=token_ids,
        loss_mask=torch.zeros(len(token_ids), dtype=torch.bool),
        sampler_logprobs=torch.zeros(len(token_ids)),
        finish_reason="length",
        policy_version=last.policy_version,
        replies=(reply,),
    )


def _encoded(tensor: Tensor | None) -> list[Any] | None:
    """Type, shape and bytes, because millions of numbers are too many for JSON."""
    if tensor is None:
        return None
    array = tensor.numpy()
    return [array.dtype.name, array.shape, base64.b64encode(array.tobytes()).decode()]


def _decoded(state: list[Any]) -> Tensor:
    dtype, shape, text = state
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy())


def _decoded_experts(state: list[Any] | None) -> Tensor | None:
    return None if state is None else _decoded(state)


def _told(reply: Reply) -> dict[str, Any]:
    return {**vars(reply), "token_ids": _encoded(reply.token_ids), "messages": list(reply.messages)}


def _heard(state: dict[str, Any]) -> Reply:
    return Reply(**{**state, "token_ids": _decoded(state["token_ids"]), "messages": tuple(state["messages"])})


def _loaded(prompt_id: str, state: dict[str, Any]) -> Rollout:
    token_ids = _decoded(state["token_ids"])
    replies = tuple(map(_heard, state["replies"]))
    loss_mask = torch.ones(len(token_ids), dtype=torch.bool)
    for reply in replies:
        loss_mask[reply.start : reply.end] = False
    return Rollout(
        prompt_id=prompt_id,
        token_ids=token_ids,
        loss_mask=loss_mask,
        sampler_logprobs=_decoded(state["sampler_logprobs"]),
        finish_reason=state["finish_reason"],
        policy_version=state["policy_version"],
        conversation_id=state["conversation_id"],
        token_versions=_decoded(state["token_versions"]),
        routed_experts=_decoded_experts(state["routed_experts"]),
        replies=replies,
    )
