"""Groups whose completions take more than one draw: a conversation's turns, or the rounds of several steps."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.types import Prompt, Reply, Rollout, RolloutGroup


class Unfinished:
    """Groups in flight, oldest first. A group is complete when each of its completions is at its end or its limit.

    max_new_tokens: the limit, the environment's tokens included. max_turns: how often the policy may speak.

    Example, with a limit of 1024 tokens and rounds of 256:
        unfinished.add(sampler.generate(prompts, 8, params, seed))                          # up to 256 tokens each
        unfinished.extend(sampler.generate(unfinished.continuations(), 1, params, seed))    # up to 256 more
        unfinished.reply(environment.replies(unfinished.turns()))                           # what is said to them
        groups = unfinished.take(32)
    """

    def __init__(self, max_new_tokens: int, max_turns: int = 1) -> None:
        self.max_new_tokens, self.max_turns = max_new_tokens, max_turns
        self._groups: list[RolloutGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def num_complete(self) -> int:
        return sum(self._is_complete(group) for group in self._groups)

    def add(self, groups: Iterable[RolloutGroup]) -> None:
        """Take in groups that have just begun."""
        self._groups += [
            replace(group, rollouts=tuple(_with_versions(rollout) for rollout in group.rollouts)) for group in groups
        ]

    def continuations(self) -> list[Prompt]:
        """Every unfinished completion as a prompt of its own: the question and all that has been said so far."""
        prompts = []
        for number, group in enumerate(self._groups):
            for sample, rollout in enumerate(group.rollouts):
                if self._goes_on(rollout):
                    token_ids = torch.cat([group.prompt.token_ids, rollout.token_ids])
                    name = f"{number}/{sample}/{group.prompt.prompt_id}"
                    left = self.max_new_tokens - len(rollout.token_ids)
                    prompts.append(replace(group.prompt, prompt_id=name, token_ids=token_ids, max_new_tokens=left))
        return prompts

    def extend(self, more: list[RolloutGroup]) -> None:
        """Take in one sample of each of `continuations()`, in their order."""
        parts = iter(more)
        self._change(self._goes_on, lambda rollout: _joined(rollout, next(parts)))
        assert next(parts, None) is None

    def turns(self) -> list[tuple[Prompt, Rollout]]:
        """The completions whose last turn has ended and that the environment has yet to answer."""
        return [(g.prompt, rollout) for g in self._groups for rollout in g.rollouts if self._awaits_reply(rollout)]

    def reply(self, replies: list[Reply]) -> None:
        """Take in an answer to each of `turns()`, in their order."""
        given = iter(replies)
        self._change(self._awaits_reply, lambda rollout: self._answered(rollout, next(given)))
        assert next(given, None) is None

    def take(self, wanted: int) -> list[RolloutGroup]:
        """Remove and return the `wanted` oldest complete groups."""
        complete = [group for group in self._groups if self._is_complete(group)][:wanted]
        taken = {id(group) for group in complete}
        self._groups = [group for group in self._groups if id(group) not in taken]
        return complete

    def _change(self, which: Callable[[Rollout], bool], change: Callable[[Rollout], Rollout]) -> None:
        self._groups = [
            replace(group, rollouts=tuple(change(r) if which(r) else r for r in group.rollouts))
            for group in self._groups
        ]

    def _goes_on(self, rollout: Rollout) -> bool:
        return rollout.finish_reason == "length" and len(rollout.token_ids) < self.max_new_tokens

    def _awaits_reply(self, rollout: Rollout) -> bool:
        size = len(rollout.token_ids)
        told_to_end = bool(rollout.replies) and rollout.replies[-1].end == size
        ended = rollout.finish_reason == "stop" and not told_to_end
        return ended and rollout.num_turns < self.max_turns and size < self.max_new_tokens

    def _is_complete(self, group: RolloutGroup) -> bool:
        return not any(self._goes_on(rollout) or self._awaits_reply(rollout) for rollout in group.rollouts)

    def _answered(self, rollout: Rollout, reply: Reply) -> Rollout:
        """The rollout with the reply's tokens, as many as there is room for."""
        replies = (*rollout.replies, reply)
        if not reply.messages:
            return replace(rollout, replies=replies)
        token_ids = torch.cat([rollout.token_ids, reply.token_ids])[: self.max_new_tokens]
        added = len(token_ids) - len(rollout.token_ids)
        version = torch.full((added,), rollout.policy_version)
        return replace(
            rollout,
            token_ids=token_ids,
            loss_mask=torch.cat([rollout.loss_mask, torch.zeros(added, dtype=torch.bool)]),
            sampler_logprobs=torch.cat([rollout.sampler_logprobs, torch.zeros(added)]),
            token_versions=torch.cat([_versions(rollout), version]),
            finish_reason="length",
            replies=replies,
        )

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
                        "token_versions": _encoded(_versions(rollout)),
                        "finish_reason": rollout.finish_reason,
                        "policy_version": rollout.policy_version,
                        "routed_experts": _encoded(rollout.routed_experts),
                        "replies": [_told(reply) for reply in rollout.replies],
                        "conversation_id": rollout.conversation_id,
                    }
                    for rollout in group.rollouts
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
        self._groups = [
            RolloutGroup(
                prompt=by_id[group["prompt_id"]],
                rollouts=tuple(_loaded(group["prompt_id"], rollout) for rollout in group["rollouts"]),
                prompt_routed_experts=_decoded_experts(group["prompt_routed_experts"]),
            )
            for group in state
        ]

    def check_routed_experts(self, wanted: bool) -> None:
        """Raise UserError where completions that have begun came without their experts, or with them unasked."""
        if any((group.prompt_routed_experts is not None) != wanted for group in self._groups):
            now, then = str(wanted).lower(), str(not wanted).lower()
            raise UserError(
                f"learner.router_replay={now}: the checkpoint's unfinished completions were begun with {then}; "
                f"resume with {then}"
            )


def _versions(rollout: Rollout) -> torch.Tensor:
    assert rollout.token_versions is not None
    return rollout.token_versions


def _with_versions(rollout: Rollout) -> Rollout:
    return replace(rollout, token_versions=torch.full_like(rollout.token_ids, rollout.policy_version))


def _joined(begun: Rollout, group: RolloutGroup) -> Rollout:
    """One rollout of what was begun and of the only sample of its continuation."""
    more = _with_versions(group.rollouts[0])
    return replace(
        begun,
        token_ids=torch.cat([begun.token_ids, more.token_ids]),
        loss_mask=torch.cat([begun.loss_mask, more.loss_mask]),
        sampler_logprobs=torch.cat([begun.sampler_logprobs, more.sampler_logprobs]),
        token_versions=torch.cat([_versions(begun), _versions(more)]),
        finish_reason=more.finish_reason,
        policy_version=more.policy_version,
        routed_experts=_joined_experts(begun, group),
    )


def _joined_experts(begun: Rollout, group: RolloutGroup) -> Tensor | None:
    """A token keeps the experts of when the one after it was drawn. The last one that was begun, and a reply to it, had
    none yet: the continuation has computed them, as the end of its prompt."""
    first, last, rest = begun.routed_experts, group.prompt_routed_experts, group.rollouts[0].routed_experts
    if first is None or last is None or rest is None:
        return None
    return torch.cat([first, last[len(first) - len(begun.token_ids) :], rest])


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
