"""The merge of two attentions, in Triton and in torch, against one softmax over all keys in float64."""

import pytest
import torch

from fastgrpo.kernels.merge_attention import merge_in_place

T, A = 9, 3


def attention(q, k, v):
    """out (T, A, D) and lse (A, T)."""
    scores = torch.einsum("tad,mad->atm", q, k)
    return torch.einsum("atm,mad->tad", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize("size", [8, 80, 256])
def test_equals_attention_over_both_key_sets(backend, dtype, tolerance, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, A, size, dtype=torch.float64) for rows in (T, 12, 12))
    q[1] *= 20  # one key set has next to all of a sharp softmax
    expected, expected_lse = attention(q, k, v)
    (out, lse), (part, part_lse) = attention(q, k[:5], v[:5]), attention(q, k[5:], v[5:])
    strided = torch.empty(T, A, 2 * size, dtype=dtype)[..., :size].copy_(part)
    out, lse, part_lse = out.to(dtype), lse.float(), part_lse.float()
    merge_in_place(out, lse, strided, part_lse, backend=backend)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")])
def test_a_part_without_keys_changes_nothing(backend, infinity):
    out, lse, part_lse = torch.randn(T, A, 8), torch.randn(A, T) - 40, torch.randn(A, T)
    part_lse[:, 2:5] = infinity
    part = torch.randn(T, A, 8)
    part[2:5] = 0.0
    before, lse_before = out.clone(), lse.clone()
    merge_in_place(out, lse, part, part_lse, backend=backend)
    assert torch.equal(out[2:5], before[2:5])
    assert torch.equal(lse[:, 2:5], lse_before[:, 2:5])
    assert not torch.isclose(out, before)[5:].any()
