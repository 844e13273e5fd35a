"""What an objective and its inputs refuse, naming the field."""

import pytest
import torch

from fastgrpo.kernels.objective import LossInputs, Objective, Sequences


@pytest.mark.parametrize(
    ("field", "value", "mend"),
    [
        ("surrogate", "ppo", "choose one of clip, cispo, sapo, reinforce"),
        ("ratio_level", "batch", "choose one of token, sequence"),
        ("kl_estimator", "k4", "choose one of k1, k2, k3"),
        ("clip_ratio_low", 1.1, r"use a value in \[0, 1\]"),
        ("clip_ratio_high", -0.1, "use a value >= 0"),
        ("dual_clip", 1.0, "use a value > 1, or null"),
        ("sapo_tau_pos", 0.0, "use a value > 0"),
        ("sapo_tau_neg", -1.0, "use a value > 0"),
        ("kl_coef", -0.1, "use a value >= 0"),
        ("temperature", 0.0, "use a value > 0"),
        ("temperature", float("nan"), "use a value > 0"),
    ],
)
def test_a_value_outside_its_range_is_refused(field, value, mend):
    with pytest.raises(ValueError, match=rf"Objective\.{field}={value!r}: {mend}"):
        Objective(**{field: value})


def test_a_dual_clip_belongs_to_the_clip_surrogate():
    with pytest.raises(ValueError, match=r"Objective\.dual_clip=3\.0: it belongs to surrogate=clip"):
        Objective(surrogate="cispo", dual_clip=3.0)


def test_inputs_of_another_length_are_refused():
    three, two = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"LossInputs\.targets has shape \(1, 3\): expected \(T,\)"):
        LossInputs(targets=three.long()[None], advantages=three, token_weights=three)
    with pytest.raises(ValueError, match=r"LossInputs\.old_logprobs has shape \(2,\): expected \(3,\)"):
        LossInputs(targets=three.long(), advantages=three, token_weights=three, old_logprobs=two)


def test_tokens_of_a_batch_keep_their_sequences():
    """Sequences of 2, 0 and 3 tokens: of [1, 4), and of 0, 3 and 4, one token is the first's and two the last's."""
    values = torch.arange(5.0)
    cu = torch.tensor([0, 2, 2, 5])
    batch = LossInputs(targets=values.long(), advantages=values, token_weights=values, cu_seqlens=cu)
    part = batch.tokens_from(1, 4)
    assert (part.targets.tolist(), part.cu_seqlens.tolist(), part.old_logprobs) == ([1, 2, 3], [0, 1, 1, 3], None)
    kept = batch.tokens_at(torch.tensor([0, 3, 4]))
    assert (kept.targets.tolist(), kept.cu_seqlens.tolist()) == ([0, 3, 4], [0, 1, 1, 3])
    assert batch.tokens_at(None) is batch


def test_sequences_count_booleans():
    sequences, marked = Sequences(torch.tensor([0, 0, 1, 1]), 2), torch.tensor([True, True, False, True])
    assert sequences.sum(marked).tolist() == [2, 2, 1, 1]
    assert sequences.mean(marked).tolist() == [1.0, 1.0, 0.5, 0.5]
