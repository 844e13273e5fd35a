"""How evenly a mixture's experts are used, and the auxiliary loss that evens their use out.

A layer deals each of an update's tokens to k of its E experts. Let f_e be the share of these choices that fell on
expert e and P_e the mean probability that the router gave it. The layer's balance is E * sum_e f_e P_e: 1 where all
experts are used alike, towards E / k where always the same k are (Switch Transformer, arXiv 2101.03961, equations 4 to
6, with f summing to 1). The auxiliary loss is coefficient * the sum of the layers' balances, as in Megatron-core.

A token counts once for every sequence it belongs to, a shared prompt's once a completion, and f is of the whole update
(the global-batch form, arXiv 2501.11873), so neither the packing nor the layout changes the gradient. f is not
differentiable but a factor of the gradient, and every micro-batch needs all of it: with a coefficient, a forward pass
over the update counts it first.

Letters: T rows, E experts, k experts a token, L layers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo.config import UserError
from fastgrpo.types import PackedBatch


def row_weights(batch: PackedBatch) -> Tensor:
    """(T,) float32: of how many of the batch's sequences each row is a part. On the CPU, as the segments are."""
    weights = torch.zeros(batch.num_tokens)
    if not len(batch.sequence_ids):  # rows for the schedule's sake
        return weights
    users = Counter((start, end) for *_, start, end in batch.segments.tolist() if start < end)
    for start, end, *_ in batch.segments.tolist():
        weights[start:end] = users.get((start, end), 1)
    return weights


class ExpertBalance:
    """Watches the routers of an update. Each calls `observe` in every pass; `phase` says what that does.

    off: nothing. count: the choices are counted, for f. train: they are counted for the metrics, wherever gradients
    are computed (so once, also where activations are computed again), and the auxiliary loss gets its gradient.
    """

    def __init__(self, num_layers: int, num_experts: int, num_chosen: int, coef: float, device: Any) -> None:
        self.num_experts, self.num_chosen, self.coef = num_experts, num_chosen, coef
        self.phase: Literal["off", "count", "train"] = "off"
        self.choices = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=device)
        self.probs = torch.zeros_like(self.choices)
        self.replayed = torch.zeros(2, num_layers, dtype=torch.float64, device=device)
        """Choices that were given, and those of them that the router would not have made."""
        self.shares: Tensor | None = None
        """(L, E) f of the whole update, once counted."""
        self.num_tokens = 0.0

    def start(self, phase: Literal["count", "train"]) -> None:
        self.phase = phase
        self.choices.zero_()
        self.probs.zero_()
        self.replayed.zero_()

    def freeze(self) -> None:
        """Take what was counted, on all ranks, for the update's."""
        num_choices = self.choices.sum(-1, keepdim=True)
        self.shares = self.choices / num_choices.clamp(min=1.0)
        self.num_tokens = float(num_choices[0]) / self.num_chosen

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What ranks that see other tokens or layers add up."""
        return self.choices, self.probs, self.replayed

    def observe(
        self, layer: int, weights: Tensor, logits: Tensor, chosen: Tensor, passed_on: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """weights (T,) of row_weights, logits (T, E), chosen (T, E) bool, own (T, E) bool: what the router would have
        chosen where the choice was given; returns `passed_on`, whose gradient carries that of the auxiliary loss."""
        if self.phase == "off" or (self.phase == "train" and not torch.is_grad_enabled()):
            return passed_on
        probs = logits.float().softmax(-1)
        with torch.no_grad():
            self.choices[layer] += (weights[:, None] * chosen).sum(0)
            self.probs[layer] += (weights[:, None] * probs).sum(0)
            if own is not None:
                of_rows = torch.stack([chosen.sum(1), (chosen & ~own).sum(1)])  # (2, T)
                self.replayed[:, layer] += (weights * of_rows).sum(1)
        if self.phase == "count" or self.shares is None or not self.num_tokens:
            return passed_on
        weighted = weights[:, None] * self.shares[layer].float()
        loss = self.coef * self.num_experts / self.num_tokens * (weighted * probs).sum()
        return _WithLoss.apply(passed_on, loss)

    def metrics(self) -> dict[str, float]:
        """balance: the layers' mean. expert_load/max and /min: tokens of a layer's most and least used expert, over
        its experts' mean; the worst layer's. replayed_difference: the share of the given choices that the routers
        would not have made; only where any were given. {} before any token."""
        num_choices = self.choices.sum(-1, keepdim=True)
        if not float(num_choices.min()):
            return {}
        shares, probs = self.choices / num_choices, self.probs * self.num_chosen / num_choices
        load = shares * self.num_experts
        balance = (self.num_experts * shares * probs).sum(-1).mean()
        names = ("moe/balance", "moe/expert_load/max", "moe/expert_load/min")
        metrics = dict(zip(names, torch.stack([balance, load.max(), load.min()]).tolist(), strict=True))
        given, different = self.replayed.sum(-1).tolist()
        return metrics | ({"moe/replayed_difference": different / given} if given else {})


def refuse_without_experts(coef: float) -> None:
    """Raise UserError where a dense model is to balance its experts."""
    if coef:
        raise UserError(f"train.moe_aux_loss_coef={coef}: the model has no experts; use 0")


class _WithLoss(torch.autograd.Function):
    """The first argument as it is; a gradient of 1 for the second."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
