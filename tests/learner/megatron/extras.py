"""What is asked of a learner besides the cases, for job.py: each in as many processes as it needs."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import adapters
import every_model
import torch
from collectives import Collectives
from megatron.core.dist_checkpointing import load_tensors_metadata
from observe import by_token, empty_directory, gradients, save, share_of
from scenario import (
    NUM_STEPS,
    OBJECTIVE,
    RESHARDED,
    RESHARDED_EXPERTS,
    RESHARDED_MODEL,
    TRAIN,
    Case,
    batches_of,
    model_of,
    train_config,
    with_logprobs,
)

from fastgrpo.config import UserError
from fastgrpo.kernels import chunks
from fastgrpo.kernels.chunks import ChunkRows
from fastgrpo.learner.megatron import head, parallel
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.learner.megatron.microbatch import prepare
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.verify.cases import OBJECTIVES


def reshard(cases: tuple[Case, ...], directory: Path) -> list[dict[str, Any]]:
    """Two steps in the first layout, and a third in all of them, each from what the one before it has saved."""
    results: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        learner = MegatronLearner.from_pretrained(
            str(directory / case.model),
            case.layout,
            train_config(case.model),
            num_updates=NUM_STEPS + 1,
            reference=True,
            distributed_optimizer=case.distributed_optimizer,
        )
        batches = with_logprobs(batches_of(True), learner)
        mine = share_of(batches, learner)
        if index == 0:
            for _ in range(NUM_STEPS - 1):
                learner.update(mine, OBJECTIVE)
            learner.move_reference(0.5)
        else:
            learner.load(directory / f"sharded-{case.model}-{index - 1}")
        save(learner, empty_directory(directory / f"sharded-{case.model}-{index}"))
        step = learner.update(mine, OBJECTIVE)
        reference = [learner.logprobs(batch, temperature=1.0, reference=True) for batch in batches]
        weights = {name: tensor.clone() for name, tensor in learner.named_weights()}
        results.append({"step": vars(step), "weights": weights, "reference": by_token(batches, reference)})
        parallel.destroy()
    return results


def sequence_ratios(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Gradients of two objectives that relate a sequence's tokens, ours and one's own, with sequences whole on a rank
    and cut over two; and what the second reports."""
    found = []
    own = replace(OBJECTIVE, surrogate=OBJECTIVES["one's own, sequence"].surrogate)
    for layout in (Layout(tp=2), Layout(cp=2)):
        path = str(directory / RESHARDED_MODEL)
        learner = MegatronLearner.from_pretrained(path, layout, TRAIN, num_updates=1, reference=True)
        batches = with_logprobs(batches_of(True), learner)
        ours = gradients(learner, batches, replace(OBJECTIVE, ratio_level="sequence"))
        theirs = {f"own {name}": gradient for name, gradient in gradients(learner, batches, own).items()}
        reported = learner.update(batches, own).metrics["surrogate/clipped"]
        found.append({**ours, **theirs, "reported": torch.tensor(reported)})
        parallel.destroy()
    return found


def other_references(directory: Path) -> list[dict[str, Any]]:
    """Logprobs under a reference that is another model, with experts or without where the policy is the other way, and
    what of it is saved; beside those of a learner whose policy it is."""
    found = []
    pairs = {Layout(tp=2, sp=True): ("qwen2", "qwen3_moe"), Layout(pp=2): ("qwen3_moe", "llama-tied")}
    for number, (layout, (model, other)) in enumerate(pairs.items()):
        path, batches = str(directory / other), batches_of(True)
        learner = MegatronLearner.from_pretrained(
            str(directory / model), layout, TRAIN, num_updates=1, reference=True, reference_path=path
        )
        own = learner.logprobs_of(batches, temperature=0.7)
        got = learner.logprobs_of(batches, temperature=0.7, reference=True)
        saved = empty_directory(directory / f"other-reference-{number}")
        save(learner, saved)
        learner.load(saved)
        parts = {name.split(".")[0] for name in load_tensors_metadata(str(saved))}
        parallel.destroy()
        oracle = TorchLearner(model_of(other), TRAIN, num_updates=1)
        want = oracle.logprobs_of(batches, temperature=0.7)
        found.append({"own": torch.cat(own), "got": torch.cat(got), "want": torch.cat(want), "saved": parts})
    return found


def bfloat16(directory: Path) -> dict[str, Any]:
    """Steps far below bfloat16's resolution, which only float32 masters can add up; then a save and a load."""
    config = replace(TRAIN, learning_rate=1e-5)
    path, model = directory / RESHARDED_MODEL, model_of(RESHARDED_MODEL).bfloat16()
    oracle = TorchLearner(model, config, num_updates=9, reference=model_of(RESHARDED_MODEL).bfloat16())
    learner = MegatronLearner.from_pretrained(
        str(path), Layout(), config, num_updates=9, reference=True, dtype=torch.bfloat16
    )
    batches = with_logprobs(batches_of(True), oracle)
    masters = [learner.optimizer.optimizer.get_parameters(), oracle.optimizer.masters]
    start = [[master.clone() for master in each] for each in masters]
    # Tokens near the clip's edges would fall on this side or that as rounding has it, and the gradient with them.
    unclipped = replace(OBJECTIVE, clip_ratio_low=0.99, clip_ratio_high=100.0, dual_clip=None)
    for _ in range(NUM_STEPS):
        steps = [vars(each.update(batches, unclipped)) for each in (learner, oracle)]
    moved = [
        sum((a - b).abs().sum().item() for a, b in zip(*pair, strict=True)) for pair in zip(masters, start, strict=True)
    ]
    saved = empty_directory(directory / "bfloat16")
    save(learner, saved)
    twice = []
    for _ in range(2):
        twice.append((vars(learner.update(batches, OBJECTIVE)), [w.clone() for _, w in learner.named_weights()]))
        learner.load(saved)
    parallel.destroy()
    return {
        "steps": steps,
        "dtypes": {tensor.dtype for _, tensor in learner.policy[0].named_parameters()},
        "movement": moved,
        "goes_on": twice[0][0] == twice[1][0] and all(map(torch.equal, twice[0][1], twice[1][1])),
    }


def pending_save(directory: Path) -> list[str]:
    """The weights whose next step depends on what happened between the beginning of a save and its writing."""
    path = str(directory / RESHARDED_MODEL)
    learner = MegatronLearner.from_pretrained(path, Layout(tp=2), TRAIN, num_updates=9, reference=True)
    batches = with_logprobs(batches_of(True), learner)
    learner.update(batches, OBJECTIVE)
    saved = [empty_directory(directory / f"pending-{name}") for name in ("at once", "later")]
    save(learner, saved[0])
    pending = learner.begin_save(saved[1], copy=True)
    learner.update(batches, OBJECTIVE)
    learner.move_reference(0.5)
    learner.offload()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda write: write(), pending.files.values()))
    learner.onload()
    pending.finish()
    found = []
    for each in saved:
        learner.load(each)
        learner.update(batches, OBJECTIVE)
        found.append({name: tensor.clone() for name, tensor in learner.named_weights()})
    parallel.destroy()
    return [name for name, tensor in found[0].items() if not torch.equal(tensor, found[1][name])]


def odd_checkpoints(directory: Path) -> dict[str, Any]:
    """Saved before the first step, without a reference or with one too many, and none at all: what loading says."""

    architecture, read = Architecture.of(model_of(RESHARDED_MODEL).config), from_directory(directory / RESHARDED_MODEL)
    names: list[str] = []

    def counted(name: str) -> torch.Tensor:
        names.append(name)
        return read(name)

    def learner_with(reference: bool) -> MegatronLearner:
        return MegatronLearner(architecture, counted, Layout(), TRAIN, num_updates=1, reference=reference)

    def loading(learner: MegatronLearner, saved: Path) -> int | str:
        try:
            learner.load(saved)
        except UserError as error:
            return str(error).replace(str(saved), "DIRECTORY")
        return learner.policy_version

    with_reference, without = learner_with(True), learner_with(False)
    saved = {name: empty_directory(directory / f"odd-{name}") for name in ("with", "without", "none")}
    save(with_reference, saved["with"])
    save(without, saved["without"])
    said = {
        "before any step": loading(without, saved["without"]),
        "one too many": loading(without, saved["with"]),
        "lacking": loading(with_reference, saved["without"]),
        "none": loading(without, saved["none"]),
    }
    said["reads"] = sorted(set(Counter(names).values()))
    said["processes"] = len(multiprocessing.active_children())
    parallel.destroy()
    return said


def kept_activations(directory: Path) -> dict[str, float]:
    """Bytes a token that autograd holds after a forward pass, beside the parameters: of models as they are, with each
    kind of recomputation, and beside a frozen base."""
    held = {}
    for model, kind, frozen in (
        (RESHARDED_MODEL, "none", False),
        (RESHARDED_MODEL, "selective", False),
        (RESHARDED_MODEL, "full", False),
        ("qwen3", "none", True),
        ("qwen3_moe", "none", False),
        ("qwen3_moe", "none", True),
    ):
        learner = MegatronLearner.from_pretrained(
            str(directory / model),
            Layout(),
            TRAIN,
            num_updates=1,
            activation_checkpoint=kind,
            adapters=adapters.with_adapters(model)[1] if frozen else None,
        )
        micro = prepare(batches_of(True), learner.parallel, learner.device)[0]
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with megatron_on_cpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = learner.ddp[0](
                input_ids=micro.batch.token_ids[None],
                position_ids=micro.batch.position_ids[None],
                attention_mask=None,
                packed_seq_params=micro.packed,
                padding_mask=None if learner.balance is None else micro.for_routers,
            )
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        weights = {param.untyped_storage()._cdata for param in learner.policy[0].parameters()}
        num_bytes = sum(num_bytes for storage, num_bytes in storages.items() if storage not in weights)
        held[f"{model} {kind}{' frozen' if frozen else ''}"] = num_bytes / micro.batch.num_tokens
        del hidden
        parallel.destroy()
    return held


def head_collectives(_: Path) -> dict[str, Any]:
    """The collectives of the loss head, forward and backward, on 2 shards of a vocabulary, chunks of 8 rows."""
    seen: dict[str, Any] = {}
    for layout in (Layout(tp=2), Layout(tp=2, sp=True)):
        model, place = model_of("qwen3"), parallel.initialize(layout)
        architecture = Architecture.of(model.config)
        weight = torch.nn.Parameter(torch.randn(architecture.padded_vocab_size(2) // 2, architecture.hidden_size))
        weight.main_grad = torch.zeros_like(weight)
        batch = prepare(batches_of(True), place, torch.device("cpu"))[0].batch
        batch = replace(batch, ref_logprobs=batch.sampler_logprobs)
        hidden = torch.randn(batch.num_tokens // (2 if layout.sp else 1), 1, architecture.hidden_size)
        eight_rows = patch.object(chunks, "chunk_rows", lambda *_, **__: ChunkRows(logits=8, gradients=8))
        with megatron_on_cpu(), eight_rows, Collectives() as collectives:
            stand_in = SimpleNamespace(head_weight=weight, architecture=architecture)
            output = head.policy_loss(stand_in, hidden.requires_grad_(), batch, OBJECTIVE, place)
            output.loss.backward()
        sizes = (batch.num_tokens, batch.num_scored, architecture.hidden_size)
        seen[str(layout)] = {"sizes": sizes, "collectives": collectives.seen}
        parallel.destroy()
    return seen


EXTRAS = {
    2: {
        "every_model": every_model.run_all,
        "head_collectives": head_collectives,
        "sequence_ratios": sequence_ratios,
        "other_references": other_references,
        "pending_save": pending_save,
    },
    1: {
        "adapters": adapters.run_alone,
        "bfloat16": bfloat16,
        "odd_checkpoints": odd_checkpoints,
        "kept_activations": kept_activations,
    },
    4: {
        "adapters": adapters.run_all,
        "every_model": every_model.run_all,
        "reshard": partial(reshard, RESHARDED),
        "reshard_experts": partial(reshard, RESHARDED_EXPERTS),
    },
}
