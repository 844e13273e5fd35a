"""Learner and vLLM in one process on one set of weights: what a step costs, what sharing costs, what is held.

    python benchmarks/bench_colocate.py [--model tiny|qwen3-0.6b|qwen3-1.7b] [--steps 20] [--out FILE.csv]
                                        [--providers fastgrpo trl]

Random weights and fixed prompts, so nothing is downloaded. Every step draws completions, learns from them and shares
the weights, and these parts are timed apart:
    generate, update        the two sides' own work
    share                   bringing the weights to the sampler: nothing, where every tensor is shared
    prove                   addresses, checksums of what was copied, and the canary's logprobs on both sides
    sleep, wake             giving the KV cache's memory back and taking it (GPU)
`copy` is measured in turn with them: all weights into a second set of the same size, on the same device. It is the
least that an engine with weights of its own has to do at every step, without the names, the buckets and the transport.
`peak_memory` is the most that a phase has begun or ended with, of everything on the device but that second set.

TRL's GRPOTrainer with vLLM in its process is described in colocate_trl.py. Each provider has a process of its own. At
equal memory in all, fastgrpo's KV cache could be larger by what TRL's peak is above its own. On a CPU TRL's first
transfer of weights fails (docs/colocation.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from harness import RESULTS, Table
from models import MODELS, random_model
from torch import Tensor

from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.decoder import CausalLM
from fastgrpo.models.hf import prepare
from fastgrpo.models.shape import Shape
from fastgrpo.phases import Phases, held_bytes
from fastgrpo.sampler.vllm.engine import EngineSettings
from fastgrpo.sampler.vllm.sampler import VLLMSampler
from fastgrpo.types import PackedBatch, Prompt, RolloutGroup, SamplingParams
from fastgrpo.weights import Exchange

PARTS = ("generate", "update", "share", "prove", "sleep", "wake", "copy")
PROVIDERS = ("fastgrpo", "trl")


class Colocated:
    """Both sides, their exchange, and the times of their parts in ms."""

    def __init__(self, args: argparse.Namespace, model: CausalLM) -> None:
        device = model.device
        self.args, self.device = args, device
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}
        self.learner = TorchLearner(model, TrainConfig(learning_rate=1e-5), num_updates=args.steps + 1)
        self.prompts = make_prompts(args, model.config.vocab_size)
        length, num_sequences = args.prompt_tokens + args.new_tokens, args.prompts * args.group_size
        settings = EngineSettings(
            config=model.config,
            dtype=model.dtype,
            device=device.type,
            tp=1,
            max_model_len=length,
            max_sequences=num_sequences,
            kv_cache_bytes=Shape.of(model.config).kv_cache_bytes(num_sequences, length, model.dtype.itemsize),
            gpu_memory_utilization=None,
            enforce_eager=device.type == "cpu",
            sleeps=device.type == "cuda",
        )
        before = held_bytes()
        self.sampler = VLLMSampler(settings, self.learner.weight_slices, max_restarts=0, notify=print)
        self.engine_bytes, self.kv_cache_bytes = held_bytes() - before, settings.kv_cache_bytes
        self.exchange = Exchange(
            self.learner, self.sampler, bucket_bytes=1 << 28, canary=self.prompts[0].token_ids[:32]
        )
        self.phases = Phases(self.learner, self.sampler, offload=False)
        self.second_set = [torch.empty_like(parameter) for parameter in model.parameters()]
        self.peaks: list[float] = []

    def step(self, number: int) -> float:
        """One step; returns the largest difference between a sampled token's two logprobs."""
        params = SamplingParams(max_new_tokens=self.args.new_tokens)
        self._timed("wake", lambda: self.phases.enter("rollout"))
        groups = self._timed(
            "generate", lambda: self.sampler.generate(self.prompts, self.args.group_size, params, number)
        )
        self._timed("sleep", lambda: self.phases.enter("train"))
        batches = pack_groups(groups, self.args.tokens_per_microbatch)
        worst = max(
            float((self.learner.logprobs(batch, temperature=1.0) - batch.sampler_logprobs).abs().max())
            for batch in batches
        )
        self._timed("update", lambda: self.learner.update(batches, Objective()))
        self.phases.enter("share")
        self._timed("share", self.exchange.move)
        self._timed("prove", self.exchange.prove)
        self._timed("copy", self._copy)
        self.peaks.append(max(self.phases.row().values()) - sum(part.nbytes for part in self.second_set))
        return worst

    @torch.no_grad()
    def _copy(self) -> None:
        torch._foreach_copy_(self.second_set, list(self.learner.model.parameters()))

    def _timed(self, part: str, work: Callable):
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        self.times[part].append((time.perf_counter() - start) * 1e3)
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_prompts(args: argparse.Namespace, vocab_size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(
            prompt_id=f"train/{i}",
            token_ids=torch.randint(0, vocab_size, (args.prompt_tokens,), generator=generator),
            text="",
        )
        for i in range(args.prompts)
    ]


def pack_groups(groups: list[RolloutGroup], max_tokens: int) -> list[PackedBatch]:
    """Everything drawn, with advantages that alternate."""
    sequences = []
    for number, group in enumerate(groups):
        for i, rollout in enumerate(group.rollouts):
            size = len(rollout.token_ids)
            advantages: Tensor = torch.full((size,), 1.0 if i % 2 else -1.0)
            sequences.append(
                Sequence(
                    sequence_id=len(sequences),
                    group_id=number,
                    prompt_ids=group.prompt.token_ids,
                    token_ids=rollout.token_ids,
                    advantages=advantages,
                    token_weights=torch.full((size,), 1.0 / size / len(groups) / len(group.rollouts)),
                    sampler_logprobs=rollout.sampler_logprobs,
                )
            )
    return pack(sequences, max_tokens=max_tokens, share_prompts=True)


def measure(args: argparse.Namespace, config: transformers.PretrainedConfig, table: Table, x: str) -> None:
    dtype = torch.bfloat16 if table.device.type == "cuda" else torch.float32
    model = prepare(random_model(config, dtype).to(table.device))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    pair = Colocated(args, model)
    shared = sum(held.dtype.itemsize * torch.Size(held.shape).numel() for held in pair.exchange.plan.shared)
    pair.exchange.share()
    differences = [pair.step(-1)]  # warm-up
    pair.times, pair.peaks = {part: [] for part in PARTS}, []
    held = []
    for number in range(args.steps):
        differences.append(pair.step(number))
        held.append(held_bytes())
    pair.sampler.close()

    def add(mode: str, metric: str, unit: str, values: list[float]) -> None:
        table.add("colocate", "second copy" if mode == "copy" else "fastgrpo", mode, metric, unit, x, values)

    for part, values in pair.times.items():
        add(part, "time", "ms", values)
    ours = zip(*(pair.times[part] for part in PARTS if part != "copy"), strict=True)
    whole = [sum(parts) for parts in ours]
    add("step", "time", "ms", whole)
    tokens = args.prompts * args.group_size * (args.prompt_tokens + args.new_tokens)
    add("step", "rate", "tok/s", [tokens / value * 1e3 for value in whole])
    add("weights", "size", "bytes", [weights])
    add("weights", "shared", "bytes", [shared])
    add("engine", "held", "bytes", [pair.engine_bytes])
    add("engine", "kv_cache", "bytes", [pair.kv_cache_bytes])
    add("step", "peak_memory", "bytes", [max(pair.peaks)])
    add("step", "growth", "bytes", [held[-1] - held[0]])
    add("step", "difference", "nats", differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b" if on_gpu else "tiny")
    parser.add_argument("--prompts", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--new-tokens", type=int, default=256 if on_gpu else 64)
    parser.add_argument("--tokens-per-microbatch", type=int, default=16384 if on_gpu else 4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["fastgrpo"])
    parser.add_argument("--trl-memory-share", type=float, default=0.3, help="of the GPU for TRL's vLLM; TRL's default")
    parser.add_argument("--out", type=Path, default=RESULTS / ("colocate.csv" if on_gpu else "colocate_cpu.csv"))
    parser.add_argument("--append", action="store_true", help="to --out, where it exists")
    args = parser.parse_args()
    if len(args.providers) > 1:  # the last of an option that is given twice counts
        for number, name in enumerate(args.providers):
            again = ["--providers", name, *(["--append"] if number else [])]
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *again], check=True)
        return
    table = Table(torch.device("cuda" if on_gpu else "cpu"))
    config = transformers.Qwen3Config(**MODELS[args.model], max_position_embeddings=32768, tie_word_embeddings=True)
    config.architectures = ["Qwen3ForCausalLM"]
    x = f"{args.model} {args.prompts}x{args.group_size} prompt={args.prompt_tokens} new={args.new_tokens}"
    if args.providers == ["trl"]:
        import colocate_trl  # the others run without TRL

        colocate_trl.measure(args, config, table, x)
    else:
        measure(args, config, table, x)
    table.write(args.out, append=args.append)


if __name__ == "__main__":
    main()
