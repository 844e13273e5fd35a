"""Tensors released and brought back: the same objects, the same bits, no memory in between."""

import torch

from fastgrpo.learner.offload import Offload


def held_bytes(*tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_kept_tensors_come_back_bit_for_bit_and_dropped_ones_as_zeros():
    kept = [torch.randn(3, 5), torch.randn(7).bfloat16()]
    values, gradients = [tensor.clone() for tensor in kept], torch.ones(11)
    view = gradients[4:6]
    offload = Offload()
    for _ in range(2):  # the host's copies are used again
        offload.out(kept, [gradients])
        assert offload.is_out
        assert held_bytes(*kept, gradients) == 0
        offload.back()
        assert not offload.is_out
        assert all(map(torch.equal, kept, values))
        assert view.tolist() == [0.0, 0.0]
        kept[0].add_(1.0)
        values[0].add_(1.0)
        view.fill_(3.0)
    assert gradients.sum() == 6.0


def test_a_storage_that_tensors_share_is_kept_once():
    buffer = torch.arange(6.0)
    offload = Offload()
    offload.out([buffer[:2], buffer[2:]])
    assert held_bytes(buffer) == 0
    offload.back()
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_out_twice_and_back_twice_are_out_and_back():
    tensor, offload = torch.ones(2), Offload()
    offload.back()
    offload.out([tensor])
    offload.out([tensor])
    offload.back()
    offload.back()
    assert tensor.tolist() == [1.0, 1.0]
