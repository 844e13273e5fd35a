"""Group relative policy optimization, Algorithm 1 of DeepSeekMath (arXiv 2402.03300): `train` is the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgrpo import stats
from fastgrpo.algorithms.advantages import soften_overlong
from fastgrpo.algorithms.reference import policy_share
from fastgrpo.config import UserError
from fastgrpo.evaluate import evaluate_if_due, samples_of
from fastgrpo.minibatch import add_logprobs, make_minibatch
from fastgrpo.rollout import collect
from fastgrpo.run import Run
from fastgrpo.signals import StopRequest
from fastgrpo.types import PackedBatch, ScoredGroup, StepResult

NUM_SHOWN_GROUPS = 2


def train(run: Run, stop: StopRequest) -> None:
    """Train from run.step on to the configured number of steps, or until asked to stop; then everything is saved."""
    config = run.config
    run.ledger.step()  # what setting up took is no step's time
    share(run)
    if run.step == 0:
        record(run, evaluate_if_due(run), last=False)
    stopping = stop.asked(run)
    while run.step < config.train.num_steps and not stopping:
        run.step += 1
        with run.profiler.step(run.step):
            groups, row = collect(run)  # sample, reward
            groups = compute_advantages(run, groups)
            row |= update_policy(run, groups)  # mu passes of clipped updates
            run.learner.move_reference(policy_share(config.algorithm.reference, run.step))
            share(run)
            row |= evaluate_if_due(run)
            shown = (s for g in groups[:NUM_SHOWN_GROUPS] for s in samples_of(g, run.task.decode, run.step, "train"))
            run.log_samples(shown)
            # Asked once: the step that ends the loop is the one that is saved.
            stopping = stop.asked(run)
            record(run, row, last=run.step == config.train.num_steps or stopping)


def share(run: Run) -> None:
    """Let the sampler see the newest policy."""
    run.enter("share")
    with run.ledger("share"):
        run.exchange.share()


def compute_advantages(run: Run, groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The groups with advantages, after the overlong punishment where it is configured."""
    config = run.config.algorithm
    if config.overlong_buffer:
        shape: dict[str, Any] = {
            "max_new_tokens": run.sampling.max_new_tokens,
            "buffer": config.overlong_buffer,
            "penalty": config.overlong_penalty,
        }
        groups = [replace(g, rewards=soften_overlong(g.rewards, g.group, **shape)) for g in groups]
    return run.task.compare(groups)


def update_policy(run: Run, groups: list[ScoredGroup]) -> dict[str, float]:
    """mu passes over the step's groups, one optimizer update a mini-batch."""
    config = run.config.train
    per_minibatch = -(-max(1, len(groups)) // config.num_minibatches)
    chunks = [groups[i : i + per_minibatch] for i in range(0, len(groups), per_minibatch)]
    run.enter("train")
    with run.ledger("logprobs"):
        packed = [minibatch for chunk in chunks if (minibatch := make_minibatch(run, chunk)) is not None]
        minibatches = [add_logprobs(run, minibatch) for minibatch in packed]
    results: list[StepResult] = []
    with run.ledger("update"):
        for _ in range(config.updates_per_rollout):
            for minibatch in minibatches:
                results.append(run.learner.update(minibatch.batches, run.task.objective))
                refuse_divergence(run, results[-1], minibatch.batches)
    row = stats.of_updates(results, comparable=not run.contract.renormalized)
    thresholds = [m.entropy_threshold for m in minibatches if m.entropy_threshold is not None]
    if thresholds:
        row["entropy/threshold"] = sum(thresholds) / len(thresholds)
    return row | {"tflop": config.updates_per_rollout * sum(m.flops for m in minibatches) / 1e12}


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


def record(run: Run, row: dict[str, float], *, last: bool) -> None:
    """Save and export where it is due and write the step's row, in the order that a kill at any moment survives."""
    config = run.config.checkpoint
    # Only one that was made tells what the one before the limit will take.
    unknown = run.config.train.time_limit_minutes is not None and run.checkpoints.longest_s is None
    if last or is_due(run.step, config.every) or (unknown and run.step > 0):
        save(run, background=config.background and not last)  # the last one has nothing to be written beside
    if is_due(run.step, config.export_every):
        with run.ledger("checkpoint"):
            run.phases.enter("train")  # gathering weights takes room
            # Before the step's checkpoint is visible: a run that goes on from that would not write it again.
            run.exports.write(run.step)
    row = {"step": run.step, **row, **run.phases.row(), **run.ledger.step()}
    row |= stats.of_rates(row, run.learner.ranks.num_ranks, run.peak_flops)
    if run.log is not None:
        run.log.write(row)
    run.learner.ranks.barrier()
    with run.ledger("checkpoint"):
        # Only now: a checkpoint that is visible has its step's row in metrics.jsonl.
        run.checkpoints.publish()
    run.console.step(row)


def is_due(step: int, every: int) -> bool:
    """Whether something is to be done after this step; never where `every` is 0, and not before the first."""
    return step > 0 and every > 0 and step % every == 0


def save(run: Run, *, background: bool) -> None:
    """Write a checkpoint, which `publish` makes count."""
    with run.ledger("checkpoint"):
        run.phases.enter("train")  # what was offloaded is part of the state
        state = {
            "stream": run.stream.state_dict(),
            "unfinished": run.unfinished.state_dict() if run.learner.ranks.is_main else [],  # who alone writes it
            "num_nonfinite": run.num_nonfinite,
        }
        run.checkpoints.save(run.step, run.learner.begin_save, state, background=background)
