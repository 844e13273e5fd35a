"""The other side: TRL's GRPOTrainer, driven by its own train(), stopped at the border of every step by a callback.

The settings are the fastest found for this case on a CPU: generation of all completions at once with the dynamic KV
cache, updates in micro-batches of one group, no gradient checkpointing (TRL's default has it), float32 without
autocast, no old-logprob pass (one update per rollout), no reference model, the fused AdamW, SDPA attention, no logging,
saving, shuffling or data workers.
Tried and left out, in seconds of CPU time a step on one core: all 64 sequences in one micro-batch (11.0 against 9.7 at
200-token prompts, with four times the memory: --groups-per-microbatch 8 measures it); and, in one micro-batch at
64-token prompts, where the rest of these settings takes 5.6, the static KV cache (6.3), transformers' continuous
batching (40, and it ignores min_new_tokens), and torch.compile (5.4, within the noise, after minutes of compiling).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import GRPOConfig, GRPOTrainer

from step_workers.case import Case, EvenShare
from step_workers.gate import Gate

NEVER = 1_000_000
COUNTS = ("scored_tokens", "learner_rows")


def configuration(case: Case) -> GRPOConfig:
    """GRPO as in the paper: sequence mean, group std, clipped ratio, no KL."""
    return GRPOConfig(
        output_dir=str(Path(case.directory) / "trl"),
        # the case
        per_device_train_batch_size=case.num_sequences // case.num_microbatches,
        gradient_accumulation_steps=case.num_microbatches,
        steps_per_generation=case.num_microbatches,  # everything is generated at once
        num_generations=case.group_size,
        max_completion_length=case.new_tokens,
        generation_kwargs={"min_new_tokens": case.new_tokens, "use_cache": True},
        num_iterations=1,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=case.max_grad_norm,
        epsilon=case.clip_ratio,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_steps=NEVER,
        # speed
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(case: Case, reward: Callable[..., list[float]]) -> GRPOTrainer:
    """The trainer, on the case's model, tokenizer and prompts."""
    hf_logging.set_verbosity_error()
    with open(case.prompts_path, encoding="utf-8") as file:
        prompts = Dataset.from_list([json.loads(line) for line in file])
    return GRPOTrainer(
        model=case.model_path,
        reward_funcs=reward,
        args=configuration(case),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(case.model_path, padding_side="left"),
    )


def run(case: Case, gate: Gate) -> None:
    """Train until the gate says stop."""
    reward = EvenShare()
    trainer = make_trainer(case, reward.trl)
    trainer.add_callback(GateCallback(trainer, gate, reward))
    trainer.train()


class GateCallback(TrainerCallback):
    """Blocks before the first step and after every step; splits a step's time by the trainer's own methods."""

    def __init__(self, trainer: GRPOTrainer, gate: Gate, reward: EvenShare) -> None:
        self._gate, self._reward = gate, reward
        self._spent: dict[str, float] = {}
        self._update_start = 0.0
        self._counts = dict.fromkeys(COUNTS, 0)
        self._tokens_seen = 0
        trainer._generate_single_turn = self._timed("generate", trainer._generate_single_turn)
        trainer._calculate_rewards = self._timed("reward", trainer._calculate_rewards)
        trainer._prepare_inputs = self._marked(trainer._prepare_inputs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._gate.ready(trl.__version__)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = int(state.num_input_tokens_seen)
        self._spent["update"] = time.perf_counter() - self._update_start
        counts = self._counts | {
            "sequence_tokens": seen - self._tokens_seen,
            "completion_tokens": self._reward.take_count(),
        }
        self._tokens_seen, self._counts = seen, dict.fromkeys(COUNTS, 0)
        self._gate.done(self._spent, counts)
        self._spent = {}

    def _timed(self, part: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self._spent[part] = time.perf_counter() - start
            return result

        return call

    def _marked(self, prepare: Callable) -> Callable:
        """Called for every micro-batch; the first call generates, and what follows it is the update."""

        @functools.wraps(prepare)
        def call(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            if not self._counts["learner_rows"]:
                self._update_start = time.perf_counter()
            self._counts["scored_tokens"] += int(batch["completion_mask"].sum())
            self._counts["learner_rows"] += batch["prompt_ids"].numel() + batch["completion_ids"].numel()
            return batch

        return call
