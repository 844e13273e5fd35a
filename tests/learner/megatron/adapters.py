"""Adapters in the processes of a layout, and the torch learner's as their oracle: for job.py and test_lora.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from observe import addresses, by_token, empty_directory, gradients, save, share_of, slices_cover_once, slices_differ
from scenario import NUM_STEPS, OBJECTIVE, Case, batches_of, model_of, train_config, with_logprobs

from fastgrpo.config import LoraConfig, UserError
from fastgrpo.learner.megatron import parallel
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.hf import prepare
from fastgrpo.models.lora import Adapters, add_adapters, add_to_skeleton

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj", "o_proj")
ATTENTION = ALL[:4]
TARGETS = {"qwen3": ALL, "qwen2-tied": SOME, "qwen3_moe": ATTENTION}
"""Which matrices of each model have adapters."""
ADAPTED = (
    Case(processes=4, layout=Layout(tp=2, pp=2), model="qwen2-tied"),
    Case(processes=4, layout=Layout(tp=2, sp=True), overlap_grad_reduce=True),
    Case(processes=4, layout=Layout(tp=2, pp=2, vpp=2, sp=True), activation_checkpoint="full"),
    Case(processes=4, layout=Layout(pp=2, cp=2), model="qwen2-tied", activation_checkpoint="selective"),
    Case(processes=4, layout=Layout(tp=4), distributed_optimizer=False),
    Case(processes=4, layout=Layout(tp=2, sp=True, ep=2), model="qwen3_moe"),
)
"""All of one model go on from the state of its first."""


def with_adapters(model: str, rank: int = 3) -> tuple[torch.nn.Module, Adapters]:
    """The model with adapters whose B is not zero, so that A has a gradient."""
    policy = prepare(model_of(model))
    adapters = add_adapters(policy, LoraConfig(rank=rank, alpha=6, target_modules=list(TARGETS[model])), seed=7)
    for name, tensor in adapters.named():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return policy, adapters


def save_adapters(directory: Path, models: Iterable[str] = TARGETS, rank: int = 3) -> None:
    for model in models:
        with_adapters(model, rank)[1].save_pretrained(directory / f"adapters-{model}")


def torch_result(model: str) -> dict[str, Any]:
    """The keys of `run` that have an oracle."""
    policy, adapters = with_adapters(model)
    adapters.keep_merged()
    learner = TorchLearner(policy, train_config(model), num_updates=NUM_STEPS + 1, adapters=adapters)
    batches = with_logprobs(batches_of(True), learner)
    result: dict[str, Any] = {
        "start": {name: tensor.clone() for name, tensor in learner.named_adapters()},
        "logprobs": by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches]),
    }
    found: dict[str, torch.Tensor] = {}
    handles = [
        param.register_post_accumulate_grad_hook(
            lambda p, name=name: found.update({name.replace(".default.", "."): p.grad.clone()})
        )
        for name, param in policy.named_parameters()
        if param.requires_grad
    ]
    result["steps"] = [vars(learner.update(batches, OBJECTIVE))]
    for handle in handles:
        handle.remove()
    result["gradients"] = found
    result["steps"] += [vars(learner.update(batches, OBJECTIVE)) for _ in range(NUM_STEPS - 1)]
    result["adapters"] = {name: tensor.clone() for name, tensor in learner.named_adapters()}
    result["weights"] = {s.name: s.tensor.clone() for s in learner.weight_slices()}
    result["reference"] = by_token(batches, [learner.logprobs(b, temperature=1.0, reference=True) for b in batches])
    return result


def make(case: Case, directory: Path, dtype: torch.dtype = torch.float32) -> tuple[MegatronLearner, Adapters]:
    """The learner, and what is left of its adapters to write a directory with."""
    config = LoraConfig(path=str(directory / f"adapters-{case.model}"))
    adapters = add_to_skeleton(str(directory / case.model), config, dtype=dtype, seed=0)
    learner = MegatronLearner.from_pretrained(
        str(directory / case.model),
        case.layout,
        train_config(case.model),
        num_updates=NUM_STEPS + 1,
        reference=True,
        adapters=adapters,
        merge_adapters=True,
        dtype=dtype,
        activation_checkpoint=case.activation_checkpoint,
        overlap_grad_reduce=case.overlap_grad_reduce,
        distributed_optimizer=case.distributed_optimizer,
    )
    adapters.drop()
    return learner, adapters


def run(case: Case, directory: Path, number: int) -> dict[str, Any]:
    """Everything that the tests compare, and a state for the next layout of the model."""
    learner, adapters = make(case, directory)
    held = learner.weight_slices()
    result: dict[str, Any] = {"slices": slices_cover_once(learner, held)}
    batches = with_logprobs(batches_of(True), learner)
    result["start"] = {name: tensor.clone() for name, tensor in learner.named_adapters()}
    result["logprobs"] = by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches])
    mine = share_of(batches, learner)
    result["gradients"] = gradients(learner, mine)
    result["steps"] = [vars(learner.update(mine, OBJECTIVE)) for _ in range(NUM_STEPS - 1)]
    saved = empty_directory(directory / f"lora-{case.model}-{number}")
    save(learner, saved)
    result["saved"] = sorted({key.split(".")[-2] for key in dist_checkpointing.load_tensors_metadata(str(saved))})
    result["steps"].append(vars(learner.update(mine, OBJECTIVE)))
    result["adapters"] = {name: tensor.clone() for name, tensor in learner.named_adapters()}
    result["weights"] = {name: tensor.clone() for name, tensor in learner.named_weights()}
    result["slices"] += slices_differ(held, result["weights"].__getitem__)
    result["moved"] = addresses(held) != addresses(learner.weight_slices())
    result["reference"] = by_token(batches, [learner.logprobs(b, temperature=1.0, reference=True) for b in batches])
    result["trained"] = sum(h.stop - h.start for h in learner.optimizer.held())
    result["exported"] = str(directory / f"exported-{number}")
    if dist.get_rank() == 0:
        adapters.save_pretrained(result["exported"], result["adapters"])
    learner.load(min(directory.glob(f"lora-{case.model}-*")))
    step = learner.update(mine, OBJECTIVE)
    result["resumed"] = {"step": vars(step), "weights": {n: t.clone() for n, t in learner.named_weights()}}
    parallel.destroy()
    return result


def run_all(directory: Path) -> list[dict[str, Any]]:
    if dist.get_rank() == 0:
        save_adapters(directory)
    dist.barrier()
    return [run(case, directory, number) for number, case in enumerate(ADAPTED)]


def run_alone(directory: Path) -> dict[str, Any]:
    """Adapters of a bfloat16 model, and a state of theirs that adapters of another rank are to go on from."""
    case = Case(processes=1, layout=Layout(), model="qwen2-tied")
    save_adapters(directory, ("qwen2-tied",))
    learner, _ = make(case, directory, torch.bfloat16)
    batches = with_logprobs(batches_of(True), learner)
    steps = [vars(learner.update(batches, OBJECTIVE)) for _ in range(NUM_STEPS)]
    result: dict[str, Any] = {
        "steps": steps,
        "dtypes": [
            {tensor.dtype for _, tensor in named()} for named in (learner.named_adapters, learner.named_weights)
        ],
        "state": {name: tensor.dtype for held in learner.optimizer.held() for name, tensor in held.tensors.items()},
    }
    saved = empty_directory(directory / "lora-of-rank-3")
    save(learner, saved)
    save_adapters(directory, ("qwen2-tied",), rank=2)
    parallel.destroy()
    learner, _ = make(case, directory, torch.bfloat16)
    try:
        learner.load(saved)
    except UserError as error:
        result["other rank"] = str(error).replace(str(saved), "DIRECTORY")
    parallel.destroy()
    return result
