"""What is right by itself and does not go together, refused before anything loads."""

from __future__ import annotations

from typing import Any

from fastgrpo.config import Config, UserError
from fastgrpo.functions.inline import is_path


def refuse(key: str, value: Any, mend: str) -> None:
    """Raise UserError: the key, its value as the user wrote it, and how to mend it."""
    raise UserError(f"{key}={_shown(value)}: {mend}")


def _shown(value: Any) -> Any:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def check_combinations(config: Config, num_ranks: int) -> None:
    """Raise UserError for values that are each right and do not go together, on a job of num_ranks processes."""
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
    if config.environment.path is not None and config.environment.max_turns == 1:
        refuse("environment.max_turns", 1, "the environment would never be asked; use 2 or more, or environment=none")
    _model(config)
    _layout(config, num_ranks)
    _lora(config)
    _sampler(config)
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
    if algorithm.group_size == 1 and algorithm.advantage != "process" and not is_path(algorithm.advantage):
        refuse(
            "algorithm.group_size",
            1,
            f"advantage={algorithm.advantage} compares a completion with its siblings; use 2 or more",
        )
    if algorithm.advantage in ("std", "process") and algorithm.std_ddof >= algorithm.group_size:
        refuse("algorithm.std_ddof", algorithm.std_ddof, f"use less than algorithm.group_size={algorithm.group_size}")
    for setting, kwargs in ((algorithm.surrogate, "surrogate_kwargs"), (algorithm.advantage, "advantage_kwargs")):
        if getattr(algorithm, kwargs) and not is_path(setting):
            refuse(f"algorithm.{kwargs}", getattr(algorithm, kwargs), f"{setting} takes none; name your own function")
    reference = algorithm.reference
    if reference.path is not None and reference.schedule != "fixed":
        refuse("algorithm.reference.schedule", reference.schedule, "algorithm.reference.path stays as it is; use fixed")
    if algorithm.kl_coef == 0 and not is_path(algorithm.surrogate):
        if reference.schedule != "fixed":
            mend = "algorithm.kl_coef=0 has no reference; set kl_coef, or schedule=fixed"
            refuse("algorithm.reference.schedule", reference.schedule, mend)
        if reference.path is not None:
            refuse("algorithm.reference.path", reference.path, "algorithm.kl_coef=0 has no reference; set kl_coef")


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
    if sampling.min_new_tokens and config.environment.path is not None:
        refuse("sampling.min_new_tokens", sampling.min_new_tokens, "with an environment turns come in rounds; use 0")
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


def _sampler(config: Config) -> None:
    sampler = config.sampler
    if sampler.kind == "torch" and sampler.tp != 1:
        refuse("sampler.tp", sampler.tp, "sampler=torch is one model on one device; use sampler=vllm")
    if sampler.merge_adapters and not (sampler.kind == "vllm" and config.model.lora.enabled):
        refuse("sampler.merge_adapters", "true", "it is for sampler=vllm with adapters (model.lora.rank); use false")
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
