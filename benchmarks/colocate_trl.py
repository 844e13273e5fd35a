"""The step of bench_colocate.py as TRL's GRPOTrainer takes it, with vLLM in its process on weights of its own.

The settings are those that are fastest for TRL: no gradient checkpointing, no reference model, no correction for the
sampler's probabilities (which would cost a forward pass), the largest micro-batches that fit the token budget, prefix
caching and CUDA graphs as vLLM has them by default. Weights are float32 under bfloat16 autocast on a GPU, TRL's
default, and bfloat16 in vLLM, which sleeps between rollouts: TRL then discards its weights and sends them all again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from datasets import Dataset
from harness import Table
from models import random_model
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from fastgrpo.models.shape import Shape
from fastgrpo.models.tiny import character_tokenizer
from fastgrpo.phases import held_bytes

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PARTS = ("generate", "share", "sleep", "wake", "update")


def configuration(args: argparse.Namespace, directory: str) -> GRPOConfig:
    """One update of everything that was drawn, as bench_colocate.Colocated.step has it."""
    on_gpu, length = torch.cuda.is_available(), args.prompt_tokens + args.new_tokens
    num_sequences = args.prompts * args.group_size
    fitting = [
        n for n in range(1, num_sequences + 1) if num_sequences % n == 0 and n * length <= args.tokens_per_microbatch
    ]
    size = max(fitting, default=1)
    return GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=num_sequences // size,
        steps_per_generation=num_sequences // size,
        num_generations=args.group_size,
        max_completion_length=args.new_tokens,
        generation_kwargs={"min_tokens": args.new_tokens, "ignore_eos": True, "detokenize": False},
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=args.trl_memory_share,
        vllm_max_model_length=length,
        vllm_enable_sleep_mode=on_gpu,
        vllm_importance_sampling_correction=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        beta=0.0,
        loss_type="grpo",
        max_steps=args.steps + 1,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def measure(args: argparse.Namespace, config: transformers.PretrainedConfig, table: Table, x: str) -> None:
    """Rows of the same names as fastgrpo's."""
    dtype = torch.bfloat16 if table.device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, len(LETTERS), (args.prompts, args.prompt_tokens), generator=generator)
    prompts = [{"prompt": "".join(LETTERS[i] for i in row)} for row in letters.tolist()]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = character_tokenizer(LETTERS)
        random_model(config, dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        gc.collect()
        trainer = GRPOTrainer(
            model=directory,
            reward_funcs=lambda completions, **_: [float(i % 2 == 0) for i in range(len(completions))],
            args=configuration(args, directory),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        watch = Watch(trainer, args.prompts * args.group_size * args.new_tokens)
        trainer.add_callback(watch)
        trainer.train()
    report(args, config, table, x, watch)


class Watch(TrainerCallback):
    """Times the parts of every step by the trainer's own methods, and notes the most that the device holds."""

    def __init__(self, trainer: GRPOTrainer, num_new_tokens: int) -> None:
        self.vllm, self.num_new_tokens = trainer.vllm_generation, num_new_tokens
        self.steps: list[dict[str, float]] = []
        self.peaks: list[int] = []
        self.held: list[int] = []
        engine: Any = self.vllm.llm
        trainer._generate_single_turn = self._counted(trainer._generate_single_turn)
        self.vllm.sync_weights = self._timed("share", self.vllm.sync_weights)
        engine.generate = self._timed("generate", engine.generate)
        engine.sleep = self._timed("sleep", engine.sleep)
        engine.wake_up = self._timed("wake", engine.wake_up)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait()
        self._began, self._spent, self._peak = time.perf_counter(), dict.fromkeys(PARTS, 0.0), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait()
        whole = (time.perf_counter() - self._began) * 1e3
        self._spent["share"] -= self._woken_in_share
        self._spent["update"] = whole - sum(self._spent.values())
        self.held.append(held_bytes())
        self.peaks.append(max(self._peak, self.held[-1]))
        self.steps.append({**self._spent, "step": whole})

    def _counted(self, generate: Callable) -> Callable:
        @functools.wraps(generate)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._woken_in_share = 0.0
            result = generate(*args, **kwargs)
            assert sum(map(len, result[0])) == self.num_new_tokens, "other completions than were asked for"
            return result

        return call

    def _timed(self, part: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            self._peak = max(self._peak, held_bytes())  # before vLLM sleeps it holds most
            before, start = self._spent["wake"], time.perf_counter()
            result = method(*args, **kwargs)
            self._wait()
            self._spent[part] += (time.perf_counter() - start) * 1e3
            if part == "share":  # it wakes the engine's weights itself
                self._woken_in_share += self._spent["wake"] - before
            return result

        return call

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def report(args: argparse.Namespace, config: transformers.PretrainedConfig, table: Table, x: str, watch: Watch) -> None:
    def add(mode: str, metric: str, unit: str, values: list[float]) -> None:
        table.add("colocate", "trl", mode, metric, unit, x, values)

    steps = watch.steps[1:]  # the first also compiles and warms up
    for part in (*PARTS, "step"):
        add(part, "time", "ms", [step[part] for step in steps])
    tokens = args.prompts * args.group_size * (args.prompt_tokens + args.new_tokens)
    add("step", "rate", "tok/s", [tokens / step["step"] * 1e3 for step in steps])
    engine: Any = watch.vllm.llm.llm_engine
    cache, itemsize = engine.vllm_config.cache_config, engine.vllm_config.model_config.dtype.itemsize
    per_token = Shape.of(config).kv_bytes_per_token(itemsize, 1)
    add("engine", "kv_cache", "bytes", [cache.num_gpu_blocks * cache.block_size * per_token])
    add("step", "peak_memory", "bytes", [max(watch.peaks[1:])])
    add("step", "growth", "bytes", [watch.held[-1] - watch.held[1]])
