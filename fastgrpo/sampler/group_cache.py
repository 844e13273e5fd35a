"""The torch sampler's key-value cache: a prompt's keys and values once for its G completions.

A decoding step attends to the shared prompt, with all of a group's queries as the rows of one product, and to each
completion's own past. Letters: B prompts, R rows (completions in flight), A / C query / key heads, Q = A / C, D head
size, P the longest prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.kernels.dense_attention import attention_with_lse, merge


class GroupCache:
    """Keys and values of B prompts, once each, and of their completions in flight; the decoder's `attend`."""

    def __init__(self, prompt_kv: list[tuple[Tensor, Tensor]], lengths: Tensor, num_samples: int, limit: int) -> None:
        first = prompt_kv[0][0]
        device, (_, heads, size) = first.device, first.shape
        num_prompts, longest = len(lengths), int(lengths.max())
        inside = torch.arange(longest) < lengths[:, None]  # (B, P)
        self.prompt_mask = None
        if not bool(inside.all()):
            bias = torch.zeros(num_prompts, 1, 1, longest, dtype=first.dtype)
            self.prompt_mask = bias.masked_fill_(~inside[:, None, None], float("-inf")).to(device)
        index = (inside.flatten().cumsum(0) - 1).clamp(min=0).to(device)
        self.prompt_kv = [
            tuple(x[index].unflatten(0, (num_prompts, longest)).transpose(1, 2).contiguous() for x in pair)
            for pair in prompt_kv
        ]  # per layer (B, C, P, D) twice
        prompt_kv.clear()
        rows = num_prompts * num_samples
        self.own_kv = [
            tuple(torch.empty(rows, heads, limit, size, dtype=first.dtype, device=device) for _ in range(2))
            for _ in self.prompt_kv
        ]
        self.length = 0
        self.prompt_lengths = lengths.to(device)
        self._seat(torch.arange(num_prompts, device=device).repeat_interleave(num_samples))

    def _seat(self, prompt_of_row: Tensor) -> None:
        """Rows of one prompt sit side by side in its block, so that they read its keys together."""
        self.prompt_of_row = prompt_of_row
        counts = torch.bincount(prompt_of_row, minlength=len(self.prompt_lengths))
        seats = int(counts.max())
        first_row = counts.cumsum(0) - counts
        self.seat_of_row = (
            prompt_of_row * seats + torch.arange(len(prompt_of_row), device=counts.device) - first_row[prompt_of_row]
        )
        self.row_of_seat = torch.zeros(len(counts) * seats, dtype=torch.int64, device=counts.device)
        self.row_of_seat[self.seat_of_row] = torch.arange(len(prompt_of_row), device=counts.device)
        self.full = len(prompt_of_row) == len(counts) * seats

    def keep(self, going: Tensor) -> None:
        """Drop the rows that are not going, and prompts that no row belongs to any more."""
        self.own_kv = [tuple(_kept(x, going, self.length) for x in pair) for pair in self.own_kv]
        prompts, prompt_of_row = self.prompt_of_row[going].unique(return_inverse=True)
        if len(prompts) < len(self.prompt_lengths):
            self.prompt_kv = [tuple(x[prompts] for x in pair) for pair in self.prompt_kv]
            self.prompt_lengths = self.prompt_lengths[prompts]
            self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask[prompts]
        self._seat(prompt_of_row)

    def positions(self) -> Tensor:
        """(R,) the position of the token each row reads next."""
        return self.prompt_lengths[self.prompt_of_row] + self.length

    def advance(self) -> None:
        """Call after the model has read one token a row."""
        self.length += 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (R, A, D), k and v (R, C, D) -> (R, A, D)."""
        own_k, own_v = self.own_kv[layer]
        own_k[:, :, self.length], own_v[:, :, self.length] = k, v
        end = self.length + 1
        own_k, own_v = own_k[:, :, :end], own_v[:, :, :end]
        grouped = q.unflatten(1, (k.shape[1], -1))  # (R, C, Q, D): a key head's queries as its rows
        # Scores in half precision would lose digits that the flash kernels keep.
        attend = self._attend_jointly if q.dtype in (torch.float32, torch.float64) else self._attend_and_merge
        prompt_k, prompt_v = self.prompt_kv[layer]
        return attend(grouped, own_k, own_v, prompt_k, prompt_v, scale).flatten(1, 2)

    def _attend_jointly(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
    ) -> Tensor:
        """(R, C, Q, D): one softmax over the prompt's and the own scores, with a single query a row to batch."""
        q = q * scale
        shared = self._to_seats(q) @ prompt_k.mT  # (B, C, seats*Q, P)
        if self.prompt_mask is not None:
            shared += self.prompt_mask
        shared = self._to_rows(shared, q.shape[2])  # (R, C, Q, P)
        probs = torch.cat([shared, q @ own_k.mT], -1).softmax(-1)
        on_prompt, on_own = probs.split([prompt_k.shape[2], own_k.shape[2]], -1)
        return self._to_rows(self._to_seats(on_prompt) @ prompt_v, q.shape[2]) + on_own @ own_v

    def _attend_and_merge(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float
    ) -> Tensor:
        """(R, C, Q, D): two attentions, merged by their log-sum-exp."""
        own = attention_with_lse(q, own_k, own_v, causal=False, scale=scale)
        shared_out, shared_lse = attention_with_lse(
            self._to_seats(q), prompt_k, prompt_v, causal=False, scale=scale, bias=self.prompt_mask
        )
        shared = self._to_rows(shared_out, q.shape[2]), self._to_rows(shared_lse, q.shape[2])
        return merge(*own, *shared)[0]

    def _to_seats(self, x: Tensor) -> Tensor:
        """(R, C, Q, D) -> (B, C, seats*Q, D)."""
        seated = x if self.full else x.index_select(0, self.row_of_seat)
        return seated.unflatten(0, (len(self.prompt_lengths), -1)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: Tensor, queries: int) -> Tensor:
        """(B, C, seats*Q, ...) -> (R, C, Q, ...)."""
        rows = x.unflatten(2, (-1, queries)).transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows.index_select(0, self.seat_of_row)


def _kept(cache: Tensor, going: Tensor, length: int) -> Tensor:
    """Copy what is filled of the rows that go on."""
    kept = cache.new_empty(int(going.sum()), *cache.shape[1:])
    kept[:, :, :length] = cache[going, :, :length]
    return kept
