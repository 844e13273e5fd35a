"""The two ways in which a decoding step attends, against a dense softmax."""

import pytest
import torch

from fastgrpo.sampler.group_cache import GroupCache

LENGTHS, SAMPLES, LIMIT, HEADS, KV_HEADS, D = torch.tensor([5, 2, 9]), 3, 6, 4, 2, 8
GOING = torch.tensor([True, False, True, False, False, False, True, True, True])  # the second prompt's are all done


def made(generator):
    """A cache of random prompts, and every prompt's keys and values."""
    total = int(LENGTHS.sum())
    packed = [torch.randn(total, KV_HEADS, D, dtype=torch.float64, generator=generator) for _ in range(2)]
    prompts = list(zip(*(x.split(LENGTHS.tolist()) for x in packed), strict=True))
    return GroupCache([tuple(packed)], LENGTHS, SAMPLES, LIMIT), prompts


@pytest.mark.parametrize("way", ["_attend_jointly", "_attend_and_merge"])
def test_each_row_sees_its_prompt_and_its_own_past(way, monkeypatch):
    monkeypatch.setattr(GroupCache, "_attend_jointly", getattr(GroupCache, way))
    generator = torch.Generator().manual_seed(0)
    cache, prompts = made(generator)
    own = [[k[:0], v[:0]] for k, v in prompts for _ in range(SAMPLES)]
    prompt_of = [i for i in range(len(prompts)) for _ in range(SAMPLES)]
    for step in range(4):
        if step == 2:
            cache.keep(GOING)
            own = [pair for pair, going in zip(own, GOING, strict=True) if going]
            prompt_of = [i for i, going in zip(prompt_of, GOING, strict=True) if going]
        q, k, v = (torch.randn(len(own), n, D, dtype=torch.float64, generator=generator) for n in (HEADS, 2, 2))
        found = cache(0, q, k, v, 0.3)
        cache.advance()
        for row, past in enumerate(own):
            past[0], past[1] = torch.cat([past[0], k[row : row + 1]]), torch.cat([past[1], v[row : row + 1]])
            keys, values = (
                torch.cat(pair).repeat_interleave(2, 1) for pair in zip(prompts[prompt_of[row]], past, strict=True)
            )
            weights = (torch.einsum("ad,jad->aj", q[row], keys) * 0.3).softmax(-1)
            expected = torch.einsum("aj,jad->ad", weights, values)
            torch.testing.assert_close(found[row], expected, atol=1e-13, rtol=1e-13)
