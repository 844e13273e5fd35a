"""Runs of a flattened tensor as boxes of it."""

import pytest
import torch

from fastgrpo.learner.megatron.sharded_checkpoint import run_as_boxes


def test_the_documented_example():
    assert list(run_as_boxes((4, 3), 2, 9)) == [((0, 2), (1, 1)), ((1, 0), (2, 3))]


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (3, 1), (2, 3, 4)], ids=str)
def test_every_run_is_covered_in_order_and_once(shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            entries = []
            for offset, size in run_as_boxes(shape, start, stop):
                box = tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
                assert box.is_contiguous()
                entries += box.flatten().tolist()
            assert entries == list(range(start, stop))
