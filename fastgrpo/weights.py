"""The policy's weights between learner and sampler."""

from __future__ import annotations

from fastgrpo.learner.protocol import Learner
from fastgrpo.sampler.protocol import Sampler


def share(learner: Learner, sampler: Sampler) -> None:
    """Let the sampler see the learner's newest weights.

    The torch sampler runs the learner's own module, so nothing moves; what changes is the version on its rollouts.
    """
    sampler.policy_version = learner.policy_version
