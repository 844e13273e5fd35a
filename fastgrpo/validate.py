"""Impossible configurations, refused before anything loads: one line with the key, the value and the mend."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, UserError
from fastgrpo.help import all_keys
from fastgrpo.trackers import check_trackers


def validate(config: Config, num_ranks: int | None = None) -> list[str]:
    """Raise UserError for what cannot run; return warnings for what can but should make one think.

    num_ranks: processes of the job; None: as many as torchrun has started.
    """
    num_ranks = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    _choices(config)
    _ranges(config)
    _combinations(config, num_ranks)
    _places(config)
    return _warnings(config)


def refuse(key: str, value: Any, mend: str) -> None:
    raise UserError(f"{key}={_shown(value)}: {mend}")


def _shown(value: Any) -> Any:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _one_of(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        refuse(key, value, f"choose one of {', '.join(choices)}")


def _choices(config: Config) -> None:
    algorithm = config.algorithm
    _one_of("algorithm.advantage", algorithm.advantage, ("std", "mean", "leave_one_out", "process"))
    _one_of("algorithm.aggregation", algorithm.aggregation, ("sequence_mean", "token_mean", "constant"))
    _one_of("algorithm.importance_level", algorithm.importance_level, ("none", "token", "sequence"))
    _one_of("algorithm.importance_mode", algorithm.importance_mode, ("truncate", "mask"))
    _one_of("algorithm.reference.schedule", algorithm.reference.schedule, ("fixed", "refresh", "ema"))
    _one_of("environment.on_error", config.environment.on_error, ("fail", "tell"))
    _one_of("train.lr_schedule", config.train.lr_schedule, ("constant", "linear", "cosine"))
    _one_of("learner.kind", config.learner.kind, ("torch", "megatron"))
    _one_of("learner.activation_checkpoint", config.learner.activation_checkpoint, ("none", "selective", "full"))
    _one_of("learner.offload", config.learner.offload, ("auto", "always", "never"))
    _one_of("sampler.kind", config.sampler.kind, ("torch", "vllm"))
    _one_of("sampler.proof", config.sampler.proof, ("sampled", "full"))
    _one_of("cluster.dtype", config.cluster.dtype, ("auto", "float32", "bfloat16"))
    _one_of("cluster.attention", config.cluster.attention, ("auto", "torch", "flash_attn", "flash_attn_3"))
    _one_of("run.console", config.run.console, ("auto", "live", "plain", "none"))
    check_trackers(config.run.trackers)
    if config.cluster.device not in ("auto", "cpu", "cuda") and not config.cluster.device.startswith("cuda:"):
        refuse("cluster.device", config.cluster.device, "choose auto, cpu, cuda or cuda:N")


_AT_LEAST: dict[str, float] = {
    "algorithm.group_size": 1,
    "algorithm.std_ddof": 0,
    "algorithm.min_std": 0,
    "algorithm.importance_floor": 0,
    "algorithm.overlong_buffer": 0,
    "algorithm.overlong_penalty": 0,
    "algorithm.max_resamples": 1,
    "algorithm.reference.refresh_every": 1,
    "sampling.temperature": 0,
    "sampling.top_k": 0,
    "sampling.max_new_tokens": 1,
    "sampling.min_new_tokens": 0,
    "train.num_steps": 0,
    "train.prompts_per_step": 1,
    "train.updates_per_rollout": 1,
    "train.num_minibatches": 1,
    "train.learning_rate": 0,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.moe_aux_loss_coef": 0,
    "train.max_nonfinite_updates": 1,
    "learner.max_tokens_per_microbatch": 1,
    "environment.max_turns": 1,
    "environment.num_workers": 0,
    "sampler.max_sequences": 1,
    "sampler.oversample": 0,
    "sampler.round_tokens": 1,
    "sampler.tp": 1,
    "sampler.max_restarts": 0,
    "sampler.bucket_mb": 1,
    "data.eval_size": 0,
    "eval.every": 0,
    "eval.num_samples": 1,
    "eval.temperature": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "model.lora.rank": 0,
    "model.hidden_size": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.intermediate_size": 1,
    "model.warm_start.batch_size": 1,
    "model.warm_start.max_steps": 1,
    "model.warm_start.learning_rate": 0,
    "data.max_prompt_tokens": 1,
    "sampler.canary_tolerance": 0,
    "cluster.num_threads": 1,
    "cluster.num_ranks": 1,
}
_ABOVE_ZERO = (
    "sampling.top_p",
    "train.max_grad_norm",
    "train.adam_eps",
    "algorithm.importance_cap",
    "model.lora.alpha",
    "reward.timeout_s",
    "environment.timeout_s",
    "cluster.memory_gb",
)
_SHARES = (
    "sampling.top_p",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.min_lr_ratio",
    "algorithm.reference.ema_decay",
    "model.warm_start.target_accuracy",
)


_UNBOUNDED = ("train.max_grad_norm", "algorithm.clip_ratio_high", "algorithm.importance_cap", "reward.timeout_s")
"""Limits, which infinity switches off."""


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _ranges(config: Config) -> None:
    for key in all_keys():
        value = _get(config, key)
        if isinstance(value, float) and not (math.isfinite(value) or (key in _UNBOUNDED and value > 0)):
            refuse(key, value, "use a finite number")
    for key, least in _AT_LEAST.items():
        value = _get(config, key)
        if value is not None and value < least:
            refuse(key, value, f"use a value of at least {least}")
    for key in _ABOVE_ZERO:
        value = _get(config, key)
        if value is not None and value <= 0:
            refuse(key, value, "use a value above 0")
    for key in _SHARES:
        if not 0 <= _get(config, key) <= 1:
            refuse(key, _get(config, key), "use a value between 0 and 1")
    if config.algorithm.std_ddof > 1:
        refuse("algorithm.std_ddof", config.algorithm.std_ddof, "use 1 or 0")
    if not -(2**63) <= config.seed < 2**63:
        refuse("seed", config.seed, "use a number of at most 63 bits")


def _combinations(config: Config, num_ranks: int) -> None:
    learner, train = config.learner, config.train
    if learner.kind == "torch" and learner.activation_checkpoint == "selective":
        refuse("learner.activation_checkpoint", "selective", "learner=torch checkpoints whole layers; use full or none")
    if train.prompts_per_step % train.num_minibatches:
        refuse(
            "train.prompts_per_step",
            train.prompts_per_step,
            f"not divisible by train.num_minibatches={train.num_minibatches}; change one of them",
        )
    _comparison(config)
    _importance(config)
    _lengths(config)
    _evaluation(config)
    _model(config)
    _layout(config, num_ranks)
    _lora(config)
    _sampler(config, num_ranks)
    _router_replay(config)
    if config.model.path == "":
        refuse("model.path", '""', "model=hf needs a Hugging Face directory or hub name; add model.path=...")
    if config.model.path is None and config.data.source != "arithmetic":
        refuse(
            "model.path", None, f"data.source={config.data.source} needs a model; give a Hugging Face directory or name"
        )


def _comparison(config: Config) -> None:
    algorithm = config.algorithm
    if config.sampling.temperature == 0:
        refuse("sampling.temperature", 0, "greedy completions are all equal; use a value above 0 (eval may be greedy)")
    if algorithm.group_size == 1 and algorithm.advantage in ("std", "mean", "leave_one_out"):
        refuse(
            "algorithm.group_size",
            1,
            f"advantage={algorithm.advantage} compares a completion with its siblings; use 2 or more",
        )
    if algorithm.advantage in ("std", "process") and algorithm.std_ddof >= algorithm.group_size:
        refuse("algorithm.std_ddof", algorithm.std_ddof, f"use less than algorithm.group_size={algorithm.group_size}")
    if algorithm.kl_coef == 0 and algorithm.reference.schedule != "fixed":
        refuse(
            "algorithm.reference.schedule",
            algorithm.reference.schedule,
            "algorithm.kl_coef=0 has no reference; set kl_coef, or schedule=fixed",
        )


def _importance(config: Config) -> None:
    algorithm, sampling = config.algorithm, config.sampling
    cuts = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_new_tokens > 0
    if algorithm.importance_level != "none" and cuts:
        refuse(
            "algorithm.importance_level",
            algorithm.importance_level,
            "the sampler's probabilities are renormalised by top_p, top_k or min_new_tokens, so the weights would be "
            "wrong; use sampling.top_p=1, sampling.top_k=0, sampling.min_new_tokens=0, or importance_level=none",
        )
    if algorithm.importance_mode == "mask" and algorithm.importance_level == "none":
        refuse("algorithm.importance_mode", "mask", "it masks by weights; set importance_level=token or sequence")
    if algorithm.importance_floor > 0 and algorithm.importance_mode != "mask":
        refuse("algorithm.importance_floor", algorithm.importance_floor, "it bounds importance_mode=mask; set that too")
    if algorithm.importance_floor > algorithm.importance_cap:
        refuse("algorithm.importance_floor", algorithm.importance_floor, "use at most algorithm.importance_cap")


def _lengths(config: Config) -> None:
    algorithm, sampling = config.algorithm, config.sampling
    if sampling.min_new_tokens > sampling.max_new_tokens:
        refuse("sampling.min_new_tokens", sampling.min_new_tokens, "use at most sampling.max_new_tokens")
    if algorithm.overlong_buffer and algorithm.advantage == "process":
        refuse(
            "algorithm.overlong_buffer",
            algorithm.overlong_buffer,
            "it softens a completion's reward, and advantage=process compares its steps' alone; use 0",
        )
    if algorithm.overlong_buffer > sampling.max_new_tokens:
        refuse("algorithm.overlong_buffer", algorithm.overlong_buffer, "use at most sampling.max_new_tokens")


def _evaluation(config: Config) -> None:
    evaluation = config.eval
    if evaluation.num_prompts is not None and evaluation.num_prompts < 1:
        refuse("eval.num_prompts", evaluation.num_prompts, "use a value of at least 1, null for all, or eval.every=0")
    if evaluation.max_new_tokens is not None and evaluation.max_new_tokens < 1:
        refuse("eval.max_new_tokens", evaluation.max_new_tokens, "use a value of at least 1")
    if evaluation.num_samples > 1 and evaluation.temperature == 0:
        refuse("eval.num_samples", evaluation.num_samples, "greedy samples are all equal; set eval.temperature above 0")


def _model(config: Config) -> None:
    """The shape of the model that is built where none is given."""
    model = config.model
    if model.path is not None:
        return
    if model.num_heads % model.num_kv_heads:
        refuse("model.num_kv_heads", model.num_kv_heads, f"use a divisor of model.num_heads={model.num_heads}")
    head_size = model.hidden_size // model.num_heads
    if head_size < 2 or head_size % 2:
        refuse(
            "model.hidden_size",
            model.hidden_size,
            f"model.num_heads={model.num_heads} gives heads of {head_size}; make that even and at least 2",
        )


def _layout(config: Config, num_ranks: int) -> None:
    """What the torch learner cannot do; whether a layout fits a model is for learner/megatron/layout.py."""
    learner = config.learner
    if learner.kind != "torch":
        if config.cluster.device.startswith("cuda:"):
            refuse("cluster.device", config.cluster.device, "torchrun gives every process a GPU of its own; use cuda")
        return
    for key, plain in (("tp", 1), ("pp", 1), ("vpp", 1), ("sp", False), ("cp", 1), ("ep", 1), ("stage_layers", None)):
        if getattr(learner, key) != plain:
            refuse(f"learner.{key}", getattr(learner, key), "learner=torch is one process; use learner=megatron")
    if num_ranks > 1:
        refuse("learner", "torch", f"it is one process and the job has {num_ranks}; use learner=megatron")


def _lora(config: Config) -> None:
    lora, reference = config.model.lora, config.algorithm.reference
    if not lora.enabled:
        return
    if lora.path is not None and lora.rank:
        refuse("model.lora.rank", lora.rank, "the adapters of model.lora.path have their own; leave one of the two out")
    if lora.path is None and not lora.target_modules:
        refuse("model.lora.target_modules", "[]", "name at least one matrix, such as q_proj")
    if reference.schedule != "fixed":
        refuse(
            "algorithm.reference.schedule",
            reference.schedule,
            "with model.lora the frozen model is the reference and cannot move; use fixed",
        )


def _sampler(config: Config, num_ranks: int) -> None:
    sampler = config.sampler
    if sampler.kind == "torch" and sampler.tp != 1:
        refuse("sampler.tp", sampler.tp, "sampler=torch is one model on one device; use sampler=vllm")
    if sampler.merge_adapters and not (sampler.kind == "vllm" and config.model.lora.enabled):
        refuse("sampler.merge_adapters", "true", "it is for sampler=vllm with adapters (model.lora.rank); use false")
    if num_ranks % sampler.tp:
        refuse(
            "sampler.tp", sampler.tp, f"it does not divide the job's {num_ranks} processes; start others with torchrun"
        )
    device = config.cluster.device
    if sampler.kind == "vllm" and device.startswith("cuda:") and device != "cuda:0":
        refuse("cluster.device", device, "vLLM takes the first GPU it sees; use cuda, and set CUDA_VISIBLE_DEVICES")
    share = sampler.gpu_memory_utilization
    if sampler.oversample > 0:
        _oversampling(config)
    if share is not None and not 0 < share <= 1:
        refuse("sampler.gpu_memory_utilization", share, "use a share above 0 and at most 1, or null")


def _router_replay(config: Config) -> None:
    """What is wrong whatever the model is; samplers.check_router_replay looks at that."""
    sampler = config.sampler
    if not config.learner.router_replay:
        return
    if config.model.path is None:
        refuse("learner.router_replay", True, "the quickstart's model has no experts; set model.path, or use false")
    if sampler.kind == "vllm" and sampler.tp > 1:
        refuse("sampler.tp", sampler.tp, "vLLM tells its experts to one rank only; with learner.router_replay use 1")


def _oversampling(config: Config) -> None:
    sampler, sampling = config.sampler, config.sampling
    if config.algorithm.dynamic_sampling:
        refuse("sampler.oversample", sampler.oversample, "algorithm.dynamic_sampling draws again by itself; use one")
    if sampling.min_new_tokens:
        refuse("sampling.min_new_tokens", sampling.min_new_tokens, "sampler.oversample draws in rounds; use 0")


def _places(config: Config) -> None:
    """Files that must be there, found out before minutes are spent."""
    for key in ("data.path", "data.eval_path"):
        path = _get(config, key)
        if path is not None and config.data.source in ("jsonl", "parquet") and not Path(path).expanduser().is_file():
            refuse(key, path, "no such file; correct the path")
    if config.data.source in ("jsonl", "parquet", "hub") and config.data.path is None:
        refuse("data.path", None, f"data.source={config.data.source} reads it; add data.path=... to the command")


def _warnings(config: Config) -> list[str]:
    algorithm = config.algorithm
    warnings = []
    if algorithm.advantage in ("std", "process") and algorithm.group_size < 4:
        warnings.append(
            f"algorithm.group_size={algorithm.group_size}: the standard deviation of fewer than 4 rewards is noise; "
            "consider algorithm.advantage=mean or a larger group"
        )
    if config.sampler.oversample > 0 and algorithm.importance_level == "none":
        warnings.append(
            f"sampler.oversample={config.sampler.oversample}: tokens of older policies are learned from as if the "
            "newest had drawn them; set algorithm.importance_level=token to weigh them"
        )
    return warnings
