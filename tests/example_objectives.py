"""Surrogates and advantages that tests name by path."""

import itertools

import torch

calls = itertools.count()


def clip(logprobs, old_logprobs, advantages, ref_logprobs, width=0.2, kl_coef=0.04):
    """The built-in clip and k3, once more."""
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - width, 1 + width) * advantages)
    drift = ref_logprobs - logprobs
    clipped = torch.where(advantages > 0, ratio > 1 + width, (ratio < 1 - width) & (advantages < 0))
    return -gain + kl_coef * (drift.exp() - drift - 1), {"clipped": clipped}


def geometric_mean(ratio, advantages, sequences, entropy, ref_logprobs, sampler_logprobs, logprobs):
    """Whatever can be asked for."""
    mean = sequences.mean(ratio.log().clamp(-0.2, 0.2)).exp() * (1 + 0.01 * entropy)
    held = 0.1 * (logprobs - ref_logprobs).square() + 0.1 * (logprobs - sampler_logprobs).square()
    return held - mean * advantages * sequences.lengths.sqrt(), {"long": sequences.lengths > 3}


def standardised(rewards, batch_rewards, lengths, truncated, answer):
    """The built-in std, once more, a number a token."""
    assert len(batch_rewards) >= len(rewards) == len(truncated)
    std = rewards.std()
    advantage = (rewards - rewards.mean()) / std if std > 0 else torch.zeros_like(rewards)
    return [a.expand(int(length)) for a, length in zip(advantage, lengths, strict=True)]


def mixes(ratio, advantages):
    return -ratio * advantages / len(ratio)


def mixes_sequences(ratio, advantages, sequences):
    return -ratio * advantages * sequences.ids


def detached(logprobs, advantages):
    return -logprobs.detach() * advantages


def infinite(logprobs, advantages):
    return -advantages / (logprobs - logprobs.detach())


def infinite_on_policy(logprobs, old_logprobs):
    return (logprobs - old_logprobs).abs().sqrt()


def infinite_where_certain(logprobs, advantages):
    """Unlikelihood, arXiv 1908.04319."""
    return torch.where(advantages > 0, -logprobs, torch.log1p(-logprobs.exp()))


def infinite_where_all_are_equal(ratio, advantages):
    return -ratio * advantages / advantages.abs()


def random(ratio):
    return ratio * (torch.rand_like(ratio) < 0.5)


def alternates(ratio):
    return ratio, {("odd", "even")[next(calls) % 2]: ratio}


def oddly_named(ratio):
    return ratio, {"50%": ratio}


def only_where_agreed(ratio, advantages, old_logprobs, sampler_logprobs, sequences):
    """Geometric-mean rejection: nothing but completions of which sampler and learner think the same."""
    kept = sequences.mean(old_logprobs - sampler_logprobs).abs() < 1e-3
    return -ratio * advantages * kept


def writes(logprobs, old_logprobs, ratio, advantages):
    old_logprobs.zero_()
    weight = ratio.detach().mul_(2.0)
    return -logprobs * advantages.mul_(weight)


def one_number(ratio):
    return ratio.sum()


def pair_of_tensors(ratio):
    return ratio, ratio


def raises(ratio):
    raise RuntimeError("no luck")


async def waits(ratio):
    return ratio


def asks_for_more(ratio, discount):
    return ratio * discount


def without_care_for_equal_ones(rewards):
    return (rewards - rewards.mean()) / rewards.std()


def too_few(rewards):
    return rewards[:1]


def shaken(rewards):
    return rewards + torch.rand_like(rewards)


def nothing(rewards):
    return None


def not_finite(rewards):
    return (rewards - rewards) / 0.0
