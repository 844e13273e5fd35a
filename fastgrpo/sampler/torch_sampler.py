"""The embedded sampler: the learner's own Hugging Face model, with a group-aware KV cache.

A prompt's keys and values are computed and kept once for its G completions. A decoding step attends twice, to the
shared prompt and to the completion's own past, and merges the two by their log-sum-exp (kernels/segment_attention.py).
Letters: B prompts, G samples each, R rows (completions in flight), A / C query / key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.kernels.segment_attention import SegmentPlan, attention_with_lse, merge, segment_attention
from fastgrpo.models import storage
from fastgrpo.models.attention import PackedAttention
from fastgrpo.models.decoder import hidden_states
from fastgrpo.models.hf import CausalLM
from fastgrpo.sampler.draw import contract_of, draw
from fastgrpo.seeding import derive_seed
from fastgrpo.types import LogprobContract, Prompt, Rollout, RolloutGroup, SamplingParams, WeightSlice

# Finished completions are dropped from the batch once they are this share of its rows: dropping copies the cache.
DROP_SHARE = 1 / 8


class TorchSampler:
    """Samples from a Hugging Face model loaded by fastgrpo.models.hf, in the learner's process, on its own weights."""

    def __init__(self, model: CausalLM, *, max_sequences: int = 512) -> None:
        self.model = model
        self.max_sequences = max_sequences
        self.policy_version = 0

    def contract(self, params: SamplingParams) -> LogprobContract:
        return contract_of(params)

    def weight_slices(self) -> list[WeightSlice]:
        """See Sampler.weight_slices."""
        return storage.weight_slices(self.model)

    @torch.no_grad()
    def score(self, token_ids: Tensor) -> Tensor:
        """See Sampler.score."""
        token_ids = token_ids.to(self.model.device)
        positions = torch.arange(len(token_ids), device=token_ids.device)
        attend = PackedAttention(torch.tensor([[0, len(token_ids), 0, 0]]), token_ids.device)
        hidden = hidden_states(self.model, token_ids, positions, attend)  # (P, H)
        logprobs = self.model.lm_head(hidden[:-1]).float().log_softmax(-1)  # (P - 1, V)
        return logprobs.gather(-1, token_ids[1:, None])[:, 0].cpu()

    def sleep(self) -> None:
        """Nothing to give back: the cache lives within generate."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to let go of."""

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], num_samples: int, params: SamplingParams, seed: int
    ) -> list[RolloutGroup]:
        """See Sampler.generate. At most max_sequences completions (at least one prompt's) are in flight at once."""
        was_training = self.model.training
        self.model.eval()
        at_once = max(1, self.max_sequences // num_samples)
        groups = [
            group
            for start in range(0, len(prompts), at_once)
            for group in self._generate(prompts[start : start + at_once], num_samples, params, seed)
        ]
        self.model.train(was_training)
        return groups

    def _generate(
        self, prompts: list[Prompt], num_samples: int, params: SamplingParams, seed: int
    ) -> Iterator[RolloutGroup]:
        device, head = self.model.device, self.model.lm_head
        num_rows, limit = len(prompts) * num_samples, params.max_new_tokens
        uniforms = _uniforms(prompts, num_samples, limit, seed).to(device)
        stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        tokens = torch.zeros(num_rows, limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_rows, limit, device=device)
        lengths = torch.full((num_rows,), limit, dtype=torch.int64, device=device)
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)

        cache, last_hidden = _prefill(self.model, prompts, num_samples, limit)
        logits = head(last_hidden).repeat_interleave(num_samples, 0)  # (R, V)
        rows = torch.arange(num_rows, device=device)  # which completions are in flight
        for position in range(limit):
            forbidden = stops if position < params.min_new_tokens and len(stops) else None
            drawn, drawn_logprobs = draw(logits, uniforms[rows, position], params, forbidden)
            tokens[rows, position], logprobs[rows, position] = drawn, drawn_logprobs
            ends = torch.isin(drawn, stops) & ~stopped[rows]
            lengths[rows[ends]] = position + 1
            stopped[rows] |= ends
            num_stopped = int(stopped[rows].sum())
            if num_stopped == len(rows) or position == limit - 1:
                break
            if num_stopped >= DROP_SHARE * len(rows):
                going = ~stopped[rows]
                rows, drawn = rows[going], drawn[going]
                cache.keep(going)
            hidden = hidden_states(self.model, drawn, cache.positions(), cache)
            cache.advance()
            logits = head(hidden)
        yield from self._rollouts(
            prompts, num_samples, tokens.cpu(), logprobs.cpu(), lengths.tolist(), stopped.tolist()
        )

    def _rollouts(self, prompts, num_samples, tokens, logprobs, lengths, stopped) -> Iterator[RolloutGroup]:
        for i, prompt in enumerate(prompts):
            rollouts = tuple(
                Rollout(
                    prompt_id=prompt.prompt_id,
                    token_ids=tokens[row, : lengths[row]].clone(),
                    loss_mask=torch.ones(lengths[row], dtype=torch.bool),
                    sampler_logprobs=logprobs[row, : lengths[row]].clone(),
                    finish_reason="stop" if stopped[row] else "length",
                    policy_version=self.policy_version,
                )
                for row in range(i * num_samples, (i + 1) * num_samples)
            )
            yield RolloutGroup(prompt=prompt, rollouts=rollouts)


def _uniforms(prompts: list[Prompt], num_samples: int, limit: int, seed: int) -> Tensor:
    """(B*G, limit) float32: each completion's own stream of random numbers."""
    generator = torch.Generator()
    streams = []
    for prompt in prompts:
        for sample in range(num_samples):
            generator.manual_seed(derive_seed(seed, prompt.prompt_id, sample))
            streams.append(torch.rand(limit, generator=generator))
    return torch.stack(streams)


def _prefill(model: CausalLM, prompts: list[Prompt], num_samples: int, limit: int) -> tuple[GroupCache, Tensor]:
    """The prompts' keys and values, computed packed, and each prompt's last hidden state (B, H)."""
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends, torch.zeros_like(ends), torch.zeros_like(ends)], 1)
    token_ids = torch.cat([prompt.token_ids for prompt in prompts])
    position_ids = torch.cat([torch.arange(int(n)) for n in lengths])
    kept: list[tuple[Tensor, Tensor]] = []
    plan = SegmentPlan(segments, model.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kept.append((k, v))
        return segment_attention(q, k, v, plan, scale=scale)

    hidden = hidden_states(model, token_ids.to(model.device), position_ids.to(model.device), attend)
    return GroupCache(kept, lengths, num_samples, limit), hidden[(ends - 1).to(model.device)]


class GroupCache:
    """Keys and values of B prompts, once each, and of their completions in flight; the model's `attend` in decoding."""

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
        prompt_k, prompt_v = self.prompt_kv[layer]
        own_k[:, :, self.length], own_v[:, :, self.length] = k, v
        grouped = q.unflatten(1, (own_k.shape[1], -1))  # (R, C, A/C, D): a key head's queries as its rows
        end = self.length + 1
        own = attention_with_lse(grouped, own_k[:, :, :end], own_v[:, :, :end], causal=False, scale=scale)
        shared_out, shared_lse = attention_with_lse(
            self._to_seats(grouped), prompt_k, prompt_v, causal=False, scale=scale, bias=self.prompt_mask
        )
        queries = grouped.shape[2]
        shared = self._to_rows(shared_out, queries), self._to_rows(shared_lse, queries)
        return merge(*own, *shared)[0].flatten(1, 2)

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
