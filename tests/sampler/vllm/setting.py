"""What the vLLM tests are about: tiny models and prompts, and one short run of learner, sampler and exchange.

Shared by the tests and by the jobs that they start: vLLM runs in processes of its own, which may crash as they like.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import small_shape

from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.models import hf
from fastgrpo.types import PackedBatch, Prompt, RolloutGroup, SamplingParams

VOCABULARY = 509
"""Padded to 512, so the second half of a vocabulary cut in two ends in 3 rows that are no token."""
MODELS = {"qwen2": True, "qwen3": True, "llama": False, "mistral": False, "qwen3_moe": False}
"""Kind to whether its head is tied: Qwen2 brings biases, Qwen3 norms of queries and keys, Llama a head of its own,
Mistral heads that are not hidden / heads wide in a model class of its own, and Qwen3-MoE experts."""
TRAIN = TrainConfig(learning_rate=1e-2)
OBJECTIVE = Objective()
SAMPLING = SamplingParams(max_new_tokens=12, stop_token_ids=(1,))
FLOAT32_TOLERANCE = 2e-5
NUM_SAMPLES = 4
MAX_LENGTH = 128


def save_model(directory: Path, kind: str) -> str:
    """A random float32 model whose logits are far from flat, and whose biases are not zero."""
    from transformers import AutoModelForCausalLM

    shape = small_shape(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=160 if kind == "mistral" else 128,
        head_dim=32,  # vLLM's attention on a CPU wants 32 or more
        intermediate_size=96,
        tie_word_embeddings=MODELS[kind],
        eos_token_id=1,
        pad_token_id=0,
        **({"moe_intermediate_size": 64} if kind == "qwen3_moe" else {}),  # vLLM pads experts to multiples of 32
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= 1 if "embed" in name else 4
    model.save_pretrained(directory / kind)
    return str(directory / kind)


def load(directory: Path, kind: str) -> Any:
    return hf.load_model(str(directory / kind), device="cpu", dtype=torch.float32)


def prompts(count: int) -> list[Prompt]:
    """Some longer than a block of vLLM's cache, which siblings share, and some not."""
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(
            prompt_id=f"train/{i}",
            token_ids=torch.randint(2, VOCABULARY, (5 + 11 * (i % 5),), generator=generator),
            text="",
        )
        for i in range(count)
    ]


def settings(config: Any, **more: Any) -> Any:
    """EngineSettings of a small engine."""
    from fastgrpo.sampler.vllm.engine import EngineSettings

    return EngineSettings(
        **{
            "config": config,
            "dtype": torch.float32,
            "device": "cpu",
            "tp": 1,
            "max_model_len": MAX_LENGTH,
            "max_sequences": 16,
            "kv_cache_bytes": 1 << 24,
            "gpu_memory_utilization": None,
            "enforce_eager": True,
            "sleeps": False,
        }
        | more
    )


def batch_of(groups: list[RolloutGroup], seed: int):
    """One packed batch of everything sampled, with random advantages."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        Sequence(
            sequence_id=number * NUM_SAMPLES + i,
            group_id=number,
            prompt_ids=group.prompt.token_ids,
            token_ids=rollout.token_ids,
            advantages=torch.randn(1, generator=generator).expand(len(rollout.token_ids)).contiguous(),
            token_weights=torch.full((len(rollout.token_ids),), 0.01),
            sampler_logprobs=rollout.sampler_logprobs,
        )
        for number, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]
    return list(pack(sequences, max_tokens=4096, share_prompts=True))


def short_run(learner: Any, sampler: Any, exchange: Any, *, num_steps: int, params: SamplingParams = SAMPLING):
    """Sample, compare, update, share, some times over; the largest difference of each step's logprobs.

    Every rank samples all prompts, so that all of them learn the same.
    """
    differences = []
    for step in range(num_steps):
        exchange.share()
        groups = sampler.generate(prompts(6), NUM_SAMPLES, params, seed=step)
        batches = batch_of(groups, step)
        worst = max(
            (learner.logprobs(b, temperature=params.temperature) - b.sampler_logprobs).abs().max().item()
            for b in batches
        )
        differences.append(worst)
        if step < num_steps - 1:
            others = [PackedBatch.empty()] * len(batches) if learner.ranks.in_step else []
            learner.update(batches if learner.ranks.data_rank == 0 else others, OBJECTIVE)
    return differences
