"""The configuration's schema: what can be set, its type, its default, and what it means.

The docstring under each field is what `fastgrpo train --help` prints. `conf/` holds named choices of these
values; `main.py` turns the composed configuration into these dataclasses once, and nothing below it sees Hydra.
Defaults here are sound for a real model; conf/model/quickstart.yaml sets what a tiny one wants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """Something the user can mend: printed as one line (what, where, how to mend), exit code 2, no traceback."""


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes and how it shows itself."""

    name: str = "default"
    """The first folder under runs/."""
    dir: str = "runs/${run.name}/${now:%Y-%m-%d_%H-%M-%S-%f}"
    """Everything the run writes goes here; runs/latest points to the newest. The time has microseconds for runs that
    begin together."""
    console: str = "auto"
    """auto | live | plain | none: a live display on a terminal, plain lines when piped."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb, mlflow; metrics.jsonl and report.html are always written."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps to profile, such as [3,4]: run.dir/profile gets torch's trace of each, a table of its costliest operators
    and, on a GPU, a snapshot of its memory (docs/metrics.md)."""
    profile_ranks: list[int] | None = field(default_factory=lambda: [0])
    """The ranks that are profiled; null: all of them."""


@dataclass(kw_only=True)
class WarmStartConfig:
    """Supervised learning on worked solutions before GRPO (model.path=null with generated problems only)."""

    target_accuracy: float = 0.25
    """Stop once this share of sampled answers is right."""
    max_steps: int = 2000
    """Give up after this many updates."""
    batch_size: int = 128
    """Worked solutions in an update."""
    learning_rate: float = 2e-3
    """Of AdamW, reached after 20 updates."""


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters beside a frozen model (needs `pip install fastgrpo[lora]`)."""

    rank: int = 0
    """0 trains every weight. The frozen model is the KL term's reference, at no memory."""
    alpha: int = 32
    """The adapters' product is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    path: str | None = None
    """Begin with the adapters of a PEFT directory, such as an earlier run's hf/, in place of fresh ones."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained, and not every weight."""
        return self.rank > 0 or self.path is not None


@dataclass(kw_only=True)
class ModelConfig:
    """The policy."""

    path: str | None = None
    """A local directory (Qwen2, Qwen3, Qwen3-MoE, Llama, Mistral) or a hub name; null builds a small Qwen3."""
    tokenizer_path: str | None = None
    """Another directory for the tokenizer; null uses model.path."""
    hidden_size: int = 128
    """hidden_size to num_kv_heads shape the model that is built when path is null."""
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 256
    lora: LoraConfig = field(default_factory=LoraConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    cache_dir: str = "${oc.env:XDG_CACHE_HOME,${oc.env:HOME,.}/.cache}/fastgrpo"
    """Where warm-started models are kept, by a hash of everything that made them."""


@dataclass(kw_only=True)
class DataConfig:
    """The questions."""

    source: str = "jsonl"
    """jsonl | parquet | hub | arithmetic. A file whose suffix is .jsonl or .parquet is read as that."""
    path: Any = None
    """A .jsonl or .parquet file, a directory of them, a pattern ('train-*.parquet') or a list ([a.jsonl,b.parquet]),
    read one after another. Or a hub data set's name."""
    eval_path: Any = None
    """Held-out questions, as data.path; null splits data.eval_size of them off data.path."""
    eval_size: int = 256
    """How many questions are held out: the same ones for every seed. They never occur in training."""
    hub_config: str | None = None
    """The hub data set's configuration, such as `main` for openai/gsm8k."""
    split: str = "train"
    """The hub data set's split to train on."""
    eval_split: str | None = None
    """The hub data set's held-out split; null splits eval_size rows off."""
    prompt_column: str = "question"
    """A text, or a list of chat messages ({role, content}). a.b is the entry b of a column a."""
    answer_column: str | None = "answer"
    """Handed to the reward as `answer`, for example reward_model.ground_truth; null for data without answers."""
    system_prompt: str | None = None
    """Put before every question; needs a tokenizer with a chat template."""
    prompt_template: str = "{prompt}"
    """Wraps a text prompt, for example "Question: {prompt} Answer:"."""
    chat_template: bool = True
    """Apply the tokenizer's chat template where it has one."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the template, for example {enable_thinking: false}."""
    max_prompt_tokens: int | None = None
    """Longer prompts follow data.long_prompts; null: the model's context less sampling.max_new_tokens."""
    long_prompts: str = "fail"
    """fail | drop (and count)."""
    shuffle: bool = True
    """A fresh order every epoch, a function of the seed; false keeps the file's."""
    operation: str = "addition"
    """arithmetic: addition | subtraction."""
    num_digits: int = 3
    """arithmetic: digits of each operand."""
    num_problems: int = 20000
    """arithmetic: how many training problems there are."""


@dataclass(kw_only=True)
class RewardTerm:
    """One reward function and its weight."""

    path: str = "???"
    """module:function or file.py:function."""
    weight: float = 1.0
    """Its value's factor in the reward."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""


@dataclass(kw_only=True)
class RewardConfig:
    """How completions are scored. The contract of a reward function is in docs/rewards.md."""

    path: str = "fastgrpo.rewards.verifiable:exact_match"
    """module:function or file.py:function."""
    weight: float = 1.0
    """Its value's factor in the reward."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""
    extra: dict[str, RewardTerm] = field(default_factory=dict)
    """Further functions by name; the reward is the weighted sum of all."""
    timeout_s: float = 30.0
    """Time limit of one call."""
    on_error: str = "fail"
    """fail | zero | drop: what happens to a group whose reward function raises or exceeds the limit.
    zero gives 0 for that function, drop leaves the group out; both are counted in the metrics."""
    num_workers: int = 2
    """Processes that run reward functions; 0 runs them in the trainer's own, for functions that hold a model."""


@dataclass(kw_only=True)
class EnvironmentConfig:
    """What answers the policy's turns: tools, a user, a game (docs/environment.md)."""

    path: str | None = None
    """module:function or file.py:function, called with every turn that a stop token has ended; null: a completion is
    one turn."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""
    max_turns: int = 8
    """The policy speaks at most this often in a completion, and sampling.max_new_tokens bounds all of it together."""
    timeout_s: float = 30.0
    """Time limit of one call."""
    on_error: str = "fail"
    """fail | tell: where the function raises or exceeds the limit, end the run, or let the policy read the error."""
    num_workers: int = 2
    """Processes that run the function; 0 runs it in the trainer's own."""


@dataclass(kw_only=True)
class ReferenceConfig:
    """The policy that the KL term holds on to."""

    path: str | None = None
    """Another model with the policy's tokens: what an earlier run began with, or a larger one to learn from. null: the
    policy as the run begins."""
    schedule: str = "fixed"
    """fixed | refresh (becomes the policy every refresh_every steps, iterative GRPO) | ema."""
    refresh_every: int = 100
    """refresh: steps between one reference and the next."""
    ema_decay: float = 0.99
    """ema: reference = decay * reference + (1 - decay) * policy after every step."""


@dataclass(kw_only=True)
class AlgorithmConfig:
    """The objective: GRPO and its relatives over one formula (docs/objective.md)."""

    group_size: int = 8
    """G, completions per prompt."""
    advantage: str = "std"
    """std: (r - mean) / std over the group (GRPO).  mean: r - mean (Dr.GRPO).  batch_std: (r - mean) / std over all of
    the step's rewards (Lite PPO).  leave_one_out: r - mean of the others (RLOO).  process: step rewards, normalised
    over the group and summed from each token on.  Or a function of your own, FILE.py:FUNCTION (docs/objective.md)."""
    advantage_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for an advantage function of your own."""
    std_ddof: int = 1
    """1 is the field's habit; 0 divides by G."""
    min_std: float = 0.0
    """A floor under the std, so that a nearly constant reward does not explode the advantages."""
    aggregation: str = "sequence_mean"
    """sequence_mean 1/(S*|o_i|) (GRPO) | token_mean 1/sum of tokens (DAPO) |
    constant 1/(S*max_new_tokens) (Dr.GRPO)."""
    surrogate: str = "clip"
    """clip | cispo | sapo | reinforce, or a function of your own, FILE.py:FUNCTION (docs/objective.md)."""
    surrogate_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for a surrogate of your own."""
    ratio_level: str = "token"
    """token | sequence (GSPO)."""
    clip_ratio_low: float = 0.2
    """epsilon: the ratio is clipped below at 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.2
    """Above clip_ratio_low it is DAPO's clip-higher."""
    dual_clip: float | None = None
    """c > 1: the loss of a token with negative advantage is at most -c*A."""
    sapo_tau_pos: float = 1.0
    """sapo: the gate's temperature where the advantage is positive."""
    sapo_tau_neg: float = 1.05
    """sapo: and where it is not."""
    kl_coef: float = 0.04
    """beta of the KL term, which is in the loss and never in the reward; 0 loads no reference model."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3."""
    kl_times_ratio: bool = False
    """Multiply the KL estimate by the ratio: an unbiased gradient off-policy."""
    entropy_coef: float = 0.0
    """A bonus for entropy."""
    top_entropy_quantile: float = 1.0
    """Below 1, only this share of an update's tokens, those of the most undecided next-token distributions, learn the
    advantage (0.2 in arXiv 2506.01939); the others keep their KL and entropy terms, and count in every mean."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    importance_level: str = "none"
    """none | token | sequence: importance weights from the sampler's to the learner's probabilities."""
    importance_mode: str = "truncate"
    """truncate: weights above importance_cap become it.  mask: outside [importance_floor, importance_cap] they become
    0, so that what sampler and learner disagree on carries no loss."""
    importance_floor: float = 0.0
    """mask: smaller weights become 0."""
    importance_cap: float = 2.0
    """truncate: larger weights become this.  mask: they become 0."""
    mask_truncated: bool = False
    """Completions cut at max_new_tokens keep their place in the group's baseline but carry no loss."""
    overlong_buffer: int = 0
    """DAPO's soft punishment: the last this many tokens before max_new_tokens cost up to overlong_penalty. 0: off."""
    overlong_penalty: float = 1.0
    """What a completion of max_new_tokens loses of its reward."""
    dynamic_sampling: bool = False
    """Replace groups of equal rewards by new prompts (DAPO)."""
    max_resamples: int = 4
    """dynamic_sampling: rounds of new prompts in a step before it goes on with what it has."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by it, in sampling and in the objective alike."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1 keeps every token."""
    top_k: int = 0
    """0 keeps every token."""
    max_new_tokens: int = 1024
    """A completion is cut at this many tokens, the environment's included."""
    min_new_tokens: int = 0
    """No stop token is drawn before this many."""
    stop_token_ids: list[int] | None = None
    """null: the tokenizer's (and generation configuration's) end tokens."""


@dataclass(kw_only=True)
class TrainConfig:
    """The steps."""

    num_steps: int = 100
    """Steps of the run, each with rollouts of its own."""
    prompts_per_step: int = 128
    """Questions of a step over all ranks; each is completed algorithm.group_size times."""
    updates_per_rollout: int = 1
    """mu of Algorithm 1: passes over a step's rollouts."""
    num_minibatches: int = 1
    """Optimizer updates in one pass; prompts_per_step must be divisible by it."""
    learning_rate: float = 1e-6
    """AdamW's, at its highest."""
    lr_schedule: str = "constant"
    """constant | linear | cosine, after the warm-up, down to min_lr_ratio."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to it from near 0."""
    min_lr_ratio: float = 0.0
    """The last learning rate as a share of the highest."""
    weight_decay: float = 0.0
    """On matrices only: norms and biases are left alone."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the root in AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients of a larger L2 norm, over all parameters, are scaled down to it."""
    moe_aux_loss_coef: float = 0.0
    """Of the loss that evens out the use of a mixture's experts (docs/parallelism.md); above 0 an update takes one more
    forward pass. Models are often pretrained with 0.001, their config.json's router_aux_loss_coef."""
    time_limit_minutes: float | None = None
    """From the command's beginning; null: none. The run ends as after a SIGTERM, saved and with exit code 124, when by
    the longest step so far another one and its checkpoint might not end in time (docs/parallelism.md). It makes one
    step in any case."""
    max_nonfinite_updates: int = 3
    """A non-finite loss or gradient skips its update; after this many in a row the run stops and saves the batch."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on a step's rollouts."""
        return self.updates_per_rollout * self.num_minibatches

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.num_steps * self.updates_per_step


@dataclass(kw_only=True)
class LearnerConfig:
    """Who computes the update."""

    kind: str = "torch"
    """torch: one Hugging Face model on one device.  megatron: the model cut over the processes of torchrun."""
    tp: int = 1
    """megatron: ranks over which every matrix and the vocabulary are cut (tensor parallel)."""
    pp: int = 1
    """megatron: stages of consecutive layers (pipeline parallel); ranks beyond tp x cp x pp are data parallel."""
    vpp: int = 1
    """megatron: virtual stages on each pipeline rank."""
    stage_layers: list[int] | None = None
    """megatron: layers of each stage (of pp x vpp, in the model's order); null deals them out so that the stages take
    equally long, the head counted with the last."""
    sp: bool = False
    """megatron: cut norms and residuals along the tokens too (sequence parallel)."""
    cp: int = 1
    """megatron: cut a micro-batch's rows over this many ranks (context parallel), for sequences too long for one."""
    ep: int = 1
    """megatron: deal a layer's experts over this many of a stage's tp x data-parallel ranks (expert parallel)."""
    max_tokens_per_microbatch: int = 16384
    """Packed tokens in one forward pass."""
    share_prompts: bool = True
    """Compute each group's prompt once; false packs a copy per completion (same gradient)."""
    offload: str = "auto"
    """auto | always | never: move optimizer state and gradients to the host while sampling.  auto: on a GPU, where the
    KV cache would not fit beside them (`fastgrpo plan` says so)."""
    activation_checkpoint: str = "none"
    """none | selective (megatron: the backward pass computes feed-forwards again, but not attention) |
    full (it computes whole layers again, of which only the inputs are kept; a third more time)."""
    distributed_optimizer: bool = True
    """megatron: each data-parallel rank keeps and steps its part of the optimizer's state; false: all of it on each."""
    overlap_grad_reduce: bool = False
    """megatron: sum gradients over data-parallel ranks while the backward pass goes on."""
    router_replay: bool = False
    """A mixture of experts computes every token with the experts that the sampler sent it to, not with those that its
    own routers would choose (docs/objective.md)."""

    @property
    def ranks_a_copy(self) -> int:
        """Processes that compute a micro-batch together; those of a run beyond them are data parallel."""
        return self.tp * self.cp * self.pp


@dataclass(kw_only=True)
class SamplerConfig:
    """Who draws the completions."""

    kind: str = "torch"
    """torch: the learner's own Hugging Face model.  vllm: vLLM in the learner's processes, on the learner's tensors
    (docs/colocation.md)."""
    max_sequences: int = 512
    """Completions drawn at once; bounds the KV cache."""
    tp: int = 1
    """vllm: ranks over which one engine is cut; it need not be learner.tp."""
    gpu_memory_utilization: float | None = None
    """vllm: share of the GPU for weights and KV cache together; null computes the KV cache from max_sequences."""
    enforce_eager: bool = False
    """vllm: no CUDA graphs (a CPU has none): starts faster, decodes slower."""
    merge_adapters: bool = False
    """vllm, with model.lora: sample from merged copies W + s B A, which decodes faster and holds the adapted matrices
    twice; false computes the adapters beside W."""
    max_restarts: int = 2
    """vllm: how often a failed engine is rebuilt, and the rollout drawn again with the same seeds, before the run
    stops."""
    oversample: float = 0.0
    """Draw this share of a step's prompts more, go on once train.prompts_per_step groups are complete, and finish the
    others in later steps: no step waits for the longest completion, and none is thrown away. Their first tokens are
    then of older policies (docs/objective.md)."""
    round_tokens: int = 256
    """oversample, and with an environment: the most tokens a completion gets between looks at what has ended."""
    bucket_mb: int = 256
    """Weights that learner and sampler do not share move in buckets of at most this size."""
    proof: str = "sampled"
    """sampled | full: whether the checksums of weights that were copied read a part, another one each step, or all."""
    canary_tolerance: float | None = None
    """How far the canary's logprobs may be apart when weights are shared; null: 2e-5 in float32, 0.1 in bfloat16."""


@dataclass(kw_only=True)
class ClusterConfig:
    """The hardware."""

    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    dtype: str = "auto"
    """auto | float32 | bfloat16: the weights' type; auto is float32 on a CPU and bfloat16 on a GPU."""
    attention: str = "auto"
    """auto | torch | flash_attn | flash_attn_3: whose flash attention a GPU computes (docs/kernels.md).  auto: that of
    the package flash_attn where it is installed, else torch's own."""
    num_threads: int | None = None
    """CPU threads; null: all cores."""
    memory_gb: float | None = None
    """One device's memory in 10^9 bytes, for `fastgrpo plan` of a GPU that is not here; null: what this machine has."""
    num_ranks: int | None = None
    """`fastgrpo plan`: processes of the job to plan for; null: the fewest that the layout takes."""


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out accuracy."""

    every: int = 10
    """Steps between evaluations, the first before training and one at the end; 0: never."""
    num_prompts: int | None = None
    """null: all held-out questions."""
    num_samples: int = 1
    """Above 1: pass@k as well; needs eval.temperature > 0."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """As sampling.top_p, which evaluations do not follow."""
    top_k: int = 0
    """As sampling.top_k."""
    by: str | None = None
    """A column of the data, such as data_source: each of its values has an accuracy of its own, eval/accuracy/VALUE."""
    max_new_tokens: int | None = None
    """null: sampling.max_new_tokens."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """What survives a stop."""

    every: int = 50
    """Steps between checkpoints, one at the end; 0: only when stopped and at the end."""
    keep: int = 2
    """The newest this many are kept."""
    background: bool = False
    """The loop waits only until the state is copied to host memory; it is written while the next steps go on. A run
    killed before that is done goes on from the checkpoint before. The last one is waited for."""
    export: bool = True
    """Write the final policy as a Hugging Face directory into run.dir/hf."""
    export_every: int = 0
    """Steps between policies that are written as Hugging Face directories, run.dir/exports/step-000050, for evaluations
    beside the run: each appears whole, and all are kept. 0: none."""


@dataclass(kw_only=True)
class Config:
    """Everything `fastgrpo train` reads."""

    seed: int = 0
    """Prompts' order, samples and everything else random derive from it."""
    resume: str = "no"
    """no | auto (the newest whole checkpoint of run.dir, or of runs/latest) | a run's or checkpoint's path.
    Rows, checkpoints and exports of later steps are removed from run.dir."""
    deterministic: bool = False
    """On a GPU: the learner repeats a run bit by bit, which costs speed (a CPU's runs always do)."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def max_new_tokens(self) -> int:
        """The longest completion, in training or in evaluation."""
        return max(self.sampling.max_new_tokens, self.eval.max_new_tokens or 0)
