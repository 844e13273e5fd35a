"""What a run will hold in one device's memory, from the configuration alone: nothing is loaded.

Parameters are counted exactly; what follows from them (gradients, optimizer) is exact too. Activations are the tensors
that autograd saves in a decoder layer, counted one by one in models/activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastgrpo.algorithms.objective import needs_reference
from fastgrpo.config import Config, LearnerConfig, UserError
from fastgrpo.kernels.chunks import GPU_TILE_FRACTION
from fastgrpo.models import hf, lora
from fastgrpo.models.activations import Kept
from fastgrpo.models.experts import choice_dtype
from fastgrpo.models.shape import Shape
from fastgrpo.models.stages import stages_of
from fastgrpo.models.storage import PRODUCTS

RESERVED_SHARE = 0.08
"""Of a GPU, for CUDA's context, the allocator's fragments and captured graphs."""


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
    def always(self) -> int:
        """Held in every phase."""
        return self.weights + self.reference + self.sampler_weights + self.reserved

    @property
    def update_state(self) -> int:
        """What only an update needs, and may leave while sampling."""
        return self.gradients + self.optimizer

    @property
    def train(self) -> int:
        """Held while learning, with the KV cache asleep."""
        return self.always + self.update_state + self.activations + self.loss_head

    @property
    def offload(self) -> bool:
        """Whether the optimizer's state and the gradients leave while sampling: as asked, else where the KV cache would
        not fit beside them."""
        if self.offload_asked != "auto":
            return self.offload_asked == "always"
        return self.on_gpu and self.always + self.update_state + self.kv_cache_wanted > self.device_bytes

    @property
    def kv_cache(self) -> int:
        """What the KV cache gets: what it wants, or what is left."""
        held = self.always + (0 if self.offload else self.update_state)
        return max(0, min(self.kv_cache_wanted, self.device_bytes - held))

    @property
    def rollout(self) -> int:
        """Held while sampling."""
        return self.always + self.kv_cache + (0 if self.offload else self.update_state)

    @property
    def fits(self) -> bool:
        return self.train <= self.device_bytes and self.kv_cache > 0


def make_plan(
    config: Config, model_config: Any, *, device_bytes: int, on_gpu: bool, longest_prompt: int, num_ranks: int
) -> Plan:
    """The plan of one rank of num_ranks, the one that holds most; longest_prompt in tokens.

    Raises UserError where model.lora.path holds no adapters.
    """
    shape, learner = Shape.of(model_config), config.learner
    reference_path = config.algorithm.reference.path
    size = 4 if config.cluster.dtype == "float32" or (config.cluster.dtype == "auto" and not on_gpu) else 2
    layers = max(_stages(shape, learner, learner.stage_layers))
    num_parameters = _num_parameters(shape, learner, learner.stage_layers)
    adapted = config.model.lora.enabled
    num_reference = 0 if adapted else num_parameters
    if reference_path is not None:
        num_reference = _num_parameters(Shape.of(hf.load_config(reference_path, hf.REFERENCE_KEY)), learner, None)
    trained, size_trained, merged = num_parameters, size, 0
    rank, targets = lora.rank_and_targets(config.model.lora) if adapted else (0, [])
    if adapted:
        trained, size_trained = num_adapter_parameters(shape, rank, targets, learner.tp, layers), 4
        # A sampler has them merged, or apart in the weights' type.
        is_merged = config.sampler.merge_adapters or config.sampler.kind == "torch"
        merged = _num_merged(shape, targets, learner.tp, layers) if is_merged else trained
    experts = 0 if adapted else layers * shape.num_expert_parameters(learner.tp, learner.ep)
    kept = _kept(config, shape, size, on_gpu, rank, targets)
    return Plan(
        device_bytes=device_bytes,
        on_gpu=on_gpu,
        weights=num_parameters * size + (trained * size_trained if adapted else 0),
        reference=num_reference * size if needs_reference(config.algorithm) else 0,
        sampler_weights=_num_unshared(config, shape, merged) * size,
        gradients=trained * 4,
        optimizer=_num_stepped(config, trained - experts, experts, num_ranks) * (8 + (4 if size_trained < 4 else 0)),
        activations=_activations(config, kept, layers),
        loss_head=(device_bytes // GPU_TILE_FRACTION if on_gpu else 1 << 26) + _head_gradient(config, shape),
        offload_asked=learner.offload,
        kv_cache_wanted=_kv_cache_wanted(config, shape, longest_prompt, size, num_ranks),
    )


def _stages(shape: Shape, learner: LearnerConfig, asked: list[int] | None) -> list[int]:
    """The layers of each rank of a pipeline."""
    virtual = stages_of(shape, learner.pp * learner.vpp, asked)
    return [sum(virtual[stage :: learner.pp]) for stage in range(learner.pp)]


def _num_parameters(shape: Shape, learner: LearnerConfig, asked: list[int] | None) -> int:
    return shape.num_parameters(learner.tp, _stages(shape, learner, asked), learner.ep)


def _kept(config: Config, shape: Shape, size: int, on_gpu: bool, rank: int, targets: list[str]) -> Kept:
    learner = config.learner
    return Kept(
        shape=shape,
        size=size,
        megatron=learner.kind == "megatron",
        on_gpu=on_gpu,
        tp=learner.tp,
        sp=learner.sp,
        cp=learner.cp,
        ep=learner.ep,
        selective=learner.activation_checkpoint == "selective",
        rank=rank,
        targets=targets,
    )


def _kv_cache_wanted(config: Config, shape: Shape, longest_prompt: int, size: int, num_ranks: int) -> int:
    sampler = config.sampler
    ranks_a_sampler = sampler.tp if sampler.kind == "vllm" else config.learner.ranks_a_copy
    prompts = -(-config.train.prompts_per_step // max(1, num_ranks // ranks_a_sampler))
    in_flight = min(prompts * config.algorithm.group_size, sampler.max_sequences)
    return shape.kv_cache_bytes(in_flight, longest_prompt + config.max_new_tokens, size, sampler.tp)


def _num_stepped(config: Config, others: int, experts: int, num_ranks: int) -> int:
    """Of a rank's trained parameters those whose optimizer's state it holds: its share among the ranks that hold the
    same ones, which are fewer for experts that are dealt out."""
    learner = config.learner
    if not learner.distributed_optimizer:
        return others + experts
    cuts = learner.tp, learner.ep if learner.ep > 1 else learner.tp
    sharers = (max(1, num_ranks // (cut * learner.pp)) for cut in cuts)
    return sum(count // sharing for count, sharing in zip((others, experts), sharers, strict=True))


def _head_gradient(config: Config, shape: Shape) -> int:
    """The head's own sum of its gradient, in float32, where it does not go straight into Megatron's."""
    if config.learner.kind == "megatron" or config.model.lora.enabled:
        return 0
    return 4 * shape.num_vocabulary_parameters()


def _activations(config: Config, kept: Kept, layers: int) -> int:
    """Of the micro-batches that the first stage has begun, on a rank with so many layers."""
    learner, shape = config.learner, kept.shape
    full = learner.activation_checkpoint == "full"
    begun = learner.pp if learner.vpp == 1 else -(-((learner.vpp + 1) * learner.pp - 1) // learner.vpp)
    tokens = -(-learner.max_tokens_per_microbatch // learner.cp)
    every_input = layers * shape.hidden_size * kept.size // (learner.tp if learner.sp else 1)
    of_token = every_input + kept.per_token if full else layers * kept.per_token
    replayed = 0
    if learner.router_replay:  # a micro-batch brings all layers' choices, and keeps them where it is computed again
        choice = choice_dtype(shape.num_experts).itemsize
        replayed = shape.num_layers * shape.experts_per_token * choice * (begun if full else 1)
    return tokens * (begun * of_token + replayed)


def _num_unshared(config: Config, shape: Shape, merged: int) -> int:
    """Parameters held for a sampler besides the learner's own; merged: those of W + s B A beside W, or of A and B."""
    learner, sampler = config.learner, config.sampler
    if sampler.kind == "torch":
        return 0 if learner.kind == "torch" else merged + shape.num_parameters()
    matching = learner.tp == sampler.tp and learner.pp == 1 and learner.ep == 1
    return merged + (0 if matching else shape.num_parameters(sampler.tp))


def num_adapter_parameters(shape: Shape, rank: int, targets: list[str], tp: int, num_layers: int) -> int:
    """Those of the adapters on a rank of num_layers: of a matrix's two sides, the one that is not H is cut over tp."""
    cut = _matrix_sides(shape)
    return num_layers * rank * sum(shape.hidden_size + cut[n] // tp for n in targets if n in cut)


def _num_merged(shape: Shape, targets: list[str], tp: int, num_layers: int) -> int:
    """Those of the layers' products, q/k/v and gate/up together, in which a matrix has adapters, on a rank."""
    products = [names for names in PRODUCTS if not set(names).isdisjoint(targets)]
    cut = _matrix_sides(shape)
    rows = sum(cut[name] for names in products for name in names)
    return num_layers * rows * shape.hidden_size // tp


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
