"""Scores groups: calls every reward function on every group, checks what comes back, applies the error policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import RewardConfig, UserError
from fastgrpo.conversation import CHECK, conversation, last_turn, parts_of
from fastgrpo.functions.contract import Failure, Unusable
from fastgrpo.functions.lane import Ticket
from fastgrpo.functions.loading import name_of
from fastgrpo.functions.pool import Executor, ProcessExecutor, ThreadExecutor
from fastgrpo.rewards.binding import Sample, bind, joined
from fastgrpo.rewards.contract import RewardFunction, StepRewards
from fastgrpo.rewards.loading import describe_reward, load_reward
from fastgrpo.types import Prompt, Rollout, RolloutGroup, ScoredGroup

Scores = list[float | StepRewards]
"""One function's values for a group, one per completion."""


TAKEN = ("mean", "std", "group_std", "min", "max", "error_count", "timeout_count", "dropped_groups")
"""Names of a run's other metrics under reward/."""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Example: ScoreResult(groups=[...], metrics={"reward/error_count": 0.0, ...})."""

    groups: list[ScoredGroup]
    """In the order given, without those that the policy dropped."""
    metrics: dict[str, float]
    """reward/error_count and reward/timeout_count (calls), reward/dropped_groups, and with more than one function
    each one's mean reward/<name>, unweighted, over the groups that are kept."""


@dataclass
class _Calls:
    """What has been started for a group."""

    samples: dict[int, Sample] = field(default_factory=dict)
    """Its completions by their place."""
    tickets: dict[tuple[int, int], Ticket] = field(default_factory=dict)
    """By the function's number and the completion's place; 0 for what takes all of them."""

    def tickets_of(self, index: int) -> list[Ticket]:
        """A function's, in the order of the completions."""
        return [self.tickets[key] for key in sorted(self.tickets) if key[0] == index]


class Rewards:
    """The configured reward functions, ready to be called. A context manager: leaving it ends the workers.

    Example:
        with Rewards(config.reward) as rewards:
            rewards.check(prompts.train[0])
            result = rewards.score(groups, tokenizer.decode)
    """

    def __init__(self, config: RewardConfig, function: Callable[..., Any] | None = None) -> None:
        """`function` takes the place of reward.path, for functions that live in a notebook.

        Raises UserError for a function that cannot be loaded or sent to the workers, and for unknown settings.
        """
        _check(config)
        self._config = config
        self._functions = _load(config, function)
        by_path = [function is None, *(True for _ in config.extra)]
        self._begun: dict[tuple[str, int], _Calls] = {}
        """By the group's drawing and number."""
        self._executor: Executor
        if config.num_workers == 0:
            self._executor = ThreadExecutor(self._functions, timeout_s=config.timeout_s)
        else:
            self._executor = ProcessExecutor(
                self._functions, by_path=by_path, num_workers=config.num_workers, timeout_s=config.timeout_s
            )

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """What ScoredGroup.reward_terms calls them."""
        return [function.name for function in self._functions]

    def close(self) -> None:
        """Ends the worker processes, also those in the middle of a call."""
        self._executor.close()

    def begin(self, prompt: Prompt, rollout: Rollout, group_size: int, decode: Callable[[Tensor], str]) -> None:
        """Starts on one of a group's completions while others are still drawn; `score` collects what comes of it.

        A plain function of one completion is called at once, another when group_size siblings have begun. One that
        begins again with other tokens takes the place of what began before. Raises UserError where a function cannot be
        called.
        """
        assert rollout.conversation_id is not None
        drawing, number, place = parts_of(rollout.conversation_id)
        calls = self._begun.setdefault((drawing, number), _Calls())
        begun = calls.samples.get(place)
        if begun is None or begun.token_ids != [rollout.token_ids.tolist()]:  # else it had to be drawn anew
            self._call(calls, place, _sample(prompt, rollout, decode), group_size)

    def score(self, groups: list[RolloutGroup], decode: Callable[[Tensor], str]) -> ScoreResult:
        """Calls the functions on all groups at once, but for what has begun, and sums their values by weight.

        `decode` turns token ids into the text that the functions see.
        Raises UserError where a function returns what is no reward, and under reward.on_error=fail where it raises
        or exceeds reward.timeout_s.
        """
        kept, metrics = self._collect_all([self._calls_of(group, decode) for group in groups])
        scored = [_scored_group(groups[i], scores, self._functions) for i, scores in kept.items()]
        if len(self._functions) > 1 and scored:
            for name in scored[0].reward_terms:
                metrics[f"reward/{name}"] = torch.cat([group.reward_terms[name] for group in scored]).mean().item()
        return ScoreResult(groups=scored, metrics=metrics)

    def check(self, prompt: Prompt, *others: Prompt, group_size: int = 2) -> None:
        """Scores made-up completions of a real prompt, so that a broken function ends the run before it starts, and
        sees whether the functions could be called for the others, which may have other columns.

        Raises UserError as `score` does.
        """
        for other in others:
            for function in self._functions:
                bind(function, _made_up(other))
        calls = _Calls()
        for place in range(group_size):
            self._call(calls, place, _made_up(prompt), group_size)
        self._collect_all([calls])

    def _calls_of(self, group: RolloutGroup, decode: Callable[[Tensor], str]) -> _Calls:
        """Those that have begun, and the rest begun now."""
        name, size = group.rollouts[0].conversation_id, len(group.rollouts)
        begun = None if name is None else self._begun.pop(parts_of(name)[:2], None)
        calls = begun or _Calls()
        for place, rollout in enumerate(group.rollouts):
            if place not in calls.samples:
                self._call(calls, place, _sample(group.prompt, rollout, decode), size)
        return calls

    def _call(self, calls: _Calls, place: int, sample: Sample, group_size: int) -> None:
        """Makes the calls that one more completion makes possible: those of functions that take one alone, and with
        the last completion the others. Async functions are of these: a group's calls run at once."""
        samples = calls.samples | {place: sample}
        for index, function in enumerate(self._functions):
            if not (function.per_group or function.is_async):
                calls.tickets[index, place] = self._executor.submit(index, bind(function, sample))
            elif len(samples) == group_size:
                group = joined([samples[i] for i in range(group_size)])
                calls.tickets[index, 0] = self._executor.submit(index, bind(function, group))
        calls.samples = samples  # only now: where a call could not be made, all of them are made again

    def _collect_all(self, all_calls: list[_Calls]) -> tuple[dict[int, list[Scores]], dict[str, float]]:
        """For each kept group every function's scores, and the counts."""
        counts = {"reward/error_count": 0.0, "reward/timeout_count": 0.0, "reward/dropped_groups": 0.0}
        kept: dict[int, list[Scores]] = {}
        for i, calls in enumerate(all_calls):
            sample = joined([calls.samples[place] for place in sorted(calls.samples)])
            collected = [
                self._collect(function, sample, calls.tickets_of(index), counts)
                for index, function in enumerate(self._functions)
            ]
            whole = [scores for scores in collected if scores is not None]
            if len(whole) == len(collected):
                kept[i] = whole
            else:
                counts["reward/dropped_groups"] += 1
        return kept, counts

    def _collect(
        self, function: RewardFunction, sample: Sample, tickets: list[Ticket], counts: dict[str, float]
    ) -> Scores | None:
        """The function's scores for the sample, or None where the policy drops it."""
        outcomes = [outcome for ticket in tickets for outcome in ticket()]
        scores: Scores = []
        failed = False
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                failed = True
                self._count_or_raise(function, sample, len(scores), outcome, counts)
                scores.extend([0.0] * (len(sample.completions) if function.per_group else 1))
            else:
                scores.extend(_usable(function, sample, len(scores), outcome))
        return None if failed and self._config.on_error == "drop" else scores

    def _count_or_raise(
        self, function: RewardFunction, sample: Sample, completion: int, failure: Failure, counts: dict[str, float]
    ) -> None:
        where = _where(function, sample, None if function.per_group else completion)
        if failure.kind == "refused":
            raise UserError(f"{where}: {failure.message}")
        if self._config.on_error == "fail":
            limit = f"exceeded reward.timeout_s={self._config.timeout_s:g}"
            what = limit if failure.kind == "timeout" else f"raised {failure.message}"
            mend = "raise the limit" if failure.kind == "timeout" else "mend the function"
            raise UserError(f"{where} {what}; {mend} or set reward.on_error=zero or drop")
        counts[f"reward/{failure.kind}_count"] += 1


def _check(config: RewardConfig) -> None:
    if config.on_error not in ("fail", "zero", "drop"):
        raise UserError(f"reward.on_error={config.on_error} is unknown; use fail, zero or drop")
    if not config.timeout_s > 0:
        raise UserError(f"reward.timeout_s={config.timeout_s} must be positive")
    if config.num_workers < 0:
        raise UserError(f"reward.num_workers={config.num_workers} is negative; use 0 for the trainer's own process")
    weights = {
        "reward.weight": config.weight,
        **{f"reward.extra.{n}.weight": t.weight for n, t in config.extra.items()},
    }
    for key, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"{key}={weight} must be a finite number")


def _load(config: RewardConfig, function: Callable[..., Any] | None) -> list[RewardFunction]:
    main: dict[str, Any] = {"weight": config.weight, "kwargs": config.kwargs}
    if function is None:
        functions = [load_reward(config.path, **main)]
    else:
        name = name_of(function, "reward")
        functions = [describe_reward(function, path=name, key="reward", **main)]
    for name, term in config.extra.items():
        key = f"reward.extra.{name}.path"
        functions.append(load_reward(term.path, key=key, name=name, weight=term.weight, kwargs=term.kwargs))
        if name == functions[0].name:
            raise UserError(f"reward.extra.{name} has the name of the first reward function; rename it")
    for one in functions if len(functions) > 1 else ():
        if one.name in TAKEN:
            raise UserError(f"{one.key}={one.path}: reward/{one.name} is a metric of its own; rename it")
    return functions


def _sample(prompt: Prompt, rollout: Rollout, decode: Callable[[Tensor], str]) -> Sample:
    """A group's part that is one completion."""
    messages = conversation(rollout, decode)
    return Sample(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        answer=prompt.answer,
        metadata=prompt.metadata,
        completions=[last_turn(messages)],
        conversations=[messages],
        conversation_ids=[rollout.conversation_id],
        token_ids=[rollout.token_ids.tolist()],
        turn_ends=[rollout.turn_ends],
        finish_reasons=[rollout.finish_reason],
    )


def _made_up(prompt: Prompt) -> Sample:
    return Sample(
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        answer=prompt.answer,
        metadata=prompt.metadata,
        completions=["0"],
        conversations=[[{"role": "assistant", "content": "0"}]],
        conversation_ids=[CHECK],
        token_ids=[[0]],
        turn_ends=[[0]],
        finish_reasons=["stop"],
    )


def _usable(function: RewardFunction, sample: Sample, first: int, outcome: Any) -> Scores:
    """The values of one call, which began at completion `first`. Raises UserError for any that is no reward."""
    where = _where(function, sample, None)
    expected = len(sample.completions) if function.per_group else 1
    if isinstance(outcome, Unusable):
        raise UserError(f"{where} returned {outcome.shown}; return a list with one number per completion ({expected})")
    if len(outcome) != expected:
        raise UserError(f"{where} returned {len(outcome)} values; return one per completion ({expected})")
    for completion, value in enumerate(outcome, start=first):
        where = _where(function, sample, completion)
        if isinstance(value, Unusable):
            raise UserError(f"{where} returned {value.shown}; return a finite number")
        if isinstance(value, StepRewards):
            length = len(sample.token_ids[completion])
            for index, _ in value.steps:
                if not 0 <= index < length:
                    raise UserError(f"{where} returned a step that ends at token {index} of {length}; count from 0")
    return outcome


def _where(function: RewardFunction, sample: Sample, completion: int | None) -> str:
    place = "" if completion is None else f", completion {completion}"
    return f"{function.key}={function.path} on prompt {sample.prompt_id}{place}"


def _scored_group(group: RolloutGroup, scores: list[Scores], functions: list[RewardFunction]) -> ScoredGroup:
    terms = {
        function.name: torch.tensor([_total(value) for value in values], dtype=torch.float32)  # (G,)
        for function, values in zip(functions, scores, strict=True)
    }
    weighted = [function.weight * terms[function.name].double() for function in functions]
    supervised = any(isinstance(value, StepRewards) for values in scores for value in values)
    return ScoredGroup(
        group=group,
        rewards=torch.stack(weighted).sum(0).float(),  # (G,)
        step_rewards=_step_rewards(group, scores, functions) if supervised else None,
        reward_terms=terms,
    )


def _total(value: float | StepRewards) -> float:
    if not isinstance(value, StepRewards):
        return value
    assert value.total is not None  # normalize fills it
    return value.total


def _step_rewards(
    group: RolloutGroup, scores: list[Scores], functions: list[RewardFunction]
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """All functions' steps, weighted; a completion's plain reward is a step that ends with its last token."""
    all_steps = []
    for completion, rollout in enumerate(group.rollouts):
        steps: list[tuple[int, float]] = []
        for function, values in zip(functions, scores, strict=True):
            value = values[completion]
            own = value.steps if isinstance(value, StepRewards) else [(rollout.token_ids.shape[0] - 1, value)]
            steps.extend((index, function.weight * reward) for index, reward in own)
        all_steps.append(tuple(sorted(steps)))
    return tuple(all_steps)
