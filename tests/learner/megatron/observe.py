"""What tests look at in a learner, alike in every process of its layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scenario import OBJECTIVE, batches_of, with_logprobs

from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.megatron import convert
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.types import PackedBatch, WeightSlice


def share_of(batches: list[PackedBatch], learner: MegatronLearner, *, all_on_rank_0: bool = False) -> list[PackedBatch]:
    """A data-parallel rank's batches, with empty ones where all must have equally many."""
    rank, size = learner.parallel.dp_rank, 1 if all_on_rank_0 else learner.parallel.dp_size
    mine = batches[rank::size] if rank < size else []
    missing = -(-len(batches) // size) - len(mine) if learner.ranks.in_step else 0
    return mine + [PackedBatch.empty()] * missing


def slices_cover_once(learner: MegatronLearner, held: list[WeightSlice]) -> list[str]:
    """The tensors whose entries the job does not hold exactly once for each copy: data-parallel ones, and those of
    what tensor-parallel ranks replicate."""
    mine = [(s.name, s.full_shape, s.start, tuple(s.tensor.shape)) for s in held]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    holders = Counter(box for boxes in everyone for box in boxes)
    counts: dict[str, torch.Tensor] = {}
    for name, full_shape, start, shape in holders:
        box = tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))
        counts.setdefault(name, torch.zeros(full_shape, dtype=torch.int))[box] += 1
    wrong = [f"{name} is not covered exactly once" for name, count in counts.items() if not (count == 1).all()]
    wrong += [f"{box} has {times} holders" for box, times in holders.items() if times != num_copies(learner, *box)]
    missing = {name for name, _ in learner.named_weights()} ^ counts.keys()
    return wrong + [f"{name} is named by one side only" for name in sorted(missing)]


def num_copies(learner: MegatronLearner, name: str, full_shape: tuple, start: tuple, shape: tuple) -> int:
    layout, dp = learner.parallel.layout, learner.parallel.dp_size * learner.parallel.layout.cp
    if ".experts." in name:
        return layout.tp * dp // (layout.ep * layout.expert_tp)
    return dp * (layout.tp if shape == full_shape else 1)


def slices_differ(held: list[WeightSlice], full: Callable[[str], torch.Tensor]) -> list[str]:
    """What of the slices is not, bit for bit, what the full tensors hold; padding is zeros."""
    wrong = []
    for s in held:
        box = tuple(slice(begin, begin + size) for begin, size in zip(s.start, s.tensor.shape, strict=True))
        after = (s.num_padding_rows, *s.tensor.shape[1:])
        padding = s.tensor.as_strided(after, s.tensor.stride(), s.tensor.storage_offset() + s.tensor.numel())
        if not torch.equal(s.tensor, full(s.name)[box]) or padding.any():
            wrong.append(f"{s.name} from {s.start} on differs")
    return wrong


def addresses(held: list[WeightSlice]) -> list[int]:
    return [s.tensor.data_ptr() for s in held]


def gradients(learner: MegatronLearner, batches, objective: Objective = OBJECTIVE) -> dict[str, torch.Tensor]:
    learner.accumulate(batches, objective)
    if learner.optimizer.is_distributed:  # each data-parallel rank has summed its own part
        groups = [g for chunk in learner.ddp for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        for ranks, bucket in ((g.intra_distributed_optimizer_instance_group, b) for g in groups for b in g.buckets):
            parts = list(bucket.grad_data.chunk(ranks.size()))
            dist.all_gather(parts, parts[ranks.rank()].clone(), group=ranks)
    adapters = learner.policy[0].architecture.adapters is not None
    whole = convert.to_hf(learner.policy, learner.parallel, lambda param: param.main_grad, adapters=adapters)
    return {name: gradient.clone() for name, gradient in whole}


def gradients_of_packing(learner: MegatronLearner, share_prompts: bool, experts: bool) -> dict[str, torch.Tensor]:
    """Those of the scenario's update with each group's prompt shared, or a copy for every completion."""
    batches = with_logprobs(batches_of(share_prompts, experts=experts), learner)
    return gradients(learner, share_of(batches, learner))


def by_token(batches, values: list[torch.Tensor]) -> torch.Tensor:
    """Per-token values in the sequences' order, whatever micro-batch they came from."""
    parts: dict[int, torch.Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        for index, sequence in enumerate(batch.sequence_ids.tolist()):
            parts[sequence] = value[batch.cu_scored[index] : batch.cu_scored[index + 1]]
    return torch.cat([parts[sequence] for sequence in sorted(parts)])


def empty_directory(path: Path) -> Path:
    """A directory that all ranks see."""
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    return path


def save(learner: MegatronLearner, directory: Path) -> None:
    """Write the state at once, all ranks together."""
    pending = learner.begin_save(directory)
    for write in pending.files.values():
        write()
    pending.finish()
