"""The routers of a Hugging Face mixture of experts: watched for the balance of its experts, or told whom to choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgrpo.learner.expert_balance import ExpertBalance, refuse_without_experts, row_weights
from fastgrpo.models.experts import routers_of
from fastgrpo.models.hf import CausalLM
from fastgrpo.types import PackedBatch


class Routers:
    """Hooks on a model's routers that hand their choices to an ExpertBalance, one layer each, and put a batch's own
    (PackedBatch.routed_experts) in their place where it has any."""

    def __init__(self, routers: list[Any], coef: float) -> None:
        first = routers[0]
        sizes = (len(routers), first.num_experts, first.top_k)
        self.balance = ExpertBalance(*sizes, coef=coef, device=first.weight.device)
        self.weights: Tensor
        self.given: Tensor | None = None
        """(T, L, k) the experts of the batch that is being computed, or computed again."""
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., tuple[Tensor, Tensor, Tensor] | None]:
        def hook(router: Any, _: tuple, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, scores, indices = output  # (T, E), (T, k), (T, k)
            own = None
            if self.given is not None:
                own, indices = indices, self.given[:, layer].long()
                scores = weights_of(router, logits, indices)
            if self.balance.phase != "off":
                chosen = _mask(logits, indices)
                own = None if own is None else _mask(logits, own)
                scores = self.balance.observe(layer, self.weights, logits, chosen, scores, own)
            return logits, scores, indices

        return hook

    @contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[None]:
        """What is computed here is this batch, on its device: its experts, where it has any, are taken."""
        self.given = batch.routed_experts
        try:
            yield
        finally:
            self.given = None

    def during(self, batches: Iterable[PackedBatch], forward: Callable[[PackedBatch], Any]) -> Iterator[PackedBatch]:
        """The batches of an update on the device, one after the other; with an auxiliary loss after a pass over all
        that counts."""
        balance, device = self.balance, self.balance.choices.device
        if balance.coef:
            batches = list(batches)
            balance.start("count")
            for batch in (batch.to(device) for batch in batches):
                self.weights = row_weights(batch).to(device)
                with torch.no_grad(), self.replaying(batch):
                    forward(batch)
            balance.freeze()
        balance.start("train")
        for batch in (batch.to(device) for batch in batches):
            self.weights = row_weights(batch).to(device)
            with self.replaying(batch):
                yield batch
        balance.phase = "off"


def weights_of(router: Any, logits: Tensor, indices: Tensor) -> Tensor:
    """(T, E) logits, (T, k) experts -> (T, k): what the router would have weighed them with, had it chosen them."""
    weights = logits.softmax(-1, dtype=torch.float).gather(-1, indices)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype)


def _mask(logits: Tensor, indices: Tensor) -> Tensor:
    """(T, E) bool."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)


def watch_routers(model: CausalLM, coef: float) -> Routers | None:
    """The model's routers in the order of its layers, or None for a dense model.

    Raises UserError where a dense model is to balance its experts.
    """
    routers = routers_of(model)
    if not routers:
        refuse_without_experts(coef)
        return None
    return Routers(routers, coef)
