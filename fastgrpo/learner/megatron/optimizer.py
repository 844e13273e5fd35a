"""Megatron's optimizers with the schedule, the clipping and the weight decay that the torch learner has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from fastgrpo.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerShard:
    """What this rank's optimizer holds of one parameter: the entries start to stop of the flattened one.

    tensors, each flat and float32: Adam's moments, and the master weights (fp32_param) of a narrower parameter.
    Example: OptimizerShard(weight, 0, 8, {"exp_avg": zeros(8), "exp_avg_sq": zeros(8)}).
    """

    param: nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


class Optimizer:
    """AdamW on float32 weights (masters of bfloat16 ones), gradients in float32, weight decay on matrices only.

    Where the chunks' data parallelism is set up for it, Megatron's distributed optimizer: each data-parallel rank
    holds and steps its own part of the state.
    """

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
            use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
        self._make_state()

    @property
    def is_distributed(self) -> bool:
        """Whether each data-parallel rank holds a part of the state, rather than all of it."""
        return self.chunks[0].ddp_config.use_distributed_optimizer

    def _make_state(self) -> None:
        """The moments, which torch's Adam makes in its first step: memory is known and saving needs no special case."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    moments = {name: torch.zeros_like(main, requires_grad=False) for name in MOMENTS}
                    part.optimizer.state[main].update(moments)
        if self._is_torchs:
            for group in self.optimizer.param_groups:
                group.update(fused=True, foreach=False)  # the other holds a second set of everything while it steps
        self.set_num_steps(0)

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        """Dense weights have one, experts another. A rank without weights of its own has an empty one."""
        return [part for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]

    @property
    def _is_torchs(self) -> bool:
        """torch's AdamW, rather than transformer-engine's or apex's."""
        return all(isinstance(part.optimizer, torch.optim.AdamW) for part in self._parts)

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
        for part in self._parts:
            clip_grad_by_total_norm_fp32(part.get_parameters(), self.config.max_grad_norm, grad_norm)
        self.optimizer.step_with_ready_grads()

    def set_num_steps(self, num_steps: int) -> None:
        """Tell Adam how many steps its moments have seen: torch's counts by tensor, other libraries' by group."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                if not self._is_torchs:
                    group["step"] = num_steps
                    continue
                for main in group["params"]:
                    part.optimizer.state[main]["step"] = torch.tensor(float(num_steps), device=main.device)

    def held(self) -> Iterator[OptimizerShard]:
        """The state of every parameter that this rank holds a part of, as it lies in memory: fill it to load it."""
        for part in self._parts:
            for param, main, start in _mains(part, self.chunks):
                tensors = {name: part.optimizer.state[main][name].view(-1) for name in MOMENTS}
                if main.dtype != param.dtype:
                    tensors["fp32_param"] = main.detach().view(-1)
                yield OptimizerShard(param, start, start + main.numel(), tensors)

    def state(self) -> list[Tensor]:
        """All that outlives an update, but the weights themselves."""
        return [tensor for held in self.held() for tensor in held.tensors.values()]

    def gradient_buffers(self) -> list[Tensor]:
        """The memory of all gradients: nothing in it outlives an update."""
        return [b.grad_data for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _mains(
    part: MegatronOptimizer, chunks: list[DistributedDataParallel]
) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """Each parameter of the part, the tensor that its Adam steps, and where that begins in the flattened parameter."""
    mains = {id(main) for group in part.optimizer.param_groups for main in group["params"]}
    for param in (param for chunk in chunks for param in chunk.parameters()):
        if isinstance(part, DistributedOptimizer):
            if param in part.model_param_group_index_map:
                group, index = part.model_param_group_index_map[param]
                main = part.optimizer.param_groups[group]["params"][index]
                yield param, main, part._get_model_param_range_map(param)["param"].start
        else:
            main = getattr(param, "main_param", param)
            if id(main) in mains:
                yield param, main, 0
