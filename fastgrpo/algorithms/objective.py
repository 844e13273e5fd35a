"""The configured objective, as the kernels take it."""

from __future__ import annotations

from fastgrpo.algorithms import custom_surrogate
from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.functions.inline import is_path
from fastgrpo.kernels.objective import Objective


def objective_of(algorithm: AlgorithmConfig, *, temperature: float) -> Objective:
    """The configured objective. Raises UserError where a value is out of range, or a surrogate of the user's own breaks
    its contract."""
    own = is_path(algorithm.surrogate)
    try:
        objective = Objective(
            surrogate=custom_surrogate.load(algorithm) if own else algorithm.surrogate,
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
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error).replace("Objective.", "algorithm.")) from None
    return custom_surrogate.tried(objective) if own else objective


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether a run needs the reference policy, known before there is an objective."""
    return algorithm.kl_coef > 0 or (
        is_path(algorithm.surrogate) and "ref_logprobs" in custom_surrogate.load(algorithm).asks
    )
