"""What the vLLM tests are about: tiny models and prompts, and one short run of learner, sampler and exchange.

Shared by the tests and by the jobs that they start: vLLM runs in processes of its own, which may crash as they like.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe")
"""Qwen2 brings biases, Qwen3 norms of queries and keys, Mistral heads that are not hidden / heads wide in a model class
of its own, and Qwen3-MoE experts."""
MODELS = tuple(f"{family}{head}" for family in FAMILIES for head in ("", "-tied"))
TRAIN = TrainConfig(learning_rate=1e-2)
OBJECTIVE = Objective()
SAMPLING = SamplingParams(max_new_tokens=12, stop_token_ids=(1,))
FLOAT32_TOLERANCE = 2e-5
NUM_SAMPLES = 4
MAX_LENGTH = 128
MAX_SEQUENCES = 16
KV_CACHE_BYTES = 1 << 24
ENGINE_BYTES = 160 << 10
"""What an engine may hold beside its parameters, the KV cache and the embeddings of a step's tokens: inputs and tables,
104 KiB, and 140 of 64 sequences. The smallest model has 930 KiB, and a layer's gate_up_proj 96."""


def save_model(directory: Path, name: str) -> str:
    """A random float32 model whose logits are far from flat, and whose biases are not zero."""
    from transformers import AutoModelForCausalLM

    family = name.removesuffix("-tied")
    shape = small_shape(
        family,
        vocab_size=VOCABULARY,
        hidden_size=160 if family == "mistral" else 128,
        head_dim=32,  # vLLM's attention on a CPU wants 32 or more
        intermediate_size=96,
        tie_word_embeddings=name.endswith("-tied"),
        eos_token_id=1,
        pad_token_id=0,
        **({"moe_intermediate_size": 64} if family == "qwen3_moe" else {}),  # vLLM pads experts to multiples of 32
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= 1 if "embed" in key else 4
    model.save_pretrained(directory / name)
    return str(directory / name)


def load(directory: Path, name: str) -> Any:
    return hf.load_model(str(directory / name), device="cpu", dtype=torch.float32)


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
            "max_sequences": MAX_SEQUENCES,
            "kv_cache_bytes": KV_CACHE_BYTES,
            "gpu_memory_utilization": None,
            "enforce_eager": True,
            "sleeps": False,
        }
        | more
    )


def bytes_built(sampler: Any, allocated: Any) -> dict[str, int]:
    """Of the Allocations of a sampler's building: the parameters that it copied, and what is neither these nor the KV
    cache nor the embeddings of a step's tokens."""
    from fastgrpo.sampler.vllm.engine import MAX_BATCHED_TOKENS
    from fastgrpo.sampler.vllm.layout import parameters

    held = parameters(sampler.engine.adoption.model)
    copied = sum(owned.parameter.nbytes for owned in held if owned.name in sampler.copied)
    embeddings = MAX_BATCHED_TOKENS * sampler.settings.config.hidden_size * 4
    return {"copied_bytes": copied, "engine_bytes": allocated.live_bytes() - KV_CACHE_BYTES - embeddings - copied}


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


def short_run(
    learner: Any,
    sampler: Any,
    exchange: Any,
    *,
    num_steps: int,
    params: SamplingParams = SAMPLING,
    watch: AbstractContextManager[Any] | None = None,
):
    """Sample, compare, update, share, some times over; the largest difference of each step's logprobs.

    Every rank samples all prompts, so that all of them learn the same. watch: what to share and to update in.
    """
    watch, differences = watch or nullcontext(), []
    for step in range(num_steps):
        with watch:
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
            with watch:
                learner.update(batches if learner.ranks.data_rank == 0 else others, OBJECTIVE)
    return differences
