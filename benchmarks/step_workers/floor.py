"""The floor of a step: the matrix products that no implementation of it can leave out, at this machine's rate.

Counted in FLOPs, with the prompt computed once per group. B prompts of P tokens, G completions of L each; M the
elements of all layers' matrices, H x V the head, A heads of size D:
    generate   2 M (B P + B G (L-1))    the prompts, then every sampled token but the last, which nothing follows
               2 H V (B + B G (L-1))    logits: once per prompt, then per token
    update     6 M (B P + B G (L-1))    forward, and the two products of the backward
               6 H V B G L              every sampled token is scored
    attention  4 A D per layer and (query, key) pair that may see each other, 8 A D more in the backward
Normalisation, softmax, rotation, AdamW and every other thing that moves memory count nothing: the floor is no promise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

from step_workers.case import Case
from step_workers.gate import Gate


def step_flops(case: Case) -> dict[str, float]:
    """{"generate": FLOPs, "update": FLOPs} of one step."""
    shape, B, G = case.shape, case.prompts_per_step, case.group_size
    P, L = case.prompt_length, case.new_tokens
    M = shape.num_layers * sum(a * b for a, b in shape.linears)
    head = shape.hidden_size * shape.vocab_size
    rows = B * P + B * G * (L - 1)
    pairs = B * (P * (P + 1) / 2 + G * ((L - 1) * P + (L - 1) * L / 2))
    attention = 4 * shape.hidden_size * shape.num_layers * pairs
    return {
        "generate": 2 * M * rows + 2 * head * (B + B * G * (L - 1)) + attention,
        "update": 6 * M * rows + 6 * head * B * G * L + 3 * attention,
    }


def run(case: Case, gate: Gate) -> None:
    """Measure the products' rate whenever the gate asks: at the update's rows and at decoding's.

    torch's float32 products go to MKL, which is slow on some processors; where this torch holds oneDNN too, the floor
    takes whichever is faster, kind of product by kind of product. Counts are in MFLOP/s; *_torch_* is torch.mm alone.
    """
    torch.manual_seed(0)
    shape = case.shape
    matrices = shape.linears * shape.num_layers + [(shape.hidden_size, shape.vocab_size)]
    rows = case.prompts_per_step * (case.prompt_length + case.group_size * (case.new_tokens - 1))
    update = [_Products(rows, a, b) for a, b in matrices]
    decode = [_Products(case.num_sequences, a, b) for a, b in matrices]
    gate.ready(version("torch"))
    while True:
        counts = {}
        kinds = {
            "update": (update, ("forward", "input_gradient", "weight_gradient"), 1),
            "decode": (decode, ("forward",), 16),
        }
        for name, (products, methods, repeats) in kinds.items():
            fastest, plain = _rates(products, methods, repeats)
            counts |= {f"{name}_mflops": round(fastest / 1e6), f"{name}_torch_mflops": round(plain / 1e6)}
        gate.done({}, counts)


def _rates(products: list[_Products], methods: tuple[str, ...], repeats: int) -> tuple[float, float]:
    """FLOP/s over all products, each kind by the library that is faster for it, and by torch.mm alone."""
    flops = repeats * len(methods) * sum(p.flops for p in products)
    fastest = plain = 0.0
    for method in methods:
        seconds = []
        for multiply in LIBRARIES:
            start = time.perf_counter()
            for _ in range(repeats):
                for product in products:
                    getattr(product, method)(multiply)
            seconds.append(time.perf_counter() - start)
        fastest, plain = fastest + min(seconds), plain + seconds[0]
    return flops / fastest, flops / plain


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
LIBRARIES = (torch.mm, _onednn) if HAS_ONEDNN else (torch.mm,)


class _Products:
    """The three products of one linear layer: y = x w^T, dx = dy w, dw = dy^T x."""

    def __init__(self, rows: int, num_in: int, num_out: int) -> None:
        self.x, self.w, self.dy = torch.randn(rows, num_in), torch.randn(num_out, num_in), torch.randn(rows, num_out)
        self.flops = 2.0 * rows * num_in * num_out

    def forward(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        multiply(self.x, self.w.t())

    def input_gradient(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        multiply(self.dy, self.w)

    def weight_gradient(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        multiply(self.dy.t(), self.x)
