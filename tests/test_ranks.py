"""Processes of a job tell each other what they hold."""

import os
import socket
from unittest.mock import patch

import torch
import torch.distributed as dist
from processes import FORKSERVER

from fastgrpo import ranks as module
from fastgrpo.ranks import Ranks, join_job

PIECE_BYTES = 700


def of_rank(rank: int, port: int, results) -> None:
    """Two data ranks of two ranks each: 0 and 2 lead, the second of them for the first data rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "4"}
    dist.init_process_group("gloo")
    ranks = Ranks(rank=rank, num_ranks=4, data_rank=1 - rank // 2, num_data_ranks=2, leads=rank % 2 == 0)
    with (
        patch.object(module, "PIECE_BYTES", PIECE_BYTES),
        patch.object(dist, "broadcast", wraps=dist.broadcast) as sent,
    ):
        gathered = ranks.gather({"of": rank, "padding": b"x" * 1000 * rank} if ranks.leads else None)
    found = {
        "gather": gathered,
        "sent": [call.args[0].nbytes for call in sent.call_args_list],
        "everyone": ranks.everyone(rank * rank),
        "any_of": ranks.any_of(f"rank {rank}" if rank > 1 else None),
        "from_main": ranks.from_main(rank + 10),
    }
    results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def test_what_ranks_tell_each_other():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORKSERVER.Queue()
    processes = [FORKSERVER.Process(target=of_rank, args=(rank, port, results)) for rank in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    for of_one in found:
        assert [(part["of"], len(part["padding"])) for part in of_one["gather"]] == [(2, 2000), (0, 0)]
        assert len(of_one["sent"]) > 3
        assert max(of_one["sent"]) == PIECE_BYTES  # of a device's memory
        assert of_one["everyone"] == [0, 1, 4, 9]
        assert (of_one["any_of"], of_one["from_main"]) == ("rank 2", 10)


def test_a_process_alone_needs_nobody():
    ranks = Ranks()
    assert (ranks.gather("a"), ranks.everyone("a"), ranks.any_of(None), ranks.from_main(3)) == (["a"], ["a"], None, 3)


def test_shares_cost_alike_and_keep_their_order():
    shares = Ranks(num_data_ranks=2).deal([5, 1, 4, 2], cost=float)
    assert shares == [[5, 1], [4, 2]]


def test_the_devices_environment_is_set_before_it_is_used(monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(dict(os.environ)))
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    join_job()
    assert seen[0]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
