"""One process of a distributed test: runs every case of its job's size and lets rank 0 write what came out.

Usage: job.py RANK NUM_PROCESSES DIRECTORY, with one Hugging Face directory a model in DIRECTORY.
"""

from __future__ import annotations

import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scenario import CASES, NUM_STEPS, OBJECTIVE, TRAIN, Case, batches_of, with_logprobs

from fastgrpo.learner.megatron import convert, parallel
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.learner import MegatronLearner


def run(case: Case, directory: Path) -> dict[str, Any]:
    """Everything that the tests compare with the torch learner."""
    path = directory / case.model
    learner = MegatronLearner.from_pretrained(
        str(path), case.layout, TRAIN, num_updates=NUM_STEPS + 1, reference=True, recompute=case.recompute
    )
    source = from_directory(path)
    result: dict[str, Any] = {
        "not_exact": [name for name, tensor in learner.named_weights() if not torch.equal(tensor, source(name))],
        "names": [name for name, _ in learner.named_weights()],
    }
    batches = with_logprobs(batches_of(case.share_prompts), learner)
    result["logprobs"] = by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches])
    mine = batches[learner.parallel.dp_rank :: learner.parallel.dp_size]
    result["gradients"] = gradients(learner, mine)
    if learner.parallel.dp_size > 1:
        result["gradients_of_rank_0_alone"] = gradients(learner, batches if learner.parallel.dp_rank == 0 else [])
    result["step_without_batches"] = vars(learner.update([], OBJECTIVE))
    result["steps"] = [vars(learner.update(mine, OBJECTIVE))]
    learner.move_reference(0.5)
    state = learner.state_dict()
    state = torch.load(_written(state, directory), weights_only=True)
    result["steps"] += [vars(learner.update(mine, OBJECTIVE)) for _ in range(NUM_STEPS - 1)]
    result["weights"] = {name: tensor.clone() for name, tensor in learner.named_weights()}
    reference = [learner.logprobs(batch, temperature=1.0, reference=True) for batch in batches]
    result["reference"] = by_token(batches, reference)
    result["skipped"] = after_a_nan(learner, mine)
    result["resume_differs"] = resumed(learner, state, mine, result["weights"])
    result["ranks_differ"] = ranks_differ(result)
    parallel.destroy()
    return result


def gradients(learner: MegatronLearner, batches) -> dict[str, torch.Tensor]:
    learner.accumulate(batches, OBJECTIVE)
    whole = convert.to_hf(learner.policy, learner.parallel, value=lambda param: param.main_grad)
    return {name: gradient.clone() for name, gradient in whole}


def by_token(batches, values: list[torch.Tensor]) -> torch.Tensor:
    """Per-token values in the sequences' order, whatever micro-batch they came from."""
    parts: dict[int, torch.Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        for index, sequence in enumerate(batch.sequence_ids.tolist()):
            parts[sequence] = value[batch.cu_scored[index] : batch.cu_scored[index + 1]]
    return torch.cat([parts[sequence] for sequence in sorted(parts)])


def _written(state: dict[str, Any], directory: Path) -> Path:
    path = directory / f"state-{dist.get_world_size()}-{dist.get_rank()}.pt"
    torch.save(state, path)
    return path


def after_a_nan(learner: MegatronLearner, batches) -> dict[str, Any]:
    """An update whose loss is not finite on one data-parallel rank: whether anything of the model moved anywhere."""
    before = {name: tensor.clone() for name, tensor in learner.named_weights()}
    if learner.parallel.dp_rank == 0:
        batches[0].advantages[0] = float("nan")
    step = learner.update(batches, OBJECTIVE)
    moved = [name for name, tensor in learner.named_weights() if not torch.equal(tensor, before[name])]
    if learner.parallel.dp_rank == 0:
        batches[0].advantages[0] = batches[0].advantages[1]
    return {"skipped": step.skipped, "moved": moved, "policy_version": step.policy_version}


def resumed(learner: MegatronLearner, state: dict[str, Any], batches, weights) -> list[str]:
    """The weights that differ when the last steps are taken again from a saved state."""
    learner.load_state_dict(state)
    for _ in range(NUM_STEPS - 1):
        learner.update(batches, OBJECTIVE)
    return [name for name, tensor in learner.named_weights() if not torch.equal(tensor, weights[name])]


def ranks_differ(result: dict[str, Any]) -> list[str]:
    """What is not the same on all ranks."""
    mine = {
        "steps": result["steps"],
        "logprobs": result["logprobs"].double().sum().item(),
        "weights": {name: tensor.double().sum().item() for name, tensor in result["weights"].items()},
        "not_exact": result["not_exact"],
    }
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [key for key in mine if any(other[key] != mine[key] for other in everyone)]


def main() -> None:
    rank, num_processes, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / f"store-{num_processes}"), num_processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=90))
    results: dict[str, Any] = {}
    for case in CASES:
        if case.processes != num_processes:
            continue
        try:
            results[case.name] = run(case, directory)
        except Exception:
            # The other ranks wait in a collective: leave at once, so that they fail too.
            print(f"rank {rank}, {case.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
    if rank == 0:
        torch.save(results, directory / f"results-{num_processes}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
