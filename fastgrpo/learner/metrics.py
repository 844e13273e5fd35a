"""What an update's micro-batches say together: sums on the device, read once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.objective import MAX_LOG_RATIO, LossOutput
from fastgrpo.types import PackedBatch

MISMATCH_SUMS = ("mismatch_abs", "mismatch_kl", "mismatch_ratio", "mismatch_ratio_squared")
IMPORTANCE_SUMS = ("importance", "importance_zero_count")


class LossSums:
    """Adds the losses' sums and counts over micro-batches and turns them into means."""

    def __init__(self) -> None:
        self.num_batches = 0
        self.sums: dict[str, Tensor] = {}
        self.largest_mismatch: Tensor | None = None

    def add(self, output: LossOutput, batch: PackedBatch) -> None:
        self.num_batches += 1
        # Later updates on the same rollouts move the policy: that is no mismatch, so the old logprobs are compared.
        learner = output.logprobs if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = learner - batch.sampler_logprobs
        sums = {**output.metrics, "loss": output.loss.detach(), **_mismatch(log_ratio)}
        if batch.importance_weights is not None:
            sums["importance"] = batch.importance_weights.sum()
            sums["importance_zero_count"] = (batch.importance_weights == 0).sum()
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        largest = log_ratio.abs().max()
        self.largest_mismatch = largest if self.largest_mismatch is None else self.largest_mismatch.maximum(largest)

    def means(self) -> dict[str, float]:
        """The loss, and per-token means; {"loss": 0.0} where there was nothing to learn."""
        if not self.num_batches:
            return {"loss": 0.0}
        assert self.largest_mismatch is not None
        read = torch.stack([*(v.float() for v in self.sums.values()), self.largest_mismatch.float()]).tolist()
        sums, largest = dict(zip(self.sums, read, strict=False)), read[-1]
        count = max(1.0, sums["num_tokens"])
        means = {
            "loss": sums["loss"],
            "ratio/mean": sums["ratio_sum"] / count,
            "kl/old": sums["old_kl_sum"] / count,
            "sampler_mismatch/mean_abs": sums["mismatch_abs"] / count,
            "sampler_mismatch/max_abs": largest,
            "sampler_mismatch/kl": sums["mismatch_kl"] / count,
            "sampler_mismatch/ess": sums["mismatch_ratio"] ** 2 / (count * sums["mismatch_ratio_squared"]),
        }
        if "clip_low_count" in sums:
            low, high = sums["clip_low_count"] / count, sums["clip_high_count"] / count
            means |= {"clip_fraction": low + high, "clip_fraction/low": low, "clip_fraction/high": high}
        if "entropy_sum" in sums:
            means["entropy"] = sums["entropy_sum"] / count
        if "kl_sum" in sums:
            means["kl"] = sums["kl_sum"] / count
        if "importance" in sums:
            means["importance/mean"] = sums["importance"] / count
            means["importance/masked_fraction"] = sums["importance_zero_count"] / count
        return means | {name: total / count for name, total in sums.items() if name.startswith("surrogate/")}


def _mismatch(log_ratio: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens of learner - sampler log-probabilities.

    mismatch_kl is k3 of the sampler's distribution to the learner's (http://joschu.net/blog/kl-approx.html): its
    expectation is KL(sampler || learner) and it is never negative. The ratios' first two moments give the effective
    sample size (sum r)^2 / (N sum r^2), 1 where both agree.
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "mismatch_abs": log_ratio.abs().sum(),
        "mismatch_kl": (ratio - 1 - log_ratio).sum(),
        "mismatch_ratio": ratio.sum(),
        "mismatch_ratio_squared": ratio.square().sum(),
    }
