import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.parcel import pack, unpack
from fastgrpo.types import Rollout

TENSORS = [
    torch.arange(7),
    torch.tensor([True, False, True]),
    torch.randn(3, 5).t(),
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.empty(0, 4, dtype=torch.int16),
    torch.randn(4, dtype=torch.float64, requires_grad=True),
    torch.arange(300, dtype=torch.int32)[::3],
]


def test_what_is_unpacked_is_what_was_packed():
    found = unpack(pack({"tensors": TENSORS, "text": "äöü", "nested": ({1: None}, [2.5])}))
    assert (found["text"], found["nested"]) == ("äöü", ({1: None}, [2.5]))
    for mine, theirs in zip(found["tensors"], TENSORS, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
        assert not mine.requires_grad


@pytest.mark.parametrize("content", [None, [], "x", b"seven b", torch.zeros(0)])
def test_little_is_packed_too(content):
    found = unpack(pack(content))
    assert torch.equal(found, content) if isinstance(content, torch.Tensor) else found == content


def test_rollouts_keep_their_fields_and_take_their_tensors_bytes():
    size = 1000
    rollout = Rollout(
        prompt_id="train/1",
        token_ids=torch.arange(size),
        loss_mask=torch.ones(size, dtype=torch.bool),
        sampler_logprobs=torch.randn(size),
        finish_reason="stop",
        policy_version=3,
    )
    message = pack([rollout, rollout])
    again, twin = unpack(message)
    assert (again.prompt_id, again.finish_reason, again.policy_version) == ("train/1", "stop", 3)
    assert torch.equal(again.sampler_logprobs, rollout.sampler_logprobs)
    assert twin is again  # as pickle keeps it
    assert len(message) < size * (8 + 1 + 4) + 1000 < len(pickle.dumps([rollout] * 2)) + 2000


class Operations(TorchDispatchMode):
    """How many of torch's operations are run inside."""

    count = 0

    def __torch_dispatch__(self, operation, _, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_a_tensor_more_takes_one_operation_more():
    counts = []
    for number in (10, 40):
        message = pack([torch.arange(5), *(torch.ones(3) for _ in range(number))])
        with Operations() as operations:
            unpack(message)
        counts.append(operations.count)
    assert counts[1] - counts[0] == 30
