import struct

import pytest
import torch

from fastgrpo import checksum as module
from fastgrpo.checksum import SAMPLE, checksums

SHAPES = [(7,), (37, 11), (3, 5, 8), (512, 384)]


def checksum(tensor, phase=None):
    (found,) = checksums([tensor], phase)
    return found


def random(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_tensors_have_equal_checksums_whatever_their_strides(shape, dtype):
    tensor = random(shape, dtype)
    strided = torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2].copy_(tensor)
    for phase in (None, 0, 5):
        assert checksum(tensor, phase) == checksum(strided, phase)


def wrapped(number: int) -> int:
    """As 64 bits with a sign."""
    return (number + 2**63) % 2**64 - 2**63


def test_it_is_a_sum_over_places_and_bits_in_64_bit_integers():
    values = [1.0, -2.0, 0.0, 3.5]
    total = 0
    for place, value in enumerate(values):
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
        mixed = wrapped((place + 1) * 0x1E3779B97F4A7C15)
        mixed = wrapped((mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9)
        total = wrapped(total + ((mixed ^ (mixed >> 32)) | 1) * (bits + 1))
    assert checksum(torch.tensor(values).view(2, 2)) == total
    assert checksum(torch.zeros(0)) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_one_changed_bit_shows(shape):
    tensor = random(shape)
    before = checksum(tensor)
    tensor.view(torch.int32).flatten()[-1] ^= 1
    assert checksum(tensor) != before


def test_permutations_and_shifts_show():
    tensor = random((64, 48))
    swapped = tensor.clone()
    swapped[[3, 4]] = tensor[[4, 3]]
    sums = [int(checksum(t)) for t in (tensor, swapped, tensor.roll(1, 0), tensor.roll(1, 1), tensor.t(), -tensor)]
    assert len(set(sums)) == len(sums)


def test_zeros_have_a_place_too():
    tensor = torch.tensor([0.0, 0.0, 1.0])
    assert checksum(tensor) != checksum(tensor.roll(1))


def test_a_sample_finds_a_stale_tensor_and_a_permuted_one():
    tensor = random((1024, 512))
    assert tensor.numel() == 8 * SAMPLE
    for other in (tensor + 1e-6 * tensor, tensor.roll(1, 0), tensor.roll(1, 1), tensor.flip(0)):
        assert checksum(tensor, 3) != checksum(other, 3)


def test_phases_see_every_element():
    tensor = random((1024, 512))
    places = torch.randint(0, tensor.numel(), (3,), generator=torch.Generator().manual_seed(2))
    for place in places.tolist():
        other = tensor.clone()
        other.flatten()[place] += 1.0
        seen = [phase for phase in range(9) if checksum(tensor, phase) != checksum(other, phase)]
        assert len(seen) == 1


@pytest.mark.parametrize("phase", [None, 4])
def test_many_tensors_have_the_sums_that_each_has_alone(phase, monkeypatch):
    """Whatever their shapes and dtypes, and however many are looked at together."""
    shapes = [(37, 11), (5,), (37, 11), (64, 48), (37, 11), (0,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    tensors = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    monkeypatch.setattr(module, "SAMPLE", 500)
    alone = [int(checksum(tensor, phase)) for tensor in tensors]
    for chunk in (100, 1000, 1 << 20):
        monkeypatch.setattr(module, "CHUNK", chunk)
        assert checksums(tensors, phase).tolist() == alone
        narrow = [torch.bfloat16] * len(tensors)
        assert checksums(tensors, phase, dtypes=narrow).tolist() == [
            int(checksum(t.bfloat16(), phase)) for t in tensors
        ]
    assert checksums([]).tolist() == []
