"""A step's completions: drawn by every data rank for its share of the prompts, scored, and known to all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from fastgrpo import stats
from fastgrpo.algorithms.advantages import is_constant
from fastgrpo.config import UserError
from fastgrpo.conversation import name_of, parts_of
from fastgrpo.nodes import JobError
from fastgrpo.ranks import Ranks
from fastgrpo.run import Run
from fastgrpo.sampler.protocol import OnEnd, Sampler
from fastgrpo.seeding import derive_seed
from fastgrpo.types import Prompt, Reply, Rollout, RolloutGroup, SamplingParams, ScoredGroup
from fastgrpo.unfinished import Unfinished

T = TypeVar("T")
PACE_S = 0.1
"""Between two looks at what has ended while others are still drawn."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn.

    Example: Drawing(num_samples=8, params=run.sampling, seed=17, label="train-3-0")
    """

    num_samples: int
    """Of each prompt."""
    params: SamplingParams
    seed: int
    label: str
    """What no other drawing of the run is called; the conversations' names begin with it."""


def collect(run: Run) -> tuple[list[ScoredGroup], dict[str, float]]:
    """Sample and score this step's groups; with dynamic sampling, until enough of them have something to compare."""
    config, wanted = run.config.algorithm, run.config.train.prompts_per_step
    groups: list[ScoredGroup] = []
    sampled: list[ScoredGroup] = []
    counts: Counter[str] = Counter()
    for attempt in range(1 + config.max_resamples * config.dynamic_sampling):
        how = Drawing(
            num_samples=config.group_size,
            params=run.sampling,
            seed=derive_seed(run.config.seed, "rollout", run.step, attempt),
            label=f"train-{run.step}-{attempt}",
        )
        if run.config.sampler.oversample > 0:
            drawn = draw_ahead(run, wanted, how)
        else:
            drawn = draw_whole(run, run.stream.take(wanted - len(groups)), how)
        scored, failures = score(run, drawn)
        sampled += scored
        counts += failures
        groups += [g for g in scored if not (config.dynamic_sampling and is_constant(g.rewards))]
        if len(groups) == wanted or not config.dynamic_sampling:
            break
    row = {**stats.of_rewards(sampled, counts), "groups/used": len(groups), "epoch": run.stream.epoch}
    if run.task.environment is not None:
        row |= stats.of_turns(sampled)
    if run.config.sampler.oversample > 0:
        row |= stats.of_staleness(sampled, run.learner.policy_version) | {"groups/unfinished": len(run.unfinished)}
    return groups, row


def draw_ahead(run: Run, wanted: int, how: Drawing) -> list[RolloutGroup]:
    """The first `wanted` groups to be complete, of more that are drawn; the others go on in the next step.

    A step waits for the slowest of `wanted` groups and not for the slowest of all. Nothing is thrown away: a group that
    takes long is learned from later, and by then its first tokens are of older policies (Rollout.token_versions).
    """
    begin(run)
    in_flight = round(wanted * (1 + run.config.sampler.oversample))
    fresh = run.stream.take(max(0, in_flight - len(run.unfinished)))
    return draw_until(run, run.unfinished, wanted, fresh, how)


def draw_whole(run: Run, prompts: list[Prompt], how: Drawing) -> list[RolloutGroup]:
    """The prompts' groups, in their order, every conversation with the environment at its end."""
    begin(run)
    if run.task.environment is None:
        return draw(run, prompts, how, Paced(partial(begin_to_score, run, how.num_samples)))
    unfinished = Unfinished(how.params.max_new_tokens, run.config.environment.max_turns)
    return draw_until(run, unfinished, len(prompts), prompts, how)


def draw_until(run: Run, unfinished: Unfinished, wanted: int, fresh: list[Prompt], how: Drawing) -> list[RolloutGroup]:
    """Begin the fresh prompts and go on with all that is unfinished, until `wanted` groups are complete.

    In rounds of at most sampler.round_tokens a completion: a turn that has ended is answered after the round, not after
    the longest turn of all, and what is drawn with what depends on no clock.
    """
    limit = min(run.config.sampler.round_tokens, how.params.max_new_tokens)
    how = replace(how, params=replace(how.params, max_new_tokens=limit))
    number = 0
    while fresh or unfinished.num_complete < wanted:
        go_on(run, unfinished, replace(how, seed=derive_seed(how.seed, "round", number)))
        beginning = replace(how, seed=derive_seed(how.seed, "begin"))
        unfinished.add(draw(run, fresh, beginning, asking(run, unfinished.first_turn)))
        unfinished.reply(replies_to(run, unfinished))
        for prompt, rollout, group_size in unfinished.ended():
            begin_to_score(run, group_size, prompt, rollout)
        fresh, number = [], number + 1
    return unfinished.take(wanted)


def begin(run: Run) -> None:
    """Hand the memory to the sampler, which is to draw as if it had never drawn before."""
    run.enter("rollout")
    if run.sampler is not None:
        run.sampler.forget()


def draw(
    run: Run, prompts: list[Prompt], how: Drawing, on_end: Callable[[Prompt, Rollout], object] | None = None
) -> list[RolloutGroup]:
    """The prompts' groups, in their order, on every rank: what the sampler makes of them in one go. on_end is called
    with each completion of this rank's share as it ends."""
    numbers = range(len(prompts))[run.sampling_ranks.share]

    def named(i: int, sample: int, rollout: Rollout) -> Rollout:
        return replace(rollout, conversation_id=name_of(how.label, numbers[i], sample))

    def mine(sampler: Sampler) -> list[dict[str, Any]]:
        share = [prompts[number] for number in numbers]
        tell: OnEnd | None = on_end and (lambda i, sample, rollout: on_end(share[i], named(i, sample, rollout)))
        groups = sampler.generate(share, how.num_samples, how.params, how.seed, tell)
        rollouts = [tuple(named(i, s, r) for s, r in enumerate(group.rollouts)) for i, group in enumerate(groups)]
        # Every rank has the prompts, and their data's other columns.
        return [{**vars(g), "prompt": None, "rollouts": r} for g, r in zip(groups, rollouts, strict=True)]

    drawn = zip(prompts, drawn_by_all(run, mine), strict=True)
    return [RolloutGroup(**{**fields, "prompt": prompt}) for prompt, fields in drawn]


def go_on(run: Run, unfinished: Unfinished, how: Drawing) -> None:
    """Draw more of every unfinished completion. A rank makes the prompts of its share alone, each of which holds all
    that has been said before, and tells the others what is new."""
    share = run.sampling_ranks.share

    def mine(sampler: Sampler) -> list[Rollout]:
        going_on = unfinished.continuations(share)
        ask = asking(run, unfinished.next_turn)
        tell: OnEnd | None = None if ask is None else (lambda i, _, part: ask(going_on[i], part))
        return unfinished.news(sampler.generate(going_on, 1, how.params, how.seed, tell), share)

    unfinished.extend(drawn_by_all(run, mine))


def drawn_by_all(run: Run, mine: Callable[[Sampler], list[T]]) -> list[T]:
    """What every data rank's sampler draws for its share, in the order of all, on every rank."""
    with run.ledger("generate"):  # waiting for the slowest rank is part of generating
        parts = run.sampling_ranks.gather([] if run.sampler is None else mine(run.sampler))
    return dealt_back(parts, range(sum(map(len, parts))))


def dealt_back(parts: list[list[T]], places: Iterable[int]) -> list[T]:
    """In order again, what was dealt to the data ranks by its place."""
    taken = [iter(part) for part in parts]
    return [next(taken[place % len(parts)]) for place in places]


class Paced:
    """Tells of completions as they end, but of several at a time: a worker that wakes up for each would take the
    sampler's threads off their cores again and again. What has not been told by the end is nobody's loss."""

    def __init__(self, tell: Callable[[Prompt, Rollout], object]) -> None:
        self._tell, self._waiting = tell, list[tuple[Prompt, Rollout]]()
        self._told_at = time.monotonic()

    def __call__(self, prompt: Prompt, rollout: Rollout) -> None:
        self._waiting.append((prompt, rollout))
        if time.monotonic() - self._told_at < PACE_S:
            return
        waiting, self._waiting = self._waiting, []
        for ended in waiting:
            self._tell(*ended)
        self._told_at = time.monotonic()


def asking(run: Run, turn_of: Callable[[Prompt, Rollout], tuple[Prompt, Rollout] | None]) -> Paced | None:
    """What asks the environment about turns as they end, while others are still drawn; None where nobody is asked."""
    environment = run.task.environment
    if environment is None or not run.sampling_ranks.leads:
        return None

    def ask(prompt: Prompt, part: Rollout) -> None:
        with suppress(Exception):  # comes again in `replies_to`, where all ranks hear of it
            if (turn := turn_of(prompt, part)) is not None:
                environment.begin(*turn)

    return Paced(ask)


def replies_to(run: Run, unfinished: Unfinished) -> list[Reply]:
    """What the environment says to each of the turns that have ended, on every rank."""
    environment, ranks = run.task.environment, run.sampling_ranks
    if environment is None:
        return []
    with run.ledger("environment"):
        parts = gathered(ranks, lambda: environment.replies(unfinished.turns(ranks.share)) if ranks.leads else [])
    return dealt_back(parts, unfinished.turn_places())


def begin_to_score(run: Run, group_size: int, prompt: Prompt, rollout: Rollout) -> None:
    """Have the reward functions look at a completion of this rank's groups while others are still drawn."""
    if run.sampling_ranks.leads and scores_here(run, rollout):
        with suppress(Exception):  # comes again in `score`, where all ranks hear of it
            run.task.rewards.begin(prompt, rollout, group_size, run.task.decode)


def scores_here(run: Run, rollout: Rollout) -> bool:
    """Whether this data rank scores the completion's group: the one that drew its beginning does."""
    assert rollout.conversation_id is not None
    return parts_of(rollout.conversation_id)[1] % run.sampling_ranks.num_data_ranks == run.sampling_ranks.data_rank


def score(run: Run, groups: list[RolloutGroup]) -> tuple[list[ScoredGroup], Counter[str]]:
    """The groups with their rewards, and the reward functions' failures, on every rank; groups may be dropped."""
    ranks = run.sampling_ranks
    mine = [i for i, group in enumerate(groups) if scores_here(run, group.rollouts[0])]

    def find() -> tuple[list[tuple[int, dict[str, Any]]], Counter[str]]:
        if not ranks.leads:
            return [], Counter()
        result = run.task.rewards.score([groups[i] for i in mine], run.task.decode)
        place = {id(groups[i]): i for i in mine}
        # Every rank has the groups; only what was found out about them is sent.
        found = [(place[id(scored.group)], {**vars(scored), "group": None}) for scored in result.groups]
        return found, Counter({name: int(n) for name, n in result.metrics.items() if name in stats.FAILURES})

    with run.ledger("reward"):
        parts = gathered(ranks, find)
    everything = sorted((entry for part, _ in parts for entry in part), key=lambda entry: entry[0])
    scored_groups = [ScoredGroup(**{**fields, "group": groups[i]}) for i, fields in everything]
    return scored_groups, sum((counts for _, counts in parts), Counter())


def gathered(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What the work gives the leaders, on every rank. Raises UserError on all of them where it does on one, so that all
    end with its line and none with a broken exchange."""
    part, problem = None, None
    try:
        part = work()
    except UserError as error:
        problem = str(error)
    parts = ranks.gather((part, problem))
    for _, problem in parts:
        if problem is not None:
            raise JobError(problem)
    return [part for part, _ in parts]  # type: ignore[misc]  # None only where there is a problem
