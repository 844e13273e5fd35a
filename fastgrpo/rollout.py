"""A step's completions: drawn by every data rank for its share of the prompts, scored, and known to all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastgrpo import stats
from fastgrpo.algorithms.advantages import is_constant
from fastgrpo.config import UserError
from fastgrpo.nodes import JobError
from fastgrpo.ranks import Ranks
from fastgrpo.run import Run
from fastgrpo.seeding import derive_seed
from fastgrpo.types import Prompt, Reply, Rollout, RolloutGroup, SamplingParams, ScoredGroup
from fastgrpo.unfinished import Unfinished

T = TypeVar("T")


def collect(run: Run) -> tuple[list[ScoredGroup], dict[str, float]]:
    """Sample and score this step's groups; with dynamic sampling, until enough of them have something to compare."""
    config, wanted = run.config.algorithm, run.config.train.prompts_per_step
    groups: list[ScoredGroup] = []
    sampled: list[ScoredGroup] = []
    counts: Counter[str] = Counter()
    for attempt in range(1 + config.max_resamples * config.dynamic_sampling):
        seed, label = derive_seed(run.config.seed, "rollout", run.step, attempt), f"train-{run.step}-{attempt}"
        if run.config.sampler.oversample > 0:
            drawn = draw_ahead(run, wanted, seed, label)
        else:
            prompts = run.stream.take(wanted - len(groups))
            drawn = draw_whole(run, prompts, config.group_size, run.sampling, seed, label)
        scored, failures = score(run, drawn)
        sampled += scored
        counts += failures
        groups += [g for g in scored if not (config.dynamic_sampling and is_constant(g.rewards))]
        if len(groups) == wanted or not config.dynamic_sampling:
            break
    row = {**stats.of_rewards(sampled, counts), "groups/used": len(groups), "epoch": run.stream.epoch}
    if run.environment is not None:
        row |= stats.of_turns(sampled)
    if run.config.sampler.oversample > 0:
        row |= stats.of_staleness(sampled, run.learner.policy_version) | {"groups/unfinished": len(run.unfinished)}
    return groups, row


def draw_ahead(run: Run, wanted: int, seed: int, label: str) -> list[RolloutGroup]:
    """The first `wanted` groups to be complete, of more that are drawn; the others go on in the next step.

    A step waits for the slowest of `wanted` groups and not for the slowest of all. Nothing is thrown away: a group that
    takes long is learned from later, and by then its first tokens are of older policies (Rollout.token_versions).
    """
    begin(run)
    config, unfinished = run.config, run.unfinished
    in_flight = round(wanted * (1 + config.sampler.oversample))
    fresh = run.stream.take(max(0, in_flight - len(unfinished)))
    return draw_until(run, unfinished, wanted, fresh, config.algorithm.group_size, run.sampling, seed, label)


def draw_whole(
    run: Run, prompts: list[Prompt], num_samples: int, params: SamplingParams, seed: int, label: str
) -> list[RolloutGroup]:
    """The prompts' groups, in their order, every conversation with the environment at its end.

    label: what no other draw of the run is called; the conversations' names begin with it."""
    begin(run)
    if run.environment is None:
        return named(draw(run, prompts, num_samples, params, seed), label)
    unfinished = Unfinished(params.max_new_tokens, run.config.environment.max_turns)
    return draw_until(run, unfinished, len(prompts), prompts, num_samples, params, seed, label)


def draw_until(
    run: Run,
    unfinished: Unfinished,
    wanted: int,
    fresh: list[Prompt],
    num_samples: int,
    params: SamplingParams,
    seed: int,
    label: str,
) -> list[RolloutGroup]:
    """Begin the fresh prompts and go on with all that is unfinished, until `wanted` groups are complete.

    In rounds of at most sampler.round_tokens a completion: a turn that has ended is answered after the round, not after
    the longest turn of all, and what is drawn with what depends on no clock.
    """
    params = replace(params, max_new_tokens=min(run.config.sampler.round_tokens, params.max_new_tokens))
    number = 0
    while fresh or unfinished.num_complete < wanted:
        pending = unfinished.continuations()
        unfinished.extend(draw(run, pending, 1, params, derive_seed(seed, "round", number)))
        unfinished.add(named(draw(run, fresh, num_samples, params, derive_seed(seed, "begin")), label))
        unfinished.reply(replies_to(run, unfinished.turns()))
        fresh, number = [], number + 1
    return unfinished.take(wanted)


def named(groups: list[RolloutGroup], label: str) -> list[RolloutGroup]:
    """The groups that have just begun, their conversations named label-group-sample."""
    return [
        replace(
            group,
            rollouts=tuple(replace(r, conversation_id=f"{label}-{number}-{i}") for i, r in enumerate(group.rollouts)),
        )
        for number, group in enumerate(groups)
    ]


def begin(run: Run) -> None:
    """Hand the memory to the sampler, which is to draw as if it had never drawn before."""
    run.enter("rollout")
    if run.sampler is not None:
        run.sampler.forget()


def draw(run: Run, prompts: list[Prompt], num_samples: int, params: SamplingParams, seed: int) -> list[RolloutGroup]:
    """The prompts' groups, in their order, on every rank: what the sampler makes of them in one go."""
    ranks = run.sampling_ranks
    with run.ledger("generate"):  # waiting for the slowest rank is part of generating
        mine: list[RolloutGroup] = []
        if run.sampler is not None:
            mine = run.sampler.generate(prompts[ranks.data_rank :: ranks.num_data_ranks], num_samples, params, seed)
        # Every rank has the prompts; a round's hold all that has been said before, and their data's other columns.
        parts = ranks.gather([{**vars(group), "prompt": None} for group in mine])
    drawn = zip(prompts, dealt_back(parts, len(prompts)), strict=True)
    return [RolloutGroup(**{**fields, "prompt": prompt}) for prompt, fields in drawn]


def dealt_back(parts: list[list[T]], count: int) -> list[T]:
    """In order again, what was dealt to the data ranks by index."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def replies_to(run: Run, turns: list[tuple[Prompt, Rollout]]) -> list[Reply]:
    """What the environment says to each, on every rank."""
    if run.environment is None:
        return []
    ranks = run.sampling_ranks
    with run.ledger("environment"):
        mine = turns[ranks.data_rank :: ranks.num_data_ranks] if ranks.leads else []
        parts = gathered(ranks, partial(run.environment.replies, mine))
    return dealt_back(parts, len(turns))


def score(run: Run, groups: list[RolloutGroup]) -> tuple[list[ScoredGroup], Counter[str]]:
    """The groups with their rewards, and the reward functions' failures, on every rank; groups may be dropped."""
    ranks = run.sampling_ranks
    mine = range(ranks.data_rank, len(groups), ranks.num_data_ranks)

    def find() -> tuple[list[tuple[int, dict[str, Any]]], Counter[str]]:
        if run.rewards is None:
            return [], Counter()
        result = run.rewards.score([groups[i] for i in mine], run.decode)
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
