"""Group relative policy optimization, Algorithm 1 of DeepSeekMath (arXiv 2402.03300): `train` is the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgrpo import stats
from fastgrpo.algorithms.advantages import compare, soften_overlong, token_advantages
from fastgrpo.algorithms.aggregation import token_weights
from fastgrpo.algorithms.importance import importance_weights
from fastgrpo.algorithms.reference import policy_share
from fastgrpo.config import UserError
from fastgrpo.data import packing
from fastgrpo.evaluate import samples_of, summarize
from fastgrpo.metrics import Sample
from fastgrpo.parts import Run
from fastgrpo.rollout import collect, draw, score
from fastgrpo.seeding import derive_seed
from fastgrpo.signals import StopRequest
from fastgrpo.types import PackedBatch, ScoredGroup, StepResult

NUM_SHOWN_GROUPS = 2


def train(run: Run, stop: StopRequest) -> None:
    """Train from run.step on to the configured number of steps, or until asked to stop; then everything is saved."""
    config = run.config
    share(run)
    if run.step == 0:
        record(run, evaluate_if_due(run), last=False)
    stopping = stop.asked(run.learner.ranks)
    while run.step < config.train.num_steps and not stopping:
        run.step += 1
        groups, row = collect(run)  # sample, reward
        groups = relate(run, groups)  # advantages
        row |= improve(run, groups)  # mu passes of clipped updates
        run.learner.move_reference(policy_share(config.algorithm.reference, run.step))
        share(run)
        row |= evaluate_if_due(run)
        show(run, [s for g in groups[:NUM_SHOWN_GROUPS] for s in samples_of(g, run.decode, run.step, "train")])
        # Asked once: the step that ends the loop is the one that is saved.
        stopping = stop.asked(run.learner.ranks)
        record(run, row, last=run.step == config.train.num_steps or stopping)


def share(run: Run) -> None:
    """Let the sampler see the newest policy."""
    with run.ledger("share"):
        run.phases.enter("share")
        run.exchange.share()


def relate(run: Run, groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The groups with advantages, after the overlong punishment where it is configured."""
    config = run.config.algorithm
    if config.overlong_buffer:
        shape: dict[str, Any] = {
            "max_new_tokens": run.sampling.max_new_tokens,
            "buffer": config.overlong_buffer,
            "penalty": config.overlong_penalty,
        }
        groups = [replace(g, rewards=soften_overlong(g.rewards, g.group, **shape)) for g in groups]
    return compare(groups, config)


def improve(run: Run, groups: list[ScoredGroup]) -> dict[str, float]:
    """mu passes over the step's groups, one optimizer update a mini-batch."""
    config = run.config.train
    per_minibatch = -(-max(1, len(groups)) // config.num_minibatches)
    chunks = [groups[i : i + per_minibatch] for i in range(0, len(groups), per_minibatch)]
    with run.ledger("share"):
        run.phases.enter("train")
    with run.ledger("logprobs"):
        laid_out = [batches for chunk in chunks if (batches := lay_out(run, chunk)) is not None]
        minibatches = [annotate(run, batches) for batches in laid_out]
    results: list[StepResult] = []
    with run.ledger("update"):
        for _ in range(config.updates_per_rollout):
            for minibatch in minibatches:
                results.append(run.learner.update(minibatch, run.objective))
                refuse_divergence(run, results[-1], minibatch)
    return stats.of_updates(results, comparable=not run.contract.renormalized)


def lay_out(run: Run, groups: list[ScoredGroup]) -> list[PackedBatch] | None:
    """One mini-batch as this data rank's micro-batches: token weights from its global counts, then packed within the
    token budget and dealt by size. None, on every rank alike, where no completion carries any loss."""
    config, ranks = run.config, run.learner.ranks
    rollouts = [rollout for group in groups for rollout in group.group.rollouts]
    cut = config.algorithm.mask_truncated
    masks = [r.loss_mask & (not (cut and r.finish_reason == "length")) for r in rollouts]
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
    batches = packing.pack(sequences, max_tokens=budget, share_prompts=config.learner.share_prompts)
    if not batches:
        return None
    shares = ranks.deal(batches, cost=lambda batch: batch.num_tokens)
    mine = shares[ranks.data_rank]
    missing = max(map(len, shares)) - len(mine) if ranks.in_step else 0
    return mine + [PackedBatch.empty()] * missing


def annotate(run: Run, batches: list[PackedBatch]) -> list[PackedBatch]:
    """The batches with the logprobs that their objective needs from before the update, and no forward pass more.

    On-policy the current logprobs are the old ones, so only a reference or an importance weight costs a pass.
    """
    learner, temperature = run.learner, run.objective.temperature
    on_policy = run.config.train.updates_per_step == 1
    correct = run.config.algorithm.importance_level != "none"
    if not on_policy or correct:
        found = learner.logprobs_of(batches, temperature=temperature)
        batches = [replace(batch, old_logprobs=old) for batch, old in zip(batches, found, strict=True)]
    if correct:
        batches = [with_importance(run, batch) if batch.num_scored else batch for batch in batches]
    if run.objective.kl_coef > 0:
        found = learner.logprobs_of(batches, temperature=temperature, reference=True)
        batches = [replace(batch, ref_logprobs=reference) for batch, reference in zip(batches, found, strict=True)]
    return batches


def with_importance(run: Run, batch: PackedBatch) -> PackedBatch:
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


def refuse_divergence(run: Run, result: StepResult, batches: Sequence[PackedBatch]) -> None:
    """Count skipped updates; after max_nonfinite_updates in a row save the batch and stop.

    Raises UserError naming the file.
    """
    run.num_nonfinite = run.num_nonfinite + 1 if result.skipped else 0
    if not result.skipped:
        return
    limit = run.config.train.max_nonfinite_updates
    run.console.message(f"step {run.step}: non-finite loss or gradient, update skipped ({run.num_nonfinite} in a row)")
    if run.num_nonfinite >= limit:
        ranks = run.learner.ranks
        part = f"-data-rank-{ranks.data_rank}" if ranks.num_data_ranks > 1 else ""
        path = run.run_dir / f"nonfinite-step-{run.step:06d}{part}.pt"
        if ranks.leads:
            torch.save([vars(batch) for batch in batches], path)
        raise UserError(
            f"step {run.step}: {limit} updates in a row had a non-finite loss or gradient "
            f"(train.max_nonfinite_updates={limit}); the last batch is in {path}; "
            "lower train.learning_rate, then go on with resume=auto"
        )


def evaluate_if_due(run: Run) -> dict[str, float]:
    """Held-out metrics at step 0, every eval.every steps and at the end; empty otherwise."""
    config, step = run.config.eval, run.step
    if config.every == 0 or not run.eval_prompts or (step % config.every and step != run.config.train.num_steps):
        return {}
    return evaluate(run)


def evaluate(run: Run) -> dict[str, float]:
    """Held-out metrics of the policy, on every rank."""
    config = run.config.eval
    params = replace(
        run.sampling,
        temperature=config.temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.max_new_tokens or run.sampling.max_new_tokens,
        return_routed_experts=False,
    )
    prompts, seed = run.eval_prompts[: config.num_prompts], derive_seed(run.config.seed, "eval")
    with run.ledger("eval"), run.ledger.all_as("eval"):
        groups, failures = score(run, draw(run, prompts, config.num_samples, params, seed))
        metrics, shown = summarize(groups, failures, run.decode, run.step)
    show(run, shown)
    return metrics


def show(run: Run, samples: list[Sample]) -> None:
    """Keep completions for people to read."""
    if run.log is not None:
        run.log.write_samples(samples)


def record(run: Run, row: dict[str, float], *, last: bool) -> None:
    """Save where it is due and write the step's row, in the order that a kill at any moment survives."""
    config = run.config.checkpoint
    if run.step and (last or (config.every and run.step % config.every == 0)):
        with run.ledger("checkpoint"):
            run.phases.enter("train")  # what was offloaded is part of the state
            state = {
                "stream": run.stream.state_dict(),
                "unfinished": run.unfinished.state_dict(),
                "num_nonfinite": run.num_nonfinite,
            }
            # The last one has nothing to be written beside.
            run.checkpoints.save(run.step, run.learner.begin_save, state, background=config.background and not last)
    row = {"step": run.step, **row, **run.phases.row(), **run.ledger.step()}
    if "tokens" in row:
        row["tokens_per_second"] = row["tokens"] / row["time/total_s"]
    if run.log is not None:
        run.log.write(row)
    run.learner.ranks.barrier()
    with run.ledger("checkpoint"):
        # Only now: a checkpoint that is visible has its step's row in metrics.jsonl.
        run.checkpoints.publish()
    run.console.step(row)
