"""One process of two that are one engine, of which the second fails alone: python lonely_job.py DIRECTORY."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from setting import SAMPLING, TRAIN, prompts, settings
from vllm.v1.engine.core_client import InprocClient

from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.models.hf import load_config
from fastgrpo.sampler.vllm import peers
from fastgrpo.sampler.vllm.sampler import VLLMSampler


def get_output(self):
    raise MemoryError("no blocks left")


torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=300))
path = str(Path(sys.argv[1]) / "qwen3")
learner = MegatronLearner.from_pretrained(path, Layout(tp=2), TRAIN, num_updates=1)
sampler = VLLMSampler(settings(load_config(path), tp=2), learner.weight_slices, max_restarts=1, notify=print)
if dist.get_rank() == 1:
    InprocClient.get_output = get_output
    peers.PATIENCE = timedelta(seconds=2)
sampler.generate(prompts(2), 2, SAMPLING, seed=9)
