"""AdamW on float32 weights, whatever type the model computes in."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import TrainConfig


def learning_rate(config: TrainConfig, update: int, num_updates: int) -> float:
    """The rate of the given update (0-based): linear warm-up, then constant, linear or cosine to min_lr_ratio."""
    warmup = config.warmup_steps * config.updates_per_step
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, num_updates - warmup))
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    floor = config.min_lr_ratio
    if config.lr_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (floor + (1.0 - floor) * shape[config.lr_schedule])


def move_towards(theirs: list[Tensor], ours: list[Tensor], share: float) -> None:
    """theirs += share * (ours - theirs), in place."""
    torch._foreach_lerp_(theirs, ours, share) if share < 1.0 else torch._foreach_copy_(theirs, ours)


class Optimizer:
    """AdamW with weight decay on matrices only, gradients accumulated and weights kept in float32.

    A float32 (or float64) model is its own master. A narrower one gets float32 masters: a step of 1e-6 would vanish in
    bfloat16's 8 bits. Its gradients move to the masters as soon as they exist, so no second full set is held.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.max_grad_norm = config.max_grad_norm
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.has_masters = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.params)
        self.masters: list[Tensor] = (
            [p.detach().float().clone() for p in self.params] if self.has_masters else self.params
        )
        if self.has_masters:
            for param, master in zip(self.params, self.masters, strict=True):
                param.register_post_accumulate_grad_hook(_into(master))
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )

    def clip_grad_norm(self) -> Tensor:
        """Scale the gradients to max_grad_norm at most; returns the L2 norm before, a scalar tensor."""
        return nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        if self.has_masters:
            torch._foreach_copy_(self.params, self.masters)

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> list[Tensor]:
        """All that outlives an update, but the weights themselves: moments and masters."""
        moments = [t for state in self.adam.state.values() for name, t in state.items() if name != "step"]
        return moments + (self.masters if self.has_masters else [])

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "masters": self.masters if self.has_masters else None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))  # which would keep a mapped file's own memory
        if self.has_masters:
            torch._foreach_copy_(self.masters, state["masters"])


def _into(master: Tensor):
    def accumulate(param: Tensor) -> None:
        assert param.grad is not None
        wide = param.grad.float()
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        param.grad = None

    return accumulate
