"""Whole GRPO steps, side by side with TRL's GRPOTrainer on the same model, prompts, token counts and machine.

    python benchmarks/bench_step.py [--prompt-lengths 64 200] [--steps 5] [--out FILE.csv]
                                    [--providers fastgrpo fastgrpo-vllm trl]

A step is everything between two borders of the training loop: prompts, generation, reward, advantages, logprobs,
loss, backward, clipping, AdamW, bookkeeping. Both sides run their own real loop (step_workers/fastgrpo_side.py,
step_workers/trl_side.py) in a process of their own, make everything once, and take one step whenever they are told
to; the parent lets them take turns, so that whatever else the machine does meets both alike. After --warmup rounds
come --steps counted ones, of which medians, 20th and 80th percentiles are shown. Every round also measures the rate
of the model's own matrix products, from which the floor follows (step_workers/floor.py has the formula).

The case: a Qwen2 made from nothing (4 layers, hidden 256, 4 query and 2 key heads, intermediate 1024, vocabulary 512:
4.2M parameters), 8 prompts x 8 completions x exactly 64 tokens (the end token is forbidden on both sides), float32,
no KL, one update per rollout from micro-batches of one group (TRL is fastest so, and both need least memory; see
--groups-per-microbatch), AdamW, gradient clipping. Every step of either side is checked to have sampled and
scored exactly that; tests/benchmarks/test_bench_step.py checks that both compute the same gradient.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from step_workers import report
from step_workers.case import Case, Shape, prepare
from step_workers.gate import Side, StepReport

PROVIDERS = {"fastgrpo": "fastgrpo", "fastgrpo-vllm": "vllm", "trl": "trl"}
"""Each with the package that it takes."""
RESULTS = Path(__file__).parent / "results"
SMOKE_SHAPE = Shape(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=320)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    missing = [PROVIDERS[name] for name in args.providers if importlib.util.find_spec(PROVIDERS[name]) is None]
    if missing:
        sys.exit(
            f"{', '.join(missing)} is not installed: `make bench` (and `make vllm`) install it, or choose other "
            "--providers"
        )
    # Read by the workers' libraries when they start.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    rows = []
    machine = report.machine()
    print(f"{machine['gpu']}; {platform.system()} {platform.release()}\n")
    for prompt_length in args.prompt_lengths:
        measured = measure(make_case(prompt_length, args.groups_per_microbatch, smoke=args.smoke), args)
        print(report.table(measured), flush=True)
        rows += report.rows(measured)
    report.write_csv(args.out, rows, machine)
    print(f"written to {args.out}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[64, 200], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=5, help="counted steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["fastgrpo", "trl"])
    parser.add_argument(
        "--groups-per-microbatch",
        type=int,
        choices=(1, 2, 4, 8),
        default=1,
        help="of 8 groups, how many each side updates from at once; 8 is one micro-batch",
    )
    parser.add_argument("--threads", type=int, help="threads of each side (default: OMP_NUM_THREADS, else all cores)")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_cpu.csv", help="the CSV file")
    parser.add_argument("--smoke", action="store_true", help="a tiny case that shows only that everything runs")
    return parser.parse_args(arguments)


def make_case(prompt_length: int, groups_per_microbatch: int = 1, *, smoke: bool) -> Case:
    """The benchmark's case, or the tiny one; its directory is filled in by `measure`."""
    if smoke:
        sizes = {"prompts_per_step": 2, "group_size": 4, "new_tokens": 6, "num_prompts": 16}
        return Case(directory="", prompt_length=prompt_length, shape=SMOKE_SHAPE, **sizes)
    return Case(directory="", prompt_length=prompt_length, groups_per_microbatch=groups_per_microbatch)


def measure(case: Case, args: argparse.Namespace) -> report.Measured:
    """All sides of one case, taking turns."""
    steps: dict[str, list[StepReport]] = {provider: [] for provider in (*args.providers, "gemm")}
    with tempfile.TemporaryDirectory(prefix="bench_step_") as directory, ExitStack() as stack:
        case = replace(case, directory=directory)
        prepare(case)
        sides = [stack.enter_context(Side(provider, case)) for provider in steps]
        for number in range(args.warmup + args.steps):
            for side in sides:
                step = side.step()
                if side.provider in PROVIDERS:
                    check_counts(side.provider, step, case)
                if number >= args.warmup:
                    steps[side.provider].append(step)
            shown = ", ".join(f"{s.provider} {steps[s.provider][-1].seconds:.2f} s" for s in sides if steps[s.provider])
            print(f"  round {number + 1 - args.warmup}/{args.steps}: {shown or 'warm-up'}", file=sys.stderr, flush=True)
        ready = {side.provider: side.ready for side in sides}
    return report.Measured(case=case, steps=steps, ready=ready)


def check_counts(provider: str, step: StepReport, case: Case) -> None:
    """Both sides must do the same work: as many prompt, sampled and scored tokens as the case says."""
    expected = {
        "sequence_tokens": case.sequence_tokens,
        "completion_tokens": case.completion_tokens,
        "scored_tokens": case.completion_tokens,
    }
    found = {name: step.counts[name] for name in expected}
    if found != expected:
        raise RuntimeError(f"{provider} did other work than the case asks for: {found}, expected {expected}")


if __name__ == "__main__":
    main()
