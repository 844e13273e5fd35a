"""Megatron's optimizer with the schedule, the clipping and the weight decay that the torch learner has."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from fastgrpo.config import TrainConfig


class Optimizer:
    """AdamW on float32 weights (masters of bfloat16 ones), gradients in float32, weight decay on matrices only."""

    def __init__(self, chunks: list[DistributedDataParallel], config: TrainConfig, dtype: torch.dtype) -> None:
        self.chunks, self.config = chunks, config
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """L2 norm over all parameters of the model; every tensor counts once, however often it is held."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def step(self, rate: float, grad_norm: float) -> None:
        """Clip the gradients that grad_norm has measured, then step."""
        for group in self.optimizer.param_groups:
            # Megatron leaves both to its own scheduler object, which would be a second learning-rate schedule.
            group["lr"] = rate
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        for part in self.optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.max_grad_norm, grad_norm)
        self.optimizer.step_with_ready_grads()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
