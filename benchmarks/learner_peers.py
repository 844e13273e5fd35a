"""The update of bench_learner.py as other people compute it: TRL's GRPOTrainer, and a plain Hugging Face model.

Both get the same model, sequences, advantages and AdamW, padded in micro-batches of whole sequences, with float32
weights (under bfloat16 autocast on a GPU, TRL's default there, which rounds as fastgrpo's bfloat16 with masters does),
torch's SDPA attention and fused AdamW. TRL runs its own training_step; what it prepares before, generation and
rewards, is given. Gradient checkpointing is off, or on in all.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence


@dataclass(frozen=True)
class Padded:
    """B sequences: prompts (B, P) padded on the left, completions (B, C) on the right, masks, advantages (B,)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    advantages: Tensor


def pad(sequences: list[Sequence], max_tokens: int, device: torch.device) -> list[Padded]:
    """Equally many sequences in every micro-batch, as many as fit max_tokens with their padding."""
    longest = max(len(s.prompt_ids) + len(s.token_ids) for s in sequences)
    size = max(
        n for n in range(1, len(sequences) + 1) if len(sequences) % n == 0 and (n == 1 or n * longest <= max_tokens)
    )
    return [_pad(sequences[i : i + size], device) for i in range(0, len(sequences), size)]


def _pad(sequences: list[Sequence], device: torch.device) -> Padded:
    def rows(tensors: list[Tensor], side: str) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side).to(device)

    prompts, completions = [s.prompt_ids for s in sequences], [s.token_ids for s in sequences]
    return Padded(
        prompt_ids=rows(prompts, "left"),
        prompt_mask=rows([torch.ones_like(ids) for ids in prompts], "left"),
        completion_ids=rows(completions, "right"),
        completion_mask=rows([torch.ones_like(ids) for ids in completions], "right"),
        advantages=torch.stack([s.advantages[0] for s in sequences]).to(device),
    )


def hugging_face(model: Any, batches: list[Padded], config: TrainConfig, *, checkpoint: bool) -> Callable[[], float]:
    """The formula written out on the model's own logits. What it returns is one update, which returns the norm."""
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    num_sequences = sum(len(batch.advantages) for batch in batches)

    def update() -> float:
        for batch in batches:
            ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
            mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)
            num_scored = batch.completion_ids.shape[1]
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
                logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=num_scored + 1).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]  # (B, C)
            ratio = (logprobs - logprobs.detach()).exp()
            weights = batch.completion_mask / batch.completion_mask.sum(1, keepdim=True) / num_sequences
            (-ratio * batch.advantages[:, None] * weights).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    return update


def trl(
    model: Any, batches: list[Padded], config: TrainConfig, *, checkpoint: bool, group_size: int
) -> Callable[[], float]:
    """TRL's training_step on every micro-batch, then what its loop does: clip, step, clear."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from fastgrpo.models.tiny import character_tokenizer

    on_gpu = batches[0].prompt_ids.device.type == "cuda"
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_generations=group_size,
        per_device_train_batch_size=group_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        beta=0.0,
        loss_type="grpo",
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=checkpoint,
        optim="adamw_torch_fused",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda **_: [],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * group_size),
        processing_class=character_tokenizer("a"),
    )
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = len(batches)
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    optimizer = trainer.create_optimizer()

    def update() -> float:
        wrapped.train()
        for batch in batches:
            trainer.training_step(wrapped, vars(batch), None)
        norm = trainer.accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(norm)

    return update


def agree(norms: dict[str, float], tolerance: float) -> None:
    """Raise RuntimeError where providers do not compute the same gradient: their times would compare nothing."""
    finite = all(math.isfinite(norm) for norm in norms.values())
    if not finite or max(norms.values()) > min(norms.values()) * (1 + tolerance):
        raise RuntimeError(f"the gradient norms differ by more than {tolerance:.0%}: {norms}")
