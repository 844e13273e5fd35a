"""From logits to tokens: temperature, top-k, top-p, and the logprob of what was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.types import LogprobContract, Prompt, SamplingParams

UNITS = 1 << 52
"""In which draws count a probability of 1."""


def contract_of(params: SamplingParams) -> LogprobContract:
    """What `draw`'s logprobs mean."""
    cut = params.top_p < 1.0 or params.top_k > 0 or params.min_new_tokens > 0
    return LogprobContract(
        temperature=params.temperature or 1.0, top_p=params.top_p, top_k=params.top_k, renormalized=cut
    )


def max_new_tokens(prompt: Prompt, params: SamplingParams) -> int:
    """The most tokens a completion of this prompt may have."""
    own = prompt.max_new_tokens
    return params.max_new_tokens if own is None else min(own, params.max_new_tokens)


def draw(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution at `uniforms`.

    logits: (A, V) any float dtype; uniforms: (A,) in [0, 1); forbidden: token ids that cannot be drawn.
    Returns tokens (A,) int64 and their float32 logprobs (A,) under `contract_of(params)`; greedy logprobs are those
    of temperature 1.
    """
    scores = logits.float()
    if params.temperature not in (0.0, 1.0):
        scores = scores / params.temperature
    if forbidden is not None:
        scores = scores.index_fill(-1, forbidden, float("-inf"))
    if params.temperature == 0.0:
        logprobs = scores.log_softmax(-1)
        tokens = scores.argmax(-1)
    else:
        logprobs = _cut(scores.log_softmax(-1), params)
        cumulative = _in_units(logprobs).cumsum_(-1)
        target = (uniforms.double()[:, None] * cumulative[:, -1:]).long()
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _in_units(logprobs: Tensor) -> Tensor:
    """Probabilities as int64 counts of 2^-52, whose sums are exact. A float32 sum over a vocabulary of 152k misplaces
    the rare tokens, and a GPU's sum of floats has no fixed order, which torch's deterministic mode refuses."""
    return logprobs.exp().double().mul_(UNITS).long()


def _cut(logprobs: Tensor, params: SamplingParams) -> Tensor:
    """Keep the top_k likeliest tokens, then the smallest set of them whose probability reaches top_p."""
    vocabulary = logprobs.shape[-1]
    if (params.top_k <= 0 or params.top_k >= vocabulary) and params.top_p >= 1.0:
        return logprobs
    ordered, order = logprobs.sort(-1, descending=True)
    if 0 < params.top_k < vocabulary:
        ordered[:, params.top_k :] = float("-inf")
        ordered = ordered.log_softmax(-1)
    probability = _in_units(ordered)
    before = probability.cumsum(-1) - probability  # of the tokens likelier than this one: the first is always kept
    ordered = ordered.masked_fill(before >= round(params.top_p * UNITS), float("-inf"))
    return torch.empty_like(logprobs).scatter_(-1, order, ordered).log_softmax(-1)
