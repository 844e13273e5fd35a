"""A process of a job whose rank 1 is killed in the middle of an update. Usage: torchrun … dies.py DIRECTORY"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from scenario import OBJECTIVE, TRAIN, batches_of, with_logprobs

from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    learner = MegatronLearner.from_pretrained(sys.argv[1], Layout(tp=2), TRAIN, num_updates=1, reference=True)
    batches = with_logprobs(batches_of(True), learner)
    layer_runs = 0

    def die(*_: object) -> None:
        nonlocal layer_runs
        layer_runs += 1
        if layer_runs == 3 and dist.get_rank() == 1:
            print("rank 1 is killed now", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    learner.policy[0].decoder.layers[2].register_forward_hook(die)
    learner.update(batches, OBJECTIVE)
    print("the update came to its end", flush=True)


if __name__ == "__main__":
    main()
