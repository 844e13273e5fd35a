"""One process with a torch learner and vLLM in it: python alone_job.py DIRECTORY.

Writes what it found to DIRECTORY/alone.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from allocations import Allocations
from setting import (
    MAX_SEQUENCES,
    MODELS,
    NUM_SAMPLES,
    OBJECTIVE,
    SAMPLING,
    TRAIN,
    VOCABULARY,
    batch_of,
    bytes_built,
    load,
    prompts,
    settings,
    short_run,
)
from transformers import AutoModelForCausalLM
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core_client import InprocClient

from fastgrpo.config import LoraConfig
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.lora import add_adapters
from fastgrpo.sampler.draw import _cut as cut
from fastgrpo.sampler.vllm.adopt import _refusing_repacking
from fastgrpo.sampler.vllm.engine import MAX_BATCHED_TOKENS
from fastgrpo.sampler.vllm.pools import kept_allocator_settings
from fastgrpo.sampler.vllm.sampler import VLLMSampler
from fastgrpo.types import SamplingParams
from fastgrpo.weights import Exchange

DIRECTORY = Path(sys.argv[1])
CROWDED = "qwen2"
"""The model whose engine takes more sequences at once than a step takes tokens for."""


class Pair:
    """A learner, a sampler on its tensors, and the exchange between them."""

    def __init__(
        self,
        name: str,
        *,
        changed: Callable[[list], list] = list,
        lora: LoraConfig | None = None,
        **more: Any,
    ) -> None:
        model = load(DIRECTORY, name)
        adapters = None if lora is None else add_adapters(model, lora, seed=0)
        self.learner = TorchLearner(model, TRAIN, num_updates=9, adapters=adapters)
        self.messages: list[str] = []
        config = settings(model.config, adapters={} if adapters is None else adapters.shapes(), **more)
        before = torch.get_rng_state(), random.getstate(), torch.set_num_threads
        with Allocations() as allocated:
            self.sampler = VLLMSampler(
                config, lambda: changed(self.learner.weight_slices()), max_restarts=1, notify=self.messages.append
            )
        self.built = {
            **bytes_built(self.sampler, allocated),
            "matrices_allocated": sum(allocated.shapes[shape] for shape in self.matrices()),
            "process_untouched": [
                torch.equal(before[0], torch.get_rng_state()),
                before[1] == random.getstate(),
                before[2] is torch.set_num_threads,
                not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1,
            ],
        }
        self.exchange = Exchange(
            self.learner, self.sampler, bucket_bytes=1 << 20, canary=prompts(5)[4].token_ids, full_proof=True
        )
        self.sampler.refill = self.exchange.restore

    def matrices(self) -> set[tuple[int, ...]]:
        """The shapes of vLLM's."""
        return {tuple(p.shape) for p in self.sampler.engine.adoption.model.parameters() if p.ndim > 1}

    def key(self) -> str:
        """Of the engine's compiled code."""
        return self.sampler.engine.llm.vllm_config.compute_hash()

    def update(self) -> None:
        """Move every weight by far more than the proof's tolerance shows."""
        self.learner.update(batch_of(self.generate(), 1), OBJECTIVE)

    def generate(self, chosen=None, params=SAMPLING, seed: int = 5, num_samples: int = NUM_SAMPLES, on_end=None):
        chosen = prompts(6) if chosen is None else chosen
        self.sampler.forget()
        return self.sampler.generate(chosen, num_samples, params, seed, on_end)

    def proof(self) -> str:
        """What the exchange says of the present state, without moving anything."""
        try:
            self.exchange.prove()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "agree"


def drawn(groups) -> dict[str, list[list[int]]]:
    return {g.prompt.prompt_id: [r.token_ids.tolist() for r in g.rollouts] for g in groups}


def sharing(pair: Pair) -> dict[str, Any]:
    """Whether vLLM computes with the learner's tensors, through updates; and what was allocated to get there."""
    learner, sampler = pair.learner, pair.sampler
    theirs = {s.name: s.tensor.data_ptr() for s in sampler.weight_slices()}
    ours = {s.name: s.tensor.data_ptr() for s in learner.weight_slices()}
    (batch,) = batch_of(pair.generate(), 0)
    first = learner.logprobs(batch, temperature=1.0)
    allocated = Allocations()
    differences = short_run(learner, sampler, pair.exchange, num_steps=4, watch=allocated)
    moments = 2 * sum(p.nbytes for p in learner.model.parameters())
    return {
        **pair.built,
        "copied": sampler.copied,
        "same_addresses": ours == theirs,
        "differences": differences,
        "change": (learner.logprobs(batch, temperature=1.0) - first).abs().max().item(),
        "bytes_kept": allocated.live_bytes() - moments,
        "key": pair.key(),
    }


def crowded(pair: Pair) -> int:
    """Completions drawn where the prompts are more than one step of the engine takes in."""
    longest = prompts(320)[4::5]
    assert sum(len(prompt.token_ids) for prompt in longest) > MAX_BATCHED_TOKENS
    return sum(len(group.rollouts) for group in pair.generate(longest, num_samples=1))


def sampling(pair: Pair) -> dict[str, Any]:
    """What the samples depend on, and what their logprobs mean."""
    oracle = AutoModelForCausalLM.from_pretrained(DIRECTORY / "qwen3-tied", dtype=torch.float32)
    chosen = prompts(6)
    result: dict[str, Any] = {"drawn": drawn(pair.generate(chosen)), "again": drawn(pair.generate(chosen))}
    ended: list[tuple[str, int, list[int]]] = []
    pair.generate(chosen, on_end=lambda i, s, r: ended.append((chosen[i].prompt_id, s, r.token_ids.tolist())))
    result["ended"] = ended
    result["reversed"] = drawn(pair.generate(chosen[::-1]))
    result["alone"] = drawn(pair.generate(chosen[2:3]))
    result["other_seed"] = drawn(pair.generate(chosen, seed=6))
    result["no_prompts"] = pair.generate([])
    greedy = replace(SAMPLING, temperature=0.0)
    for name, params in {
        "warm": replace(SAMPLING, temperature=0.7),
        "cut": replace(SAMPLING, temperature=0.8, top_p=0.9, top_k=20),
        "greedy": greedy,
    }.items():
        result[name] = logprob_error(oracle, pair.generate(chosen, params), params)
    result["greedy_gap"] = greedy_gap(oracle, pair.generate(chosen, greedy, num_samples=2), greedy)
    stops = tuple(range(2, VOCABULARY, 3))
    stopping = replace(SAMPLING, stop_token_ids=stops, min_new_tokens=4)
    result["stopped"] = [
        (r.finish_reason, [t in stops for t in r.token_ids.tolist()])
        for g in pair.generate(chosen, stopping)
        for r in g.rollouts
    ]
    return result


def continuing(pair: Pair) -> dict[str, Any]:
    """Completions that go on after a reply, each with a limit of its own: from the keys that are there, and anew."""
    oracle = AutoModelForCausalLM.from_pretrained(DIRECTORY / "qwen3-tied", dtype=torch.float32)
    run, cached = pair.sampler.engine.run, []

    def counting(requests, on_end):
        outputs = run(requests, on_end)
        cached.append(sum(output.num_cached_tokens for output in outputs.values()))
        return outputs

    begun = pair.generate(prompts(5), num_samples=1)
    reply = torch.arange(40, 45)
    longer = [
        replace(
            group.prompt,
            token_ids=torch.cat([group.prompt.token_ids, group.rollouts[0].token_ids, reply]),
            max_new_tokens=1 + 4 * number,
        )
        for number, group in enumerate(begun)
    ]
    pair.sampler.engine.run = counting
    groups = [pair.sampler.generate(longer, 1, SAMPLING, 5), pair.generate(longer, num_samples=1)]
    pair.sampler.policy_version += 1
    pair.sampler.generate(longer, 1, SAMPLING, 5)
    del pair.sampler.engine.run
    return {
        "cached": cached,
        "lengths": [[len(group.rollouts[0].token_ids) for group in each] for each in groups],
        "errors": [logprob_error(oracle, each, SAMPLING) for each in groups],
        "same": drawn(groups[0]) == drawn(groups[1]),
    }


@torch.no_grad()
def expected_logprobs(oracle: Any, group: Any, rollout: Any, params: SamplingParams) -> torch.Tensor:
    """(R, V) transformers' own distributions for the rollout's tokens, cut as fastgrpo.sampler.draw cuts them."""
    tokens = torch.cat([group.prompt.token_ids, rollout.token_ids])
    scores = oracle(tokens[None]).logits[0, len(group.prompt.token_ids) - 1 : -1] / (params.temperature or 1.0)
    return cut(scores.log_softmax(-1), params)


def logprob_error(oracle: Any, groups: Any, params: SamplingParams) -> float:
    worst = 0.0
    for group in groups:
        for rollout in group.rollouts:
            expected = expected_logprobs(oracle, group, rollout, params)
            own = expected.gather(-1, rollout.token_ids[:, None])[:, 0]
            worst = max(worst, (own - rollout.sampler_logprobs).abs().max().item())
    return worst


def greedy_gap(oracle: Any, groups: Any, params: SamplingParams) -> float:
    """How much likelier than a drawn token any other was."""
    worst = 0.0
    for group in groups:
        for rollout in group.rollouts:
            expected = expected_logprobs(oracle, group, rollout, params)
            own = expected.gather(-1, rollout.token_ids[:, None])[:, 0]
            worst = max(worst, (expected.max(-1).values - own).max().item())
    return worst


def proofs(pair: Pair) -> dict[str, Any]:
    """What the proof says of weights that are not the learner's."""
    result = {"intact": pair.proof()}
    model = pair.sampler.engine.adoption.model
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    own = module.weight
    module.weight = torch.nn.Parameter(own.detach().clone(), requires_grad=False)
    pair.update()
    result["stale"] = pair.proof()
    module.weight = own
    result["mended"] = pair.proof()
    # The same memory under another name: what only the logprobs can show.
    gate_up = model.get_submodule("model.layers.0.mlp.gate_up_proj")
    own = gate_up.weight
    gate_up.weight = torch.nn.Parameter(own.detach().roll(len(own) // 2, 0), requires_grad=False)
    addresses, pair.exchange.addresses = pair.exchange.addresses, []
    pair.exchange.prepare()
    pair.exchange.plan, pair.exchange.proven = replace(pair.exchange.plan, copied=()), []
    result["permuted"] = pair.proof()
    gate_up.weight = own
    pair.exchange.prepare()
    assert pair.exchange.addresses == addresses
    return result


def failures(pair: Pair) -> dict[str, Any]:
    """Engines that break in the middle of a rollout, some times in a row."""
    expected = drawn(pair.generate())

    def outcome(how: Callable[[InprocClient], EngineCoreOutputs] | None = None, times: int = 0) -> str:
        real, calls = InprocClient.get_output, 0

        def get_output(self):
            nonlocal calls
            calls += 1
            return real(self) if calls % 5 or calls > 5 * times else how(self)

        pair.messages.clear()
        InprocClient.get_output = get_output
        try:
            found = pair.generate()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            InprocClient.get_output = real
        said = "".join(pair.messages)
        return said if drawn(found) == expected else f"other samples after: {said}"

    def raises(client):
        raise MemoryError("no blocks left")

    def drops(client):
        client.abort_requests(list(client.engine_core.scheduler.requests))
        pair.sampler.engine.llm.output_processor.request_states.clear()
        return EngineCoreOutputs()

    def stands_still(client):
        client.engine_core.step_fn = lambda: ({}, False)
        return EngineCoreOutputs()

    result: dict[str, Any] = {"keys": [pair.key()], "gone": gone_when(pair, lambda: outcome(raises, 1))}
    result["keys"].append(pair.key())
    result |= {how.__name__: outcome(how, 1) for how in (raises, drops, stands_still)}
    result["nothing"] = outcome()
    result["proof"] = pair.proof()
    result["copied"] = pair.sampler.copied
    result["twice"] = outcome(raises, 2)
    return result


def gone_when(pair: Pair, restarts: Callable[[], Any]) -> dict[str, bool]:
    """Whether the broken engine was gone when its memory was freed, and its KV cache when the next one was built."""
    engine, shutdown, offer = weakref.ref(pair.sampler.engine.llm), InprocClient.shutdown, pair.sampler.offer
    runner = pair.sampler.engine.llm.model_executor.driver_worker.worker.model_runner
    kv_cache, gone = weakref.ref(runner.kv_caches[0]), {}
    del runner

    def shutting_down(client):
        gone["engine"] = engine() is None
        shutdown(client)

    def offering():
        gone["kv_cache"] = kv_cache() is None
        return offer()

    InprocClient.shutdown, pair.sampler.offer = shutting_down, offering
    try:
        restarts()
    finally:
        InprocClient.shutdown, pair.sampler.offer = shutdown, offer
    return gone


def pools(pair: Pair) -> list[str]:
    """What happens in which order to the memory that sleeps, at the end of an engine: here a pool that is none."""
    from vllm.device_allocator.cumem import CuMemAllocator

    happened: list[str] = []
    shutdown = InprocClient.shutdown

    class Pool:
        def __del__(self):
            happened.append("pool freed")

    class Allocator:
        def __del__(self):
            happened.append("allocator freed")

    def shutting_down(client):
        CuMemAllocator.instance.allocator_and_pools.clear()  # as a GPU's worker does
        shutdown(client)
        happened.append("shut down")

    known = SimpleNamespace(allocator_and_pools={"kv_cache": (Pool(), Allocator())})
    CuMemAllocator.instance, InprocClient.shutdown = known, shutting_down
    try:
        pair.sampler.close()
    finally:
        CuMemAllocator.instance, InprocClient.shutdown = None, shutdown
    return happened


def allocator_settings() -> list[str]:
    """What torch is told after an engine was made where a user had asked for something."""
    told: list[str] = []
    with (
        patch.dict(os.environ, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
        patch.object(torch.cuda.memory, "_set_allocator_settings", told.append),
        patch.object(torch.cuda, "is_available", lambda: True),
        kept_allocator_settings(),
    ):
        assert not told
    return told


def repacking() -> dict[str, str | None]:
    """What is said of backends that compute with another form of the weights, by where they put it."""
    weight = torch.nn.Linear(8, 4, bias=False).weight
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    said: dict[str, str | None] = {}
    for where, repack in {
        "nowhere": lambda: weight.data.copy_(weight.data),
        "elsewhere": lambda: setattr(weight, "data", weight.data.flip(0)),
        "in place": lambda: weight.data.copy_(weight.data.flip(0)),
    }.items():
        try:
            with _refusing_repacking(model):
                repack()
            said[where] = None
        except NotImplementedError as error:
            said[where] = str(error)
    return said


def gpu_arguments() -> dict[str, Any]:
    """What an engine for a GPU is asked for."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from fastgrpo.sampler.vllm import engine

    offered = TorchLearner(load(DIRECTORY, "qwen2"), TRAIN, num_updates=1).weight_slices()
    weights = sum(s.tensor.nbytes for s in offered)
    engine._gpu_bytes = lambda: 4 * weights
    known = {"config": None, "device": "cuda", "dtype": torch.bfloat16, "enforce_eager": False, "sleeps": True}
    arguments = engine._engine_args(settings(**known, kv_cache_bytes=weights, max_sequences=16384), "", offered)
    share = settings(**known, kv_cache_bytes=None, gpu_memory_utilization=0.75)

    def shares() -> list[float]:
        asked = (settings(**known, kv_cache_bytes=weights), share)
        return [engine._engine_args(wanted, "", offered).gpu_memory_utilization for wanted in asked]

    result = {"head": arguments.hf_overrides, "tokens": arguments.max_num_batched_tokens, "shares": shares()}
    with patch.object(BaseModelLoader, "get_external_weight_memory"):
        del BaseModelLoader.get_external_weight_memory
        result["older_shares"] = shares()
    return result


def apart() -> dict[str, Any]:
    """A learner whose memory vLLM cannot take as it is: a copy, kept up to date and proven by its checksums."""

    def elsewhere(held):
        return [replace(s, tensor=s.tensor.clone()) if ".gate_proj." in s.name else s for s in held]

    pair = Pair("llama", changed=elsewhere)
    result: dict[str, Any] = {"copied": pair.sampler.copied, **pair.built}
    result["differences"] = short_run(pair.learner, pair.sampler, pair.exchange, num_steps=3)
    pair.update()
    result["stale"] = pair.proof()
    pair.exchange.share()
    held = next(s.tensor for s in pair.sampler.weight_slices() if s.name.endswith("0.mlp.gate_proj.weight"))
    held[[3, 4]] = held[[4, 3]]
    result["permuted"] = pair.proof()
    pair.sampler.restart()
    result["restored"] = pair.proof()
    pair.sampler.close()
    return result


def adapted(lora: LoraConfig) -> dict[str, Any]:
    """Adapters that vLLM computes beside the learner's matrices, from updates that change them by a lot."""
    pair = Pair("qwen2-tied", lora=lora)
    (batch,) = batch_of(pair.generate(), 0)
    first = pair.learner.logprobs(batch, temperature=1.0)
    result: dict[str, Any] = {"copied": pair.sampler.copied}
    result["differences"] = short_run(pair.learner, pair.sampler, pair.exchange, num_steps=4)
    result["change"] = (pair.learner.logprobs(batch, temperature=1.0) - first).abs().max().item()
    pair.update()
    result["stale"] = pair.proof()
    pair.sampler.restart()
    result["restored"] = pair.proof()
    qkv = pair.sampler.engine.adoption.model.get_submodule("model.layers.0.self_attn.qkv_proj")
    x = torch.randn(5, qkv.input_size)
    compiled = torch.compile(lambda x: qkv(x)[0], backend="aot_eager", fullgraph=True)  # as a GPU's graphs need it
    result["compiled_error"] = (compiled(x) - qkv(x)[0]).abs().max().item()
    pair.sampler.close()
    return result


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(11)
    random.seed(11)
    results: dict[str, Any] = {}
    for name in MODELS:
        pair = Pair(name, max_sequences=64 if name == CROWDED else MAX_SEQUENCES)
        if name == "qwen3-tied":
            pair.exchange.share()
            results["sampling"], results["continuing"] = sampling(pair), continuing(pair)
        results[name] = sharing(pair)
        if name == "qwen3-tied":
            results["proofs"], results["failures"] = proofs(pair), failures(pair)
        if name == CROWDED:
            results["crowded"], results["pools"] = crowded(pair), pools(pair)
        else:
            pair.sampler.close()
    results["apart"] = apart()
    results["adapters"] = adapted(LoraConfig(rank=3))
    results["some adapters"] = adapted(LoraConfig(rank=4, target_modules=["k_proj", "down_proj"], rank_stabilized=True))
    results["gpu_arguments"], results["allocator_settings"] = gpu_arguments(), allocator_settings()
    results["repacking"] = repacking()
    (DIRECTORY / "alone.json").write_text(json.dumps(results))


main()
