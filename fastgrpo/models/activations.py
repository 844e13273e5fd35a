"""What autograd keeps of one token in one decoder layer, counted tensor by tensor.

tests/test_plan.py and tests/learner/megatron/test_activation_checkpoint.py hold the counts to the real thing, on a CPU.
arXiv 2205.05198 counts GPT's layers in the same way.

Letters: H hidden, F feed-forward size, A / C query / key heads, D head size, E experts, k experts a token, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.models.shape import Shape

WIDE = 4
"""Bytes of a float32."""
INDEX = 8


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Who computes a layer, of what, and with what else. Example: Kept(shape=shape, size=2, megatron=True, tp=8)."""

    shape: Shape
    size: int
    """Bytes of an element."""
    megatron: bool = False
    on_gpu: bool = False
    """There norms keep no float32 a row, and no product keeps what it has no gradient for."""
    tp: int = 1
    sp: bool = False
    cp: int = 1
    ep: int = 1
    selective: bool = False
    """Feed-forwards are computed again, so that all that is kept of them is their input."""
    rank: int = 0
    """Of the adapters beside a frozen base; 0 where all is trained."""
    targets: Sequence[str] = ()
    """The matrices that have adapters."""

    @property
    def per_token(self) -> int:
        """Bytes of one token, of a rank's rows."""
        return self._norms + self._inputs + self._attention + (0 if self.selective else self._feed_forward)

    def _is_trained(self, *matrices: str) -> bool:
        """Whether what these multiply is kept, for their gradients or their adapters'."""
        if matrices and self._is_peft and self.size == WIDE and not self.on_gpu:
            return True  # kernels/cpu_linear.py keeps it anyway
        return not self.rank or not set(matrices).isdisjoint(self.targets)

    def _norm(self, width: int, num_rows: int = 1) -> int:
        """A norm's input, and on a CPU a float32 a row (kernels/rms_norm.py)."""
        return self.size * width + WIDE * num_rows * (not self.on_gpu)

    @property
    def _norms(self) -> int:
        """The layer's two; those of queries and keys are attention's."""
        return 2 * self._norm(self.shape.hidden_size) // (self.tp if self.sp else 1)

    @property
    def _inputs(self) -> int:
        """What the layer's products take, beside attention's output and the feed-forward's inner part; and A x."""
        shape, low = self.shape, WIDE if self._is_peft else self.size
        beside = () if shape.num_experts else ("gate_proj", "up_proj")  # experts have no adapters
        gate_up = max(self._copies(*beside), self.size * self.selective)
        hidden = (self._copies("q_proj", "k_proj", "v_proj") + gate_up) * shape.hidden_size
        copy = self._copies("o_proj") * shape.num_heads * shape.head_size if self._copies_narrow else 0
        return hidden // (self.tp if self.sp else 1) + copy + low * self.rank * len(self.targets)

    @property
    def _is_peft(self) -> bool:
        return self.rank > 0 and not self.megatron

    @property
    def _copies_narrow(self) -> bool:
        """PEFT gives each adapter what it takes in float32."""
        return self._is_peft and self.size < WIDE

    def _copies(self, *matrices: str) -> int:
        """Bytes that are kept of one entry of what these take."""
        if self._copies_narrow:
            return WIDE * len(set(matrices) & set(self.targets))
        return self.size * self._is_trained(*matrices)

    @property
    def _attention(self) -> int:
        """Queries, keys, values and the output; where queries and keys are normed, what they were before, and the
        values as a part of that. Under context parallelism the keys and values of all ranks' rows."""
        shape = self.shape
        heads, kv = shape.num_heads, max(shape.num_kv_heads, self.tp)
        kept = 2 * heads + 2 * kv * self.cp
        num_bytes = kept * shape.head_size * self.size + WIDE * heads
        if shape.qk_norm:
            num_bytes += self._norm((heads + kv) * shape.head_size, heads + kv)
            num_bytes += self.size * kv * shape.head_size * (self.cp > 1)
        return num_bytes // self.tp

    @property
    def _feed_forward(self) -> int:
        """gate and up, and their product where that is some product's input."""
        shape = self.shape
        if shape.num_experts:
            return self._experts
        return (2 * self.size + self._copies("down_proj")) * shape.ffn_size // self.tp

    @property
    def _experts(self) -> int:
        """The rows dealt to them (of all tp ranks where those cut every expert), gate and up, their product, and the
        output, which the routers' weights multiply; and what the routers keep. Transformers keeps silu(gate) too."""
        shape, trained = self.shape, not self.rank
        num_chosen, cut = shape.experts_per_token, self.tp if self.ep > 1 else 1
        rows = (1 + trained) * self.size * shape.hidden_size // cut
        inner = (2 + trained + (not self.megatron)) * self.size * shape.ffn_size // self.tp
        router = (WIDE + self.size + 1) * shape.num_experts + num_chosen * (3 * INDEX + self.size)
        return num_chosen * (rows + inner) + router // (self.tp if self.sp else 1)
