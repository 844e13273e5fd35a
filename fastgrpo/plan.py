"""What a run will hold in one device's memory, from the configuration alone: nothing is loaded.

Parameters are counted exactly; what follows from them (gradients, optimizer) is exact too. Activations are the tensors
that autograd saves in a decoder layer, counted term by term in `activation_bytes_per_token` and checked against the
real thing by tests/test_plan.py.

Letters: H hidden, F feed-forward size, A / C query / key heads, D head size, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastgrpo.config import Config, UserError
from fastgrpo.models import lora
from fastgrpo.models.storage import FUSED, VOCAB_MULTIPLE

RESERVED_SHARE = 0.08
"""Of a GPU, for CUDA's context, the allocator's fragments and captured graphs."""
KV_BLOCK = 128
"""Tokens; no block of a sampler's cache is larger."""
LOSS_HEAD_SHARE = 1 / 128
"""kernels/chunks.py gives a tile of logits this share of a GPU."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's dimensions. Example, Qwen3-0.6B: Shape(num_layers=28, hidden_size=1024, ffn_size=3072, num_heads=16,
    num_kv_heads=8, head_size=128, vocab_size=151936, tied=True, qkv_bias=False, qk_norm=True)"""

    num_layers: int
    hidden_size: int
    ffn_size: int
    """Of one expert where there are any."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    num_experts: int = 0
    experts_per_token: int = 1

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration."""
        num_experts = getattr(config, "num_experts", None) or 0
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_size=config.moe_intermediate_size if num_experts else config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type.startswith("qwen3"),
            num_experts=num_experts,
            experts_per_token=config.num_experts_per_tok if num_experts else 1,
        )

    def num_layer_parameters(self, tp: int = 1, ep: int = 1) -> int:
        """One layer's parameters on one rank."""
        heads, width = self.num_heads + 2 * max(self.num_kv_heads, tp), self.head_size
        qkv, out = heads * width * (self.hidden_size + self.qkv_bias), self.num_heads * width * self.hidden_size
        attention = (qkv + out) // tp
        norms = 2 * self.hidden_size + 2 * width * self.qk_norm
        ffn = 3 * self.hidden_size * self.ffn_size // tp
        if self.num_experts:
            ffn = ffn * self.num_experts // ep + self.hidden_size * self.num_experts
        return attention + norms + ffn

    def num_vocabulary_parameters(self, tp: int = 1) -> int:
        """The embedding's, or the head's, on one rank."""
        rows = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if tp > 1 else self.vocab_size
        return rows * self.hidden_size // tp

    def num_parameters(self, tp: int = 1, pp: int = 1, ep: int = 1) -> int:
        """The parameters of the rank that holds most."""
        layers = -(-self.num_layers // pp) * self.num_layer_parameters(tp, ep)
        vocabulary = self.num_vocabulary_parameters(tp)
        if pp > 1:  # the last stage: its layers, the final norm and the head
            return layers + vocabulary + self.hidden_size
        return layers + vocabulary * (1 if self.tied else 2) + self.hidden_size

    def activation_bytes_per_token(
        self, size: int, tp: int = 1, *, sp: bool = False, megatron: bool = False, selective: bool = False
    ) -> int:
        """What autograd keeps of one token in one layer; `size` is the bytes of an element.

        A norm keeps its input and the float32 factor of each row; a product its input; attention q, k, v, its output
        and a float32 a head; silu(gate) * up its two inputs. Megatron's norms keep a float32 copy of their input too,
        and its SwiGLU, like that of experts, silu(gate). arXiv 2205.05198 counts GPT's layers the same way.

        selective: feed-forwards are computed again, so that all that is kept of them is their input.
        """
        heads = self.num_heads + 2 * self.num_kv_heads
        wide = 4 if megatron else 0
        norms = 2 * ((wide + size) * self.hidden_size + 4) // (tp if sp else 1)
        inputs = 2 * size * self.hidden_size // (tp if sp else 1)
        attention = ((heads + self.num_heads) * self.head_size * size + 4 * self.num_heads) // tp
        qk_norms = ((wide + size) * heads * self.head_size + 4 * heads) * self.qk_norm // tp
        factors = 4 if megatron or self.num_experts else 3
        ffn = 0 if selective else factors * self.ffn_size * self.experts_per_token * size // tp
        return norms + inputs + attention + qk_norms + ffn

    def kv_bytes_per_token(self, size: int, tp: int = 1) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // tp) * self.head_size * size

    def kv_cache_bytes(self, num_sequences: int, length: int, size: int, tp: int = 1) -> int:
        """Room for so many sequences of `length` tokens at once, in whole blocks."""
        return num_sequences * -(-length // KV_BLOCK) * KV_BLOCK * self.kv_bytes_per_token(size, tp)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on one device, by what they are for. Example: Plan(device_bytes=141 << 30, weights=1 << 30, ...)"""

    device_bytes: int
    on_gpu: bool
    weights: int
    reference: int
    sampler_weights: int
    """What the sampler cannot share with the learner: 0 where their layouts match."""
    gradients: int
    optimizer: int
    activations: int
    loss_head: int
    offload_asked: str = "auto"
    """learner.offload."""
    kv_cache_wanted: int
    """Of every completion of this rank that can be in flight at once, at its full length."""

    @property
    def reserved(self) -> int:
        return int(self.device_bytes * RESERVED_SHARE) if self.on_gpu else 0

    @property
    def train(self) -> int:
        """Held while learning, with the KV cache asleep."""
        held = self.weights + self.reference + self.sampler_weights + self.gradients + self.optimizer
        return held + self.activations + self.loss_head + self.reserved

    @property
    def offload(self) -> bool:
        """Whether the optimizer's state and the gradients leave while sampling: as asked, else where the KV cache would
        not fit beside them."""
        if self.offload_asked != "auto":
            return self.offload_asked == "always"
        stays = self.weights + self.reference + self.sampler_weights + self.reserved
        return self.on_gpu and stays + self.gradients + self.optimizer + self.kv_cache_wanted > self.device_bytes

    @property
    def kv_cache(self) -> int:
        """What the KV cache gets: what it wants, or what is left."""
        held = self.weights + self.reference + self.sampler_weights + self.reserved
        held += 0 if self.offload else self.gradients + self.optimizer
        return max(0, min(self.kv_cache_wanted, self.device_bytes - held))

    @property
    def rollout(self) -> int:
        """Held while sampling."""
        held = self.weights + self.reference + self.sampler_weights + self.reserved + self.kv_cache
        return held + (0 if self.offload else self.gradients + self.optimizer)

    @property
    def fits(self) -> bool:
        return self.train <= self.device_bytes and self.kv_cache > 0


def make_plan(
    config: Config, model_config: Any, *, device_bytes: int, on_gpu: bool, longest_prompt: int, num_ranks: int
) -> Plan:
    """The plan of one rank of num_ranks, the one that holds most; longest_prompt in tokens.

    Raises UserError where model.lora.path holds no adapters.
    """
    shape, learner, sampler = Shape.of(model_config), config.learner, config.sampler
    size = 4 if config.cluster.dtype == "float32" or (config.cluster.dtype == "auto" and not on_gpu) else 2
    num_parameters = shape.num_parameters(learner.tp, learner.pp, learner.ep)
    adapted = config.model.lora.enabled
    trained, size_trained, merged = num_parameters, size, 0
    if adapted:
        rank, targets = lora.rank_and_targets(config.model.lora)
        trained, size_trained = num_adapter_parameters(shape, rank, targets, learner.tp, learner.pp), 4
        merged = _num_merged(shape, targets, learner.tp, learner.pp)
    is_megatron = learner.kind == "megatron"
    per_token = shape.activation_bytes_per_token(
        size,
        learner.tp,
        sp=learner.sp,
        megatron=is_megatron,
        selective=learner.activation_checkpoint == "selective",
    )
    layers = -(-shape.num_layers // learner.pp)
    every_input = layers * shape.hidden_size * size
    kept = every_input + per_token if learner.activation_checkpoint == "full" else layers * per_token
    tokens = -(-learner.max_tokens_per_microbatch // learner.cp) * learner.pp
    stepped = trained // max(1, num_ranks // (learner.tp * learner.pp)) if learner.distributed_optimizer else trained
    ranks_a_sampler = sampler.tp if sampler.kind == "vllm" else learner.ranks_a_copy
    prompts = -(-config.train.prompts_per_step // max(1, num_ranks // ranks_a_sampler))
    in_flight = min(prompts * config.algorithm.group_size, sampler.max_sequences)
    length = longest_prompt + config.max_new_tokens
    return Plan(
        device_bytes=device_bytes,
        on_gpu=on_gpu,
        weights=num_parameters * size + (trained * size_trained if adapted else 0),
        reference=num_parameters * size if config.algorithm.kl_coef > 0 and not adapted else 0,
        sampler_weights=_num_unshared(config, shape, merged) * size,
        gradients=trained * 4,
        optimizer=stepped * (8 + (4 if size_trained < 4 else 0)),
        activations=tokens * kept,
        loss_head=int(device_bytes * LOSS_HEAD_SHARE) if on_gpu else 1 << 26,
        offload_asked=learner.offload,
        kv_cache_wanted=shape.kv_cache_bytes(in_flight, length, size, sampler.tp),
    )


def _num_unshared(config: Config, shape: Shape, merged: int) -> int:
    """Parameters held for a sampler besides the learner's own; merged: those of W + s B A beside W."""
    learner, sampler = config.learner, config.sampler
    if sampler.kind == "torch":
        return 0 if learner.kind == "torch" else merged + shape.num_parameters()
    matching = learner.tp == sampler.tp and learner.pp == 1 and learner.ep == 1
    return merged + (0 if matching else shape.num_parameters(sampler.tp))


def num_adapter_parameters(shape: Shape, rank: int, targets: list[str], tp: int = 1, pp: int = 1) -> int:
    """Those of the adapters on one rank: of a matrix's two sides, the one that is not H is cut over tp."""
    cut = _matrix_sides(shape)
    return -(-shape.num_layers // pp) * rank * sum(shape.hidden_size + cut[n] // tp for n in targets if n in cut)


def _num_merged(shape: Shape, targets: list[str], tp: int, pp: int) -> int:
    """Those of the layers' products, q/k/v and gate/up together, in which a matrix has adapters, on one rank."""
    products = [names for names in (*FUSED, ("o_proj",), ("down_proj",)) if not set(names).isdisjoint(targets)]
    cut = _matrix_sides(shape)
    rows = sum(cut[name] for names in products for name in names)
    return -(-shape.num_layers // pp) * rows * shape.hidden_size // tp


def _matrix_sides(shape: Shape) -> dict[str, int]:
    """Of each matrix the side that is not H."""
    heads, kv_heads = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    attention = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "o_proj": heads}
    return attention | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.ffn_size)


def device_memory(device: str) -> int:
    """Bytes of a device of this machine: "cpu" is its main memory. Raises UserError where it has no such GPU."""
    if device == "cpu":
        with open("/proc/meminfo", encoding="ascii") as file:
            return int(file.readline().split()[1]) * 1024
    if not torch.cuda.is_available():
        raise UserError(
            f"cluster.device={device}: this machine has no CUDA device; set cluster.memory_gb to plan for one"
        )
    return torch.cuda.get_device_properties(device).total_memory


def device_to_plan_for(config: Config) -> tuple[int, bool]:
    """(bytes, whether it is a GPU's) of the GPU of cluster.memory_gb, which need not be here, else of this machine."""
    name, memory_gb = config.cluster.device, config.cluster.memory_gb
    if name == "auto":
        name = "cuda" if memory_gb is not None or torch.cuda.is_available() else "cpu"
    return device_memory(name) if memory_gb is None else int(memory_gb * 1e9), name != "cpu"


def table(plan: Plan) -> str:
    """The plan for people."""
    rows: list[tuple[str, int, bool, bool]] = [
        ("weights", plan.weights, True, True),
        ("reference", plan.reference, True, True),
        ("sampler's own", plan.sampler_weights, True, True),
        ("gradients", plan.gradients, True, not plan.offload),
        ("optimizer", plan.optimizer, True, not plan.offload),
        ("activations", plan.activations, True, False),
        ("loss head", plan.loss_head, True, False),
        ("KV cache", plan.kv_cache, False, True),
        ("reserved", plan.reserved, True, True),
    ]
    lines = [f"{'one device':<14}{'TRAIN':>12}{'ROLLOUT':>12}"]
    lines += [
        f"{name:<14}{_shown(size) if train else '':>12}{_shown(size) if rollout else '':>12}"
        for name, size, train, rollout in rows
    ]
    lines.append(f"{'in all':<14}{_shown(plan.train):>12}{_shown(plan.rollout):>12}   of {_shown(plan.device_bytes)}")
    return "\n".join([*lines, "", *advice(plan)])


def _shown(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def advice(plan: Plan) -> list[str]:
    """What the numbers mean, and what to change where they do not fit."""
    lines = []
    if plan.train > plan.device_bytes:
        biggest = max(("activations", "optimizer", "weights"), key=lambda name: getattr(plan, name))
        mend = {
            "activations": "lower learner.max_tokens_per_microbatch, or set learner.activation_checkpoint=full",
            "optimizer": "raise learner.tp or learner.pp, or train adapters (model.lora.rank)",
            "weights": "raise learner.tp or learner.pp, or use algorithm.kl_coef=0, which needs no reference",
        }[biggest]
        lines.append(f"does not fit: training needs {_shown(plan.train - plan.device_bytes)} more; {mend}")
    if plan.kv_cache < plan.kv_cache_wanted:
        share = plan.kv_cache / plan.kv_cache_wanted
        lines.append(
            f"the KV cache holds {share:.0%} of the {_shown(plan.kv_cache_wanted)} that all completions would take at "
            "their full length; the rest wait their turn"
        )
    if plan.offload:
        lines.append("gradients and optimizer state move to the host while sampling")
    return lines or ["fits, with nothing to move"]
