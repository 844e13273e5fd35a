"""The CPU view reaches Megatron's modules alone, and ends with the context."""

import sys

import megatron.core.optimizer.clip_grads as a_megatron_module
import pytest
import torch

from fastgrpo.learner.megatron.cpu import megatron_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is to be changed")


def test_megatron_takes_the_cpu_for_its_device():
    with megatron_on_cpu():
        view = a_megatron_module.torch
        assert view.cuda.current_device() == torch.device("cpu")
        assert view.zeros(2, device="cuda").device.type == "cpu"
        assert view.empty(2, device=view.cuda.current_device()).device.type == "cpu"
        assert view.cuda.synchronize() is None
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).cuda().device.type == "cpu"


def test_everything_else_is_torchs_own():
    with megatron_on_cpu():
        view = a_megatron_module.torch
        assert view.Tensor is torch.Tensor
        assert view.nn is torch.nn
        assert view.cuda.is_available() is False
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
        assert sys.modules["torch"] is torch
        with pytest.raises((AssertionError, RuntimeError)):
            torch.cuda.current_device()


def test_nothing_stays_behind_and_it_may_be_nested():
    with megatron_on_cpu():
        with megatron_on_cpu():
            pass
        assert a_megatron_module.torch is not torch
    assert a_megatron_module.torch is torch
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_an_error_inside_restores_torch():
    with pytest.raises(KeyError), megatron_on_cpu():
        raise KeyError
    assert a_megatron_module.torch is torch


def test_it_changes_nothing_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with megatron_on_cpu():
        assert a_megatron_module.torch is torch
