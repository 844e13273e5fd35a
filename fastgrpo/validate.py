"""Impossible configurations, refused before anything loads: one line with the key, the value and the mend."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from fastgrpo.combinations import check_combinations, refuse
from fastgrpo.config import Config
from fastgrpo.data_files import find_files, names_in
from fastgrpo.functions.inline import is_path
from fastgrpo.help import all_keys
from fastgrpo.trackers import check_trackers


def validate(config: Config, num_ranks: int | None = None) -> list[str]:
    """Raise UserError for what cannot run; return warnings for what can but should make one think.

    num_ranks: processes of the job; None: as many as torchrun has started.
    """
    num_ranks = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    _choices(config)
    _ranges(config)
    check_combinations(config, num_ranks)
    _profile(config, num_ranks)
    _places(config)
    return _warnings(config)


def _one_of(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        refuse(key, value, f"choose one of {', '.join(choices)}")


ADVANTAGES = ("std", "mean", "batch_std", "leave_one_out", "process")


def _one_of_or_path(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices and not is_path(value):
        refuse(key, value, f"choose one of {', '.join(choices)}, or name a function of your own: FILE.py:FUNCTION")


def _choices(config: Config) -> None:
    algorithm = config.algorithm
    _one_of_or_path("algorithm.advantage", algorithm.advantage, ADVANTAGES)
    _one_of_or_path("algorithm.surrogate", algorithm.surrogate, ("clip", "cispo", "sapo", "reinforce"))
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
    "eval.top_k": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.export_every": 0,
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
    "eval.top_p",
    "train.max_grad_norm",
    "train.adam_eps",
    "train.time_limit_minutes",
    "algorithm.importance_cap",
    "algorithm.top_entropy_quantile",
    "model.lora.alpha",
    "reward.timeout_s",
    "environment.timeout_s",
    "cluster.memory_gb",
)
_SHARES = (
    "algorithm.top_entropy_quantile",
    "sampling.top_p",
    "eval.top_p",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.min_lr_ratio",
    "algorithm.reference.ema_decay",
    "model.warm_start.target_accuracy",
)


_UNBOUNDED = (
    "train.max_grad_norm",
    "algorithm.clip_ratio_high",
    "algorithm.importance_cap",
    "reward.timeout_s",
    "environment.timeout_s",
)
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


def _profile(config: Config, num_ranks: int) -> None:
    run, num_steps = config.run, config.train.num_steps
    for step in run.profile_steps:
        if not 1 <= step <= num_steps:
            refuse("run.profile_steps", step, f"use steps from 1 to train.num_steps={num_steps}")
    for rank in run.profile_ranks or ():
        if not 0 <= rank < num_ranks:
            refuse("run.profile_ranks", rank, f"use ranks from 0 to {num_ranks - 1}, as many as there are processes")
    if run.profile_steps and run.profile_ranks == []:
        refuse("run.profile_ranks", "[]", "name the ranks that are profiled, or null for all")


def _places(config: Config) -> None:
    """Files that must be there, found out before minutes are spent."""
    if not config.run.dir.strip():  # what a variable that is not set makes of run.dir=$DIR
        refuse("run.dir", config.run.dir, "name a directory")
    for key in ("data.path", "data.eval_path"):
        path = _get(config, key)
        if path is not None:
            (find_files if config.data.source in ("jsonl", "parquet") else names_in)(path, key)
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
