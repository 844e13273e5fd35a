"""The sampler that a configuration asks for, and the exchange that keeps it on the learner's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgrpo.config import Config, UserError
from fastgrpo.data import PromptSets
from fastgrpo.learner.protocol import Learner
from fastgrpo.models.experts import layers_with_experts
from fastgrpo.models.hf import CausalLM
from fastgrpo.models.lora import Adapters
from fastgrpo.plan import Plan
from fastgrpo.policy import device_of
from fastgrpo.ranks import Ranks
from fastgrpo.sampler.protocol import Sampler
from fastgrpo.sampler.torch_sampler import TorchSampler
from fastgrpo.weights import Exchange

CANARY_TOKENS = 32


def check_router_replay(config: Config, model_config: Any) -> None:
    """Raise UserError where the model has no experts to replay, or the sampler cannot tell which it chose."""
    if not config.learner.router_replay:
        return
    if not layers_with_experts(model_config):
        path = config.model.path
        raise UserError(f"learner.router_replay=true: the model of model.path={path} has no experts; use false")
    if config.sampler.kind == "vllm" and device_of(config)[0] == "cpu":
        raise UserError("learner.router_replay=true: on a CPU vLLM does not tell its experts; use sampler=torch")


def make_sampler(
    config: Config,
    learner: Learner,
    model: CausalLM,
    adapters: Adapters | None,
    prompts: PromptSets,
    plan: Plan,
    notify: Callable[[str], None],
) -> tuple[Sampler | None, Ranks]:
    """The sampler of this rank, None where it does not sample, and where it stands among those of the job.

    Raises UserError where vLLM is not installed or cannot run this model.
    """
    if config.sampler.kind == "torch":
        sampler = TorchSampler(model, max_sequences=config.sampler.max_sequences) if learner.ranks.leads else None
        return sampler, learner.ranks
    try:
        from fastgrpo.sampler.vllm.sampler import VLLMSampler
    except ModuleNotFoundError as error:
        raise UserError(
            f"sampler=vllm: {error.name} is not installed; pip install fastgrpo[vllm], or `make vllm` for a CPU"
        ) from None
    settings = _engine_settings(config, learner, model, adapters, prompts, plan)
    try:
        vllm = VLLMSampler(settings, learner.weight_slices, max_restarts=config.sampler.max_restarts, notify=notify)
    except (ValueError, NotImplementedError) as error:  # what vLLM refuses, in pydantic's wrapping or without
        reason = str(error).rpartition("Value error, ")[2].partition(" [type=")[0].strip().splitlines()[0]
        raise UserError(f"sampler=vllm: it cannot run this model: {reason}; use sampler=torch") from error
    return vllm, vllm.ranks


def make_exchange(
    config: Config, learner: Learner, sampler: Sampler | None, prompts: PromptSets, notify: Callable[[str], None]
) -> Exchange:
    """The exchange between the two; a canary only where they compute with different code."""
    one_model = config.learner.kind == config.sampler.kind == "torch"
    exchange = Exchange(
        learner,
        sampler,
        bucket_bytes=config.sampler.bucket_mb << 20,
        canary=None if one_model else canary(prompts),
        canary_tolerance=config.sampler.canary_tolerance,
        full_proof=config.sampler.proof == "full",
    )
    if config.sampler.kind == "vllm":
        vllm: Any = sampler
        vllm.refill = exchange.restore
        notify(f"weights of vLLM: {', '.join(exchange.plan.lines(learner.ranks.rank))}")
        for line in vllm.why_copied():
            notify(f"  not shared: {line}")
    return exchange


def canary(prompts: PromptSets) -> Tensor:
    """(P,) a few dozen tokens that the data has."""
    longest = max((prompt.token_ids for prompt in prompts.train), key=len)
    return longest.repeat(2)[:CANARY_TOKENS] if len(longest) < 2 else longest[:CANARY_TOKENS]


def _engine_settings(
    config: Config, learner: Learner, model: CausalLM, adapters: Adapters | None, prompts: PromptSets, plan: Plan
) -> Any:
    from fastgrpo.sampler.vllm.engine import EngineSettings

    sampler, shape = config.sampler, model.config
    device = learner.weight_slices()[0].tensor.device
    share = sampler.gpu_memory_utilization
    return EngineSettings(
        config=shape,
        dtype=model.dtype,
        device=device.type,
        tp=sampler.tp,
        max_model_len=prompts.max_tokens + config.max_new_tokens,
        max_sequences=sampler.max_sequences,
        kv_cache_bytes=plan.kv_cache if share is None else None,
        gpu_memory_utilization=share,
        enforce_eager=sampler.enforce_eager,
        sleeps=device.type == "cuda",
        adapters={} if adapters is None or sampler.merge_adapters else adapters.shapes(),
        returns_routed_experts=config.learner.router_replay,
    )
