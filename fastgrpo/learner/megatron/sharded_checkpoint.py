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

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.model import HiddenStatesModel

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
        _fill(learner.policy, loaded, "policy")
        if learner.reference is not None:
            _fill(learner.reference, loaded, "reference")
        if policy_version > 0:
            learner.optimizer.load_state_dict(loaded["optimizer"])
    learner.policy_version = policy_version


def _sharded(learner: MegatronLearner, *, with_optimizer: bool, loading: bool) -> dict[str, Any]:
    """What to write or to read: this rank's tensors with their places in the whole ones.

    An optimizer that has not stepped holds nothing yet.
    """
    policy = {f"policy{i}": _of_chunk(chunk, "policy.") for i, chunk in enumerate(learner.policy)}
    state: dict[str, Any] = dict(policy)
    for i, chunk in enumerate(learner.reference or []):
        state[f"reference{i}"] = _of_chunk(chunk, "reference.")
    if with_optimizer:
        every_tensor = {f"{part}.{name}": tensor for part, held in policy.items() for name, tensor in held.items()}
        state["optimizer"] = learner.optimizer.optimizer.sharded_state_dict(every_tensor, is_loading=loading)
    return state


def _of_chunk(chunk: HiddenStatesModel, prefix: str) -> dict[str, Any]:
    return chunk.sharded_state_dict(prefix=prefix)


@torch.no_grad()
def _fill(chunks: list[HiddenStatesModel], loaded: dict[str, Any], part: str) -> None:
    for i, chunk in enumerate(chunks):
        held = {name.removeprefix(f"{part}."): tensor for name, tensor in loaded[f"{part}{i}"].items()}
        chunk.load_state_dict(held)
