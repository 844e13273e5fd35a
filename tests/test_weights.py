"""Planning on paper, and an exchange between two models in one process; tests/sampler/vllm has real samplers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from builders import make_model

from fastgrpo.config import TrainConfig
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models import hf, storage
from fastgrpo.sampler.torch_sampler import TorchSampler
from fastgrpo.transfer_plan import RemoteSlice, WeightsError, describe, plan_transfers, volume
from fastgrpo.types import WeightSlice
from fastgrpo.weights import Exchange

FULL = (8, 4)


def held(rank: int, rows: slice, columns: slice = slice(0, 4), *, dtype=torch.float32, name="w"):
    """A rank's part of an (8, 4) tensor, in memory of its own."""
    tensor = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
    box = WeightSlice(name=name, full_shape=FULL, start=(rows.start, columns.start), tensor=tensor)
    return describe([box], rank)[0]


ALL, TOP, BOTTOM = slice(0, 8), slice(0, 4), slice(4, 8)


def boxes(pieces):
    return [(p.source.rank, p.target.rank, p.start, p.shape) for p in pieces]


def test_the_same_memory_is_shared_and_so_is_a_part_of_it():
    whole = torch.zeros(FULL)
    (learner,) = describe([WeightSlice(name="w", full_shape=FULL, start=(0, 0), tensor=whole)], 0)
    parts = [
        WeightSlice(name="w", full_shape=FULL, start=(0, 0), tensor=whole),
        WeightSlice(name="w", full_shape=FULL, start=(4, 0), tensor=whole[4:]),
        WeightSlice(name="w", full_shape=FULL, start=(0, 2), tensor=whole[:, 2:]),
    ]
    samplers = describe(parts, 0)
    assert plan_transfers([learner], samplers, 1 << 20).shared == tuple(samplers)


@pytest.mark.parametrize(
    "change",
    [{"start": (4, 0)}, {"tensor": torch.zeros(4, 4)}, {"rank": 1}],
    ids=["another part of it", "other memory", "another rank"],
)
def test_anything_else_is_not(change):
    whole = torch.zeros(FULL)
    (learner,) = describe([WeightSlice(name="w", full_shape=FULL, start=(0, 0), tensor=whole)], 0)
    rank = change.pop("rank", 0)
    box = WeightSlice(name="w", full_shape=FULL, start=(0, 0), tensor=whole[:4])
    plan = plan_transfers([learner], describe([replace(box, **change)], rank), 1 << 20)
    assert plan.shared == ()


def test_shards_are_put_together_from_the_ranks_that_hold_them():
    learners = [held(0, TOP), held(1, BOTTOM)]
    plan = plan_transfers(learners, [held(0, ALL)], 1 << 20)
    assert boxes(plan.copied) == [(0, 0, (0, 0), (4, 4))]
    assert [boxes(bucket) for bucket in plan.buckets] == [[(1, 0, (4, 0), (4, 4))]]


def test_a_shard_of_another_axis_takes_its_part_of_every_rank():
    learners = [held(0, TOP), held(1, BOTTOM)]
    plan = plan_transfers(learners, [held(0, ALL, slice(0, 2)), held(1, ALL, slice(2, 4))], 1 << 20)
    assert boxes(plan.copied) == [(0, 0, (0, 0), (4, 2)), (1, 1, (4, 2), (4, 2))]
    assert [boxes(bucket) for bucket in plan.buckets] == [[(1, 0, (4, 0), (4, 2)), (0, 1, (0, 2), (4, 2))]]


def test_copies_of_a_shard_share_the_sending():
    learners = [held(0, ALL), held(1, ALL)]
    plan = plan_transfers(learners, [held(2, ALL), held(3, ALL)], 1 << 20)
    assert boxes(plan.buckets[0]) == [(0, 2, (0, 0), (8, 4)), (1, 3, (0, 0), (8, 4))]


def test_a_bucket_bounds_what_every_rank_sends_and_receives():
    learners = [held(0, ALL), held(0, ALL, name="v")]
    row = 16  # bytes
    plan = plan_transfers(learners, [held(1, ALL), held(1, ALL, name="v")], 3 * row)
    assert [boxes(bucket) for bucket in plan.buckets] == [
        [(0, 1, (0, 0), (3, 4))],
        [(0, 1, (3, 0), (3, 4))],
        [(0, 1, (6, 0), (2, 4))],
        [(0, 1, (0, 0), (3, 4))],
        [(0, 1, (3, 0), (3, 4))],
        [(0, 1, (6, 0), (2, 4))],
    ]
    assert len(plan_transfers(learners, [held(1, ALL)], 1).buckets) == 8  # a row is never cut


def test_ranks_send_and_receive_at_the_same_time():
    """Piece after piece, rank 1 would wait for rank 0 and rank 3 for rank 2: three buckets."""
    learners = [held(rank, ALL, name=name) for rank in (0, 1) for name in "wv"]
    samplers = [held(rank, ALL, name=name) for rank in (2, 3) for name in "wv"]
    plan = plan_transfers(learners, samplers, volume(FULL) * 4)
    ends = [{(piece.source.rank, piece.target.rank) for piece in bucket} for bucket in plan.buckets]
    assert ends == [{(0, 2), (1, 3)}, {(1, 2), (0, 3)}]


def layers_of_70b(rank: int, tp: int, layers: range) -> list[RemoteSlice]:
    """A rank's part of Llama-3-70B's matrices, in memory of its own."""
    hidden, ffn, kv = 8192, 28672, 1024
    cut = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}  # name: the axis that tp cuts
    full = {"k": (kv, hidden), "v": (kv, hidden), "gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    parts = []
    for layer in layers:
        for name, axis in cut.items():
            shape, start = list(full.get(name, (hidden, hidden))), [0, 0]
            full_shape = tuple(shape)
            shape[axis] //= tp
            start[axis] = rank % tp * shape[axis]
            parts.append(
                RemoteSlice(
                    rank=rank,
                    index=len(parts),
                    name=f"{layer}.{name}",
                    full_shape=full_shape,
                    start=tuple(start),
                    shape=tuple(shape),
                    dtype=torch.bfloat16,
                    address=len(parts) << 32,
                    strides=(shape[1], 1),
                )
            )
    return parts


def test_many_ranks_need_hardly_more_buckets_than_the_busiest():
    """From tp=8 pp=8 to eight engines of tp=8."""
    learners = [
        part for rank in range(64) for part in layers_of_70b(rank, 8, range(rank // 8 * 10, rank // 8 * 10 + 10))
    ]
    samplers = [
        replace(part, address=part.address + 1) for rank in range(64) for part in layers_of_70b(rank, 8, range(80))
    ]
    limit = 256 << 20
    buckets = plan_transfers(learners, samplers, limit).buckets
    busiest: Counter[tuple[str, int]] = Counter()
    for bucket in buckets:
        load: Counter[tuple[str, int]] = Counter()
        for piece in bucket:
            load["send", piece.source.rank] += piece.num_bytes
            load["receive", piece.target.rank] += piece.num_bytes
        assert max(load.values()) <= limit
        busiest += load
    assert (len(buckets), round(max(busiest.values()) / limit)) == (77, 56)  # as docs/colocation.md says


def test_what_the_learner_does_not_hold_is_named():
    message = "w: the learner holds 16 of the 32 elements that rank 0's sampler needs of it"
    with pytest.raises(WeightsError, match=message):
        plan_transfers([held(1, TOP)], [held(0, ALL)], 1 << 20)
    with pytest.raises(WeightsError, match="v: the learner holds 0 of the 32"):
        plan_transfers([held(0, ALL)], [held(0, ALL, name="v")], 1 << 20)


def test_another_shape_is_named():
    other = replace(held(0, ALL), full_shape=(9, 4))
    with pytest.raises(WeightsError, match=r"w: \(9, 4\) in the learner and \(8, 4\) in the sampler"):
        plan_transfers([other], [held(0, ALL)], 1 << 20)


@pytest.fixture
def pair():
    """A learner, and a sampler on a copy of its model."""
    learner = TorchLearner(hf.prepare(make_model("qwen3", tied=True)), TrainConfig(), num_updates=1)
    sampler = TorchSampler(hf.prepare(make_model("qwen3", tied=True, seed=1)))
    return learner, sampler, torch.arange(2, 30)


def test_a_sampler_on_a_copy_is_kept_on_the_learners_weights(pair):
    learner, sampler, canary = pair
    exchange = Exchange(learner, sampler, bucket_bytes=1 << 20, canary=canary)
    with pytest.raises(WeightsError, match=r"model.embed_tokens.weight: the checksums of the learner \(rank 0\) and"):
        exchange.prove()
    exchange.share()
    theirs = {s.name: s.tensor for s in storage.weight_slices(sampler.model)}
    assert all(torch.equal(s.tensor, theirs[s.name]) for s in storage.weight_slices(learner.model))
    assert sampler.policy_version == learner.policy_version


def test_a_sampler_on_the_learners_model_needs_nothing(pair):
    learner, _, canary = pair
    exchange = Exchange(learner, TorchSampler(learner.model), bucket_bytes=1 << 20, canary=canary)
    exchange.share()
    assert (exchange.plan.copied, exchange.plan.buckets) == ((), ())
    assert len(exchange.plan.shared) == len(storage.weight_slices(learner.model))


def test_a_learner_that_moves_to_other_memory_is_named(pair):
    learner, _, _ = pair
    exchange = Exchange(learner, TorchSampler(learner.model), bucket_bytes=1 << 20)
    norm = learner.model.model.norm.weight
    norm.data = norm.data.clone()
    with pytest.raises(WeightsError, match=r"model.norm.weight: the learner of rank 0 has moved it to other memory"):
        exchange.share()


def test_a_sampler_that_computes_otherwise_is_found_by_the_canary(pair):
    learner, sampler, canary = pair
    exchange = Exchange(learner, sampler, bucket_bytes=1 << 20, canary=canary)
    for module in sampler.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-2
    with pytest.raises(WeightsError, match=r"the canary's logprobs differ by .* on rank 0, more than 2e-05"):
        exchange.share()
    exchange.canary_tolerance = 100.0
    exchange.share()
