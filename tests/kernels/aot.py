"""Compiles the Triton kernels for real GPUs on a machine without one, through the functions users call.

A stand-in driver names the target and every launch stops after compilation, so that what is measured is what
the launchers would launch: their signatures, alignments, flags and shapes. Run as a script:

    python tests/kernels/aot.py            print the table of resources
    python tests/kernels/aot.py --write    and make it the committed one, on purpose
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # as Triton 3.10 is to have it: what a launch needs it must ask for

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgrpo.kernels import (
    backend,
    group_advantages,
    logprob_kernels,
    logprobs,
    merge_attention,
    policy_kernels,
    rms_norm,
    rotary,
    scale_gradient,
    swiglu,
)
from fastgrpo.kernels.linear_logprobs import linear_logprobs
from fastgrpo.kernels.linear_policy_loss import linear_policy_loss
from fastgrpo.kernels.objective import CustomSurrogate, LossInputs, Objective
from fastgrpo.kernels.policy_loss import policy_loss

TABLE = Path(__file__).with_name("aot_resources.json")
CAPABILITIES = (80, 90, 100)
VOCAB_SIZE = 152064
KERNELS = {
    "statistics": logprob_kernels.statistics_kernel,
    "gradient": logprob_kernels.gradient_kernel,
    "policy": policy_kernels.policy_kernel,
    "sequence": policy_kernels.sequence_kernel,
    "sum": policy_kernels.sum_kernel,
    "group": group_advantages._group_kernel,
    "merge": merge_attention.merge_kernel,
    "scale": scale_gradient.scale_kernel,
    "norm": rms_norm.norm_kernel,
    "norm_backward": rms_norm.norm_backward_kernel,
    "rotary": rotary.rotary_kernel,
    "rotary_backward": rotary.rotary_backward_kernel,
    "swiglu": swiglu.swiglu_kernel,
    "swiglu_backward": swiglu.swiglu_backward_kernel,
}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class OfflineDriver:
    """What Triton asks of a driver before it launches. The capability doubles as the device's number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int) -> None:
    """From here on every Triton launch in this process compiles for the capability and runs nothing."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    backend.interpreting = lambda: True
    if not hasattr(JITFunction, "_launch_for_real"):
        JITFunction._launch_for_real = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return JITFunction._launch_for_real(self, *args, grid=grid, warmup=True, **kwargs)

        JITFunction.run = run


def batch_of(num_tokens: int, **fields: Any) -> LossInputs:
    ones = torch.ones(num_tokens)
    rich = {"old_logprobs": ones, "ref_logprobs": ones, "importance_weights": ones} if fields.pop("rich", True) else {}
    zeros = torch.zeros(num_tokens, dtype=torch.int64)
    return LossInputs(targets=zeros, advantages=ones, token_weights=ones, **rich, **fields)


RICH = {"kl_coef": 0.1, "entropy_coef": 0.01}


def from_logits(dtype: torch.dtype, objective: Objective, rich: bool = True) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, dtype=dtype, requires_grad=True)
    policy_loss(logits, batch_of(2, rich=rich), objective, backend="triton")


def from_hidden(objective: Objective) -> None:
    hidden = torch.zeros(2, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(VOCAB_SIZE, 16, dtype=torch.bfloat16)
    cu = torch.tensor([0, 2])
    linear_policy_loss(hidden, weight, batch_of(2, cu_seqlens=cu), objective, backend="triton", entropy=True)


def logprobs_of(dtype: torch.dtype, entropy: bool = True) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, dtype=dtype, requires_grad=entropy)
    pair = logprobs.logprobs(logits, torch.zeros(2, dtype=torch.int64), entropy=entropy, backend="triton")
    if entropy:
        sum(x.sum() for x in pair).backward()


def merge_of(head_size: int) -> None:
    out, part = torch.zeros(2, 2, 16, head_size, dtype=torch.bfloat16)
    lse, part_lse = torch.zeros(2, 16, 2)
    merge_attention.merge_in_place(out, lse, part, part_lse, backend="triton")


def leaf(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=True)


def norm_of(size: int, num_rows: int = 2) -> None:
    rms_norm.rms_norm(leaf(num_rows, size), leaf(size), 1e-6, backend="triton").sum().backward()


def add_norm_of(size: int, num_rows: int = 2) -> None:
    rows = leaf(num_rows, size)
    sum(x.sum() for x in rms_norm.add_norm(rows, rows, leaf(size), 1e-6, backend="triton")).backward()


def rotary_of(head_size: int, normed: bool, num_rows: int = 2) -> None:
    angles = torch.zeros(num_rows, 1, head_size, dtype=torch.bfloat16)
    norm = {"weight": leaf(24, head_size), "epsilon": 1e-6} if normed else {}
    turned = rotary.rotary(leaf(num_rows, 32, head_size), angles, angles, 16, 8, **norm, backend="triton")
    sum(x.sum() for x in turned).backward()


def swiglu_of(size: int, num_rows: int = 2) -> None:
    swiglu.swiglu(leaf(num_rows, 2 * size), backend="triton").sum().backward()


OWN = CustomSurrogate(name="mine", function=lambda x: (x.ratio, {}))
SCENARIOS: dict[str, Callable[[], Any]] = {
    "policy_loss bf16, clip on-policy": lambda: from_logits(torch.bfloat16, Objective(), rich=False),
    "policy_loss bf16, dual clip + k3 + entropy": lambda: from_logits(torch.bfloat16, Objective(dual_clip=3.0, **RICH)),
    "policy_loss fp16, sapo + k1 x ratio": lambda: from_logits(
        torch.float16, Objective(surrogate="sapo", kl_coef=0.1, kl_estimator="k1", kl_times_ratio=True)
    ),
    "policy_loss fp32, cispo": lambda: from_logits(torch.float32, Objective(surrogate="cispo")),
    "linear_policy_loss bf16, clip + k3 + entropy": lambda: from_hidden(Objective(**RICH)),
    "linear_policy_loss bf16, GSPO": lambda: from_hidden(Objective(ratio_level="sequence", **RICH)),
    "linear_policy_loss bf16, one's own": lambda: from_hidden(Objective(surrogate=OWN, **RICH)),
    "logprobs bf16 with entropy": lambda: logprobs_of(torch.bfloat16),
    "logprobs fp32 with entropy": lambda: logprobs_of(torch.float32),
    "logprobs bf16 alone": lambda: logprobs_of(torch.bfloat16, entropy=False),
    "scale bf16": lambda: scale_gradient.scale_in_place(
        torch.zeros(2, VOCAB_SIZE, dtype=torch.bfloat16), torch.ones(()), backend="triton"
    ),
    "group_advantages": lambda: group_advantages.group_advantages(
        torch.zeros(4), torch.zeros(4, dtype=torch.int64), backend="triton"
    ),
    "merge bf16, heads of 128": lambda: merge_of(128),
    "merge bf16, heads of 80": lambda: merge_of(80),
    **{f"rms_norm bf16, rows of {size}": partial(norm_of, size) for size in (1024, 2048, 5120)},
    **{f"add_norm bf16, rows of {size}": partial(add_norm_of, size) for size in (1024, 2048, 5120)},
    "rotary bf16, heads of 128": lambda: rotary_of(128, normed=False),
    "rotary bf16, normed heads of 128": lambda: rotary_of(128, normed=True),
    "rotary bf16, heads of 64": lambda: rotary_of(64, normed=False),
    "swiglu bf16": lambda: swiglu_of(6144),
}


def compiled(capability: int) -> dict[tuple[str, Any], Any]:
    """Every kernel compiled so far for a capability, by (name, cache key)."""
    return {
        (name, key): kernel
        for name, fn in KERNELS.items()
        if capability in fn.device_caches
        for key, kernel in fn.device_caches[capability][0].items()
    }


def walks(sass: str) -> list[list[str]]:
    """The loops along a row that carry no mask, as their instructions: four 16-byte loads and exponentials a round."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", sass)]
    branches = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, text in code]
    loops = [
        [text for at, text in code if int(to[1], 16) <= at <= last]
        for last, to in branches
        if to is not None and int(to[1], 16) < last
    ]
    return [loop for loop in loops if sum(text.startswith("LDG.E.128") for text in loop) == 4 and _exponentials(loop)]


def _exponentials(loop: list[str]) -> int:
    return sum("MUFU.EX2" in text for text in loop)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and shared bytes, spill instructions and vector accesses of a compiled kernel.

    walk_instructions, walk_exponentials: what a thread executes for four 16-byte loads of each walk along the row.
    split_lines: a walk's loads that lie 16 bytes behind another of the same thread, so that both touch the same lines.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def cuobjdump(option: str) -> str:
            return subprocess.run(
                [str(_TOOLS / "cuobjdump"), option, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", cuobjdump("--dump-resource-usage"))
        sass = cuobjdump("-sass")
    assert usage is not None
    registers, stack, _ = map(int, usage.groups())
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": kernel.metadata.shared,
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "vector_loads": len(re.findall(r"ld\.global[^;]*v4", kernel.asm["ptx"])),
        "vector_stores": len(re.findall(r"st\.global[^;]*v4", kernel.asm["ptx"])),
        "walk_instructions": sum(map(len, walks(sass))),
        "walk_exponentials": sum(map(_exponentials, walks(sass))),
        "split_lines": sum("+0x10]" in text for walk in walks(sass) for text in walk if text.startswith("LDG")),
        "num_warps": kernel.metadata.num_warps,
    }


def measure(capability: int) -> Iterator[tuple[str, dict[str, int]]]:
    """(scenario / kernel / sm, resources) of everything the scenarios launch."""
    compile_only(capability)
    for scenario, call in SCENARIOS.items():
        before = set(compiled(capability))
        call()
        for (name, key), kernel in compiled(capability).items():
            if (name, key) not in before:
                assert kernel.metadata.enable_fp_fusion, name
                yield f"{scenario} / {name} / sm_{capability}", resources(kernel)


def variants_by_call(capability: int = 90) -> list[int]:
    """How many kernels exist after each of a series of calls that differ only in lengths and coefficients."""
    compile_only(capability)
    counts = []
    for step, num_tokens in enumerate((1, 2, 16, 17, 48)):
        objective = Objective(
            ratio_level="sequence" if step % 2 else "token",
            clip_ratio_low=0.1 + 0.1 * step,
            clip_ratio_high=step,
            kl_coef=1.0 + step,
            entropy_coef=1.0 - 0.1 * step,
            temperature=1.0 + step,
        )
        # a slice that starts anywhere: no pointer of the batch is aligned to 16 bytes
        long = batch_of(num_tokens + step)
        batch = long.tokens_from(step, step + num_tokens)
        cu = torch.tensor([0, *range(1, step + 1), num_tokens]).clamp(max=num_tokens)
        batch = LossInputs(**{**vars(batch), "cu_seqlens": cu})
        hidden = torch.zeros(num_tokens, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(1024, 16, dtype=torch.bfloat16)
        logits = torch.zeros(num_tokens, 1024, dtype=torch.bfloat16, requires_grad=True)
        for chunk in (None, 16):
            linear_policy_loss(hidden, weight, batch, objective, chunk_size=chunk, backend="triton")
        policy_loss(logits, batch, objective, backend="triton")
        for temperature in (1.0, 0.5 + step):
            options = {"temperature": temperature, "entropy": True, "backend": "triton"}
            pair = linear_logprobs(hidden, weight, batch.targets, chunk_size=7 + step, **options)
            sum(x.sum() for x in pair).backward()
            sum(x.sum() for x in logprobs.logprobs(logits, batch.targets, **options)).backward()
        group_advantages.group_advantages(batch.advantages, batch.targets // (step + 1), min_std=step, backend="triton")
        out, lse = torch.zeros(num_tokens, 4, 64, dtype=torch.bfloat16), torch.zeros(4, num_tokens)
        merge_attention.merge_in_place(out, lse, out, lse, backend="triton")
        scale_gradient.scale_in_place(logits.detach(), lse.sum(), backend="triton")
        norm_of(2048, num_tokens)
        add_norm_of(2048, num_tokens)
        rotary_of(128, normed=True, num_rows=num_tokens)
        swiglu_of(6144, num_tokens)
        counts.append(len(compiled(capability)))
    return counts


def main() -> None:
    if "--variants" in sys.argv:
        print(json.dumps(variants_by_call()))
        return
    table = {"triton": triton.__version__}
    rows = {name: row for capability in CAPABILITIES for name, row in measure(capability)}
    if "--json" in sys.argv:
        print(json.dumps(table | {"kernels": rows}))
        return
    columns = list(next(iter(rows.values())))
    print(f"{'kernel':<72}" + "".join(f"{c:>18}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<72}" + "".join(f"{row[c]:>18}" for c in columns))
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(table | {"kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
