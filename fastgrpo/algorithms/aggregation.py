"""How tokens are averaged into the loss: nothing but a weight per token, from counts over the whole update.

Because the counts are those of all micro-batches (and ranks) together, no split of the update changes its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(masks: list[Tensor], aggregation: str, *, max_new_tokens: int) -> list[Tensor]:
    """The weight w_t of every token of an update's S sequences.

    masks: S bool tensors (R_i,), True where the token carries loss; a sequence without any still counts in S.
    aggregation: sequence_mean 1/(S*|o_i|) (GRPO, arXiv 2402.03300 eq. 3), token_mean 1/sum_i |o_i| (DAPO,
    2503.14476 eq. 8), constant 1/(S*max_new_tokens) (Dr.GRPO, 2503.20783), with |o_i| the tokens that carry loss.
    Returns S float32 tensors (R_i,), 0 where the mask is False.
    """
    counts = [int(mask.sum()) for mask in masks]
    total, num_sequences = sum(counts), len(masks)

    def weight(count: int) -> float:
        if aggregation == "sequence_mean":
            return 1.0 / (num_sequences * count)
        if aggregation == "token_mean":
            return 1.0 / total
        assert aggregation == "constant", aggregation
        return 1.0 / (num_sequences * max_new_tokens)

    return [
        mask.to(torch.float32) * weight(count) if count else torch.zeros(len(mask))
        for mask, count in zip(masks, counts, strict=True)
    ]
