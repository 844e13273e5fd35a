"""How the policy of a run is described."""

import pytest
import torch
from builders import make_model

from fastgrpo.kernels import varlen_kernels
from fastgrpo.learners import describe


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.bfloat16, "flash attention of torch"), (torch.float32, "attention in plain torch, slow: no flash kernel")],
)
def test_a_gpus_attention_is_named(dtype, attention):
    varlen_kernels.choose("torch")
    model = make_model(dtype=dtype)
    assert attention in describe(model, "cuda")
    assert "attention" not in describe(model, "cpu")
