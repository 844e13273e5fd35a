"""What the Megatron tests run: tiny models, ragged batches and layouts, with the torch learner as the oracle.

Shared by the tests and by job.py, which runs in every process of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.types import PackedBatch

# Padded to 512, so a TP2 shard ends in 3 rows that are no token.
VOCAB = 509
NUM_STEPS = 3
OBJECTIVE = Objective(kl_coef=0.05, entropy_coef=0.01, temperature=0.7, kl_estimator="k3")
# Large, so that a wrong share of it shows.
AUX_COEF = 0.5
# eps is far above the rounding noise of a gradient near zero, whose sign Adam would otherwise blow up to a whole step.
TRAIN = TrainConfig(
    learning_rate=1e-3, weight_decay=0.1, adam_eps=1e-4, max_grad_norm=0.5, lr_schedule="linear", warmup_steps=1
)


def train_config(model: str) -> TrainConfig:
    return replace(TRAIN, moe_aux_loss_coef=AUX_COEF) if model.startswith("qwen3_moe") else TRAIN


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout of one model on a number of processes."""

    layout: Layout
    processes: int
    model: str = "qwen3"
    share_prompts: bool = True
    activation_checkpoint: str = "none"
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = True

    @property
    def data_parallel(self) -> int:
        return self.processes // self.layout.num_model_ranks

    @property
    def replays(self) -> bool:
        """Whether the batches bring experts for every row."""
        return self.model.endswith("-told")

    @property
    def name(self) -> str:
        words = [self.model, *str(self.layout).split(), f"dp={self.data_parallel}"]
        words += [] if self.share_prompts else ["unshared"]
        words += [] if self.activation_checkpoint == "none" else [f"recompute={self.activation_checkpoint}"]
        words += ["overlap"] if self.overlap_grad_reduce else []
        words += [] if self.distributed_optimizer else ["replicated optimizer"]
        return " ".join(words)


CASES = (
    Case(processes=1, layout=Layout()),
    Case(processes=1, layout=Layout(), model="llama-yarn"),
    Case(processes=1, layout=Layout(), model="mistral"),
    Case(processes=1, layout=Layout(), model="qwen3_moe-unscaled"),
    Case(processes=2, layout=Layout(tp=2)),
    Case(processes=2, layout=Layout(tp=2), model="qwen2-tied"),
    Case(processes=2, layout=Layout(tp=2), model="llama"),
    Case(processes=2, layout=Layout(tp=2, sp=True)),
    Case(processes=2, layout=Layout(tp=2, sp=True), model="qwen2-tied", activation_checkpoint="selective"),
    Case(processes=2, layout=Layout(pp=2)),
    Case(processes=2, layout=Layout(pp=2), model="qwen2-tied"),
    Case(processes=2, layout=Layout(pp=2, stage_layers=(1, 3)), model="llama", activation_checkpoint="full"),
    Case(processes=2, layout=Layout(pp=2, vpp=2)),
    Case(processes=2, layout=Layout()),
    Case(processes=2, layout=Layout(ep=2), model="qwen3_moe"),
    Case(processes=2, layout=Layout(tp=2, sp=True, ep=2), model="qwen3_moe-told", share_prompts=False),
    Case(processes=2, layout=Layout(pp=2), model="qwen3_moe-told", activation_checkpoint="full"),
    Case(processes=2, layout=Layout(cp=2)),
    Case(processes=4, layout=Layout(tp=2, pp=2)),
    Case(processes=4, layout=Layout(tp=2, pp=2), model="qwen2-tied"),
    Case(processes=4, layout=Layout(tp=2, pp=2, sp=True)),
    Case(processes=4, layout=Layout(tp=2, pp=2), share_prompts=False),
    Case(processes=4, layout=Layout(tp=2, pp=2, vpp=2, sp=True), model="qwen2-tied"),
    Case(processes=4, layout=Layout(tp=2), overlap_grad_reduce=True),
    Case(processes=4, layout=Layout(tp=4)),
    Case(processes=4, layout=Layout(pp=2), model="qwen2-tied", overlap_grad_reduce=True),
    Case(processes=4, layout=Layout(pp=2), distributed_optimizer=False),
    Case(processes=4, layout=Layout(tp=2, sp=True, cp=2), share_prompts=False),
    Case(processes=4, layout=Layout(pp=2, cp=2), model="qwen2-tied", activation_checkpoint="full"),
    Case(processes=4, layout=Layout(cp=2, ep=2), model="qwen3_moe-told"),
    Case(processes=4, layout=Layout(tp=2, sp=True, ep=2), model="qwen3_moe"),
    Case(processes=4, layout=Layout(pp=2, ep=2), model="qwen3_moe-told", activation_checkpoint="selective"),
    Case(processes=4, layout=Layout(tp=2, pp=2, sp=True), model="qwen3_moe-tied"),
)
DENSE = tuple(kind + head for kind in ("qwen2", "qwen3", "llama") for head in ("", "-tied"))
EXPERTS = ("qwen3_moe", "qwen3_moe-tied")
# The layouts in which every model is looked at, by processes; a mixture of experts wants sp with tp.
EVERY_MODEL = {
    2: {
        **dict.fromkeys((Layout(tp=2), Layout(pp=2, vpp=2)), DENSE),
        **dict.fromkeys((Layout(tp=2, sp=True), Layout(pp=2), Layout()), DENSE + EXPERTS),
        Layout(ep=2): EXPERTS,
    },
    4: {
        **dict.fromkeys((Layout(tp=2, pp=2), Layout(tp=2)), DENSE),
        Layout(tp=2, sp=True, ep=2): EXPERTS,
    },
}
# Each loads what the one before has saved; the last is the first again.
RESHARDED_MODEL = "qwen2-tied"
RESHARDED = (
    Case(processes=4, layout=Layout(tp=2, pp=2), model=RESHARDED_MODEL),
    Case(processes=4, layout=Layout(tp=4), model=RESHARDED_MODEL, distributed_optimizer=False),
    Case(processes=4, layout=Layout(pp=4), model=RESHARDED_MODEL),
    Case(processes=4, layout=Layout(cp=2), model=RESHARDED_MODEL),
    Case(processes=4, layout=Layout(tp=2), model=RESHARDED_MODEL, distributed_optimizer=False),
    Case(processes=4, layout=Layout(tp=2, pp=2), model=RESHARDED_MODEL),
)
RESHARDED_EXPERTS = (
    Case(processes=4, layout=Layout(tp=2, sp=True, ep=2), model="qwen3_moe"),
    Case(processes=4, layout=Layout(tp=2, pp=2, sp=True), model="qwen3_moe"),
    Case(processes=4, layout=Layout(ep=4), model="qwen3_moe", distributed_optimizer=False),
    Case(processes=4, layout=Layout(tp=2, sp=True, ep=2), model="qwen3_moe"),
)


def model_of(name: str) -> nn.Module:
    """A float32 model with 4 layers (2 where they have 8 experts, 2 a token), 4 query and 2 key/value heads, and logits
    that are far from flat."""
    kind, _, variant = name.partition("-")
    shape: dict = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": variant == "tied",
    }
    if kind == "qwen3":
        shape["head_dim"] = 32
    if kind == "mistral":
        shape |= {"head_dim": 8, "sliding_window": None}
    if kind == "qwen3_moe":
        shape |= {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        shape["num_hidden_layers"] = 2
        shape["norm_topk_prob"] = variant != "unscaled"
    if variant == "yarn":
        shape["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    config_type, model_type = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[kind]
    torch.manual_seed(0)
    model = model_type(config_type(**shape)).float()
    with torch.no_grad():
        for parameter_name, param in model.named_parameters():
            if parameter_name.endswith("bias"):
                param.normal_(0.0, 0.1)
            elif "norm" in parameter_name:
                param.add_(0.1 * torch.randn_like(param))
            else:
                param.mul_(4.0)
    return model


def batches_of(share_prompts: bool, *, experts: bool = False) -> list[PackedBatch]:
    """Five ragged micro-batches of one update: 4 groups of 3, one split; prompts of 2 to 9, completions of 1 to 12.

    experts: for every row 2 of 8 in each of 2 layers, which no router would choose.
    """
    generator = torch.Generator().manual_seed(1)
    choices = torch.Generator().manual_seed(2)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def routed(num_rows: int) -> torch.Tensor | None:
        return torch.rand(num_rows, 2, 8, generator=choices).topk(2).indices.byte() if experts else None

    sequences = []
    for group in range(4):
        prompt = torch.randint(0, VOCAB, (integer(2, 9),), generator=generator)
        prompt_experts = routed(len(prompt))
        for _ in range(3):
            length = integer(1, 12)
            weights = torch.rand(length, generator=generator) / 15
            weights[integer(0, length - 1)] = 0.0 if length > 2 else 0.05  # a token without loss inside a completion
            sequences.append(
                Sequence(
                    sequence_id=len(sequences),
                    group_id=group,
                    prompt_ids=prompt,
                    token_ids=torch.randint(0, VOCAB, (length,), generator=generator),
                    advantages=torch.randn(1, generator=generator).expand(length),
                    token_weights=weights,
                    sampler_logprobs=-5 * torch.rand(length, generator=generator),
                    prompt_routed_experts=prompt_experts,
                    routed_experts=routed(length - 1),
                )
            )
    return pack(sequences, max_tokens=28, share_prompts=share_prompts)


def with_logprobs(batches: list[PackedBatch], learner) -> list[PackedBatch]:
    """Off-policy batches: old logprobs near the learner's own, on both sides of the clip; the reference's exact."""
    result = []
    of_both = [
        learner.logprobs_of(batches, temperature=OBJECTIVE.temperature, reference=each) for each in (False, True)
    ]
    for batch, current, reference in zip(batches, *of_both, strict=True):
        # A function of the token, so that every packing of the update moves it alike.
        shift = 0.35 * torch.sin(batch.targets.float() + 10 * batch.advantages)
        result.append(replace(batch, old_logprobs=current + shift, ref_logprobs=reference - 0.1 * shift))
    return result


def save_models(directory: Path, names: set[str]) -> None:
    for name in sorted(names):
        model_of(name).save_pretrained(directory / name)
