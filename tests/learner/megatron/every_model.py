"""Every family of models, with a head of its own and a tied one, in the layouts of scenario.EVERY_MODEL: for job.py.

What a layout's place in job.py's cases does not repeat for each model: no saving, offloading or recomputation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from observe import by_token, gradients, gradients_of_packing, share_of
from scenario import EVERY_MODEL, NUM_STEPS, OBJECTIVE, batches_of, train_config, with_logprobs

from fastgrpo.learner.megatron import parallel
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner


def run_all(directory: Path) -> dict[str, dict[str, Any]]:
    """By layout and model, the keys of job.run that the torch learner has too."""
    results = {}
    for layout, models in EVERY_MODEL[dist.get_world_size()].items():
        for model in models:  # one after the other in the same process groups
            results[f"{model} {layout}"] = run(model, layout, directory / model)
        parallel.destroy()
    return results


def run(model: str, layout: Layout, path: Path) -> dict[str, Any]:
    learner = MegatronLearner.from_pretrained(
        str(path), layout, train_config(model), num_updates=NUM_STEPS + 1, reference=True
    )
    source = from_directory(path)
    start = list(learner.named_weights())
    batches = with_logprobs(batches_of(True), learner)
    mine = share_of(batches, learner)
    return {
        "names": [name for name, _ in start],
        "not_exact": [name for name, tensor in start if not torch.equal(tensor, source(name))],
        "logprobs": by_token(batches, learner.logprobs_of(batches, temperature=0.7)),
        "gradients": gradients(learner, mine),
        "gradients_of_the_other_packing": gradients_of_packing(learner, False, experts=False),
        "steps": [vars(learner.update(mine, OBJECTIVE)) for _ in range(NUM_STEPS)],
        "weights": {name: tensor.clone() for name, tensor in learner.named_weights()},
    }
