"""This process's place in a layout: Megatron's process groups, made once a process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from fastgrpo.config import UserError
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.weight_map import Place
from fastgrpo.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Sizes, ranks and groups of one process. Example: Parallel of rank 3 in tp=2 pp=2: tp_rank=1, pp_rank=1."""

    layout: Layout
    tp_rank: int
    tp_group: Any
    pp_rank: int
    pp_group: Any
    cp_rank: int
    cp_group: Any
    dp_size: int
    dp_rank: int
    dp_cp_rank: int
    dp_cp_group: Any
    """The ranks that hold the same part of the model: those of data and of context parallelism."""
    ep_rank: int
    ep_group: Any
    expert_dp_rank: int
    """Among the ranks that hold the same part of the experts."""

    @property
    def place(self) -> Place:
        """Where this rank stands in the cut of a stage's matrices."""
        return Place(tp=self.layout.tp, tp_rank=self.tp_rank, ep=self.layout.ep, ep_rank=self.ep_rank)

    @property
    def ranks(self) -> Ranks:
        """The same, as the loop sees it: the first rank of each copy of the model samples for it."""
        return Ranks(
            rank=dist.get_rank(),
            num_ranks=dist.get_world_size(),
            data_rank=self.dp_rank,
            num_data_ranks=self.dp_size,
            leads=self.tp_rank == 0 and self.pp_rank == 0 and self.cp_rank == 0,
            in_step=self.layout.ep > 1,
        )

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def last_stage(self) -> int:
        """The global rank that holds the loss of this process's pipeline."""
        return dist.get_global_rank(self.pp_group, self.layout.pp - 1)


def initialize(layout: Layout) -> Parallel:
    """Make Megatron's process groups for a layout that data_parallel_size has accepted.

    Raises UserError where the processes of the run have not met yet, ValueError where this process already has
    another layout.
    """
    if not dist.is_initialized():
        raise UserError(
            "learner=megatron: no process group; start with torchrun --nproc-per-node N -m fastgrpo train …"
        )
    if not parallel_state.is_initialized():
        _make_groups(layout)
    made = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if made != (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep):
        raise ValueError(
            f"this process already has the layout tp, pp, vpp, cp, ep = {made}; call destroy() before [{layout}]"
        )
    return Parallel(
        layout=layout,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def _make_groups(layout: Layout) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        create_gloo_process_groups=False,
    )
    # Nothing in these models is random, so no generator is forked per layer.
    initialize_rng_tracker(inference_rng_tracker=True)


def destroy() -> None:
    """Forget the layout, so that another can be made in this process.

    Megatron forgets its groups without ending them, and each of gloo's has threads that look for work all the time.
    """
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        dist.destroy_process_group(group)
