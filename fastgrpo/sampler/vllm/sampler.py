"""Samples with vLLM in the learner's own process, on the learner's own tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from vllm import RequestOutput
from vllm import SamplingParams as VLLMParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from fastgrpo.models.experts import choice_dtype, layers_with_experts
from fastgrpo.ranks import Ranks
from fastgrpo.sampler.draw import contract_of, max_new_tokens
from fastgrpo.sampler.protocol import OnEnd
from fastgrpo.sampler.vllm.engine import Engine, EngineError, EngineSettings
from fastgrpo.sampler.vllm.peers import end_together
from fastgrpo.seeding import derive_seed
from fastgrpo.types import LogprobContract, Prompt, Rollout, RolloutGroup, SamplingParams, WeightSlice

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to draw. Example: Request(name="0/3", prompt_ids=[5, 9, 2], params=SamplingParams(),
    max_tokens=256, seed=7)."""

    name: str
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int

    def for_vllm(self) -> tuple[list[int], VLLMParams]:
        """Every request is one sequence with its own generator, so no sample depends on which others are drawn."""
        params = self.params
        return self.prompt_ids, VLLMParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=self.max_tokens,
            min_tokens=min(params.min_new_tokens, self.max_tokens),
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,  # vLLM's own idea of an end; ours are stop_token_ids
            seed=self.seed,
            logprobs=0,  # the drawn token's alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else vLLM makes an answer out of every token
        )


class VLLMSampler:
    """vLLM on adopted weights; see Sampler for what it does and engine.py for how.

    offer: what this rank's learner holds, asked again when an engine has to be rebuilt. max_restarts: engines built in
    place of broken ones for one call of generate. Under torchrun every rank of the job calls generate and score
    together, and the `settings.tp` ranks of a group with the same prompts.
    """

    def __init__(
        self,
        settings: EngineSettings,
        offer: Callable[[], list[WeightSlice]],
        *,
        max_restarts: int,
        notify: Callable[[str], None],
    ) -> None:
        self.settings, self.offer, self.max_restarts, self.notify = settings, offer, max_restarts, notify
        self.policy_version = 0
        self._cached_version: int | None = None
        """Whose keys the prefix cache holds; None: it is to be emptied first."""
        self.refill: Callable[[], None] = lambda: None
        """Called when a rebuilt engine has memory of its own to fill with the policy; fastgrpo/weights.py does."""
        self.engine = Engine(settings, offer())

    @property
    def ranks(self) -> Ranks:
        """Where this process stands among the samplers of the job."""
        if not dist.is_initialized():
            return Ranks()
        rank, num_ranks, tp = dist.get_rank(), dist.get_world_size(), self.settings.tp
        return Ranks(
            rank=rank, num_ranks=num_ranks, data_rank=rank // tp, num_data_ranks=num_ranks // tp, leads=rank % tp == 0
        )

    @property
    def copied(self) -> dict[str, str]:
        """vLLM's parameters that are not the learner's memory, and why."""
        return self.engine.adoption.copied

    def why_copied(self) -> list[str]:
        """The same for people: one line for what all layers have in common."""
        lines = Counter(re.sub(r"\.\d+\.", ".*.", f"{name}: {why}") for name, why in self.copied.items())
        return [f"{line} (x{count})" if count > 1 else line for line, count in lines.items()]

    def weight_slices(self) -> list[WeightSlice]:
        """What this rank's engine computes with."""
        return self.engine.adoption.weight_slices()

    def contract(self, params: SamplingParams) -> LogprobContract:
        return contract_of(params)

    def generate(
        self,
        prompts: list[Prompt],
        num_samples: int,
        params: SamplingParams,
        seed: int,
        on_end: OnEnd | None = None,
    ) -> list[RolloutGroup]:
        """See Sampler.generate. Raises EngineError where max_restarts engines in a row could not do it."""
        requests = [
            Request(
                name=f"{i}/{sample}",
                prompt_ids=prompt.token_ids.tolist(),
                params=params,
                max_tokens=max_new_tokens(prompt, params),
                seed=derive_seed(seed, prompt.prompt_id, sample),
            )
            for i, prompt in enumerate(prompts)
            for sample in range(num_samples)
        ]
        rollouts: dict[str, Rollout] = {}

        def ended(output: RequestOutput) -> None:
            i, sample = map(int, output.request_id.split("/"))
            rollouts[output.request_id] = rollout = self._rollout(prompts[i], output)
            if on_end is not None:
                on_end(i, sample, rollout)

        outputs = self._with_restarts(lambda: self._complete({r.name: r.for_vllm() for r in requests}, ended))
        groups = []
        for i, prompt in enumerate(prompts):
            names = [f"{i}/{sample}" for sample in range(num_samples)]
            group = RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[name] for name in names))
            if params.return_routed_experts:
                group = self._with_experts(group, [outputs[name] for name in names])
            groups.append(group)
        return groups

    def forget(self) -> None:
        """Empty the prefix cache. An evaluation's keys would not be wrong in the step that follows, but change how its
        prompts are computed, so that a resumed run could round another way."""
        self._cached_version = None

    def score(self, token_ids: Tensor) -> Tensor:
        """(P,) token ids -> (P - 1,) float32: each token's logprob after those before it, at temperature 1."""
        params = VLLMParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        requests = {"score": (token_ids.tolist(), params)}
        self.forget()  # weights may have moved under the same version
        output = self._with_restarts(lambda: self._complete(requests))["score"]
        assert isinstance(output.prompt_logprobs, FlatLogprobs)
        return torch.tensor(output.prompt_logprobs.logprobs)

    def sleep(self) -> None:
        """Give the KV cache back, where the settings let it go."""
        if self.settings.sleeps:
            self.engine.sleep()

    def wake(self) -> None:
        if self.settings.sleeps:
            self.engine.wake()

    def close(self) -> None:
        """Shut vLLM down. The learner's weights stay as they are."""
        self.engine.close()

    def _complete(
        self,
        requests: dict[str, tuple[list[int], VLLMParams]],
        on_end: Callable[[RequestOutput], object] = lambda output: None,
    ) -> dict[str, RequestOutput]:
        if self._cached_version != self.policy_version:
            self.engine.reset_prefix_cache()
            self._cached_version = self.policy_version
        return self.engine.run(requests, on_end)

    def _rollout(self, prompt: Prompt, output: RequestOutput) -> Rollout:
        (completion,) = output.outputs
        assert isinstance(completion.logprobs, FlatLogprobs)
        return Rollout(
            prompt_id=prompt.prompt_id,
            token_ids=torch.tensor(completion.token_ids),
            loss_mask=torch.ones(len(completion.token_ids), dtype=torch.bool),
            sampler_logprobs=torch.tensor(completion.logprobs.logprobs),
            finish_reason="stop" if completion.finish_reason == "stop" else "length",
            policy_version=self.policy_version,
        )

    def _with_experts(self, group: RolloutGroup, outputs: list[RequestOutput]) -> RolloutGroup:
        """Siblings may compute the prompt's last tokens each for themselves: the first one's experts count."""
        config, size = self.settings.config, len(group.prompt.token_ids)
        layers, dtype = layers_with_experts(config), choice_dtype(config.num_experts)
        experts = []
        for rollout, output in zip(group.rollouts, outputs, strict=True):
            array = output.outputs[0].routed_experts
            if array is None or len(array) != size + len(rollout.token_ids) - 1:
                raise EngineError("vLLM did not tell the experts of every token; use learner.router_replay=false")
            experts.append(torch.from_numpy(array[:, layers].astype("int16")).to(dtype))  # (P + R - 1, L, k)
        told = (replace(r, routed_experts=e[size:]) for r, e in zip(group.rollouts, experts, strict=True))
        return replace(group, rollouts=tuple(told), prompt_routed_experts=experts[0][:size].clone())

    # --- failures ---------------------------------------------------------------------------------------------------

    def _with_restarts(self, work: Callable[[], T]) -> T:
        """Do the work; where an engine fails on any rank, rebuild them all and do it again, with the same seeds."""
        for restart in range(self.max_restarts + 1):
            result: Any = None
            error: Exception | None = None
            try:
                result = work()
            except Exception as raised:  # whatever a broken engine comes up with
                error = raised
            mine = None if error is None else _in_one_line(error)
            if self.settings.tp > 1 and not end_together(self.settings.tp, failed=mine is not None):
                # Ends this process, and so the job: nothing else reaches ranks that wait inside vLLM.
                raise EngineError(f"vLLM failed on rank {self.ranks.rank} alone: {mine}") from error
            failure = self.ranks.any_of(mine)  # all build an engine together
            if failure is None:
                return result
            if restart == self.max_restarts:
                raise EngineError(
                    f"vLLM failed {restart + 1} times in a row (sampler.max_restarts={restart}): {failure}"
                ) from error
            self.notify(f"vLLM failed ({failure}); restarting it, {restart + 1} of {self.max_restarts}")
            error = None  # whose traceback holds the broken engine, and so the memory that the next one needs
            self.restart()
        raise AssertionError("unreachable")

    def restart(self) -> None:
        """A new engine on the learner's weights, in place of this one."""
        self.engine.close()
        self.engine = Engine(self.settings, self.offer())
        self.refill()


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
