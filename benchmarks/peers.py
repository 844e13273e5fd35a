"""Other people's kernels behind one signature, and plain torch; a package that is not installed is left out.

Every provider computes the same clipped objective with the same token weights, so times compare like with like.
Where a peer fuses only the logprob, torch computes the rest, as its users do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgrpo.kernels.objective import LossInputs, Objective


@dataclass(frozen=True)
class Problem:
    """hidden (N, H), weight (V, H) or logits (N, V), and the batch."""

    batch: LossInputs
    objective: Objective
    hidden: Tensor | None = None
    weight: Tensor | None = None
    logits: Tensor | None = None


def problem(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device, *, from_logits: bool) -> Problem:
    """Random tokens with old logprobs near the policy's; never zeros, which hide errors and run faster."""
    rng = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, generator=rng, dtype=dtype).mul_(scale)

    batch = LossInputs(
        targets=torch.randint(0, v, (n,), device=device, generator=rng),
        advantages=torch.randn(n, device=device, generator=rng),
        token_weights=torch.full((n,), 1.0 / n, device=device),
        old_logprobs=torch.full((n,), -12.0, device=device) + 0.1 * torch.randn(n, device=device, generator=rng),
    )
    if from_logits:
        return Problem(batch, Objective(), logits=normal(n, v).requires_grad_())
    return Problem(
        batch, Objective(), hidden=normal(n, h).requires_grad_(), weight=normal(v, h, scale=h**-0.5).requires_grad_()
    )


def surrogate(log_p: Tensor, batch: LossInputs, objective: Objective) -> Tensor:
    """The clipped objective in plain torch, from logprobs (N,)."""
    assert batch.old_logprobs is not None
    ratio = torch.exp(log_p - batch.old_logprobs)
    clipped = ratio.clamp(1.0 - objective.clip_ratio_low, 1.0 + objective.clip_ratio_high)
    loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return (batch.token_weights * loss).sum()


def torch_from_logits(logits: Tensor, batch: LossInputs, objective: Objective) -> Tensor:
    """log_softmax over all logits, in float32."""
    log_p = torch.log_softmax(logits.float(), -1).gather(1, batch.targets[:, None])[:, 0]
    return surrogate(log_p, batch, objective)


def torch_from_hidden(hidden: Tensor, weight: Tensor, batch: LossInputs, objective: Objective) -> Tensor:
    """The same behind an ordinary linear layer."""
    return torch_from_logits(hidden @ weight.T, batch, objective)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def from_logits(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Providers of the objective on logits."""
    assert p.logits is not None
    logits, batch, objective = p.logits, p.batch, p.objective
    providers = {"torch eager": lambda: torch_from_logits(logits, batch, objective)}
    if logits.is_cuda:
        compiled = torch.compile(torch_from_logits)
        providers["torch compile"] = lambda: compiled(logits, batch, objective)
        if has("liger_kernel"):
            providers["liger triton grpo"] = lambda: _liger_triton(logits, batch, objective)
        if has("trl"):
            providers["trl logprob"] = lambda: surrogate(trl_logprobs(logits, batch.targets), batch, objective)
    return providers


def from_hidden(p: Problem) -> dict[str, Callable[[], Tensor]]:
    """Providers of the objective on hidden states."""
    assert p.hidden is not None
    assert p.weight is not None
    hidden, weight, batch, objective = p.hidden, p.weight, p.batch, p.objective
    providers = {"torch eager": lambda: torch_from_hidden(hidden, weight, batch, objective)}
    if hidden.is_cuda:
        compiled = torch.compile(torch_from_hidden)
        providers["torch compile"] = lambda: compiled(hidden, weight, batch, objective)
        if has("cut_cross_entropy"):
            providers["cut-cross-entropy"] = lambda: surrogate(cce_logprobs(hidden, weight, batch), batch, objective)
        if has("trl"):
            providers["trl logprob"] = lambda: surrogate(
                trl_logprobs(hidden @ weight.T, batch.targets), batch, objective
            )
            providers["trl chunked"] = lambda: surrogate(trl_chunked(hidden, weight, batch), batch, objective)
    if has("liger_kernel"):
        providers["liger fused linear"] = liger_fused_linear(p)
    return providers


def cce_logprobs(hidden: Tensor, weight: Tensor, batch: LossInputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, batch.targets, reduction="none")


def trl_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def trl_chunked(hidden: Tensor, weight: Tensor, batch: LossInputs) -> Tensor:
    """Without the entropy, which the clipped objective does not need; with the width of TRL's trainers."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    width = _CHUNKED_LOGPROB_CHUNK_SIZE
    return ChunkedLogProbFunction.apply(hidden, weight, None, batch.targets, 1.0, width, None, 1.0, ())[0]


def _liger_triton(logits: Tensor, batch: LossInputs, objective: Objective) -> Tensor:
    """One sequence, out of place as the others; its last row of logits predicts nothing, so one token is left out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    assert batch.old_logprobs is not None
    n = logits.shape[0] - 1
    per_token, _, _ = triton_grpo_loss(
        logits[None],
        batch.old_logprobs[None, :n],
        None,
        batch.targets[None, :n],
        batch.advantages[:1],
        temperature=1.0,
        beta=0.0,
        eps_low=objective.clip_ratio_low,
        eps_high=objective.clip_ratio_high,
        inplace=False,
    )
    return per_token.mean()


def liger_fused_linear(p: Problem) -> Callable[[], Tensor]:
    """Liger's chunked GRPO loss over hidden states: sequences of 1024 tokens, as it chunks by sequence."""
    hidden, weight, batch = p.hidden, p.weight, p.batch
    assert hidden is not None
    assert weight is not None
    assert batch.old_logprobs is not None
    old = batch.old_logprobs
    length = min(1024, hidden.shape[0])

    @cache
    def peer() -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=hidden.is_cuda)

    def run() -> Tensor:
        loss, _ = peer()(
            hidden.view(-1, length, hidden.shape[1]),
            weight,
            batch.targets.view(-1, length),
            torch.ones(hidden.shape[0] // length, length, device=hidden.device),
            batch.advantages.view(-1, length)[:, 0],
            old_per_token_logps=old.view(-1, length),
        )
        return loss

    return run
