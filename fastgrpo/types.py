"""The contracts between the rooms: what a prompt, a rollout, a packed batch and a step's result are.

Letters: T packed tokens, N scored tokens, S sequences, G group size, K segments, V vocabulary, L layers with experts,
k experts a token.
Every tensor is on the CPU until a learner moves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question, tokenized, with what its reward needs.

    Example: Prompt(prompt_id="train/17", token_ids=tensor([5, 9, 2]), text="2+3=", answer="5", metadata={})
    """

    prompt_id: str
    """Unique in its data set; seeds of its samples derive from it."""
    token_ids: Tensor
    """(P,) int64, P >= 1."""
    text: str
    """What the tokens say, for reward functions and reports."""
    answer: Any = None
    """The reference answer, as the data has it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Every other column of the data's row, the prompt's as it is there too."""
    max_new_tokens: int | None = None
    """Where it is less than SamplingParams.max_new_tokens, the limit of this prompt's completions: what is left of one
    that has begun."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. temperature 0 is greedy.

    Example: SamplingParams(temperature=1.0, max_new_tokens=256, stop_token_ids=(2,))
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """Stop tokens cannot be drawn before."""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with the first of these, which belongs to it and is scored."""
    return_routed_experts: bool = False
    """Also return which experts the sampler sent every token to, in every layer, for learner.router_replay."""


@dataclass(frozen=True, kw_only=True)
class LogprobContract:
    """What a sampler's logprobs mean, so that the learner can compute the same quantity or refuse.

    Example: LogprobContract(temperature=0.7, top_p=1.0, top_k=0, renormalized=False)
    """

    temperature: float
    """The logits were divided by this."""
    top_p: float
    top_k: int
    renormalized: bool
    """Whether top-p / top-k removed probability and the rest was scaled up to 1."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an environment said to a turn of the policy.

    Example: Reply(start=5, token_ids=tensor([7, 3]), messages=({"role": "tool", "content": "42"},))
    """

    start: int
    """Its first token's place in the completion; the policy's turn ends there."""
    token_ids: Tensor
    """(E,) int64: its messages and what leads to the policy's next turn, as the policy reads them."""
    messages: tuple[dict[str, str], ...]
    """{role, content} each. None of them: the environment ended the conversation, and there are no tokens."""
    failure: Literal["error", "timeout"] | None = None
    """Where the function failed, and the policy was told so (environment.on_error=tell)."""

    @property
    def end(self) -> int:
        """Behind its last token, which may lie beyond the completion that it filled."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of one prompt, R tokens: a turn of the policy, or with an environment turns of both.

    Example: Rollout(prompt_id="train/17", token_ids=tensor([8, 2]), loss_mask=tensor([True, True]),
                     sampler_logprobs=tensor([-0.1, -0.02]), finish_reason="stop", policy_version=3)
    """

    prompt_id: str
    token_ids: Tensor
    """(R,) int64, R >= 1, the stop tokens included."""
    loss_mask: Tensor
    """(R,) bool; False for tokens that the policy did not choose: the environment's replies."""
    sampler_logprobs: Tensor
    """(R,) float32, under the sampler's LogprobContract; 0 for the environment's tokens."""
    finish_reason: FinishReason
    """stop: the last turn ended by a stop token; length: cut at max_new_tokens."""
    policy_version: int
    """Optimizer steps the policy had taken when its last token was sampled."""
    token_versions: Tensor | None = None
    """(R,) int64: the same for every token, where a completion took several steps to draw; else None."""
    routed_experts: Tensor | None = None
    """(R - 1, L, k) uint8, or int16 where there are more than 256: the experts that computed the row of each token,
    when the token after it was drawn. The last token's row is never computed, nor are those of a reply that filled the
    completion. None where they were not asked for."""
    replies: tuple[Reply, ...] = ()
    """The environment's, in their order."""
    conversation_id: str | None = None
    """Names it to environment and reward functions, from its first turn on; the trainer's, and unique in a run."""

    @property
    def num_turns(self) -> int:
        """How often the policy spoke."""
        return 1 + sum(reply.end < len(self.token_ids) for reply in self.replies)

    @property
    def turn_ends(self) -> list[int]:
        """The place of the last token of each of the policy's turns."""
        answered = self.replies[: self.num_turns - 1]
        return [*(reply.start - 1 for reply in answered), int(self.loss_mask.nonzero()[-1])]


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The G completions of one prompt, compared with each other only.

    Example: RolloutGroup(prompt=prompt, rollouts=(rollout_0, rollout_1))
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    prompt_routed_experts: Tensor | None = None
    """(P, L, k): Rollout.routed_experts of the prompt's tokens, one choice for all G; None as there."""


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A group with its rewards and, once compared, its advantages.

    Example: ScoredGroup(group=group, rewards=tensor([1., 0.]), advantages=tensor([0.707, -0.707]))
    """

    group: RolloutGroup
    rewards: Tensor
    """(G,) float32, the weighted sum over the reward functions."""
    step_rewards: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """Process supervision: for each completion its (index of the step's last token, reward) pairs."""
    reward_terms: dict[str, Tensor] = field(default_factory=dict)
    """Each reward function's own (G,) values, for the metrics."""
    advantages: Tensor | tuple[Tensor, ...] | None = None
    """(G,) float32 for outcomes, or G tensors (R_i,) for process supervision."""


HOST_FIELDS = ("segments", "cu_scored", "sequence_ids")


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Groups laid out without padding as [prompt | completion 1 | ... | completion G], one after the other.

    A token attends to its own segment's past and to all of the segment's prefix: exactly what G separate
    sequences would compute, with the prompt computed once.
    Only scored tokens reach the loss head; hidden_rows says which packed row predicts each. A completion's last scored
    token and what follows it predict nothing, and are not packed.

    Example, a prompt [p0 p1] with completions [a0 a1] and [b0]:
        token_ids    = [p0, p1, a0]              position_ids = [0, 1, 2]
        segments     = [[0, 2, 0, 0], [2, 3, 0, 2], [3, 3, 0, 2]]
        hidden_rows  = [1, 2, 1]                 targets      = [a0, a1, b0]
        cu_scored    = [0, 2, 3]                 sequence_ids = [0, 1]
    """

    token_ids: Tensor
    """(T,) int64."""
    position_ids: Tensor
    """(T,) int64; a completion's positions go on from its prompt's end."""
    segments: Tensor
    """(K, 4) int64: start, end, prefix_start, prefix_end in packed rows; prefix_start == prefix_end for none.
    start == end where nothing of a completion but its first token is scored."""
    hidden_rows: Tensor
    """(N,) int64."""
    targets: Tensor
    """(N,) int64."""
    advantages: Tensor
    """(N,) float32."""
    token_weights: Tensor
    """(N,) float32; the aggregation, from counts over the whole update."""
    sampler_logprobs: Tensor
    """(N,) float32."""
    cu_scored: Tensor
    """(S+1,) int64; where each sequence's scored tokens start."""
    sequence_ids: Tensor
    """(S,) int64; each sequence's place in the step, to put results back in order."""
    old_logprobs: Tensor | None = None
    """(N,) float32; None where the update is on-policy."""
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    routed_experts: Tensor | None = None
    """(T, L, k) integers: the experts that the policy's routers take for each row; None where they choose."""

    @classmethod
    def empty(cls) -> PackedBatch:
        """One token, nothing scored, for any objective: computed where ranks must run equally many forward passes."""
        integers, floats = torch.empty(0, dtype=torch.int64), torch.empty(0)
        return cls(
            token_ids=torch.zeros(1, dtype=torch.int64),
            position_ids=torch.zeros(1, dtype=torch.int64),
            segments=torch.tensor([[0, 1, 0, 0]]),
            hidden_rows=integers,
            targets=integers,
            advantages=floats,
            token_weights=floats,
            sampler_logprobs=floats,
            cu_scored=torch.zeros(1, dtype=torch.int64),
            sequence_ids=integers,
            ref_logprobs=floats,
        )

    @property
    def num_tokens(self) -> int:
        """T, the rows the model computes."""
        return self.token_ids.shape[0]

    @property
    def num_scored(self) -> int:
        """N, the rows the loss head computes."""
        return self.targets.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on the device, but for what the host plans from: segments, cu_scored and sequence_ids."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name not in HOST_FIELDS
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer update did.

    Example: StepResult(policy_version=4, loss=0.01, grad_norm=0.8, skipped=False, metrics={"kl": 0.002})
    """

    policy_version: int
    loss: float
    grad_norm: float
    """L2 norm over all parameters before clipping."""
    skipped: bool
    """True where a non-finite loss or gradient left the weights untouched."""
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """A box of one of the policy's tensors, in this rank's memory.

    A learner and a sampler each describe what they hold in these terms, whatever they fuse, cut or pad; comparing the
    two says what can be one and the same memory and what has to move where (weights.py).

    Example, rank 1 of tp=2 holding the lower half of a (509, 64) embedding in a (256, 64) parameter:
        WeightSlice(name="model.embed_tokens.weight", full_shape=(509, 64), start=(256, 0), tensor=weight[:253],
                    num_padding_rows=3)
    """

    name: str
    """The tensor's name in a Hugging Face checkpoint (one name an expert's matrix, none for a tied head)."""
    full_shape: tuple[int, ...]
    """The tensor's shape in that checkpoint."""
    start: tuple[int, ...]
    """Where the box begins in it."""
    tensor: Tensor
    """The box: a view of this rank's memory, not a copy."""
    num_padding_rows: int = 0
    """Rows that follow the box in memory and belong to it, but to no entry of the vocabulary."""
