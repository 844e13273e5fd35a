"""The three ways to average tokens, as literal weights."""

import pytest
import torch

from fastgrpo.algorithms.aggregation import token_weights

MASKS = [torch.tensor([True, True, False, True]), torch.tensor([True]), torch.tensor([False, False])]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", [[1 / 9, 1 / 9, 0, 1 / 9], [1 / 3], [0, 0]]),  # the masked sequence counts in S
        ("token_mean", [[0.25, 0.25, 0, 0.25], [0.25], [0, 0]]),
        ("constant", [[1 / 30, 1 / 30, 0, 1 / 30], [1 / 30], [0, 0]]),
    ],
)
def test_weights(aggregation, expected):
    for weights, literal in zip(token_weights(MASKS, aggregation, max_new_tokens=10), expected, strict=True):
        torch.testing.assert_close(weights, torch.tensor(literal, dtype=torch.float32))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_nothing_to_learn_is_all_zero(aggregation):
    (weights,) = token_weights([torch.zeros(3, dtype=torch.bool)], aggregation, max_new_tokens=4)
    assert weights.tolist() == [0, 0, 0]
