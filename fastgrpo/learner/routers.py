"""The routers of a Hugging Face mixture of experts, watched for the balance of its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.learner.expert_balance import ExpertBalance, refuse_without_experts, row_weights
from fastgrpo.models.hf import CausalLM
from fastgrpo.types import PackedBatch


class Routers:
    """Hooks on a model's routers that hand their choices to an ExpertBalance, one layer each."""

    def __init__(self, routers: list[Any], coef: float) -> None:
        first = routers[0]
        sizes = (len(routers), first.num_experts, first.top_k)
        self.balance = ExpertBalance(*sizes, coef=coef, device=first.weight.device)
        self.weights: Tensor
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., tuple[Tensor, Tensor, Tensor] | None]:
        def observe(_: nn.Module, __: tuple, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, scores, indices = output  # (T, E), (T, k), (T, k)
            if self.balance.phase == "off":
                return None
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
            return logits, self.balance.observe(layer, self.weights, logits, chosen, scores), indices

        return observe

    def during(self, batches: Iterable[PackedBatch], forward: Callable[[PackedBatch], Any]) -> Iterator[PackedBatch]:
        """The batches of an update, one after the other; with an auxiliary loss after a pass over all that counts."""
        balance, device = self.balance, self.balance.choices.device
        if balance.coef:
            batches = list(batches)
            balance.start("count")
            for batch in batches:
                self.weights = row_weights(batch).to(device)
                with torch.no_grad():
                    forward(batch.to(device))
            balance.freeze()
        balance.start("train")
        for batch in batches:
            self.weights = row_weights(batch).to(device)
            yield batch
        balance.phase = "off"


def watch_routers(model: CausalLM, coef: float) -> Routers | None:
    """The model's routers in the order of its layers, or None for a dense model.

    Raises UserError where a dense model is to balance its experts.
    """
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    if not routers:
        refuse_without_experts(coef)
        return None
    return Routers(routers, coef)
