"""What the host does on a GPU's path: it launches, and never waits.

Tensors on the meta device have shapes and no numbers: whatever would read one (item, a boolean index, a copy to the
host) raises. The kernels themselves are left out, and their launches counted.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.kernels import group_advantages as advantages_file
from fastgrpo.kernels import linear_logprobs as linear_logprobs_file
from fastgrpo.kernels import linear_policy_loss as linear_file
from fastgrpo.kernels import logprob_kernels, logprobs, policy_rows_triton
from fastgrpo.kernels import policy_loss as policy_file
from fastgrpo.kernels.group_advantages import group_advantages
from fastgrpo.kernels.launch import row_shape
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective
from fastgrpo.kernels.policy_loss import policy_loss

CHECK = "check_row_targets"
N, H, V = 96, 32, 200
KERNELS = {
    policy_rows_triton: ("policy_kernel", "sequence_kernel", "sum_kernel"),
    logprob_kernels: ("statistics_kernel", "gradient_kernel"),
    logprobs: ("statistics_kernel",),
    advantages_file: ("_group_kernel",),
}
OBJECTIVES = {
    "token": Objective(kl_coef=0.1, entropy_coef=0.01),
    "sequence": Objective(ratio_level="sequence"),
    "one's own": Objective(
        surrogate=CustomSurrogate(
            name="mine", function=lambda x: (x.sequences.mean(x.ratio), {}), asks=frozenset({"sequences"})
        )
    ),
}


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched."""
    counts = Counter()

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: counts.update([self.name])

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Launch(name))
    for module, name in ((linear_file, "check_targets"), (policy_file, "check_targets"), (linear_logprobs_file, CHECK)):
        monkeypatch.setattr(module, name, lambda *_, **__: None)  # done for tensors on the host alone
    return counts


def case():
    def vector(kind=torch.float32):
        return torch.empty(N, dtype=kind, device="meta")

    batch = LossInputs(
        targets=vector(torch.int64),
        advantages=vector(),
        token_weights=vector(),
        old_logprobs=vector(),
        ref_logprobs=vector(),
        cu_seqlens=torch.tensor([0, 40, 96]),
    )
    hidden = torch.empty(N, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return hidden, torch.empty(V, H, dtype=torch.bfloat16, device="meta", requires_grad=True), batch


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_head_never_waits(name, launches):
    hidden, weight, batch = case()
    linear_policy_loss(hidden, weight, batch, OBJECTIVES[name], chunk_size=48, backend="triton").loss.backward()
    assert hidden.grad.shape == (N, H)
    assert launches["policy_kernel"] >= 2  # one a chunk at least


class Operators(TorchDispatchMode):
    """Those of torch's operators that would launch something: neither views nor bare allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_advantages_and_loss_are_two_launches_beside_the_walk_along_the_rows(launches):
    _, _, batch = case()
    rewards, ids = torch.empty(N, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Operators() as operators:
        batch = replace(batch, advantages=group_advantages(rewards, ids, backend="triton"))
        out = policy_loss(logits, batch, OBJECTIVES["token"], backend="triton")
    assert operators.names == ["aten::ne"]  # for the check of the targets, which CUDA tensors are spared
    assert launches == {"_group_kernel": 1, "policy_kernel": 1, "sum_kernel": 1}
    out.loss.backward()
    assert logits.grad.shape == logits.shape


def test_logprobs_never_wait(launches):
    hidden, weight, batch = case()
    linear_logprobs(hidden, weight, batch.targets, chunk_size=48, backend="triton").sum().backward()
    assert launches


def test_advantages_are_one_launch(launches):
    rewards = torch.empty(N, device="meta")
    group_advantages(rewards, torch.empty(N, dtype=torch.int64, device="meta"), backend="triton")
    assert launches == {"_group_kernel": 1}


def test_the_shape_of_a_row_follows_its_length_dtype_and_alignment():
    def shape(columns, dtype, stride):
        row = row_shape(torch.zeros(2, stride, dtype=dtype)[:, :columns])
        return row["BLOCK"], row["VECTOR"], row["num_warps"]

    assert shape(151936, torch.bfloat16, 151936) == (2048, 8, 8)
    assert shape(151936, torch.float32, 151936) == (1024, 4, 8)
    assert shape(50257, torch.bfloat16, 50257) == (2048, 1, 8)  # the second row starts at no multiple of 16 bytes
    assert shape(50257, torch.bfloat16, 50272) == (2048, 8, 8)
    assert shape(1, torch.float16, 1) == (256, 1, 1)
    assert row_shape(torch.zeros(2, 64)[:, 1:33])["VECTOR"] == 1


def test_waiting_would_be_seen():
    numbers = torch.empty(4, device="meta")
    with pytest.raises(RuntimeError):
        numbers.sum().item()
    with pytest.raises(NotImplementedError):
        numbers.cpu()
    with pytest.raises(NotImplementedError):
        numbers[numbers > 0]
