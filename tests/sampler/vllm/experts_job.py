"""One process with vLLM telling its experts: python experts_job.py DIRECTORY. Writes to DIRECTORY/experts.json.

vLLM tells them from its second model runner alone, whose Triton kernels a CPU runs in the interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import torch
from setting import SAMPLING, load, prompts, settings
from triton.backends import backends

from fastgrpo.config import TrainConfig
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.experts import routers_of

DIRECTORY = Path(sys.argv[1])


@torch.no_grad()
def taken(model, tokens: torch.Tensor) -> torch.Tensor:
    """(T, L, k) what a full forward pass of transformers takes."""
    chosen: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda *a: chosen.append(a[2][2])) for r in routers_of(model)]
    model(tokens[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1)


def main() -> None:
    torch.set_num_threads(1)
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # or vLLM goes without Triton
    from fastgrpo.sampler.vllm.sampler import VLLMSampler

    learner = TorchLearner(load(DIRECTORY, "qwen3_moe"), TrainConfig(), num_updates=1)
    config = settings(learner.model.config, returns_routed_experts=True)
    sampler = VLLMSampler(config, learner.weight_slices, max_restarts=0, notify=print)
    asked = replace(SAMPLING, return_routed_experts=True)
    groups = sampler.generate(prompts(5), 3, asked, seed=5)
    unasked = sampler.generate(prompts(1), 1, SAMPLING, seed=5)
    plain, different = load(DIRECTORY, "qwen3_moe"), 0
    for group in groups:
        for rollout in group.rollouts:
            tokens = torch.cat([group.prompt.token_ids, rollout.token_ids])
            told = torch.cat([group.prompt_routed_experts, rollout.routed_experts])
            different += int((told.long().sort(-1).values != taken(plain, tokens)[:-1].sort(-1).values).sum())
    sampler.close()
    result = {
        "different": different,
        "shapes": [list(group.prompt_routed_experts.shape) for group in groups],
        "dtypes": sorted({str(r.routed_experts.dtype) for group in groups for r in group.rollouts}),
        "unasked": unasked[0].prompt_routed_experts is None and unasked[0].rollouts[0].routed_experts is None,
    }
    (DIRECTORY / "experts.json").write_text(json.dumps(result))


main()
