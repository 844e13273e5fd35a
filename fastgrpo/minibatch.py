"""From scored groups to the packed batches that an update learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgrpo.algorithms.advantages import token_advantages
from fastgrpo.algorithms.aggregation import token_weights
from fastgrpo.algorithms.importance import importance_weights
from fastgrpo.data import packing
from fastgrpo.ranks import Ranks
from fastgrpo.run import Run
from fastgrpo.types import PackedBatch, ScoredGroup


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """What one optimizer update learns from. Example: Minibatch(batches=[batch_0, batch_1], flops=3e12)"""

    batches: list[PackedBatch]
    """This data rank's micro-batches."""
    flops: float
    """What an update needs for those of all data ranks together."""
    entropy_threshold: float | None = None
    """Below it tokens learn no advantage (algorithm.top_entropy_quantile)."""


def make_minibatch(run: Run, groups: list[ScoredGroup]) -> Minibatch | None:
    """Token weights from the mini-batch's global counts, then laid out within the token budget, dealt by the time they
    take, and this rank's share packed. None, on every rank alike, where no completion carries any loss."""
    config, ranks = run.config, run.learner.ranks
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    cut = config.algorithm.mask_truncated
    masks = [torch.zeros_like(r.loss_mask) if cut and r.finish_reason == "length" else r.loss_mask for r in rollouts]
    weights_of = token_weights(masks, config.algorithm.aggregation, max_new_tokens=run.sampling.max_new_tokens)
    members = [(number, group, i) for number, group in enumerate(groups) for i in range(len(group.rewards))]
    sequences = [
        packing.Sequence(
            sequence_id=sequence_id,
            group_id=number,
            prompt_ids=group.group.prompt.token_ids,
            token_ids=group.group.rollouts[i].token_ids,
            advantages=token_advantages(group, i),
            token_weights=weights_of[sequence_id],
            sampler_logprobs=group.group.rollouts[i].sampler_logprobs,
            prompt_routed_experts=group.group.prompt_routed_experts,
            routed_experts=group.group.rollouts[i].routed_experts,
        )
        for sequence_id, (number, group, i) in enumerate(members)
    ]
    budget = config.learner.max_tokens_per_microbatch
    if ranks.num_data_ranks > 1:  # smaller ones where that lets every rank have some
        budget = min(budget, packing.fair_budget(sequences, ranks.num_data_ranks))
    layouts = packing.plan(sequences, max_tokens=budget, share_prompts=config.learner.share_prompts)
    if not layouts:
        return None
    shares = ranks.deal(layouts, cost=run.flops)
    mine = [layout.pack() for layout in shares[ranks.data_rank]]
    missing = max(map(len, shares)) - len(mine) if ranks.in_step else 0
    return Minibatch(batches=mine + [PackedBatch.empty()] * missing, flops=sum(map(run.flops, layouts)))


def add_logprobs(run: Run, minibatch: Minibatch) -> Minibatch:
    """The mini-batch with what its objective needs from before the update, and no forward pass more.

    On-policy the current logprobs are the old ones, so only a reference, an importance weight or entropies cost a pass.
    """
    learner, temperature, algorithm = run.learner, run.task.objective.temperature, run.config.algorithm
    batches, threshold = minibatch.batches, None
    on_policy, corrects = run.config.train.updates_per_step == 1, algorithm.importance_level != "none"
    picks = algorithm.top_entropy_quantile < 1
    if picks:
        found, entropies = learner.logprobs_and_entropies(batches, temperature=temperature)
        threshold = top_threshold(learner.ranks, entropies, algorithm.top_entropy_quantile)
        batches = [keep_undecided(*pair, threshold) for pair in zip(batches, entropies, strict=True)]
    elif not on_policy or corrects:
        found = learner.logprobs_of(batches, temperature=temperature)
    if not on_policy or corrects:
        batches = [replace(batch, old_logprobs=old) for batch, old in zip(batches, found, strict=True)]
    if corrects:
        batches = [add_importance(run, batch) if batch.num_scored else batch for batch in batches]
    if run.task.objective.needs_reference:
        found = learner.logprobs_of(batches, temperature=temperature, reference=True)
        batches = [replace(batch, ref_logprobs=reference) for batch, reference in zip(batches, found, strict=True)]
    return replace(minibatch, batches=batches, entropy_threshold=threshold)


def top_threshold(ranks: Ranks, entropies: list[Tensor], share: float) -> float:
    """The entropy that a share of all data ranks' tokens reach; of each entry (N,), with N as the batch has."""
    every = torch.cat([part for part in ranks.gather(torch.cat([torch.empty(0), *entropies])) if len(part)])
    kept = math.ceil(share * len(every) - 1e-9)  # 0.1 * 30 is a little above 3
    return every.kthvalue(len(every) - kept + 1).values.item()


def keep_undecided(batch: PackedBatch, entropies: Tensor, threshold: float) -> PackedBatch:
    """The batch with an advantage of 0 where the policy was surer of the next token."""
    return replace(batch, advantages=torch.where(entropies >= threshold, batch.advantages, 0.0))


def add_importance(run: Run, batch: PackedBatch) -> PackedBatch:
    """The batch with the weights that correct for the sampler's probabilities."""
    algorithm = run.config.algorithm
    assert batch.old_logprobs is not None
    weight = importance_weights(
        batch.old_logprobs,
        batch.sampler_logprobs,
        batch.cu_scored,
        level=algorithm.importance_level,
        mode=algorithm.importance_mode,
        floor=algorithm.importance_floor,
        cap=algorithm.importance_cap,
    )
    return replace(batch, importance_weights=weight)
