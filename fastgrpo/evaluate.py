"""Held-out accuracy of the current policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo.conversation import conversation, told
from fastgrpo.metrics import Sample
from fastgrpo.rollout import Drawing, draw_whole, score
from fastgrpo.run import Run
from fastgrpo.seeding import derive_seed
from fastgrpo.stats import FAILURES
from fastgrpo.types import ScoredGroup

NUM_SHOWN = 8
CORRECT = 1.0
"""A completion is right where the first reward function gives it at least this."""


def evaluate_if_due(run: Run) -> dict[str, float]:
    """Held-out metrics at step 0, every eval.every steps and at the end; empty otherwise."""
    config, step = run.config.eval, run.step
    if config.every == 0 or not run.task.prompts.eval or (step % config.every and step != run.config.train.num_steps):
        return {}
    return evaluate(run)


def evaluate(run: Run) -> dict[str, float]:
    """Held-out metrics of the policy, on every rank."""
    config = run.config.eval
    params = replace(
        run.sampling,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens or run.sampling.max_new_tokens,
        return_routed_experts=False,
    )
    prompts, seed = run.task.prompts.eval[: config.num_prompts], derive_seed(run.config.seed, "eval")
    how = Drawing(num_samples=config.num_samples, params=params, seed=seed, label=f"eval-{run.step}")
    with run.ledger("eval"), run.ledger.all_as("eval"):
        groups, failures = score(run, draw_whole(run, prompts, how))
        metrics, shown = summarize(groups, failures, run.task.decode, run.step, by=config.by)
    run.log_samples(shown)
    return metrics


def summarize(
    groups: list[ScoredGroup],
    counts: Mapping[str, float],
    decode: Callable[[Tensor], str],
    step: int,
    *,
    by: str | None,
) -> tuple[dict[str, float], list[Sample]]:
    """eval/accuracy (mean over all samples), eval/reward, eval/response_length, eval/truncated_fraction, and with
    several samples a prompt eval/pass@k; and some completions to show.

    by: the column whose values have an accuracy each.
    counts: the reward functions' failures. Where there were any, eval/error_count, eval/timeout_count and
    eval/dropped_groups say so; where reward.on_error=drop leaves no group there is nothing else to say."""
    failures = {name.replace("reward", "eval"): counts[name] for name in FAILURES if counts.get(name)}
    if not groups:
        return failures, []
    right = torch.stack([correct(group) for group in groups])  # (prompts, samples)
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    metrics = {
        **failures,
        "eval/accuracy": right.float().mean().item(),
        "eval/reward": torch.cat([group.rewards for group in groups]).mean().item(),
        "eval/response_length": sum(int(r.loss_mask.sum()) for r in rollouts) / len(rollouts),
        "eval/truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
    if by is not None:
        metrics |= accuracies(right, [group.group.prompt.metadata.get(by) for group in groups])
    k = 2
    while k <= right.shape[1]:
        metrics[f"eval/pass@{k}"] = pass_at(right, k)
        k *= 2
    shown = [sample for group in groups[:NUM_SHOWN] for sample in samples_of(group, decode, step, "eval")[:1]]
    return metrics, shown


def accuracies(right: Tensor, values: list[Any]) -> dict[str, float]:
    """The accuracy of the prompts of each value. right: (prompts, samples) bool."""
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(re.sub(r"[^\w.-]", "_", str(value)), []).append(row)  # what every tracker takes for a name
    return {f"eval/accuracy/{name}": right[rows[name]].float().mean().item() for name in sorted(rows)}


def correct(group: ScoredGroup) -> Tensor:
    """(G,) bool."""
    first = next(iter(group.reward_terms.values())) if group.reward_terms else group.rewards
    return first >= CORRECT


def pass_at(right: Tensor, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right, from n >= k of them.

    right: (prompts, n) bool. Source: arXiv 2107.03374, section 2.1.
    """
    n = right.shape[1]
    wrong = n - right.sum(1)  # (prompts,)
    none_right = torch.ones(len(wrong), dtype=torch.float64)
    for i in range(k):  # C(wrong, k) / C(n, k), factor by factor
        none_right *= (wrong - i).clamp(min=0) / (n - i)
    return (1.0 - none_right).mean().item()


def samples_of(group: ScoredGroup, decode: Callable[[Tensor], str], step: int, kind) -> list[Sample]:
    """A group's completions, for people to read."""
    right, prompt = correct(group), group.group.prompt
    outcome = isinstance(group.advantages, Tensor)
    return [
        Sample(
            step=step,
            kind=kind,
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            completion=told(conversation(rollout, decode)),
            answer=prompt.answer,
            reward=float(group.rewards[i]),
            advantage=float(group.advantages[i]) if outcome else None,  # type: ignore[index]
            finish_reason=rollout.finish_reason,
            correct=bool(right[i]),
        )
        for i, rollout in enumerate(group.group.rollouts)
    ]
