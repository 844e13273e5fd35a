"""Small models and groups that many tests build on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from fastgrpo.types import Prompt, Rollout, RolloutGroup, ScoredGroup

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
ALL_CONFIGS = {**CONFIGS, "mistral": MistralConfig, "qwen3_moe": Qwen3MoeConfig}
VOCABULARY = 61


def make_model(kind: str = "qwen2", *, seed: int = 0, dtype=torch.float32, tied=False):
    """A two-layer model with random weights, grouped-query attention, and biases that are not zero."""
    from transformers import AutoModelForCausalLM

    shape = small_shape(kind, vocab_size=VOCABULARY, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif "embed" not in name:
                parameter.data *= 4  # far from the near-uniform start, so that errors show
    if dtype is torch.float64:
        _widen_norms(model)
    return model.to(dtype)


def small_shape(kind: str, **more):
    """The configuration of a two-layer model with grouped-query attention."""
    fixed = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "bos_token_id": None,
    }
    if kind == "mistral":  # as in Mistral-Nemo, its heads are not hidden / heads wide
        fixed |= {"head_dim": 6, "sliding_window": None}
    if kind == "qwen3_moe":
        fixed |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return ALL_CONFIGS[kind](**fixed | more)


def _widen_norms(model):
    """transformers computes RMSNorm in float32 even for a float64 model, which would hide errors below 1e-7."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def make_groups(shape: list[tuple[int, list[int]]], *, seed: int = 0) -> list[ScoredGroup]:
    """Groups of (prompt length, completion lengths) with random tokens, advantages and sampler logprobs."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int):
        return torch.randint(2, VOCABULARY, (count,), generator=generator)

    groups = []
    for number, (prompt_length, lengths) in enumerate(shape):
        prompt = Prompt(prompt_id=f"train/{number}", token_ids=tokens(prompt_length), text=f"question {number}")
        rollouts = tuple(
            Rollout(
                prompt_id=prompt.prompt_id,
                token_ids=tokens(length),
                loss_mask=torch.ones(length, dtype=torch.bool),
                sampler_logprobs=-torch.rand(length, generator=generator),
                finish_reason="stop",
                policy_version=0,
            )
            for length in lengths
        )
        rewards = torch.rand(len(lengths), generator=generator)
        groups.append(
            ScoredGroup(
                group=RolloutGroup(prompt=prompt, rollouts=rollouts),
                rewards=rewards,
                advantages=torch.randn(len(lengths), generator=generator),
            )
        )
    return groups


RAGGED = [(7, [5, 1, 12]), (3, [4]), (11, [9, 9, 2, 6]), (1, [1, 3])]

REWARDS = Path(__file__).with_name("example_rewards.py")


def byte_tokenizer():
    """One token a byte, made the way of Qwen's: transformers would turn any other kind for a Qwen2 into that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_tiny_model(directory: Path, kind: str = "qwen2", *, max_length: int = 128, **more) -> str:
    """A Hugging Face directory of a two-layer model with random weights and one token a byte; returns its path."""
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    shape = small_shape(
        kind,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def small_run(model: str, *more: str, reward: str = "varied") -> list[str]:
    """Overrides of a run whose steps take a tenth of a second; `reward` is a function of example_rewards.py."""
    return [
        f"model.path={model}",
        "data=arithmetic",
        "data.num_problems=40",
        "data.eval_size=4",
        f"reward.path={REWARDS}:{reward}",
        "reward.num_workers=0",
        "run.dir=run",
        "run.trackers=[]",
        "train.num_steps=2",
        "train.prompts_per_step=4",
        "train.learning_rate=1e-3",
        "algorithm.group_size=4",
        "sampling.max_new_tokens=6",
        "eval.every=2",
        *more,
    ]


def save(learner, directory: Path) -> None:
    """Write a learner's state at once."""
    pending = learner.begin_save(directory)
    for write in pending.files.values():
        write()
    pending.finish()
