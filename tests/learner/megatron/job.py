"""One process of a distributed test: runs every case of its job's size and lets rank 0 write what came out.

Usage: start.py RANK NUM_PROCESSES DIRECTORY, with one Hugging Face directory a model in DIRECTORY.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from collectives import Collectives
from scenario import (
    CASES,
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
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.megatron import convert, head, parallel
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.cpu import megatron_on_cpu
from fastgrpo.learner.megatron.hf_weights import from_directory
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.megatron.learner import MegatronLearner
from fastgrpo.learner.megatron.microbatch import prepare
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.types import PackedBatch, WeightSlice


def run(case: Case, directory: Path) -> dict[str, Any]:
    """Everything that the tests compare with the torch learner."""
    path = directory / case.model
    learner = MegatronLearner.from_pretrained(
        str(path),
        case.layout,
        train_config(case.model),
        num_updates=NUM_STEPS + 1,
        reference=True,
        activation_checkpoint=case.activation_checkpoint,
        overlap_grad_reduce=case.overlap_grad_reduce,
        distributed_optimizer=case.distributed_optimizer,
    )
    source = from_directory(path)
    result: dict[str, Any] = {
        "not_exact": [name for name, tensor in learner.named_weights() if not torch.equal(tensor, source(name))],
        "names": [name for name, _ in learner.named_weights()],
    }
    held = learner.weight_slices()
    result["slices"] = slices_cover_once(learner, held) + slices_differ(held, source)
    batches = with_logprobs(batches_of(case.share_prompts, experts=case.replays), learner)
    result["logprobs"] = by_token(batches, [learner.logprobs(batch, temperature=0.7) for batch in batches])
    mine = share_of(batches, learner)
    result["gradients"] = gradients(learner, mine)
    if learner.parallel.dp_size > 1:
        result["gradients_of_rank_0_alone"] = gradients(learner, share_of(batches, learner, all_on_rank_0=True))
    result["step_without_batches"] = vars(learner.update([], OBJECTIVE))
    result["steps"] = [vars(learner.update(mine, OBJECTIVE))]
    learner.move_reference(0.5)
    saved = empty_directory(directory / f"saved-{case.name}")
    learner.save(saved)
    result["steps"] += [vars(learner.update(mine, OBJECTIVE)) for _ in range(NUM_STEPS - 1)]
    result["weights"] = {name: tensor.clone() for name, tensor in learner.named_weights()}
    result["slices"] += slices_differ(held, result["weights"].__getitem__)
    result["reference"] = by_token(batches, learner.logprobs_of(batches, temperature=1.0, reference=True))
    result["skipped"] = after_a_nan(learner, mine)
    result["bytes_while_offloaded"], result["resume_differs"] = resumed(learner, saved, mine, result["weights"])
    result["moved"] = addresses(held) != addresses(learner.weight_slices())
    result["ranks_differ"] = ranks_differ(result)
    parallel.destroy()
    return result


def share_of(batches: list[PackedBatch], learner: MegatronLearner, *, all_on_rank_0: bool = False) -> list[PackedBatch]:
    """A data-parallel rank's batches, with empty ones where all must have equally many."""
    rank, size = learner.parallel.dp_rank, 1 if all_on_rank_0 else learner.parallel.dp_size
    mine = batches[rank::size] if rank < size else []
    missing = -(-len(batches) // size) - len(mine) if learner.ranks.in_step else 0
    return mine + [PackedBatch.empty()] * missing


def slices_cover_once(learner: MegatronLearner, held: list[WeightSlice]) -> list[str]:
    """The tensors whose entries the job does not hold exactly once for each copy: data-parallel ones, and those of
    what tensor-parallel ranks replicate."""
    mine = [(s.name, s.full_shape, s.start, tuple(s.tensor.shape)) for s in held]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    holders = Counter(box for boxes in everyone for box in boxes)
    counts: dict[str, torch.Tensor] = {}
    for name, full_shape, start, shape in holders:
        box = tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))
        counts.setdefault(name, torch.zeros(full_shape, dtype=torch.int))[box] += 1
    wrong = [f"{name} is not covered exactly once" for name, count in counts.items() if not (count == 1).all()]
    wrong += [f"{box} has {times} holders" for box, times in holders.items() if times != num_copies(learner, *box)]
    missing = {name for name, _ in learner.named_weights()} ^ counts.keys()
    return wrong + [f"{name} is named by one side only" for name in sorted(missing)]


def num_copies(learner: MegatronLearner, name: str, full_shape: tuple, start: tuple, shape: tuple) -> int:
    layout, dp = learner.parallel.layout, learner.parallel.dp_size * learner.parallel.layout.cp
    if ".experts." in name:
        return layout.tp * dp // (layout.ep * layout.expert_tp)
    return dp * (layout.tp if shape == full_shape else 1)


def slices_differ(held: list[WeightSlice], full: Callable[[str], torch.Tensor]) -> list[str]:
    """What of the slices is not, bit for bit, what the full tensors hold; padding is zeros."""
    wrong = []
    for s in held:
        box = tuple(slice(begin, begin + size) for begin, size in zip(s.start, s.tensor.shape, strict=True))
        after = (s.num_padding_rows, *s.tensor.shape[1:])
        padding = s.tensor.as_strided(after, s.tensor.stride(), s.tensor.storage_offset() + s.tensor.numel())
        if not torch.equal(s.tensor, full(s.name)[box]) or padding.any():
            wrong.append(f"{s.name} from {s.start} on differs")
    return wrong


def addresses(held: list[WeightSlice]) -> list[int]:
    return [s.tensor.data_ptr() for s in held]


def gradients(learner: MegatronLearner, batches, objective: Objective = OBJECTIVE) -> dict[str, torch.Tensor]:
    learner.accumulate(batches, objective)
    if learner.optimizer.is_distributed:  # each data-parallel rank has summed its own part
        groups = [g for chunk in learner.ddp for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        for ranks, bucket in ((g.intra_distributed_optimizer_instance_group, b) for g in groups for b in g.buckets):
            parts = list(bucket.grad_data.chunk(ranks.size()))
            dist.all_gather(parts, parts[ranks.rank()].clone(), group=ranks)
    adapters = learner.policy[0].architecture.adapters is not None
    whole = convert.to_hf(learner.policy, learner.parallel, lambda param: param.main_grad, adapters=adapters)
    return {name: gradient.clone() for name, gradient in whole}


def by_token(batches, values: list[torch.Tensor]) -> torch.Tensor:
    """Per-token values in the sequences' order, whatever micro-batch they came from."""
    parts: dict[int, torch.Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        for index, sequence in enumerate(batch.sequence_ids.tolist()):
            parts[sequence] = value[batch.cu_scored[index] : batch.cu_scored[index + 1]]
    return torch.cat([parts[sequence] for sequence in sorted(parts)])


def empty_directory(path: Path) -> Path:
    """A directory that all ranks see."""
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    return path


def after_a_nan(learner: MegatronLearner, batches) -> dict[str, Any]:
    """An update whose loss is not finite on one data-parallel rank: whether anything of the model moved anywhere."""
    before = {name: tensor.clone() for name, tensor in learner.named_weights()}
    if learner.parallel.dp_rank == 0:
        batches[0].advantages[0] = float("nan")
    step = learner.update(batches, OBJECTIVE)
    moved = [name for name, tensor in learner.named_weights() if not torch.equal(tensor, before[name])]
    if learner.parallel.dp_rank == 0:
        batches[0].advantages[0] = batches[0].advantages[1]
    return {"skipped": step.skipped, "moved": moved, "policy_version": step.policy_version}


def resumed(learner: MegatronLearner, saved: Path, batches, weights) -> tuple[int, list[str]]:
    """The last steps taken again from a saved state, with the optimizer out of memory before each: the bytes it then
    holds, and the weights that come out different."""
    learner.load(saved)
    num_bytes = 0
    for _ in range(NUM_STEPS - 1):
        learner.offload()
        released = [*learner.optimizer.state(), *learner.optimizer.gradient_buffers()]
        num_bytes += sum(tensor.untyped_storage().nbytes() for tensor in released)
        learner.logprobs(batches[0], temperature=1.0)  # all that the sampler's phase asks for still works
        learner.onload()
        learner.update(batches, OBJECTIVE)
    return num_bytes, [name for name, tensor in learner.named_weights() if not torch.equal(tensor, weights[name])]


def ranks_differ(result: dict[str, Any]) -> list[str]:
    """What is not the same on all ranks."""
    mine = {
        "steps": result["steps"],
        "logprobs": result["logprobs"].double().sum().item(),
        "weights": {name: tensor.double().sum().item() for name, tensor in result["weights"].items()},
        "not_exact": result["not_exact"],
        "slices": result["slices"],
        "moved": result["moved"],
        "bytes_while_offloaded": result["bytes_while_offloaded"],
    }
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [key for key in mine if any(other[key] != mine[key] for other in everyone)]


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
        learner.save(empty_directory(directory / f"sharded-{case.model}-{index}"))
        step = learner.update(mine, OBJECTIVE)
        reference = [learner.logprobs(batch, temperature=1.0, reference=True) for batch in batches]
        weights = {name: tensor.clone() for name, tensor in learner.named_weights()}
        results.append({"step": vars(step), "weights": weights, "reference": by_token(batches, reference)})
        parallel.destroy()
    return results


def sequence_ratios(directory: Path) -> list[dict[str, torch.Tensor]]:
    """Gradients of an objective that relates a sequence's tokens, with sequences whole on a rank and cut over two."""
    found = []
    for layout in (Layout(tp=2), Layout(cp=2)):
        path = str(directory / RESHARDED_MODEL)
        learner = MegatronLearner.from_pretrained(path, layout, TRAIN, num_updates=1, reference=True)
        batches = with_logprobs(batches_of(True), learner)
        found.append(gradients(learner, batches, replace(OBJECTIVE, ratio_level="sequence")))
        parallel.destroy()
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
    learner.save(saved)
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
    learner.save(saved[0])
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
    with_reference.save(saved["with"])
    without.save(saved["without"])
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
    from adapters import with_adapters

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
            adapters=with_adapters(model)[1] if frozen else None,
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


def adapters(directory: Path) -> Any:
    """What adapters.py has for so many processes; it looks at learners through this module."""
    import adapters

    return adapters.run_all(directory) if dist.get_world_size() > 1 else adapters.run_alone(directory)


EXTRAS = {
    2: {"head_collectives": head_collectives, "sequence_ratios": sequence_ratios, "pending_save": pending_save},
    1: {
        "adapters": adapters,
        "bfloat16": bfloat16,
        "odd_checkpoints": odd_checkpoints,
        "kept_activations": kept_activations,
    },
    4: {
        "adapters": adapters,
        "reshard": partial(reshard, RESHARDED),
        "reshard_experts": partial(reshard, RESHARDED_EXPERTS),
    },
}


def meet(rank: int, num_processes: int, port_file: Path) -> dist.TCPStore:
    """A store on a port that was free when rank 0 took it. A FileStore is slow for the many groups of a layout."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
        whole = port_file.with_suffix(".new")
        whole.write_text(str(store.port))
        whole.rename(port_file)
        return store
    while not port_file.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port_file.read_text()), num_processes)


def main() -> None:
    rank, num_processes, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = meet(rank, num_processes, directory / f"port-{num_processes}")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=90))
    results: dict[str, Any] = {name: extra(directory) for name, extra in EXTRAS.get(num_processes, {}).items()}
    for case in CASES:
        if case.processes != num_processes:
            continue
        try:
            results[case.name] = run(case, directory)
            gc.collect()  # a layout's process groups, with their threads, live as long as its learner
        except Exception:
            # The other ranks wait in a collective: leave at once, so that they fail too.
            print(f"rank {rank}, {case.name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
    if rank == 0:
        torch.save(results, directory / f"results-{num_processes}.pt")
    dist.barrier()
    dist.destroy_process_group()
