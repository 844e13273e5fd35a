"""An update's sums over all data- and context-parallel ranks, known on every rank of the job."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastgrpo.kernels.objective import Objective
from fastgrpo.kernels.token_terms import record_names
from fastgrpo.learner.megatron.parallel import Parallel
from fastgrpo.learner.metrics import IMPORTANCE_SUMS, MISMATCH_SUMS, LossSums


def reduce_sums(local: LossSums, objective: Objective, parallel: Parallel, device: torch.device) -> LossSums:
    """The sums of the whole update, added on the last stages over all who computed a part and sent along the pipelines.

    Which sums there are depends on the objective; ranks without a scored token have none, hence the presence flags.
    Collective over all ranks.
    """
    names = (*record_names(objective), *MISMATCH_SUMS, *IMPORTANCE_SUMS)
    assert set(local.sums) <= set(names), set(local.sums) - set(names)
    zero = torch.zeros((), device=device)
    values = torch.stack([local.sums[name].double() if name in local.sums else zero.double() for name in names])
    flags = torch.tensor([name in local.sums for name in names], dtype=torch.float64, device=device)
    count = torch.tensor([local.num_batches], dtype=torch.float64, device=device)
    added = torch.cat([values, flags, count])
    largest = (zero if local.largest_mismatch is None else local.largest_mismatch).double().reshape(1)
    if parallel.is_last_stage:
        dist.all_reduce(added, group=parallel.dp_cp_group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel.dp_cp_group)
    both = torch.cat([added, largest])
    if parallel.layout.pp > 1:
        dist.broadcast(both, src=parallel.last_stage, group=parallel.pp_group)
    return _unpack(both, names)


def _unpack(numbers: torch.Tensor, names: tuple[str, ...]) -> LossSums:
    values, flags, count, largest = numbers.split([len(names), len(names), 1, 1])
    result = LossSums()
    present = flags.tolist()
    result.sums = {name: value for name, value, flag in zip(names, values, present, strict=True) if flag}
    result.num_batches = int(count)
    result.largest_mismatch = largest[0]
    return result
