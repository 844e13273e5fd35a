"""A surrogate of the user's own: found by path, and tried on a few made-up tokens before anything loads."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from fastgrpo.config import AlgorithmConfig, UserError
from fastgrpo.functions.inline import Inline
from fastgrpo.functions.loading import listed
from fastgrpo.kernels.custom_terms import CustomTerms, custom_terms
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective, SurrogateInputs, SurrogateValues

KEY = "algorithm.surrogate"
ALWAYS = ("logprobs", "ratio", "advantages", "old_logprobs")
ON_DEMAND = ("ref_logprobs", "sampler_logprobs", "entropy", "sequences")
TRIAL_LENGTHS = (3, 1, 4, 2, 6)
METRIC_NAME = r"[\w./ -]+"  # what every tracker takes


def load(config: AlgorithmConfig) -> CustomSurrogate:
    """The function that algorithm.surrogate names, as the kernels take it; its metrics are not known yet.

    It is given what it asks for of SurrogateInputs' fields by parameter name, and returns the surrogate of each token
    (n,), or a pair of that and {name: (n,)} to be reported. Raises UserError where it cannot be called so.
    """
    function = Inline(config.surrogate, KEY, config.surrogate_kwargs, ALWAYS + ON_DEMAND)

    def call(inputs: SurrogateInputs) -> SurrogateValues:
        result = function(vars(inputs))
        value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(metrics, dict):
            raise UserError(f"{function.where} returned a pair whose second is no dictionary of names and values")
        for name, given in {"its value": value, **metrics}.items():
            if not isinstance(given, torch.Tensor) or given.shape != inputs.logprobs.shape:
                what = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                raise UserError(
                    f"{function.where}: {name} is {what}; return ({len(inputs.logprobs)},), one a token of these"
                )
        return value, metrics

    return CustomSurrogate(name=config.surrogate, function=call, asks=function.asks.intersection(ON_DEMAND))


def tried(objective: Objective) -> Objective:
    """The objective, its surrogate's metrics known. Raises UserError where the surrogate breaks its contract on made-up
    tokens: not a value a token, not finite, without a gradient, or another value beside others or at another call.

    The policy is a little off the others, then equals them, as on-policy: a mask may leave a gradient, and a root be
    finite, in one of the two alone."""
    custom = objective.custom
    assert custom is not None
    where = f"{KEY}={custom.name}"
    names: list[str] = []

    def noting(inputs: SurrogateInputs) -> SurrogateValues:
        value, metrics = custom.function(inputs)
        names[:] = metrics
        return value, metrics

    def same_names(inputs: SurrogateInputs) -> SurrogateValues:
        value, metrics = custom.function(inputs)
        if metrics.keys() != set(names):
            now, then = listed(metrics), listed(names)
            raise UserError(f"{where} reports {now} where it has reported {then}; report the same at every call")
        return value, metrics

    batch, log_p, entropy = _trial_batch()
    on_policy = replace(batch, old_logprobs=None, ref_logprobs=log_p, sampler_logprobs=log_p)
    whole = _terms(batch, log_p, entropy, replace(objective, surrogate=replace(custom, function=noting)))
    for name in names:
        if not isinstance(name, str) or re.fullmatch(METRIC_NAME, name) is None:
            raise UserError(f"{where} reports {name!r}; name it with letters, digits, spaces and any of _ . / -")
    objective = replace(objective, surrogate=replace(custom, function=same_names, metrics=tuple(names)))
    again = _terms(batch, log_p, entropy, objective)
    agreeing = _terms(on_policy, log_p, entropy, objective)
    for terms, when in (
        (whole, "common logprobs and advantages, 0 among both"),
        (agreeing, "a policy that equals the old one"),
    ):
        if not all(bool(x.isfinite().all()) for x in (terms.value, terms.grad_logprob)):
            raise UserError(f"{where}: a value or its gradient is not finite for {when}; mend the function")
    if not _same(whole, again.value, again.grad_logprob):
        raise UserError(f"{where}: its value is another at every call; draw nothing at random and keep no state")
    if not (whole.grad_logprob.any() or agreeing.grad_logprob.any()):
        raise UserError(f"{where}: nothing is learned from it; compute it from `logprobs` or `ratio`, undetached")
    cut = sum(TRIAL_LENGTHS[:3]) if objective.relates_tokens else 5
    parts = []
    for span in ((0, cut), (cut, len(log_p))):
        part = batch.tokens_from(*span)
        assert part.cu_seqlens is not None
        alone = replace(part, cu_seqlens=part.cu_seqlens.unique())
        parts.append(_terms(alone, log_p[slice(*span)], entropy[slice(*span)], objective))
    if not _same(whole, torch.cat([part.value for part in parts]), torch.cat([part.grad_logprob for part in parts])):
        relate = "take means and sums with `sequences`" if objective.relates_tokens else "ask for `sequences`"
        raise UserError(
            f"{where}: a token's value depends on which others are computed beside it, so micro-batches would "
            f"change the gradient; {relate} to relate the tokens of a completion, and relate no others"
        )
    return objective


def _same(terms: CustomTerms, value: torch.Tensor, grad_logprob: torch.Tensor) -> bool:
    pairs = ((terms.value, value), (terms.grad_logprob, grad_logprob))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


def _terms(batch: LossInputs, log_p: torch.Tensor, entropy: torch.Tensor, objective: Objective) -> CustomTerms:
    return custom_terms(log_p, entropy, batch, objective, batch.token_weights)


def _trial_batch() -> tuple[LossInputs, torch.Tensor, torch.Tensor]:
    """A few completions, the policy a little off the old one; the batch, logprobs and entropies. As in any run, a token
    is certain and a completion has advantage 0."""
    rng = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *TRIAL_LENGTHS]).cumsum(0)
    num_tokens = int(cu[-1])

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(num_tokens, generator=rng)

    log_p, entropy = -0.1 - normal(1.0).abs(), normal(1.0).abs()
    log_p[0] = entropy[0] = 0.0
    others: dict[str, Any] = {
        name: (log_p + normal(0.2)).clamp(max=-1e-3) for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    }
    advantages = torch.randn(len(TRIAL_LENGTHS), generator=rng)
    advantages[-2] = 0.0
    batch = LossInputs(
        targets=torch.zeros(num_tokens, dtype=torch.int64),
        advantages=advantages.repeat_interleave(torch.tensor(TRIAL_LENGTHS)),
        token_weights=torch.full((num_tokens,), 1.0 / num_tokens),
        cu_seqlens=cu,
        **others,
    )
    return batch, log_p, entropy
