"""group_advantages: one launch against the dozen of a reshaped mean and standard deviation.

Bytes: 8 a completion for reward and group, 4 for the advantage; launches are what it costs.
"""

from __future__ import annotations

import torch
from harness import Table, Variant, compare

from fastgrpo.kernels.group_advantages import group_advantages

KERNEL = "group_advantages"
SIZES = ((256, 8), (2048, 16), (16384, 16))
SMOKE_SIZES = ((16, 4),)


def bench(table: Table, *, smoke: bool = False) -> None:
    for num_sequences, group_size in SMOKE_SIZES if smoke else SIZES:
        rewards = torch.rand(num_sequences, device=table.device)
        ids = torch.arange(num_sequences, device=table.device) // group_size

        def eager(rewards=rewards, group_size=group_size):
            grouped = rewards.view(-1, group_size)
            return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)).view(-1)

        variants = {
            "fastgrpo": lambda rewards=rewards, ids=ids: Variant(lambda: group_advantages(rewards, ids)),
            "torch eager": lambda eager=eager: Variant(eager),
        }
        compare(table, KERNEL, f"S={num_sequences},G={group_size}", variants, rounds=3 if smoke else 30)
