"""The embedded sampler: the learner's own Hugging Face model, with a group-aware KV cache.

A prompt's keys and values are computed and kept once for its G completions (group_cache.py).
Letters: B prompts, G samples each, R rows (completions in flight), V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastgrpo.kernels.segment_attention import SegmentPlan, segment_attention
from fastgrpo.models import storage
from fastgrpo.models.attention import PackedAttention
from fastgrpo.models.decoder import Decoder, hidden_states
from fastgrpo.models.hf import CausalLM
from fastgrpo.sampler.draw import contract_of, draw, max_new_tokens
from fastgrpo.sampler.expert_record import ExpertRecord, recording
from fastgrpo.sampler.group_cache import GroupCache
from fastgrpo.sampler.protocol import OnEnd
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

    def forget(self) -> None:
        """Nothing is kept."""

    def sleep(self) -> None:
        """Nothing to give back: the cache lives within generate."""

    def wake(self) -> None:
        """Nothing to take."""

    def close(self) -> None:
        """Nothing to let go of."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        num_samples: int,
        params: SamplingParams,
        seed: int,
        on_end: OnEnd | None = None,
    ) -> list[RolloutGroup]:
        """See Sampler.generate. At most max_sequences completions (at least one prompt's) are in flight at once."""
        was_training = self.model.training
        self.model.eval()
        at_once = max(1, self.max_sequences // num_samples)
        groups: list[RolloutGroup] = []
        with recording(self.model) if params.return_routed_experts else nullcontext() as record:
            for start in range(0, len(prompts), at_once):
                chunk = prompts[start : start + at_once]
                tell = None if on_end is None else partial(_tell, on_end, start, num_samples)
                groups += self._generate(chunk, num_samples, params, seed, record, tell)
        self.model.train(was_training)
        return groups

    def _generate(
        self,
        prompts: list[Prompt],
        num_samples: int,
        params: SamplingParams,
        seed: int,
        record: ExpertRecord | None,
        on_end: Callable[[int, Rollout], object] | None,
    ) -> Iterator[RolloutGroup]:
        device = self.model.device
        limits = torch.tensor([max_new_tokens(prompt, params) for prompt in prompts], device=device)
        limits = limits.repeat_interleave(num_samples)  # (R,)
        num_rows, limit = len(limits), int(limits.max())
        uniforms = _uniforms(prompts, num_samples, limit, seed).to(device)
        stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)
        tokens = torch.zeros(num_rows, limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_rows, limit, device=device)
        lengths = limits.clone()
        stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)

        decoder = Decoder(self.model, pack_for=num_rows)
        cache, last_hidden = _prefill(decoder, prompts, num_samples, limit, device)
        if record is not None:
            record.start([len(prompt.token_ids) for prompt in prompts], num_rows, limit)
        logits = decoder.logits(last_hidden).repeat_interleave(num_samples, 0)  # (R, V)
        rows = torch.arange(num_rows, device=device)  # which completions are in flight
        num_going = num_rows
        for position in range(limit):
            forbidden = stops if position < params.min_new_tokens and len(stops) else None
            drawn, drawn_logprobs = draw(logits, uniforms[rows, position], params, forbidden)
            tokens[rows, position], logprobs[rows, position] = drawn, drawn_logprobs
            in_flight = ~stopped[rows] & (position < limits[rows])
            ends = torch.isin(drawn, stops) & in_flight
            lengths[rows[ends]] = position + 1
            stopped[rows] |= ends
            going = ~stopped[rows] & (position + 1 < limits[rows])
            num_before, num_going = num_going, int(going.sum())
            if on_end is not None and num_going < num_before:
                for row in rows[in_flight & ~going].tolist():
                    has_stopped, length = bool(stopped[row]), int(lengths[row])
                    prompt_id = prompts[row // num_samples].prompt_id
                    on_end(row, self._rollout(prompt_id, tokens[row, :length], logprobs[row, :length], has_stopped))
            if num_going == 0:
                break
            if len(rows) - num_going >= DROP_SHARE * len(rows):
                rows, drawn = rows[going], drawn[going]
                cache.keep(going)
            hidden = decoder.hidden_states(drawn, cache.positions(), cache)
            cache.advance()
            if record is not None:
                record.step(rows, position)
            logits = decoder.logits(hidden)
        yield from self._groups(
            prompts, num_samples, tokens.cpu(), logprobs.cpu(), lengths.tolist(), stopped.tolist(), record
        )

    def _groups(self, prompts, num_samples, tokens, logprobs, lengths, stopped, record) -> Iterator[RolloutGroup]:
        for i, prompt in enumerate(prompts):
            rollouts = []
            for row in range(i * num_samples, (i + 1) * num_samples):
                size = lengths[row]
                rollout = self._rollout(prompt.prompt_id, tokens[row, :size], logprobs[row, :size], stopped[row])
                experts = None if record is None else record.completion(row, size)
                rollouts.append(replace(rollout, routed_experts=experts))
            prompt_routed_experts = None if record is None else record.prompt(i)
            yield RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), prompt_routed_experts=prompt_routed_experts)

    def _rollout(self, prompt_id: str, token_ids: Tensor, logprobs: Tensor, has_stopped: bool) -> Rollout:
        return Rollout(
            prompt_id=prompt_id,
            token_ids=token_ids.to("cpu", copy=True),
            loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
            sampler_logprobs=logprobs.to("cpu", copy=True),
            finish_reason="stop" if has_stopped else "length",
            policy_version=self.policy_version,
        )


def _tell(on_end: OnEnd, start: int, num_samples: int, row: int, rollout: Rollout) -> None:
    """Of row `row` of a chunk that begins with prompt `start`."""
    on_end(start + row // num_samples, row % num_samples, rollout)


def _uniforms(prompts: list[Prompt], num_samples: int, limit: int, seed: int) -> Tensor:
    """(B*G, limit) float32: each completion's own stream of random numbers."""
    generator = torch.Generator()
    streams = []
    for prompt in prompts:
        for sample in range(num_samples):
            generator.manual_seed(derive_seed(seed, prompt.prompt_id, sample))
            streams.append(torch.rand(limit, generator=generator))
    return torch.stack(streams)


def _prefill(
    decoder: Decoder, prompts: list[Prompt], num_samples: int, limit: int, device: torch.device
) -> tuple[GroupCache, Tensor]:
    """The prompts' keys and values, computed packed, and each prompt's last hidden state (B, H)."""
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    ends = lengths.cumsum(0)
    segments = torch.stack([ends - lengths, ends, torch.zeros_like(ends), torch.zeros_like(ends)], 1)
    token_ids = torch.cat([prompt.token_ids for prompt in prompts])
    position_ids = torch.cat([torch.arange(int(n)) for n in lengths])
    kept: list[tuple[Tensor, Tensor]] = []
    plan = SegmentPlan(segments, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kept.append((k, v))
        return segment_attention(q, k, v, plan, scale=scale)

    hidden = decoder.hidden_states(token_ids.to(device), position_ids.to(device), attend)
    return GroupCache(kept, lengths, num_samples, limit), hidden[(ends - 1).to(device)]
