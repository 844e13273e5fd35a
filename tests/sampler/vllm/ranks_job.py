"""One process of a job with Megatron and vLLM in it: python ranks_job.py DIRECTORY, in the environment of torchrun.

Rank 0 writes every rank's result of every case to DIRECTORY/ranks.json.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from allocations import Allocations
from ranks_cases import CASES, Case
from setting import SAMPLING, TRAIN, bytes_built, prompts, settings, short_run
from vllm.v1.engine.core_client import InprocClient

from fastgrpo.config import LoraConfig
from fastgrpo.learner.megatron import parallel
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.models.hf import load_config
from fastgrpo.models.lora import add_to_skeleton
from fastgrpo.sampler.vllm.sampler import VLLMSampler
from fastgrpo.weights import Exchange

DIRECTORY = Path(sys.argv[1])


def run(case: Case) -> dict:
    path = str(DIRECTORY / case.model)
    sequence_parallel = case.model == "qwen3_moe" and case.learner_tp > 1  # Megatron's experts want it
    layout = Layout(
        tp=case.learner_tp, pp=case.learner_pp, cp=case.learner_cp, ep=case.learner_ep, sp=sequence_parallel
    )
    adapters = None
    if case.lora_rank:
        adapters = add_to_skeleton(path, LoraConfig(rank=case.lora_rank), dtype=torch.float32, seed=0)
    learner = MegatronLearner.from_pretrained(path, layout, TRAIN, num_updates=9, adapters=adapters)
    messages: list[str] = []
    engine = settings(load_config(path), tp=case.sampler_tp, adapters=adapters.shapes() if adapters else {})
    with Allocations() as building:
        sampler = VLLMSampler(engine, learner.weight_slices, max_restarts=1, notify=messages.append)
    try:
        canary = prompts(5)[4].token_ids
        exchange = Exchange(learner, sampler, bucket_bytes=case.bucket_bytes, canary=canary)
        running = Allocations()
        differences = short_run(learner, sampler, exchange, num_steps=3, watch=running)
        plan = exchange.plan
        loads = [
            sum(p.num_bytes for p in bucket if p.target.rank == rank)
            for bucket in plan.buckets
            for rank in range(dist.get_world_size())
        ]
        result = {
            "differences": differences,
            "trained": learner.policy_version,
            "copied": sampler.copied,
            **bytes_built(sampler, building),
            "bytes_kept": running.live_bytes(),
            "num_shared": sum(held.rank == dist.get_rank() for held in plan.shared),
            "num_local": len(plan.copied),
            "num_buckets": len(plan.buckets),
            "largest_bucket": max(loads, default=0),
            "largest_row": max((p.num_bytes // p.shape[0] for b in plan.buckets for p in b), default=0),
            "sampling_ranks": [sampler.ranks.data_rank, sampler.ranks.num_data_ranks, sampler.ranks.leads],
        }
        if case.spoil:
            result["spoiled"] = spoiled(exchange, sampler)
        if case.fail:
            sampler.refill = exchange.restore
            result |= failed(exchange, sampler, messages)
        return result
    finally:
        sampler.close()
        parallel.destroy()


def spoiled(exchange: Exchange, sampler: VLLMSampler) -> str:
    """What the proof says of a tensor whose rows are in another order on the last rank alone."""
    if dist.get_rank() == dist.get_world_size() - 1:
        held = next(s.tensor for s in sampler.weight_slices() if s.name.endswith("1.mlp.down_proj.weight"))
        held.copy_(held.roll(1, 0).clone())
    try:
        exchange.prove()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failed(exchange: Exchange, sampler: VLLMSampler, messages: list[str]) -> dict:
    """A rollout in which the last rank's engine raises, against the same one undisturbed."""
    exchange.share()

    def drawn() -> list:
        groups = sampler.generate(prompts(4), 2, SAMPLING, seed=9)
        return [r.token_ids.tolist() for g in groups for r in g.rollouts]

    expected, real, calls = drawn(), InprocClient.get_output, 0

    def get_output(self):
        nonlocal calls
        calls += 1
        if calls == 4 and dist.get_rank() == dist.get_world_size() - 1:
            raise MemoryError("no blocks left")
        return real(self)

    InprocClient.get_output = get_output
    try:
        same = drawn() == expected
    finally:
        InprocClient.get_output = real
    exchange.prove()
    return {"same_after_restart": same, "messages": messages}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = {case.name: run(case) for case in CASES}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        (DIRECTORY / "ranks.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


main()
