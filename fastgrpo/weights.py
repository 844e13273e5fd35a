"""The policy's weights between learner and sampler."""

from __future__ import annotations

from fastgrpo.learner.protocol import Learner
from fastgrpo.sampler.protocol import Sampler


def share(learner: Learner, sampler: Sampler | None) -> None:
    """Let the sampler see the learner's newest weights; every rank calls it, also one that does not sample.

    A sampler on the learner's own tensors needs nothing moved. Any other takes them one whole tensor at a time.
    """
    if not learner.weights_are_shared:
        for name, tensor in learner.named_weights():
            if sampler is not None:
                sampler.load_weight(name, tensor)
    if sampler is not None:
        sampler.policy_version = learner.policy_version
