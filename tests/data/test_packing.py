"""How groups are laid out for the learner."""

from dataclasses import replace

import pytest
import torch

from fastgrpo.data.packing import Sequence, pack, plan


def sequence(number, group, prompt, tokens, weights=None):
    count = len(tokens)
    return Sequence(
        sequence_id=number,
        group_id=group,
        prompt_ids=torch.tensor(prompt),
        token_ids=torch.tensor(tokens),
        advantages=torch.full((count,), float(number)),
        token_weights=torch.tensor(weights if weights is not None else [0.5] * count),
        sampler_logprobs=torch.arange(count).float(),
    )


GROUP = [sequence(0, 0, [10, 11], [20, 21]), sequence(1, 0, [10, 11], [30])]


def test_a_group_shares_its_prompt():
    (batch,) = pack(GROUP, max_tokens=100, share_prompts=True)
    assert batch.token_ids.tolist() == [10, 11, 20]
    assert batch.position_ids.tolist() == [0, 1, 2]
    assert batch.segments.tolist() == [[0, 2, 0, 0], [2, 3, 0, 2], [3, 3, 0, 2]]
    assert batch.hidden_rows.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [20, 21, 30]
    assert batch.advantages.tolist() == [0, 0, 1]
    assert batch.sampler_logprobs.tolist() == [0, 1, 0]
    assert batch.cu_scored.tolist() == [0, 2, 3]
    assert batch.sequence_ids.tolist() == [0, 1]


def test_without_sharing_every_sequence_has_its_own():
    (batch,) = pack(GROUP, max_tokens=100, share_prompts=False)
    assert batch.token_ids.tolist() == [10, 11, 20, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.segments.tolist() == [[0, 3, 0, 0], [3, 5, 0, 0]]
    assert batch.hidden_rows.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [20, 21, 30]


def test_tokens_without_weight_are_read_but_not_scored():
    (batch,) = pack([sequence(0, 0, [10], [20, 21, 22], [0.5, 0.0, 0.5])], max_tokens=9, share_prompts=True)
    assert batch.token_ids.tolist() == [10, 20, 21]
    assert batch.hidden_rows.tolist() == [0, 2]
    assert batch.targets.tolist() == [20, 22]


@pytest.mark.parametrize("share", [True, False])
def test_tokens_after_the_last_scored_one_are_not_read(share):
    (batch,) = pack([sequence(0, 0, [10], [20, 21, 22, 23], [0.5, 0.5, 0.0, 0.0])], max_tokens=9, share_prompts=share)
    assert batch.token_ids.tolist() == [10, 20]
    assert batch.hidden_rows.tolist() == [0, 1]
    assert batch.targets.tolist() == [20, 21]


def test_a_rows_experts_come_along_with_its_token():
    prompt, first, second = (torch.tensor(x, dtype=torch.uint8)[:, None, None] for x in ([1, 2], [3, 4, 5], []))
    given = [
        replace(sequence(0, 0, [10, 11], [20, 21, 22, 23], [0.5, 0.5, 0.5, 0.0]), routed_experts=first),
        replace(sequence(1, 0, [10, 11], [30]), routed_experts=second),
    ]
    given = [replace(one, prompt_routed_experts=prompt) for one in given]
    for share, expected in ((True, [1, 2, 3, 4]), (False, [1, 2, 3, 4, 1, 2])):
        (batch,) = pack(given, max_tokens=100, share_prompts=share)
        assert batch.routed_experts.dtype == torch.uint8
        assert batch.routed_experts.flatten().tolist() == expected
        assert len(batch.token_ids) == len(expected)
    assert pack(GROUP, max_tokens=100, share_prompts=True)[0].routed_experts is None


def test_sequences_without_any_weight_cost_nothing():
    masked = sequence(1, 0, [10, 11], [30], [0.0])
    (batch,) = pack([GROUP[0], masked], max_tokens=100, share_prompts=True)
    assert batch.sequence_ids.tolist() == [0]
    assert batch.num_tokens == 3
    assert pack([masked], max_tokens=100, share_prompts=True) == []


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [9, 12, 20, 1000])
def test_nothing_is_lost_and_no_budget_broken(share, max_tokens):
    sequences = [sequence(i, i // 4, [10 + i // 4] * (1 + i // 4), [50 + i] * (1 + i % 5)) for i in range(12)]
    layouts = plan(sequences, max_tokens=max_tokens, share_prompts=share)
    batches = [layout.pack() for layout in layouts]
    assert [(one.num_tokens, one.num_scored) for one in layouts] == [(b.num_tokens, b.num_scored) for b in batches]
    assert all(batch.num_tokens <= max_tokens for batch in batches)
    assert sorted(i for batch in batches for i in batch.sequence_ids.tolist()) == list(range(12))
    for batch in batches:
        for i, (start, end) in enumerate(zip(batch.cu_scored[:-1], batch.cu_scored[1:], strict=True)):
            number = int(batch.sequence_ids[i])
            assert batch.targets[start:end].tolist() == [50 + number] * (1 + number % 5)


def test_a_sequence_that_cannot_fit_is_refused_by_key():
    with pytest.raises(
        ValueError, match=r"learner\.max_tokens_per_microbatch=2: .* 3 tokens; raise it to at least that"
    ):
        pack(GROUP, max_tokens=2, share_prompts=True)
