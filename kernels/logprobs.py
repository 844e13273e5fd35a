"""Log-probability of the target, and entropy, from logits.

One read of the logits in the forward pass, one read and one write in the backward pass:

    lp = log softmax(z / temperature)[target],   H = -sum p log p,
    dL/dz = (g (1[target] - p) - h p (log p + H)) / temperature   for upstream gradients g of lp and h of H.

Letters: T tokens, n rows of a tile, V vocabulary (shard), R vocabulary shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgrpo.kernels import torch_rows
from fastgrpo.kernels.backend import on_device, refuse_second_derivative, use_triton
from fastgrpo.kernels.chunks import Span
from fastgrpo.kernels.heads import GivenLogits
from fastgrpo.kernels.launch import row_shape
from fastgrpo.kernels.logprob_kernels import launch_gradient, launch_statistics, statistics_kernel
from fastgrpo.kernels.reference import IGNORE_INDEX
from fastgrpo.kernels.vocab_parallel import VocabShard


class _LogprobsTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        num_tokens = logits.shape[0]
        stats, (log_p, row_entropy) = (
            torch.empty(1, num_tokens, 4, dtype=torch.float32, device=logits.device),
            torch.empty(2, num_tokens, dtype=torch.float32, device=logits.device),
        )
        statistics_kernel[(num_tokens,)](
            logits,
            logits.stride(0),
            targets,
            None,
            stats,
            log_p,
            row_entropy,
            0,
            0,
            logits.shape[1],
            1.0 / temperature,
            HAS_ENTROPY=entropy,
            **row_shape(logits),
        )
        ctx.save_for_backward(logits, targets, stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_p, row_entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        refuse_second_derivative("fastgrpo.kernels.logprobs")
        logits, targets, stats = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        upstream = contiguous_upstream(grad_logprobs, grad_entropy)
        shard = VocabShard.of(logits.shape[1], None, None)
        span = (0, logits.shape[0])
        out = torch.empty_like(logits)
        launch_gradient(logits, out, span, stats, targets, upstream, shard, 1.0 / ctx.temperature)
        return out, None, None, None


def contiguous_upstream(grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both upstream gradients as the kernel reads them; if that of the logprobs is missing, it becomes zeros."""
    if grad_logprobs is None:
        assert grad_entropy is not None
        grad_logprobs = torch.zeros_like(grad_entropy)
    return grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()


class LogprobRows(Protocol):
    """What a backend does with tiles of logits whose rows are the tokens of `span`."""

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        """(n, 4): max, sum, shifted sum and target logit of each row."""

    def finish(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs (T,) and entropies (T,) from the statistics (R, T, 4) of all shards; keeps `state`."""

    def state(self) -> Sequence[Tensor]:
        """What backward needs of the forward pass."""

    def resume(self, state: Sequence[Tensor], grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> None:
        """Take up the state and the upstream gradients (T,)."""

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        """dL/dlogits of the tile, in place where the dtype allows."""


class TorchLogprobRows:
    """LogprobRows in float32 or float64. Tiles hold logits already divided by the temperature."""

    def __init__(
        self, targets: Tensor, shard: VocabShard, tile: Tensor, *, temperature: float, entropy: bool, finite: bool
    ) -> None:
        self.columns = torch_rows.local_columns(targets, shard)
        self.rank, self.temperature = shard.rank, temperature
        self.rows = torch_rows.TorchRows(tile.shape[0], shard.num_valid, tile, entropy=entropy, finite=finite)

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        return self.rows.statistics(tile, self.columns[slice(*span)])

    def finish(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        total_max, log_total, (log_p, entropy) = torch_rows.combine(gathered)
        own_max = gathered[self.rank, :, 0].contiguous()
        self._state = own_max, torch_rows.log_sum_from(own_max, total_max, log_total), entropy
        return log_p, entropy

    def state(self) -> Sequence[Tensor]:
        return self._state

    def resume(self, state: Sequence[Tensor], grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> None:
        self._state = (state[0], state[1], state[2])
        self.grad_logprobs = torch.zeros_like(state[0]) if grad_logprobs is None else grad_logprobs / self.temperature
        self.grad_entropy = None if grad_entropy is None else grad_entropy / self.temperature

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        rows = slice(*span)
        own_max, log_sum, entropy = (part[rows] for part in self._state)
        grad_entropy = None if self.grad_entropy is None else self.grad_entropy[rows]
        return self.rows.gradient(
            tile, self.columns[rows], own_max, log_sum, entropy, self.grad_logprobs[rows], grad_entropy
        )


class TritonLogprobRows:
    """LogprobRows on tiles of undivided logits (n, V), V including the shard's padding."""

    def __init__(
        self,
        targets: Tensor,
        shard: VocabShard,
        gradient_tile: Callable[[Tensor, Span], Tensor],
        *,
        temperature: float,
        entropy: bool,
    ) -> None:
        self.targets, self.shard, self.gradient_tile, self.entropy = targets, shard, gradient_tile, entropy
        self.inverse_temperature = 1.0 / temperature

    def statistics(self, tile: Tensor, span: Span) -> Tensor:
        return launch_statistics(
            tile, span, self.targets, None, self.shard, self.inverse_temperature, entropy=self.entropy
        )

    def finish(self, gathered: Tensor) -> tuple[Tensor, Tensor]:
        self._gathered = gathered
        _, _, (log_p, entropy) = torch_rows.combine(gathered, self.inverse_temperature)
        scored = self.targets != IGNORE_INDEX
        known = (self.targets >= 0) & (self.targets < self.shard.vocab_size)
        log_p = torch.where(known, log_p, torch.where(scored, torch.nan, 0.0))
        return log_p, torch.where(scored, entropy, 0.0)

    def state(self) -> Sequence[Tensor]:
        return (self._gathered,)

    def resume(self, state: Sequence[Tensor], grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> None:
        (self._gathered,) = state
        self._upstream = contiguous_upstream(grad_logprobs, grad_entropy)

    def gradient(self, tile: Tensor, span: Span) -> Tensor:
        return launch_gradient(
            tile,
            self.gradient_tile(tile, span),
            span,
            self._gathered,
            self.targets,
            self._upstream,
            self.shard,
            self.inverse_temperature,
        )


class _Logprobs(torch.autograd.Function):
    """The torch path: rows of the caller's logits pass through one float32 tile."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        head, rows = _given(logits, targets, temperature, entropy)
        parts = [rows.statistics(head.logits(span), span) for span in head.spans()]
        stats = torch.cat(parts) if parts else head.tile.new_empty(0, 4)
        log_p, row_entropy = rows.finish(stats[None])
        ctx.save_for_backward(logits, targets, *rows.state())
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return head.spread(log_p), head.spread(row_entropy)

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        refuse_second_derivative("fastgrpo.kernels.logprobs")
        logits, targets, *state = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None
        head, rows = _given(logits, targets, ctx.temperature, grad_entropy is not None)
        rows.resume(
            state,
            None if grad_logprobs is None else head.keep(grad_logprobs),
            None if grad_entropy is None else head.keep(grad_entropy),
        )
        head.want_gradient(in_place=False)
        for span in head.spans():
            head.accumulate(rows.gradient(head.logits(span), span), span)
        return head.grad_logits, None, None, None


def _given(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[GivenLogits, TorchLogprobRows]:
    head = GivenLogits(logits, targets != IGNORE_INDEX, temperature=temperature)
    shard = VocabShard.of(logits.shape[1], None, None)
    rows = TorchLogprobRows(
        head.keep(targets), shard, head.tile, temperature=temperature, entropy=entropy, finite=False
    )
    return head, rows


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the target and, on request, the entropy; both are differentiable.

    Args:
        logits: (T, V) float32, bfloat16 or float16, computed in float32 (float64 on the torch backend).
        targets: (T,) int64 in [0, V), or -100 for a row whose results and gradient are zero.
        temperature: divides the logits; > 0.
        entropy: also return the entropy.
        backend: "auto" (Triton on CUDA, torch on CPU and for float64), "torch" or "triton".

    Returns: (T,) float32 (float64 from float64), or a pair (logprobs, entropy) of these.
    Raises: ValueError, naming the argument. On a GPU, a target outside the vocabulary yields NaN instead.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (T, V) and (T,)")
    triton = use_triton(backend, logits)
    check_row_targets(targets, logits.shape[1], temperature, triton=triton)
    if triton:
        rows_contiguous = logits if logits.stride(1) == 1 else logits.contiguous()
        with on_device(logits):
            log_p, row_entropy = _LogprobsTriton.apply(rows_contiguous, targets.contiguous(), temperature, entropy)
    else:
        log_p, row_entropy = _Logprobs.apply(logits, targets, temperature, entropy)
    return (log_p, row_entropy) if entropy else log_p


def check_row_targets(targets: Tensor, vocab_size: int, temperature: float, *, triton: bool) -> None:
    """Raise ValueError for an invalid temperature and, where checking does not mean waiting for a GPU, target."""
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature}: use a value > 0")
    if triton and targets.device.type == "cuda":
        return
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        token = int(wrong.nonzero()[0, 0])
        raise ValueError(f"targets[{token}]={int(targets[token])} is outside [0, {vocab_size}): use -100 to skip a row")
