"""The configured objective, as the kernels take it."""

from __future__ import annotations

from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.kernels.objective import Objective


def objective_of(algorithm: AlgorithmConfig, *, temperature: float) -> Objective:
    """The configured objective. Raises UserError where a value is out of range."""
    try:
        return Objective(
            surrogate=algorithm.surrogate,
            ratio_level=algorithm.ratio_level,
            clip_ratio_low=algorithm.clip_ratio_low,
            clip_ratio_high=algorithm.clip_ratio_high,
            dual_clip=algorithm.dual_clip,
            sapo_tau_pos=algorithm.sapo_tau_pos,
            sapo_tau_neg=algorithm.sapo_tau_neg,
            kl_coef=algorithm.kl_coef,
            kl_estimator=algorithm.kl_estimator,
            kl_times_ratio=algorithm.kl_times_ratio,
            entropy_coef=algorithm.entropy_coef,
            temperature=temperature,
        )
    except ValueError as error:
        raise UserError(str(error).replace("Objective.", "algorithm.")) from None
