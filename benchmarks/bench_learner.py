"""One update of a learner on fixed fake rollouts: tokens/s, MFU and peak memory a rank, for a layout and a model.

    python benchmarks/bench_learner.py [--providers fastgrpo-torch trl ...]                       # one process
    torchrun --nproc-per-node 4 benchmarks/bench_learner.py --tp 2 --pp 2 [--model qwen3-0.6b] [--out FILE.csv]

    for p in fastgrpo-megatron fastgrpo-torch trl hugging-face; do                                # a GPU, 32k tokens
      python benchmarks/bench_learner.py --model qwen3-1.7b --providers $p --out $p.csv; done

Weights are random and rollouts the same for every layout, made by every rank, so nothing is downloaded. On one process
the providers take turns, once the norms of their first gradients have agreed; peak memory is given where one of them
runs alone. TRL and the plain Hugging Face learner are described in learner_peers.py. On a CPU the numbers compare
layouts and providers with each other, no more.

Tokens are those of the sequences, each with its prompt. MFU is the work that the update needs
(fastgrpo.models.flops.update_flops has the formula) over what the devices could do in its time (its PEAKS, or
--peak-tflops a device, dense). Recomputation of activations, prompts computed again for every completion and padding
count nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from harness import RESULTS, Table
from learner_peers import agree, hugging_face, pad, trl
from models import MODELS, random_model

from fastgrpo.config import TrainConfig
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.layout import Layout
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.models.decoder import recompute_activations
from fastgrpo.models.flops import peak_flops, update_flops
from fastgrpo.models.hf import prepare
from fastgrpo.models.shape import Shape
from fastgrpo.types import PackedBatch

PROVIDERS = ("fastgrpo-megatron", "fastgrpo-torch", "trl", "hugging-face")


def rollouts(args: argparse.Namespace, vocab_size: int) -> list[Sequence]:
    """Groups of ragged completions."""
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for group in range(args.groups):
        prompt = torch.randint(0, vocab_size, (args.prompt_tokens,), generator=generator)
        for _ in range(args.group_size):
            length = int(
                torch.randint(args.completion_tokens // 2, args.completion_tokens + 1, (), generator=generator)
            )
            sequence = Sequence(
                sequence_id=len(sequences),
                group_id=group,
                prompt_ids=prompt,
                token_ids=torch.randint(0, vocab_size, (length,), generator=generator),
                advantages=torch.randn(1, generator=generator).expand(length),
                token_weights=torch.full((length,), 1 / length / args.groups / args.group_size),
                sampler_logprobs=torch.full((length,), -5.0),
            )
            sequences.append(sequence)
    return sequences


def timed(update: Callable[[], object], device: torch.device) -> float:
    """Seconds until the slowest rank is done."""
    _wait(device)
    start = time.perf_counter()
    update()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def measure(args: argparse.Namespace, device: torch.device, table: Table) -> None:
    config = transformers.Qwen3Config(**MODELS[args.model], max_position_embeddings=32768, tie_word_embeddings=True)
    layout = Layout(
        tp=args.tp, pp=args.pp, vpp=args.vpp, sp=args.sp, stage_layers=args.stage_layers and tuple(args.stage_layers)
    )
    sequences = rollouts(args, config.vocab_size)
    batches = pack(sequences, max_tokens=args.tokens_per_microbatch, share_prompts=True)
    updates = {name: make_update(name, args, config, layout, sequences, batches, device) for name in args.providers}
    # The first also warms up. bfloat16 rounds every activation, so norms agree to a few per cent there.
    agree({name: update() for name, update in updates.items()}, 0.05 if device.type == "cuda" else 1e-3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(args.rounds):
        for name, update in updates.items():
            seconds[name].append(timed(update, device))
    peaks = peak_bytes(device) if len(updates) == 1 else []
    if dist.get_rank() == 0:
        flops = sum(update_flops(Shape.of(config), batch) for batch in batches)
        report(args, table, layout, flops, sequences, seconds, peaks)


def make_update(
    name: str,
    args: argparse.Namespace,
    config: transformers.PretrainedConfig,
    layout: Layout,
    sequences: list[Sequence],
    batches: list[PackedBatch],
    device: torch.device,
) -> Callable[[], float]:
    """One provider's update, which returns the gradient's norm before it was clipped."""
    train, objective = TrainConfig(), Objective()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    full = args.activation_checkpoint == "full"
    if name == "fastgrpo-megatron":
        from fastgrpo.learner.megatron.learner import MegatronLearner  # the others run without Megatron

        read = random_model(config, dtype).state_dict().__getitem__
        kwargs = {"dtype": dtype, "activation_checkpoint": args.activation_checkpoint}
        kwargs |= {"overlap_grad_reduce": args.overlap_grad_reduce}
        megatron = MegatronLearner(Architecture.of(config), read, layout, train, num_updates=1000, **kwargs)
        mine = batches[megatron.parallel.dp_rank :: megatron.parallel.dp_size]
        return lambda: megatron.update(mine, objective).grad_norm
    if name == "fastgrpo-torch":
        model = prepare(random_model(config, dtype).to(device))
        if full:
            recompute_activations(model)
        learner = TorchLearner(model, train, num_updates=1000)
        return lambda: learner.update(batches, objective).grad_norm
    make = functools.partial(trl, group_size=args.group_size) if name == "trl" else hugging_face
    padded = pad(sequences, args.tokens_per_microbatch, device)
    return make(random_model(config, torch.float32).to(device), padded, train, checkpoint=full)


def peak_bytes(device: torch.device) -> list[int]:
    """Of every rank's device; none on a CPU."""
    if device.type != "cuda":
        return []
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, torch.cuda.max_memory_allocated(device))
    return peaks


def report(
    args: argparse.Namespace,
    table: Table,
    layout: Layout,
    flops: float,
    sequences: list[Sequence],
    seconds: dict[str, list[float]],
    peaks: list[int],
) -> None:
    """Rows for every provider; peak memory is given only where one provider ran, so that it is that provider's."""
    tokens, world_size = sum(len(s.prompt_ids) + len(s.token_ids) for s in sequences), dist.get_world_size()
    x = f"{args.model} {layout} dp={world_size // layout.num_model_ranks} tokens={tokens}"
    x += f" checkpoint={args.activation_checkpoint}"
    one_peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(str(table.device), torch.bfloat16)
    for name, values in seconds.items():
        table.add("learner", name, "update", "rate", "tok/s", x, [tokens / value for value in values])
        table.add("learner", name, "update", "time", "ms", x, [value * 1e3 for value in values])
        if one_peak is not None:
            peak = one_peak * world_size
            table.add("learner", name, "update", "mfu", "%", x, [100 * flops / value / peak for value in values])
    for rank, peak in enumerate(peaks):
        table.add("learner", args.providers[0], "update", "peak_memory", "bytes", f"{x} rank={rank}", [peak])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b" if torch.cuda.is_available() else "tiny")
    for name in ("tp", "pp", "vpp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--stage-layers", type=int, nargs="+", help="of each stage; dealt out by time unless given")
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--activation-checkpoint", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--overlap-grad-reduce", action="store_true")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["fastgrpo-megatron"])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256 if torch.cuda.is_available() else 32)
    parser.add_argument("--completion-tokens", type=int, default=336 if torch.cuda.is_available() else 48)
    parser.add_argument("--tokens-per-microbatch", type=int, default=16384 if torch.cuda.is_available() else 512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of one device, dense, where it is not a known GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "learner.csv")
    parser.add_argument("--append", action="store_true", help="to --out, where it exists")
    args = parser.parse_args()
    start_process_group()
    if dist.get_world_size() > 1 and args.providers != ["fastgrpo-megatron"]:
        parser.error("the other providers run on one process")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    table = Table(device)
    measure(args, device, table)
    if dist.get_rank() == 0:
        table.write(args.out, append=args.append)
    dist.destroy_process_group()


def start_process_group() -> None:
    """torchrun's, or one of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as fastgrpo.ranks.join_job, before the first use
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    main()
