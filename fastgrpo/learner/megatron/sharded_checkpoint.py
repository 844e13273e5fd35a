"""A learner's state on disk, written by all ranks at once and readable by every other layout.

Each rank writes its own shards through Megatron's dist_checkpointing, which records where they lie in the whole
tensors; on loading, each rank reads what its own layout needs. Weights are boxes of the Hugging Face tensors, and so
are the optimizer's moments and a bfloat16 model's float32 masters: what a rank holds of a parameter, all of it or a
distributed optimizer's run of entries, is cut where the tensors' rows end. So nothing is gathered, and what one layout
has written, with either optimizer, any other reads. (Megatron's own formats for its distributed optimizer change dp
alone, or gather the whole state on every rank.)

The directory is a file set beside others: writing it whole or not at all is the caller's business.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401  (before megatron_on_cpu opens)
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from fastgrpo.config import UserError
from fastgrpo.learner.host_memory import HostMemory
from fastgrpo.learner.megatron import convert, writing
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.model import HiddenStatesModel
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.learner.megatron.weight_map import HEAD, Box, boxes_of, is_expert, is_replicated
from fastgrpo.learner.protocol import PendingSave

if TYPE_CHECKING:
    from fastgrpo.learner.megatron.learner import MegatronLearner


def begin_save(learner: MegatronLearner, directory: Path, host: HostMemory) -> PendingSave:
    """Begin to write the state, copied to `host`, into an existing, empty directory that all ranks see.

    Collective over all ranks.
    """
    with megatron_on_cpu():
        state: dict[str, Any] = _sharded(learner)
    state["policy_version"] = learner.policy_version
    return writing.begin_save(state, directory, host)


@torch.no_grad()
def load(learner: MegatronLearner, directory: Path) -> None:
    """Go on from a state saved by any layout: bit for bit by the same one. Collective over all ranks.

    Raises UserError where the directory holds no such state, or lacks the reference model or masters that are wanted.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(f"resume={directory}: no state of a Megatron learner there")
    with megatron_on_cpu():
        wanted = _sharded(learner)
        _refuse_what_does_not_fit(directory, {tensor.key: tensor.global_shape for tensor in wanted.values()})
        targets = {name: tensor.data for name, tensor in wanted.items()}
        loaded = dist_checkpointing.load(wanted, str(directory))
        for name, target in targets.items():
            if loaded[name].data_ptr() != target.data_ptr():  # else it was read into its place
                target.copy_(loaded[name])
        learner.policy_version = dist_checkpointing.load_common_state_dict(str(directory))["policy_version"]
    learner.optimizer.set_num_steps(learner.policy_version)


def _refuse_what_does_not_fit(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {
        key: tensor.global_shape for key, tensor in dist_checkpointing.load_tensors_metadata(str(directory)).items()
    }
    missing = sorted(shapes.keys() - found.keys())
    if any(key.startswith("reference.") for key in missing):
        raise UserError(
            f"resume={directory}: saved without a reference model; resume with algorithm.kl_coef=0, or with the "
            "algorithm.reference.path of then"
        )
    if missing:
        raise UserError(f"resume={directory}: {missing[0]} is not in it; resume with the model and dtype of then")
    other = next((key for key, shape in shapes.items() if found[key] != shape), None)
    if other is not None:
        raise UserError(
            f"resume={directory}: its {other} is {found[other]}, not {shapes[other]}; resume with the model of then"
        )


def _sharded(learner: MegatronLearner) -> dict[str, ShardedTensor]:
    """What to write, or to read in place: this rank's tensors with their places in the whole ones."""
    models = {"policy": learner.policy}
    if learner.kept_reference is not None:
        models["reference"] = learner.kept_reference
    state: dict[str, ShardedTensor] = {}
    for prefix, chunks in models.items():
        for entry in _entries(chunks, learner.parallel):
            if prefix == "policy" and not entry.param.requires_grad:
                continue  # beside adapters, what model.path holds
            state.update(entry.boxes_of(prefix, entry.param.detach().view(-1)))
    entry_of = {id(entry.param): entry for entry in _entries(learner.policy, learner.parallel)}
    for held in learner.optimizer.held():
        entry = entry_of[id(held.param)]
        if learner.optimizer.is_distributed:
            entry = replace(entry, dp_replica=0)
        for name, tensor in held.tensors.items():
            state.update(entry.boxes_of(f"optimizer.{name}", tensor, held.start))
    return state


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A parameter of this rank, where it lies in the Hugging Face tensors, and which of its replicas this one is."""

    name: str
    param: nn.Parameter
    boxes: list[Box]
    pp_replica: int
    tp_replica: int
    dp_replica: int

    def boxes_of(self, prefix: str, flat: Tensor, start: int = 0) -> Iterator[tuple[str, ShardedTensor]]:
        """A run of the flattened parameter, which begins at its entry `start`, as boxes of the whole tensors, named."""
        for box in self.boxes:
            columns = math.prod(box.shape[1:])
            first = box.row * columns  # the box's first entry in the flattened parameter
            begin, end = max(first, start), min(first + box.shape[0] * columns, start + flat.numel())
            for offset, shape in run_as_boxes(box.shape, begin - first, end - first):
                size = math.prod(shape)
                tensor = ShardedTensor(
                    key=f"{prefix}.{box.name}",
                    data=flat[begin - start : begin - start + size].view(shape),
                    dtype=flat.dtype,
                    local_shape=shape,
                    global_shape=box.full_shape,
                    global_offset=tuple(map(operator.add, box.start, offset)),
                    axis_fragmentations=None,  # ranks need not hold equally much
                    replica_id=(self.pp_replica, self.tp_replica, self.dp_replica),  # who is 0 in all three writes
                )
                yield f"{prefix}.{self.name}.{begin}", tensor
                begin += size


def _entries(chunks: list[HiddenStatesModel], parallel: Parallel) -> Iterator[_Entry]:
    architecture, place = chunks[0].architecture, parallel.place
    for name, param in convert.parameters(chunks):
        yield _Entry(
            name=name,
            param=param,
            boxes=boxes_of(name, architecture, place),
            pp_replica=int(name == HEAD and architecture.tied),
            tp_replica=parallel.tp_rank if is_replicated(name, architecture, place) else 0,
            dp_replica=parallel.expert_dp_rank if is_expert(name) else parallel.dp_cp_rank,
        )


def run_as_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The entries start to stop of a flattened tensor as boxes of it, (first entry, shape), in their order.

    Example: entries 2 to 9 of a (4, 3) tensor are ((0, 2), (1, 1)), ((1, 0), (2, 3)).
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    columns = math.prod(shape[1:])
    first, last = -(-start // columns), stop // columns  # the whole rows
    if first > last:  # less than a row
        runs = [(last, start - last * columns, stop - last * columns)]
    else:
        runs = [(first - 1, start - (first - 1) * columns, columns)] if start < first * columns else []
    for row, begin, end in runs:
        yield from (((row, *offset), (1, *size)) for offset, size in run_as_boxes(shape[1:], begin, end))
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * columns < stop:
        tail = run_as_boxes(shape[1:], 0, stop - last * columns)
        yield from (((last, *offset), (1, *size)) for offset, size in tail)
