"""Where the policy of a run lives, and how it is described."""

import pytest
import torch
from builders import make_model

from fastgrpo.config import UserError
from fastgrpo.kernels import varlen_kernels
from fastgrpo.main import compose
from fastgrpo.policy import describe, device_of


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.bfloat16, "flash attention of torch"), (torch.float32, "attention in plain torch, slow: no flash kernel")],
)
def test_a_gpus_attention_is_named(dtype, attention):
    varlen_kernels.choose("torch")
    model = make_model(dtype=dtype)
    assert attention in describe(model, "cuda")
    assert "attention" not in describe(model, "cpu")


@pytest.mark.parametrize("option", ["learner=megatron", "sampler=vllm"])
def test_the_cpu_is_refused_beside_a_gpu_that_would_be_taken(option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(compose("train", ["cluster.device=cpu"])[0])[0] == "cpu"
    with pytest.raises(UserError, match=r"cluster.device=cpu: .*; hide it with CUDA_VISIBLE_DEVICES="):
        device_of(compose("train", [option, "cluster.device=cpu"])[0])
