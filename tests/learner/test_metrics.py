"""Sums over micro-batches, and the means they become."""

import math

import pytest
import torch

from fastgrpo.kernels.objective import LossOutput
from fastgrpo.learner.metrics import LossSums
from fastgrpo.types import PackedBatch

COUNTS = ("num_tokens", "ratio_sum", "old_kl_sum", "clip_low_count", "clip_high_count")


def batch_of(sampler, old=None, weights=None) -> PackedBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    places = dict.fromkeys(("token_ids", "position_ids", "segments", "hidden_rows", "targets", "sequence_ids"), empty)
    return PackedBatch(
        **places,
        advantages=torch.zeros(len(sampler)),
        token_weights=torch.ones(len(sampler)),
        cu_scored=torch.tensor([0, len(sampler)]),
        sampler_logprobs=torch.tensor(sampler).log(),
        old_logprobs=None if old is None else torch.tensor(old).log(),
        importance_weights=None if weights is None else torch.tensor(weights),
    )


def output_of(probabilities) -> LossOutput:
    metrics = {name: torch.tensor(0.0) for name in COUNTS}
    metrics["num_tokens"] = torch.tensor(float(len(probabilities)))
    return LossOutput(loss=torch.tensor(0.0), logprobs=torch.tensor(probabilities).log(), entropy=None, metrics=metrics)


def test_mismatch_of_the_sampler_over_two_micro_batches():
    sums = LossSums()
    sums.add(output_of([0.5, 0.2]), batch_of([0.25, 0.2]))  # ratios 2 and 1
    sums.add(output_of([0.1]), batch_of([0.2]))  # 1/2
    means = sums.means()
    log2 = math.log(2)
    assert means["sampler_mismatch/mean_abs"] == pytest.approx(2 * log2 / 3, rel=1e-6)
    assert means["sampler_mismatch/max_abs"] == pytest.approx(log2, rel=1e-6)
    # k3 = r - 1 - log r: 1 - log 2, 0, log 2 - 1/2
    assert means["sampler_mismatch/kl"] == pytest.approx(0.5 / 3, rel=1e-5)
    assert means["sampler_mismatch/ess"] == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-6)


def test_where_the_policy_has_moved_the_old_logprobs_are_compared():
    sums = LossSums()
    sums.add(output_of([0.9]), batch_of([0.25], old=[0.25], weights=[0.0]))
    means = sums.means()
    assert means["sampler_mismatch/max_abs"] == 0.0
    assert means["sampler_mismatch/ess"] == 1.0
    assert (means["importance/mean"], means["importance/masked_fraction"]) == (0.0, 1.0)
