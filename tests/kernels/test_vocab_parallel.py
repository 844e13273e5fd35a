"""Vocabulary shards on 2 and 4 real processes over gloo: equal to the whole, with a single all-gather."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import FORKSERVER

from fastgrpo.kernels import reference, vocab_parallel
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.logprobs import TorchLogprobRows, TritonLogprobRows
from fastgrpo.kernels.vocab_parallel import VocabShard
from fastgrpo.verify import cases, oracle

VOCAB_SIZE, PADDED = 613, 640  # the last of four shards is mostly padding


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _both_ops(case, weight, objective, **options):
    """Loss, logprobs and gradients of the policy loss; then logprobs, entropies and gradients of linear_logprobs."""
    out = linear_policy_loss(case.hidden, weight, case.batch, objective, chunk_size=7, vocab_size=VOCAB_SIZE, **options)
    policy = (out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, (case.hidden, weight)))
    targets = torch.where(case.batch.token_weights != 0, case.batch.targets, -100)
    pair = linear_logprobs(
        case.hidden, weight, targets, entropy=True, chunk_size=7, vocab_size=VOCAB_SIZE, temperature=0.9, **options
    )
    total = pair[0].sum() + 0.3 * pair[1].sum()
    return *policy, pair[0].detach(), pair[1].detach(), *torch.autograd.grad(total, (case.hidden, weight))


def _worker(rank, world, port, names, dtype, backend, results):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    gathers = []
    gather = vocab_parallel._all_gather
    vocab_parallel._all_gather = lambda *args, **kwargs: (gathers.append(1), gather(*args, **kwargs))[1]
    answers = {}
    for name in names:
        objective = cases.OBJECTIVES[name]
        case, weight = _case(objective, dtype)
        size = PADDED // world
        shard = weight[rank * size : (rank + 1) * size].clone().requires_grad_()
        gathers.clear()
        out = _both_ops(case, shard, objective, tp_group=dist.group.WORLD, backend=backend)
        answers[name] = [x.detach() for x in out], len(gathers)
    results[rank] = answers
    dist.destroy_process_group()


def _case(objective, dtype):
    case = cases.make_case(
        num_tokens=16, hidden_size=16, vocab_size=VOCAB_SIZE, dtype=dtype, mask="scattered", temperature=0.9
    )
    padding = torch.full((PADDED - VOCAB_SIZE, 16), 40.0, dtype=dtype)
    return case, torch.cat([case.weight.detach(), padding])


@pytest.mark.parametrize(
    ("world", "dtype", "backend", "names"),
    [
        (2, torch.float64, "torch", ["clip higher", "clip, sequence (GSPO)", "cispo, sequence"]),
        (4, torch.float64, "torch", ["dual clip", "sapo, sequence", "one's own"]),
        (2, torch.float32, "triton", ["clip higher", "clip, sequence (GSPO)", "one's own, sequence"]),
        (4, torch.float32, "triton", ["dual clip"]),
        (2, torch.float16, "triton", ["clip higher", "clip, sequence (GSPO)"]),
    ],
)
def test_shards_equal_the_whole(world, dtype, backend, names):
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (world, _free_port(), names, dtype, backend, results)
        mp.start_processes(_worker, arguments, nprocs=world, start_method=FORKSERVER.get_start_method())
        answers = [results[rank] for rank in range(world)]
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    for name in names:
        objective = cases.OBJECTIVES[name]
        case, weight = _case(objective, dtype)
        if dtype == torch.float16:  # against a shard's rounding, another's is no measure
            exact, weight = oracle.oracle_inputs(case), weight.double()
            want = [x.detach() for x in _both_ops(exact, weight.requires_grad_(), objective)]
        else:
            want = [x.detach() for x in _both_ops(case, weight.requires_grad_(), objective, backend=backend)]
        whole = [rank[name][0] for rank in answers]
        for position, value in enumerate(want):
            if value.shape == weight.shape:
                got = torch.cat([rank[position] for rank in whole])
            else:
                got = whole[0][position]
                for rank in whole[1:]:
                    assert torch.equal(rank[position], got)  # every rank computes the same bits
            if got.dtype == torch.float16:  # a gradient
                assert oracle.relative(got, value) <= 5e-3
            else:
                torch.testing.assert_close(got, value.to(got.dtype), **tolerance)
        # one all-gather a unit of the policy loss (chunks of 7, or sequences), one for all of linear_logprobs
        assert all(rank[name][1] <= 4 for rank in answers)


def _rows_of_shard(backend, targets, shard, tile):
    if backend == "torch":
        return TorchLogprobRows(targets, shard, tile, temperature=1.0, entropy=True, finite=False)
    return TritonLogprobRows(targets, shard, lambda tile, _: torch.empty_like(tile), temperature=0.5, entropy=True)


@pytest.mark.parametrize(("backend", "temperature"), [("torch", 1.0), ("triton", 0.5)])
@pytest.mark.parametrize(
    "largest", [(3e38, -3e38), (-3e38, 3e38), (1e4, -1e4), (-200.0, -201.0), (0.0, float("-inf"))], ids=str
)
def test_shards_whose_logits_lie_far_apart(backend, temperature, largest):
    """Two shards in one process, the largest logits so far apart that the distance times 2 is infinite."""
    targets, span = torch.tensor([0, 1, 49]), (0, 3)
    tiles = [value + torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) for value in largest]
    exact = torch.cat(tiles, 1).double().requires_grad_()
    want = reference.logprobs(exact, targets, temperature=temperature, entropy=True)
    (want_grad,) = torch.autograd.grad(want[0].sum() + 2.0 * want[1].sum(), exact)

    shards = [VocabShard(None, rank, 2, 50 * rank, 50, 100) for rank in range(2)]
    rows = [_rows_of_shard(backend, targets, shard, tile) for shard, tile in zip(shards, tiles, strict=True)]
    gathered = torch.stack([row.statistics(tile, span) for row, tile in zip(rows, tiles, strict=True)])
    gradients = []
    for row, tile in zip(rows, tiles, strict=True):
        got = row.finish(gathered)
        row.resume(row.state(), torch.ones(3), torch.full((3,), 2.0))
        gradients.append(row.gradient(tile.clone(), span))
    for mine, exactly in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exactly.float(), rtol=1e-6, atol=5e-6)  # -6e38 is float32's -inf
    torch.testing.assert_close(torch.cat(gradients, 1).double(), want_grad, rtol=1e-4, atol=5e-5)
