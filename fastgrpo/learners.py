"""The learner that a configuration asks for, and whether its layout can be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgrpo.agreement import check_model, check_prompts
from fastgrpo.algorithms.objective import needs_reference
from fastgrpo.config import Config, UserError
from fastgrpo.data import PromptSets
from fastgrpo.learner.protocol import Learner
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models import hf, lora
from fastgrpo.models.decoder import recompute_activations
from fastgrpo.models.hf import REFERENCE_KEY, CausalLM
from fastgrpo.models.lora import Adapters
from fastgrpo.models.shape import Shape
from fastgrpo.policy import device_of, load_model, model_directory
from fastgrpo.ranks import Ranks, started_by_torchrun
from fastgrpo.warm_start import hand_out


def check_layout(config: Config, model_config: Any, num_ranks: int) -> None:
    """Raise UserError, with the nearest possible cuts, where the model cannot be cut like that over the processes."""
    if config.learner.kind == "megatron":
        from fastgrpo.learner.megatron.architecture import Architecture
        from fastgrpo.learner.megatron.layout import data_parallel_size

        layout = _layout(config)
        data_parallel_size(layout, Architecture.of(model_config), num_ranks)
        if config.algorithm.reference.path is not None:
            reference = Architecture.of(hf.load_config(config.algorithm.reference.path, REFERENCE_KEY))
            try:
                data_parallel_size(replace(layout, stage_layers=None), reference, num_ranks)
            except UserError as error:
                raise UserError(f"{REFERENCE_KEY}={config.algorithm.reference.path}: {error}") from None
    _check_sampler_tp(config.sampler.tp, Shape.of(model_config), num_ranks)


def _check_sampler_tp(tp: int, shape: Shape, num_ranks: int) -> None:
    possible = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0 and _can_sample(shape, size)]
    if tp in possible:
        return
    if not _can_sample(shape, tp):
        problem = f"cannot cut the model's {shape.num_heads} attention and {shape.num_kv_heads} key/value heads"
    else:
        problem = f"does not divide the number of processes (torchrun can start a multiple of {tp})"
    processes = f"{num_ranks} process{'es' if num_ranks > 1 else ''}"
    raise UserError(f"sampler.tp={tp}: {problem}; possible with {processes}: {', '.join(map(str, possible))}")


def _can_sample(shape: Shape, tp: int) -> bool:
    """Whether vLLM can cut the model's heads: those of keys and values it cuts or replicates, as Megatron does."""
    return shape.num_heads % tp == 0 and (shape.num_kv_heads % tp == 0 or tp % shape.num_kv_heads == 0)


def _layout(config: Config) -> Any:
    from fastgrpo.learner.megatron.layout import Layout

    learner = config.learner
    stage_layers = None if learner.stage_layers is None else tuple(learner.stage_layers)
    return Layout(
        tp=learner.tp,
        pp=learner.pp,
        vpp=learner.vpp,
        sp=learner.sp,
        cp=learner.cp,
        ep=learner.ep,
        stage_layers=stage_layers,
    )


def make_learner(
    config: Config, tokenizer: Any, prompts: PromptSets, ranks: Ranks, notify: Callable[[str], None]
) -> tuple[Learner, CausalLM, Adapters | None]:
    """The learner, the policy as a Hugging Face model (the learner's own, a copy to sample from, or a skeleton on ranks
    that need neither), and its adapters.

    Raises UserError for what is wrong with the model or the layout.
    """
    make = _torch_learner if config.learner.kind == "torch" else _megatron_learner
    return make(config, tokenizer, prompts, ranks, notify)


def _torch_learner(
    config: Config, tokenizer: Any, prompts: PromptSets, _: Ranks, notify: Callable[[str], None]
) -> tuple[Learner, CausalLM, Adapters | None]:
    model = load_model(config, tokenizer, prompts, notify)
    adapters = lora.add_adapters(model, config.model.lora, seed=config.seed) if config.model.lora.enabled else None
    if adapters is not None and config.sampler.merge_adapters:
        adapters.keep_merged()
    reference, other = None, config.algorithm.reference.path
    if other is not None:
        device, dtype = device_of(config)
        reference = hf.load_model(other, device=device, dtype=dtype, key=REFERENCE_KEY)
    elif needs_reference(config.algorithm) and adapters is None:
        reference = hf.prepare(copy.deepcopy(model))
    if config.learner.activation_checkpoint == "full":
        recompute_activations(model)
    learner = TorchLearner(
        model,
        config.train,
        num_updates=config.train.num_updates,
        reference=reference,
        is_own_reference=other is None,
        adapters=adapters,
    )
    return learner, model, adapters


def _megatron_learner(
    config: Config, tokenizer: Any, prompts: PromptSets, ranks: Ranks, notify: Callable[[str], None]
) -> tuple[Learner, CausalLM, Adapters | None]:
    if not started_by_torchrun():
        raise UserError("learner=megatron: start it with torchrun --nproc-per-node N -m fastgrpo train ...")
    try:
        from fastgrpo.learner.megatron.learner import MegatronLearner
    except ModuleNotFoundError as error:
        raise UserError(f"learner=megatron: {error.name} is not installed; pip install fastgrpo[megatron]") from None
    learner, path = config.learner, model_directory(config)
    check_prompts(config, prompts, ranks)
    if config.model.path is None:
        if ranks.is_main:
            load_model(config, tokenizer, prompts, notify)  # leaves the warm-started model in the cache
        hand_out(Path(path), ranks)
    check_model("model.path" if config.model.path else "model.cache_dir", path, ranks)
    if config.model.lora.path is not None:
        check_model("model.lora.path", config.model.lora.path, ranks)
    if config.algorithm.reference.path is not None:
        check_model(REFERENCE_KEY, config.algorithm.reference.path, ranks)
    device, dtype = device_of(config)
    adapters = None
    if config.model.lora.enabled:
        adapters = lora.add_to_skeleton(path, config.model.lora, dtype=dtype, seed=config.seed)
    megatron = MegatronLearner.from_pretrained(
        path,
        _layout(config),
        config.train,
        num_updates=config.train.num_updates,
        reference=needs_reference(config.algorithm),
        reference_path=config.algorithm.reference.path,
        adapters=adapters,
        merge_adapters=config.sampler.merge_adapters or config.sampler.kind == "torch",
        dtype=dtype,
        activation_checkpoint=learner.activation_checkpoint,
        distributed_optimizer=learner.distributed_optimizer,
        overlap_grad_reduce=learner.overlap_grad_reduce,
    )
    if adapters is not None:
        adapters.drop()  # the learner has its part of them
    if config.sampler.kind == "torch" and megatron.ranks.leads:
        return megatron, hf.load_model(path, device=device, dtype=dtype), adapters
    return megatron, hf.load_skeleton(path, dtype=dtype), adapters
