"""One vLLM engine in this process: built on adopted weights, driven step by step, closed without a trace.

Building one changes things that belong to the whole process; process_state.py puts them back.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from vllm import EngineArgs, ModelRegistry, RequestOutput, SamplingParams
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample import sampler as vllm_sampler

from fastgrpo.models.shape import Shape
from fastgrpo.sampler.vllm.adopt import LOAD_FORMAT, Adoption, adopting
from fastgrpo.sampler.vllm.low_rank import Shapes
from fastgrpo.sampler.vllm.pools import kept_allocator_settings, pools_outlive_tensors
from fastgrpo.sampler.vllm.process_state import (
    job_name,
    kept_process_group,
    kept_process_state,
    shared_memory_names,
    without_warnings,
)
from fastgrpo.types import WeightSlice

SLACK_STEPS = 64
MAX_BATCHED_TOKENS = 2048
"""Of one step on a CPU, where it need not take more."""
GPU_BATCHED_TOKENS = 8192
"""On a GPU: vLLM's own choice for work without a server, where a step's prompts come all at once."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is built with."""

    config: Any
    """The model's transformers configuration."""
    dtype: torch.dtype
    device: str
    tp: int
    max_model_len: int
    """Longest prompt and completion together."""
    max_sequences: int
    kv_cache_bytes: int | None
    """Of one rank; None: what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float | None
    enforce_eager: bool
    sleeps: bool
    """Whether the KV cache can be given back between rollouts."""
    adapters: Shapes = field(default_factory=dict)
    """Of the policy's matrices, where the engine is to compute them beside these."""
    returns_routed_experts: bool = False
    """Whether requests come back with the experts of every token but the last."""


class EngineError(RuntimeError):
    """The engine cannot be used any more."""


class Engine:
    """An LLMEngine whose parameters are the offered memory wherever that fits; see adopt.py."""

    def __init__(self, settings: EngineSettings, offered: list[WeightSlice]) -> None:
        _check_supported(settings)
        self.adoption = Adoption(offered=offered, adapters=settings.adapters)
        self._group_is_ours = dist.is_initialized()
        self._llm: LLMEngine | None = None
        with tempfile.TemporaryDirectory(prefix="fastgrpo-vllm-") as directory:
            _write_config(settings, Path(directory))
            try:
                _make_cheap_to_start(settings)
                with (
                    kept_process_state(),
                    kept_allocator_settings(),
                    shared_memory_names(),
                    adopting(self.adoption),
                    without_warnings(),
                ):
                    config = _engine_args(settings, directory, offered).create_engine_config()
                    # A part of the key under which compiled code is kept, and the directory is another one every time.
                    config.model_config.model = "fastgrpo"
                    self._llm = LLMEngine.from_vllm_config(config, disable_log_stats=True)
            except BaseException:
                self.close()
                raise

    @property
    def llm(self) -> LLMEngine:
        if self._llm is None:
            raise EngineError("the engine is closed")
        return self._llm

    def run(
        self,
        requests: dict[str, tuple[list[int], SamplingParams]],
        on_end: Callable[[RequestOutput], object] = lambda output: None,
    ) -> dict[str, RequestOutput]:
        """Complete every request (id -> prompt and parameters); on_end is called with each as it ends.

        Raises EngineError where they do not end within the steps that they can need; whatever the engine raises comes
        through as it is. After either the engine must be closed.
        """
        # Every step computes a prompt's chunk or at least one token of some request, twice over where one is preempted.
        patience = SLACK_STEPS + 2 * sum(len(prompt) + (params.max_tokens or 0) for prompt, params in requests.values())
        finished: dict[str, RequestOutput] = {}
        with kept_process_state():
            for name, (prompt, params) in requests.items():
                self.llm.add_request(name, {"prompt_token_ids": prompt}, params)
            while self.llm.has_unfinished_requests():
                if patience <= 0:
                    raise EngineError(f"{len(requests) - len(finished)} of {len(requests)} requests never end")
                patience -= 1
                for output in self.llm.step():
                    if isinstance(output, RequestOutput) and output.finished:
                        finished[output.request_id] = output
                        on_end(output)
        if missing := requests.keys() - finished.keys():
            raise EngineError(f"{len(missing)} of {len(requests)} requests were dropped")
        return finished

    def reset_prefix_cache(self) -> None:
        """Forget keys and values of older weights. Raises EngineError where requests still use them."""
        if not self.llm.reset_prefix_cache():
            raise EngineError("its prefix cache is in use and cannot be reset")

    def sleep(self) -> None:
        """Give the KV cache's memory back (and park what vLLM copied of the weights on the host)."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()

    def close(self) -> None:
        """Free everything; the process group stays where it was not vLLM's own."""
        self.adoption.model = None
        with kept_process_group() if self._group_is_ours else nullcontext(), pools_outlive_tensors():
            if self._llm is None:  # a constructor that failed leaves vLLM's groups behind
                parallel_state.cleanup_dist_env_and_memory()
            else:
                # The LLMEngine first: vLLM 0.26's holds the model, whose layers hold the KV cache.
                core, self._llm = self._llm.engine_core, None
                if core.is_sleeping():
                    with suppress(RuntimeError):  # no room; what is not mapped only complains when it is freed
                        core.wake_up()
                core.shutdown()
                del core
        for file in glob.glob(f"/dev/shm/*{job_name()}-*"):
            Path(file).unlink(missing_ok=True)


def _check_supported(settings: EngineSettings) -> None:
    """Raise ValueError for what would only fail in the first rollout."""
    if settings.returns_routed_experts and not hasattr(EngineArgs, "enable_return_routed_experts"):
        raise ValueError("this version does not tell its experts, as learner.router_replay needs it")
    if settings.device == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size = Shape.of(settings.config).head_size
        known = CPUAttentionBackend.get_supported_head_sizes()
        if size not in known:
            raise ValueError(f"on a CPU its attention has heads of {', '.join(map(str, known))}, but not of {size}")


def _engine_args(settings: EngineSettings, directory: str, offered: list[WeightSlice]) -> EngineArgs:
    on_cpu = settings.device == "cpu"
    optional: dict[str, Any] = {}
    if settings.kv_cache_bytes is not None:
        optional["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    if not on_cpu:
        optional["gpu_memory_utilization"] = _gpu_share(settings, offered)
    elif settings.gpu_memory_utilization is not None:
        optional["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if on_cpu:
        optional |= {
            "block_size": 32,  # a prompt is shared by whole blocks only, and the default is 128 tokens
            "async_scheduling": False,
            # After a prompt's first part vLLM winds its generator back, which a CPU's cannot do: prompts stay whole.
            "enable_chunked_prefill": False,
        }
    elif hasattr(settings.config, "num_experts") and hasattr(EngineArgs, "moe_backend"):
        optional["moe_backend"] = "triton"  # others shuffle the experts into a form of their own
    if not on_cpu and settings.dtype != torch.float32:
        # As the learner's: rounded to bfloat16, logits of 16 and more are up to 0.06 off, in what is drawn from too.
        optional["hf_overrides"] = {"head_dtype": "float32"}
    if settings.returns_routed_experts:
        optional["enable_return_routed_experts"] = True
    if settings.adapters:  # they change the computation, which vLLM may find compiled in its cache
        optional["additional_config"] = {"adapters": sorted([k, *v] for k, v in settings.adapters.items())}
    return EngineArgs(
        model=directory,
        hf_config_path=directory,
        skip_tokenizer_init=True,
        load_format=LOAD_FORMAT,
        dtype="bfloat16" if settings.dtype == torch.bfloat16 else "float32",
        seed=0,  # every request brings its own
        tensor_parallel_size=settings.tp,
        distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_sequences,
        max_num_batched_tokens=max(
            settings.max_sequences,
            *((MAX_BATCHED_TOKENS, settings.max_model_len) if on_cpu else (GPU_BATCHED_TOKENS,)),
        ),
        enforce_eager=settings.enforce_eager or on_cpu,
        enable_prefix_caching=True,
        enable_sleep_mode=settings.sleeps,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",  # nothing is sampled with but what we pass
        disable_log_stats=True,
        **optional,
    )


def _gpu_share(settings: EngineSettings, offered: list[WeightSlice]) -> float:
    """What vLLM wants to be free at its start, of the GPU. From 0.32 on it takes the adopted weights off by itself."""
    weights, total = sum(s.tensor.nbytes for s in offered), _gpu_bytes()
    off = weights / total if hasattr(BaseModelLoader, "get_external_weight_memory") else 0.0
    if settings.gpu_memory_utilization is not None:
        return settings.gpu_memory_utilization - weights / total + off
    assert settings.kv_cache_bytes is not None
    return settings.kv_cache_bytes / total + off


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _make_cheap_to_start(settings: EngineSettings) -> None:
    """Import the model here, where vLLM would start a process to look at it (9 s where its cache is empty), and count
    ranks on a CPU without a compiler (5 s, and it needs one)."""
    for architecture in settings.config.architectures or ():
        known = ModelRegistry.models.get(architecture)
        if known is not None:
            ModelRegistry.register_model(architecture, known.load_model_cls())
    if settings.device == "cpu":
        vllm_sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


def _write_config(settings: EngineSettings, directory: Path) -> None:
    """All that vLLM reads of a model, so that a policy without a directory of its own can be sampled from."""
    config = settings.config
    if not config.architectures:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(directory)
