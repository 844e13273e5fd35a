"""Advantages relative to a group of siblings, in one launch for any number of ragged groups in any order.

    A_i = (r_i - baseline) / max(std, min_std) over the group of i; see reference.group_advantages.

Program i looks at all S rewards twice, taking its group's mean first and its deviations then: E[r^2] - E[r]^2
would lose every digit at an offset of 100. S is thousands, so S^2 comparisons cost less than a second launch.

Letters: S completions, K reasoning steps, T tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels import reference
from fastgrpo.kernels.backend import on_device, use_triton
from fastgrpo.kernels.launch import options, unspecialized
from fastgrpo.kernels.row_math import larger

NORMALIZE = ("std", "none")


@triton.jit(**unspecialized("REWARDS", "GROUP_IDS", "ADVANTAGES", "num_rewards", "std_ddof"))
def _group_kernel(
    REWARDS,
    GROUP_IDS,
    ADVANTAGES,
    num_rewards,
    std_ddof,
    min_std,
    NORMALIZE_STD: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The advantage of one completion."""
    me = tl.program_id(0)
    group = tl.load(GROUP_IDS + me)
    reward = tl.load(REWARDS + me).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    different = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rewards, BLOCK):
        inside = start + lanes < num_rewards
        member = inside & (tl.load(GROUP_IDS + start + lanes, mask=inside, other=0) == group)
        r = tl.load(REWARDS + start + lanes, mask=member, other=0.0).to(tl.float32)
        # relative to this reward: the mean of offsets keeps the digits that a mean of large rewards would lose
        total += tl.where(member, r - reward, 0.0)
        count += member.to(tl.float32)
        different = larger(different, tl.where(member & (r != reward), 1.0, 0.0))
    size = tl.sum(count, 0)
    mean_offset = tl.sum(total, 0) / size
    advantage = 0.0
    if tl.sum(different, 0) > 0.0:  # some sibling has another reward; equality is exact, not a matter of epsilon
        advantage = -mean_offset
        if LEAVE_ONE_OUT:
            advantage = advantage * (size / (size - 1.0))
        if NORMALIZE_STD:
            squares = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_rewards, BLOCK):
                inside = start + lanes < num_rewards
                member = inside & (tl.load(GROUP_IDS + start + lanes, mask=inside, other=0) == group)
                r = tl.load(REWARDS + start + lanes, mask=member, other=0.0).to(tl.float32)
                centred = tl.where(member, (r - reward) - mean_offset, 0.0)
                squares += centred * centred
            std = tl.sqrt(tl.sum(squares, 0) / (size - std_ddof))
            advantage = advantage / larger(std, min_std)
    tl.store(ADVANTAGES + me, advantage)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: str = "std",
    std_ddof: int = 1,
    min_std: float = 0.0,
    leave_one_out: bool = False,
    backend: str = "auto",
) -> Tensor:
    """How much better a completion is than its siblings: (r - baseline) / std over its group.

    Args:
        rewards: (S,) float. group_ids: (S,) integers, in any order, groups of any size.
        normalize: "std" divides by max(std, min_std) with the given ddof (0 or 1); "none" does not (Dr.GRPO).
        leave_one_out: the baseline is the mean of the *other* rewards (RLOO).
        backend: "auto" (Triton on CUDA, torch on CPU), "torch" or "triton".

    Returns: (S,) float32 (float64 from float64). Exactly 0 for a group whose rewards are all equal, so also for
        a group of one. A NaN reward makes its own group NaN and no other.
    Raises: ValueError, naming the argument.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be (S,)")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize={normalize!r}: choose one of {', '.join(NORMALIZE)}")
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof={std_ddof}: use 0 or 1")
    if not min_std >= 0.0:
        raise ValueError(f"min_std={min_std}: use a value >= 0")
    if not use_triton(backend, rewards):
        return reference.group_advantages(
            rewards, group_ids, normalize=normalize, std_ddof=std_ddof, min_std=min_std, leave_one_out=leave_one_out
        )
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if rewards.shape[0]:
        with on_device(rewards):
            _group_kernel[(rewards.shape[0],)](
                rewards.contiguous(),
                group_ids.contiguous(),
                advantages,
                rewards.shape[0],
                std_ddof,
                float(min_std),
                NORMALIZE_STD=normalize == "std",
                LEAVE_ONE_OUT=leave_one_out,
                BLOCK=1024,
                **options(num_warps=4),
            )
    return advantages


def process_advantages(
    step_rewards: Tensor,
    step_token_index: Tensor,
    step_sequence_ids: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    num_tokens: int | None = None,
    normalize: str = "std",
    std_ddof: int = 1,
    min_std: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Per-token advantages from a reward at the end of every reasoning step (arXiv 2402.03300 section 4.1.3).

    With R the rewards of all steps of all completions of a group, r~ = (r - mean(R)) / std(R); the advantage of
    token t of a completion is the sum of r~_j over its steps whose last token index(j) >= t. Tokens behind the
    last step get 0.

    Args:
        step_rewards: (K,) float. step_token_index: (K,) integers, index(j): the step's last token, counted from
            the start of its completion. step_sequence_ids: (K,) integers in [0, S). Steps in any order.
        group_ids: (S,) integers, the group of each completion. cu_seqlens: (S+1,) integers, where each
            completion's tokens start.
        num_tokens: cu_seqlens[-1], where the caller knows it: reading it from a GPU waits for the device.
        normalize, std_ddof, min_std, backend: as in group_advantages.

    Returns: (T,) float32 (float64 from float64).
    Raises: ValueError where a step lies outside its completion (CPU tensors), or as group_advantages.
    """
    if num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    start, stop = cu_seqlens[step_sequence_ids], cu_seqlens[step_sequence_ids + 1]
    position = start + step_token_index
    if position.device.type == "cpu" and ((position < start) | (position >= stop)).any():
        step = int(((position < start) | (position >= stop)).nonzero()[0, 0])
        raise ValueError(
            f"step_token_index[{step}]={int(step_token_index[step])} lies outside completion "
            f"{int(step_sequence_ids[step])} of {int(stop[step] - start[step])} tokens"
        )
    relative = group_advantages(
        step_rewards,
        group_ids[step_sequence_ids],
        normalize=normalize,
        std_ddof=std_ddof,
        min_std=min_std,
        backend=backend,
    )
    # Sum of the rewards at or behind each token: a suffix sum over everything, less what lies behind the sequence.
    at_end = torch.zeros(num_tokens + 1, dtype=torch.float64, device=relative.device)
    at_end.index_add_(0, position, relative.double())
    behind = at_end.flip(0).cumsum(0).flip(0)  # (T+1,)
    sequence = reference.sequence_of_token(cu_seqlens, num_tokens)
    return (behind[:-1] - behind[cu_seqlens[sequence + 1]]).to(relative.dtype)
