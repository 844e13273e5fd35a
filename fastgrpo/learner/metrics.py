"""What an update's micro-batches say together: sums on the device, read once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.objective import LossOutput
from fastgrpo.types import PackedBatch


class LossSums:
    """Adds the losses' sums and counts over micro-batches and turns them into means."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.sums: dict[str, Tensor] = {}
        self.largest_mismatch: Tensor | None = None

    def add(self, output: LossOutput, batch: PackedBatch) -> None:
        self.num_batches += 1
        mismatch = (output.logprobs - batch.sampler_logprobs).abs()
        sums = {**output.metrics, "loss": output.loss.detach(), "mismatch": mismatch.sum()}
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        largest = mismatch.max()
        self.largest_mismatch = largest if self.largest_mismatch is None else self.largest_mismatch.maximum(largest)

    def means(self) -> dict[str, float]:
        """The loss, and per-token means; {"loss": 0.0} where there was nothing to learn."""
        if not self.num_batches:
            return {"loss": 0.0}
        assert self.largest_mismatch is not None
        read = torch.stack([*(v.float() for v in self.sums.values()), self.largest_mismatch.float()]).tolist()
        sums, largest = dict(zip(self.sums, read, strict=False)), read[-1]
        count = max(1.0, sums["num_tokens"])
        low, high = sums["clip_low_count"] / count, sums["clip_high_count"] / count
        means = {
            "loss": sums["loss"],
            "ratio/mean": sums["ratio_sum"] / count,
            "kl/old": sums["old_kl_sum"] / count,
            "clip_fraction": low + high,
            "clip_fraction/low": low,
            "clip_fraction/high": high,
            "sampler_mismatch/mean_abs": sums["mismatch"] / count,
            "sampler_mismatch/max_abs": largest,
        }
        if "entropy_sum" in sums:
            means["entropy"] = sums["entropy_sum"] / count
        if "kl_sum" in sums:
            means["kl"] = sums["kl_sum"] / count
        return means
