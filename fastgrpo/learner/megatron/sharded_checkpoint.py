"""A learner's state on disk, written by all ranks at once and readable by every other layout.

Each rank writes its own shards through Megatron's dist_checkpointing, which records where they lie in the whole
tensors; on loading, each rank reads what its own layout needs. The optimizer's moments, and a bfloat16 model's float32
masters, lie and travel as their parameters do.

The directory is a file set beside others: writing it whole or not at all is the caller's business. A script that saves
needs the `if __name__ == "__main__"` guard, because the writer starts a process that imports it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401  (before megatron_on_cpu opens)
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from fastgrpo.config import UserError
from fastgrpo.learner.megatron import convert
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.learner.megatron.weight_map import HEAD, Box, boxes_of, is_replicated

if TYPE_CHECKING:
    from fastgrpo.learner.megatron.learner import MegatronLearner


def save(learner: MegatronLearner, directory: Path) -> None:
    """Write the state into an existing, empty directory that all ranks see. Collective over all ranks."""
    with megatron_on_cpu():
        state = _sharded(learner, with_optimizer=learner.policy_version > 0, loading=False)
        state["policy_version"] = learner.policy_version
        dist_checkpointing.save(state, str(directory))


def load(learner: MegatronLearner, directory: Path) -> None:
    """Go on from a state saved by any layout: bit for bit by the same one. Collective over all ranks.

    Raises UserError where the directory holds no such state, or lacks the reference model that is wanted.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(f"resume={directory}: no state of a Megatron learner there")
    with megatron_on_cpu():
        policy_version = dist_checkpointing.load_common_state_dict(str(directory))["policy_version"]
        state = _sharded(learner, with_optimizer=policy_version > 0, loading=True)
        saved_names = dist_checkpointing.load_tensors_metadata(str(directory))
        if learner.reference is not None and not any(name.startswith("reference.") for name in saved_names):
            raise UserError(f"resume={directory}: saved without a reference model; resume with algorithm.kl_coef=0")
        loaded = dist_checkpointing.load(state, str(directory))
        _fill(learner.policy, loaded["policy"])
        if learner.reference is not None:
            _fill(learner.reference, loaded["reference"])
        if policy_version > 0:
            learner.optimizer.load_state_dict(loaded["optimizer"])
    learner.policy_version = policy_version


def _sharded(learner: MegatronLearner, *, with_optimizer: bool, loading: bool) -> dict[str, Any]:
    """What to write or to read: this rank's tensors with their places in the whole ones.

    An optimizer that has not stepped holds nothing yet.
    """
    policy = _parameters(learner.policy, learner.parallel, "policy.")
    state: dict[str, Any] = {"policy": policy}
    if learner.reference is not None:
        state["reference"] = _parameters(learner.reference, learner.parallel, "reference.")
    if with_optimizer:
        state["optimizer"] = learner.optimizer.optimizer.sharded_state_dict(policy, is_loading=loading)
    return state


def _parameters(chunks: list[HiddenStatesModel], parallel: Parallel, prefix: str) -> dict[str, ShardedTensorFactory]:
    """Every parameter of this rank, stored as boxes of the Hugging Face tensors it holds, which no layout changes."""
    architecture, tp = chunks[0].architecture, parallel.layout.tp
    return {
        name: _factory(
            prefix,
            param,
            boxes_of(name, architecture, tp, parallel.tp_rank),
            # (pipeline, tensor parallel, data parallel): whoever is 0 in all three writes.
            replica_id=(
                int(name == HEAD and architecture.tied),
                parallel.tp_rank if is_replicated(name, architecture, tp) else 0,
                parallel.dp_rank,
            ),
        )
        for name, param in convert.parameters(chunks)
    }


def _factory(
    prefix: str, param: nn.Parameter, boxes: list[Box], *, replica_id: tuple[int, int, int]
) -> ShardedTensorFactory:
    """How Megatron takes a parameter, or an optimizer's state of its shape, apart into boxes and together again."""

    def split(key: str, tensor: Tensor, replica_id: tuple, _: slice | None) -> list[ShardedTensor]:
        return [
            ShardedTensor(
                key=key + box.name,
                data=box.within(tensor),
                dtype=tensor.dtype,
                local_shape=box.shape,
                global_shape=box.full_shape,
                global_offset=box.start,
                axis_fragmentations=None,  # ranks need not hold equally much of a vocabulary
                replica_id=replica_id,
            )
            for box in boxes
            if 0 not in box.shape
        ]

    def merge(loaded: list[Tensor]) -> Tensor:
        merged = torch.zeros_like(param, dtype=loaded[0].dtype) if loaded else torch.zeros_like(param)
        for box, tensor in zip((box for box in boxes if 0 not in box.shape), loaded, strict=True):
            box.within(merged).copy_(tensor)
        return merged

    return ShardedTensorFactory(prefix, param, split, merge, replica_id)


@torch.no_grad()
def _fill(chunks: list[HiddenStatesModel], loaded: dict[str, Tensor]) -> None:
    for name, param in convert.parameters(chunks):
        param.copy_(loaded[name])
