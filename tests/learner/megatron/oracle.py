"""What the torch learner computes in the scenario, and how far another result is from it."""

from __future__ import annotations

from typing import Any

import scenario
import torch
from observe import by_token

from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.storage import as_saved


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def largest_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error over named tensors, and whose it is."""
    assert actual.keys() == expected.keys()
    return max((error(actual[name], expected[name]), name) for name in expected)


def in_checkpoint(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names of a checkpoint, where experts are not stacked."""
    return {name: part for key, tensor in tensors.items() for name, part in as_saved(key, tensor)}


def torch_result(name: str) -> dict[str, Any]:
    """The same keys as a case of job.py."""
    model, reference = scenario.model_of(name), scenario.model_of(name)
    learner = TorchLearner(model, scenario.train_config(name), num_updates=scenario.NUM_STEPS + 1, reference=reference)
    batches = scenario.with_logprobs(scenario.batches_of(True, experts=name.endswith("-told")), learner)
    result: dict[str, Any] = {
        "names": list(in_checkpoint(dict(learner.named_weights()))),
        "logprobs": by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches]),
    }
    gradients: dict[str, torch.Tensor] = {}
    handles = [  # update() clears the gradients, so they are caught before it clips them
        param.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
        for name, param in model.named_parameters()
    ]
    result["steps"] = [vars(learner.update(batches, scenario.OBJECTIVE))]
    for handle in handles:
        handle.remove()
    result["gradients"] = in_checkpoint(gradients)
    learner.move_reference(0.5)
    result["steps"] += [vars(learner.update(batches, scenario.OBJECTIVE)) for _ in range(scenario.NUM_STEPS - 1)]
    result["weights"] = in_checkpoint({name: tensor.detach().clone() for name, tensor in learner.named_weights()})
    after = [learner.logprobs(batch, temperature=1.0, reference=True) for batch in batches]
    result["reference"] = by_token(batches, after)
    return result
