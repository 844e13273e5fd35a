"""When the KL term's reference follows the policy."""

from __future__ import annotations

from fastgrpo.config import ReferenceConfig


def policy_share(config: ReferenceConfig, step: int) -> float:
    """How far the reference moves to the policy after `step` (1-based): reference += share * (policy - reference).

    0 keeps it, 1 replaces it (iterative GRPO, arXiv 2402.03300, Algorithm 1), between is an exponential moving average.
    """
    if config.schedule == "refresh":
        return 1.0 if step % config.refresh_every == 0 else 0.0
    if config.schedule == "ema":
        return 1.0 - config.ema_decay
    assert config.schedule == "fixed", config.schedule
    return 0.0
