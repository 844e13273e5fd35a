"""One process of a distributed test: runs every case of its job's size and lets rank 0 write what came out.

Usage: job.py RANK NUM_PROCESSES DIRECTORY, with one Hugging Face directory a model in DIRECTORY.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from extras import EXTRAS
from observe import (
    addresses,
    by_token,
    empty_directory,
    gradients,
    gradients_of_packing,
    save,
    share_of,
    slices_cover_once,
    slices_differ,
)
from scenario import (
    CASES,
    NUM_STEPS,
    OBJECTIVE,
    Case,
    batches_of,
    train_config,
    with_logprobs,
)

from fastgrpo.learner.megatron import parallel
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.learner import MegatronLearner


def run(case: Case, directory: Path) -> dict[str, Any]:
    """Everything that the tests compare with the torch learner."""
    path = directory / case.model
    learner = MegatronLearner.from_pretrained(
        str(path),
        case.layout,
        train_config(case.model),
        num_updates=NUM_STEPS + 1,
        reference=True,
        activation_checkpoint=case.activation_checkpoint,
        overlap_grad_reduce=case.overlap_grad_reduce,
        distributed_optimizer=case.distributed_optimizer,
    )
    source = from_directory(path)
    result: dict[str, Any] = {
        "not_exact": [name for name, tensor in learner.named_weights() if not torch.equal(tensor, source(name))],
        "names": [name for name, _ in learner.named_weights()],
    }
    held = learner.weight_slices()
    result["slices"] = slices_cover_once(learner, held) + slices_differ(held, source)
    batches = with_logprobs(batches_of(case.share_prompts, experts=case.replays), learner)
    result["logprobs"] = by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches])
    mine = share_of(batches, learner)
    result["gradients"] = gradients(learner, mine)
    if learner.parallel.dp_size > 1:
        result["gradients_of_rank_0_alone"] = gradients(learner, share_of(batches, learner, all_on_rank_0=True))
    result["gradients_of_the_other_packing"] = gradients_of_packing(learner, not case.share_prompts, case.replays)
    result["step_without_batches"] = vars(learner.update([], OBJECTIVE))
    result["steps"] = [vars(learner.update(mine, OBJECTIVE))]
    learner.move_reference(0.5)
    saved = empty_directory(directory / f"saved-{case.name}")
    save(learner, saved)
    result["steps"] += [vars(learner.update(mine, OBJECTIVE)) for _ in range(NUM_STEPS - 1)]
    result["weights"] = {name: tensor.clone() for name, tensor in learner.named_weights()}
    result["slices"] += slices_differ(held, result["weights"].__getitem__)
    result["reference"] = by_token(batches, learner.logprobs_of(batches, temperature=1.0, reference=True))
    result["skipped"] = after_a_nan(learner, mine)
    result["bytes_while_offloaded"], result["resume_differs"] = resumed(learner, saved, mine, result["weights"])
    result["moved"] = addresses(held) != addresses(learner.weight_slices())
    result["ranks_differ"] = ranks_differ(result)
    parallel.destroy()
    return result


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


def resumed(learner: MegatronLearner, saved: Path, batches, weights) -> tuple[int, list[str]]:
    """The last steps taken again from a saved state, with the optimizer out of memory before each: the bytes it then
    holds, and the weights that come out different."""
    learner.load(saved)
    num_bytes = 0
    for _ in range(NUM_STEPS - 1):
        learner.offload()
        released = [*learner.optimizer.state(), *learner.optimizer.gradient_buffers()]
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in released)
        learner.logprobs(batches[0], temperature=1.0)  # all that the sampler's phase asks for still works
        learner.onload()
        learner.update(batches, OBJECTIVE)
    return num_bytes, [name for name, tensor in learner.named_weights() if not torch.equal(tensor, weights[name])]


def ranks_differ(result: dict[str, Any]) -> list[str]:
    """What is not the same on all ranks."""
    mine = {
        "steps": result["steps"],
        "logprobs": result["logprobs"].double().sum().item(),
        "weights": {name: tensor.double().sum().item() for name, tensor in result["weights"].items()},
        "not_exact": result["not_exact"],
        "slices": result["slices"],
        "moved": result["moved"],
        "bytes_while_offloaded": result["bytes_while_offloaded"],
    }
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [key for key in mine if any(other[key] != mine[key] for other in everyone)]


def meet(rank: int, num_processes: int, port_file: Path) -> dist.TCPStore:
    """A store on a port that was free when rank 0 took it. A FileStore is slow for the many groups of a layout."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
        whole = port_file.with_suffix(".new")
        whole.write_text(str(store.port))
        whole.rename(port_file)
        return store
    while not port_file.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port_file.read_text()), num_processes)


def main() -> None:
    rank, num_processes, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = meet(rank, num_processes, directory / f"port-{num_processes}")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=90))
    gc.freeze()  # what has been imported need not be looked through again after each case
    results: dict[str, Any] = {name: extra(directory) for name, extra in EXTRAS.get(num_processes, {}).items()}
    for case in CASES:
        if case.processes != num_processes:
            continue
        try:
            results[case.name] = run(case, directory)
            gc.collect()  # a layout's process groups, with their threads, live as long as its learner
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
