"""From logits to tokens, with literal distributions."""

import math

import pytest
import torch

from fastgrpo.sampler.draw import contract_of, draw
from fastgrpo.types import SamplingParams

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


def drawn(params, uniforms, logits=LOGITS, forbidden=None):
    tokens, logprobs = draw(logits.expand(len(uniforms), -1), torch.tensor(uniforms), params, forbidden)
    return tokens.tolist(), [round(math.exp(x), 4) for x in logprobs.tolist()]


def test_a_uniform_number_picks_the_token_whose_share_it_falls_into():
    assert drawn(SamplingParams(), [0.0, 0.499, 0.501, 0.749, 0.751, 0.999]) == (
        [0, 0, 1, 1, 2, 3],
        [0.5, 0.5, 0.25, 0.25, 0.125, 0.125],
    )


def test_temperature_sharpens_and_the_logprob_knows():
    # squares of the probabilities, normalised: 16/22, 4/22, 1/22, 1/22
    assert drawn(SamplingParams(temperature=0.5), [0.0, 0.73]) == ([0, 1], [0.7273, 0.1818])


def test_greedy_takes_the_likeliest_with_its_logprob_at_temperature_one():
    assert drawn(SamplingParams(temperature=0.0), [0.99]) == ([0], [0.5])


@pytest.mark.parametrize(
    ("params", "tokens", "shares"),
    [
        (SamplingParams(top_k=2), [0, 1], [0.6667, 0.3333]),
        (SamplingParams(top_p=0.75), [0, 1], [0.6667, 0.3333]),
        (SamplingParams(top_p=0.5), [0, 0], [1.0, 1.0]),
        (SamplingParams(top_p=0.51), [0, 1], [0.6667, 0.3333]),
        (SamplingParams(top_p=1e-9), [0, 0], [1.0, 1.0]),
        (SamplingParams(top_k=3, top_p=0.8), [0, 1], [0.6667, 0.3333]),
        (SamplingParams(top_k=100), [0, 3], [0.5, 0.125]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest_and_renormalise(params, tokens, shares):
    assert drawn(params, [0.0, 0.999]) == (tokens, shares)


def test_forbidden_tokens_are_never_drawn():
    tokens, shares = drawn(SamplingParams(), [0.0, 0.999], forbidden=torch.tensor([0, 3]))
    assert tokens == [1, 2]
    assert shares == [0.6667, 0.3333]


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    tokens, _ = drawn(SamplingParams(), [0.0, 0.4999, 0.5, 0.9999999], logits)
    assert tokens == [1, 1, 3, 3]


def test_frequencies_are_the_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    tokens, _ = draw(logits.expand(40000, -1), torch.rand(40000), SamplingParams())
    expected = logits[0].softmax(-1)
    observed = torch.bincount(tokens, minlength=40) / 40000
    assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / 40000).sqrt() + 1e-9).all()


def test_the_contract_says_what_the_logprobs_mean():
    assert not contract_of(SamplingParams(temperature=0.7)).renormalized
    assert contract_of(SamplingParams(temperature=0.7)).temperature == 0.7
    for cut in ({"top_p": 0.9}, {"top_k": 5}, {"min_new_tokens": 3}):
        assert contract_of(SamplingParams(**cut)).renormalized
