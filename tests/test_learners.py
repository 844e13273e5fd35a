"""How the policy of a run is described."""

import pytest
import torch
from builders import make_model

from fastgrpo.config import UserError
from fastgrpo.kernels import varlen_kernels
from fastgrpo.learners import describe, make_learner
from fastgrpo.main import compose
from fastgrpo.ranks import Ranks


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.bfloat16, "flash attention of torch"), (torch.float32, "attention in plain torch, slow: no flash kernel")],
)
def test_a_gpus_attention_is_named(dtype, attention):
    varlen_kernels.choose("torch")
    model = make_model(dtype=dtype)
    assert attention in describe(model, "cuda")
    assert "attention" not in describe(model, "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_megatrons_processes_have_a_gpu_each(device, monkeypatch):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, _ = compose("train", ["learner=megatron", f"cluster.device={device}"])
    with pytest.raises(UserError, match=f"cluster.device={device}: .* a GPU of its own; use auto"):
        make_learner(config, None, None, Ranks(num_ranks=2), print)
