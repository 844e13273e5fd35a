"""Group-relative advantages: literal values, degenerate groups, and the kernel against the specification."""

import pytest
import torch

from fastgrpo.kernels import reference
from fastgrpo.kernels.group_advantages import group_advantages, process_advantages

ROOT_HALF = 0.5**0.5


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_two_interleaved_groups_literal():
    a = group_advantages(doubles(1, 10, 0, 30), torch.tensor([7, -2, 7, -2]))
    assert a.tolist() == pytest.approx([ROOT_HALF, -ROOT_HALF, -ROOT_HALF, ROOT_HALF], abs=1e-15)


def test_ddof_none_and_leave_one_out_literal():
    rewards, ids = doubles(0, 0, 3), torch.zeros(3, dtype=torch.int64)
    assert group_advantages(rewards, ids, normalize="none").tolist() == [-1, -1, 2]
    assert group_advantages(rewards, ids, normalize="none", leave_one_out=True).tolist() == [-1.5, -1.5, 3]
    assert group_advantages(rewards, ids, std_ddof=0).tolist() == pytest.approx([-ROOT_HALF, -ROOT_HALF, 2**0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.7, 0.3, 1e8, -0.1])
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_constant_group_is_exactly_zero(dtype, reward, normalize):
    a = group_advantages(torch.full((7,), reward, dtype=dtype), torch.zeros(7, dtype=torch.int64), normalize=normalize)
    assert a.tolist() == [0.0] * 7


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_group_of_one_is_zero(leave_one_out, normalize):
    a = group_advantages(doubles(5, 1, 3), torch.tensor([0, 1, 1]), normalize=normalize, leave_one_out=leave_one_out)
    assert a[0] == 0.0
    assert a[1] == -a[2] != 0.0


def test_large_offset_costs_no_precision():
    """One pass of E[x^2] - E[x]^2 in float32 would lose half the digits here."""
    rewards = torch.tensor([100.0, 100.01, 100.02, 100.03])
    ids = torch.zeros(4, dtype=torch.int64)
    exact = group_advantages(rewards.double(), ids)
    torch.testing.assert_close(group_advantages(rewards, ids).double(), exact, rtol=1e-5, atol=0)


def test_min_std_bounds_nearly_constant_groups():
    a = group_advantages(doubles(0.5, 0.5 + 1e-9), torch.zeros(2, dtype=torch.int64), min_std=1e-3)
    assert a.abs().max() < 1e-6


def test_nan_reward_stays_in_its_group():
    a = group_advantages(doubles(float("nan"), 1, 0, 1), torch.tensor([0, 0, 1, 1]))
    assert a.isnan().tolist() == [True, True, False, False]


def test_process_advantages_literal():
    """Steps rewarded 1, 0 (completion 0) and 1 (completion 1): mean 2/3, std 1/sqrt(3), so r~ = s, -2s, s."""
    s = 1 / 3**0.5
    a = process_advantages(
        step_rewards=doubles(1, 0, 1),
        step_token_index=torch.tensor([1, 3, 0]),
        step_sequence_ids=torch.tensor([0, 0, 1]),
        group_ids=torch.tensor([5, 5]),
        cu_seqlens=torch.tensor([0, 5, 7]),
    )
    assert a.tolist() == pytest.approx([-s, -s, -2 * s, -2 * s, 0, s, 0])


def test_process_advantages_of_one_step_at_the_end_are_outcome_advantages():
    torch.manual_seed(0)
    rewards, ids, lengths = torch.randn(6).double(), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([3, 1, 4, 2, 2, 5])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    per_token = process_advantages(rewards, lengths - 1, torch.arange(6), ids, cu)
    torch.testing.assert_close(per_token, group_advantages(rewards, ids).repeat_interleave(lengths))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize("std_ddof", [0, 1])
def test_kernel_against_the_specification(normalize, std_ddof, leave_one_out):
    """Ragged groups in random order, one constant, one of a single member, one with an offset of 100."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, 3, 3, 9, 9, 9, 9, -4, 5, 5, 5, 5, 5])
    rewards = torch.rand(13, generator=rng)
    rewards[3:7] = 0.7
    rewards[8:] += 100.0
    order = torch.randperm(13, generator=rng)
    rewards, ids = rewards[order], ids[order]
    options = {"normalize": normalize, "std_ddof": std_ddof, "leave_one_out": leave_one_out}
    got = group_advantages(rewards, ids, backend="triton", **options)
    want = group_advantages(rewards.double(), ids, **options)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    assert got[(ids == 9) | (ids == -4)].abs().max() == 0.0


def test_process_advantages_agree_with_the_specification():
    rng = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, 4, 4, 11, 20])
    step_sequence, index = torch.tensor([0, 3, 0, 2, 3, 2]), torch.tensor([3, 8, 1, 0, 2, 5])
    rewards, ids = torch.randn(6, generator=rng).double(), torch.tensor([1, 1, 1, 2])
    got = process_advantages(rewards, index, step_sequence, ids, cu)
    want = reference.process_advantages(rewards, index, step_sequence, ids, cu)
    torch.testing.assert_close(got, want)


def test_process_advantages_of_a_constant_group_are_exactly_zero():
    cu, steps = torch.tensor([0, 3, 6]), torch.tensor([0, 0, 1])
    a = process_advantages(torch.full((3,), 0.7), torch.tensor([0, 2, 1]), steps, torch.tensor([0, 1]), cu)
    assert a.tolist() == [0.0] * 6


def test_refusals():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="normalize='max'"):
        group_advantages(one, one.long(), normalize="max")
    with pytest.raises(ValueError, match="std_ddof=2"):
        group_advantages(one, one.long(), std_ddof=2)
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(one, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"step_token_index\[0\]=5 lies outside completion 0 of 3 tokens"):
        process_advantages(one, torch.tensor([5]), torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 3]))
