"""A step's rollouts and updates as numbers for metrics.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from fastgrpo.algorithms.advantages import is_constant
from fastgrpo.types import ScoredGroup, StepResult

FAILURES = ("reward/error_count", "reward/timeout_count", "reward/dropped_groups")


def of_rewards(groups: list[ScoredGroup], failures: Mapping[str, int]) -> dict[str, float]:
    """Rewards, lengths and groups of all that was sampled in a step, over every round of resampling.

    response_length: the policy's own tokens. tokens: all of every sequence, the prompt's and an environment's with
    them, as if no prompt were shared, which is how peers count.
    """
    row: dict[str, float] = {name: failures.get(name, 0) for name in FAILURES}
    row["groups/sampled"] = len(groups)
    if not groups:
        return row
    rewards = torch.cat([group.rewards for group in groups])
    terms = groups[0].reward_terms if len(groups[0].reward_terms) > 1 else ()
    row |= {f"reward/{name}": torch.cat([group.reward_terms[name] for group in groups]).mean().item() for name in terms}
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    lengths = torch.tensor([int(rollout.loss_mask.sum()) for rollout in rollouts], dtype=torch.float32)
    finished = lengths[[rollout.finish_reason == "stop" for rollout in rollouts]]
    if len(finished):
        row["response_length/finished_mean"] = finished.mean().item()
    prompts = [len(group.group.prompt.token_ids) for group in groups]
    prompt_tokens = sum(n * len(group.group.rollouts) for n, group in zip(prompts, groups, strict=True))
    return {
        **row,
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "reward/group_std": sum(group.rewards.std(correction=0).item() for group in groups) / len(groups),
        "reward/min": rewards.min().item(),
        "reward/max": rewards.max().item(),
        "groups/constant_fraction": sum(is_constant(group.rewards) for group in groups) / len(groups),
        "response_length/mean": lengths.mean().item(),
        "response_length/min": lengths.min().item(),
        "response_length/max": lengths.max().item(),
        "prompt_length/mean": sum(prompts) / len(prompts),
        "prompt_length/max": max(prompts),
        "truncated_fraction": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "tokens": prompt_tokens + sum(len(rollout.token_ids) for rollout in rollouts),
    }


def of_turns(groups: list[ScoredGroup]) -> dict[str, float]:
    """What the environment had to do with a step's completions."""
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    if not rollouts:
        return {}
    turns = [rollout.num_turns for rollout in rollouts]
    failures = Counter(reply.failure for rollout in rollouts for reply in rollout.replies)
    return {
        "turns/mean": sum(turns) / len(turns),
        "turns/max": max(turns),
        "environment/length_mean": sum(int((~rollout.loss_mask).sum()) for rollout in rollouts) / len(rollouts),
        "environment/error_count": failures["error"],
        "environment/timeout_count": failures["timeout"],
    }


def of_staleness(groups: list[ScoredGroup], policy_version: int) -> dict[str, float]:
    """How many updates older than the newest policy the one was that drew a token."""
    versions = [
        torch.full_like(rollout.token_ids, rollout.policy_version)
        if rollout.token_versions is None
        else rollout.token_versions
        for group in groups
        for rollout in group.group.rollouts
    ]
    if not versions:
        return {}
    count, total = sum(map(len, versions)), sum(int(each.sum()) for each in versions)
    return {
        "staleness/mean": (policy_version * count - total) / count,
        "staleness/max": policy_version - min(int(each.min()) for each in versions),
    }


def of_updates(results: list[StepResult], *, comparable: bool) -> dict[str, float]:
    """The mean over a step's updates; `updates/skipped` counts those that a non-finite value cancelled.

    comparable: whether the sampler's logprobs are of the same distribution as the learner's; where top-p or top-k
    renormalised them their difference is no mismatch and is left out.
    """
    row: dict[str, float] = {"updates/skipped": sum(result.skipped for result in results)}
    if not results:
        return row
    rows = [{**result.metrics, "loss": result.loss, "grad_norm": result.grad_norm} for result in results]
    means = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]}
    if not comparable:
        means = {name: value for name, value in means.items() if not name.startswith("sampler_mismatch/")}
    return {**row, **means, "policy_version": results[-1].policy_version}


def of_rates(row: Mapping[str, float], num_ranks: int, peak_flops: float | None) -> dict[str, float]:
    """What a step that is done did in a second. row: its metrics, its times among them.

    mfu: what its updates needed over what num_ranks devices of that peak could have done in their time.
    """
    rates = {}
    if "tokens" in row:
        rates["tokens_per_second"] = row["tokens"] / row["time/total_s"]
    if row.get("tflop"):
        rates["tflop_per_second"] = row["tflop"] / row["time/update_s"] / num_ranks
        if peak_flops is not None:
            rates["mfu"] = rates["tflop_per_second"] * 1e12 / peak_flops
    return rates
