"""The configuration's schema: what can be set, its type, its default, and what it means.

`fastgrpo train --help` prints the docstring under each field. `conf/` holds named choices of these values; `main.py`
turns the composed configuration into these dataclasses once, and nothing below it sees Hydra. The defaults here suit a
real model; conf/model/quickstart.yaml sets what a tiny one needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """Something the user can fix: printed as one line (what, where, how to fix it), exit code 2, no traceback."""


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes and what it shows."""

    name: str = "default"
    """The first folder under runs/."""
    dir: str = "runs/${run.name}/${now:%Y-%m-%d_%H-%M-%S-%f}"
    """The directory for everything that the run writes; runs/latest points to the newest run. The time includes
    microseconds, for runs that begin together."""
    console: str = "auto"
    """auto | live | plain | none.  auto: a live display on a terminal, plain lines when piped."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb and mlflow; metrics.jsonl and report.html are always written."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps to profile, such as [3,4]. For each one, run.dir/profile receives torch's trace, a table of the costliest
    operators and, on a GPU, a snapshot of its memory (docs/metrics.md)."""
    profile_ranks: list[int] | None = field(default_factory=lambda: [0])
    """The ranks to profile; null: all of them."""


@dataclass(kw_only=True)
class WarmStartConfig:
    """Supervised learning on worked solutions before GRPO (model.path=null with generated problems only)."""

    target_accuracy: float = 0.25
    """Stop once this share of the sampled answers is right."""
    max_steps: int = 2000
    """Give up after this many updates."""
    batch_size: int = 128
    """Worked solutions per update."""
    learning_rate: float = 2e-3
    """AdamW's learning rate, reached after 20 updates."""


@dataclass(kw_only=True)
class LoraConfig:
    """Train low-rank adapters beside a frozen model (needs `pip install fastgrpo[lora]`)."""

    rank: int = 0
    """The adapters' rank; 0 trains every weight instead. The frozen model serves as the KL term's reference and takes
    no extra memory."""
    alpha: int = 32
    """The product of the adapters is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    path: str | None = None
    """Begin with the adapters of a PEFT directory, such as an earlier run's hf/, instead of fresh ones."""

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained instead of every weight."""
        return self.rank > 0 or self.path is not None


@dataclass(kw_only=True)
class ModelConfig:
    """The policy."""

    path: str | None = None
    """A local directory (Qwen2, Qwen3, Qwen3-MoE, Llama, Mistral) or a hub name; null builds a small Qwen3."""
    tokenizer_path: str | None = None
    """Another directory for the tokenizer; null: model.path."""
    hidden_size: int = 128
    """hidden_size to intermediate_size set the shape of the model that is built when path is null."""
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 256
    lora: LoraConfig = field(default_factory=LoraConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    cache_dir: str = "${oc.env:XDG_CACHE_HOME,${oc.env:HOME,.}/.cache}/fastgrpo"
    """Where warm-started models are kept, under a hash of everything that went into them."""


@dataclass(kw_only=True)
class DataConfig:
    """The questions."""

    source: str = "jsonl"
    """jsonl | parquet | hub | arithmetic. A file that ends in .jsonl or .parquet is read as that format."""
    path: Any = None
    """A .jsonl or .parquet file, a directory of them, a pattern ('train-*.parquet') or a list ([a.jsonl,b.parquet]),
    read one after another; or the name of a hub data set."""
    eval_path: Any = None
    """Held-out questions, given as in data.path; null splits data.eval_size of them off data.path."""
    eval_size: int = 256
    """How many questions are held out. They are the same for every seed and never occur in training."""
    hub_config: str | None = None
    """The hub data set's configuration, such as `main` for openai/gsm8k."""
    split: str = "train"
    """The hub data set's split to train on."""
    eval_split: str | None = None
    """The hub data set's held-out split; null splits eval_size rows off."""
    prompt_column: str = "question"
    """The column with the prompt: a text, or a list of chat messages ({role, content}). a.b is the entry b of column
    a."""
    answer_column: str | None = "answer"
    """The column that reward functions receive as `answer`, for example reward_model.ground_truth; null for data
    without answers."""
    system_prompt: str | None = None
    """A system message put before every question; needs a tokenizer with a chat template."""
    prompt_template: str = "{prompt}"
    """Text around a text prompt, for example "Question: {prompt} Answer:"."""
    chat_template: bool = True
    """Apply the tokenizer's chat template if it has one."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the chat template, for example {enable_thinking: false}."""
    max_prompt_tokens: int | None = None
    """The longest prompt allowed; data.long_prompts says what happens to longer ones. null: the model's context less
    sampling.max_new_tokens."""
    long_prompts: str = "fail"
    """fail | drop: end the run, or leave such prompts out and count them."""
    shuffle: bool = True
    """Use a new order in every epoch, which depends on the seed; false keeps the file's order."""
    operation: str = "addition"
    """arithmetic: addition | subtraction."""
    num_digits: int = 3
    """arithmetic: number of digits of each operand."""
    num_problems: int = 20000
    """arithmetic: number of training problems."""


@dataclass(kw_only=True)
class RewardTerm:
    """One reward function and its weight."""

    path: str = "???"
    """The function, as module:function or file.py:function."""
    weight: float = 1.0
    """The factor of its value in the reward."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""


@dataclass(kw_only=True)
class RewardConfig:
    """How completions are scored (docs/rewards.md has the contract of a reward function)."""

    path: str = "fastgrpo.rewards.verifiable:exact_match"
    """The function, as module:function or file.py:function."""
    weight: float = 1.0
    """The factor of its value in the reward."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""
    extra: dict[str, RewardTerm] = field(default_factory=dict)
    """Further functions by name; the reward is the weighted sum of all of them."""
    timeout_s: float = 30.0
    """Time limit for one call, in seconds."""
    on_error: str = "fail"
    """fail | zero | drop: what happens when a reward function raises or exceeds the time limit.  fail: the run ends.
    zero: that function's value is 0.  drop: the group is left out.  The metrics count the last two."""
    num_workers: int = 2
    """Number of processes that run reward functions; 0 runs them in the trainer's own process, for functions that hold
    a model."""


@dataclass(kw_only=True)
class EnvironmentConfig:
    """What answers the policy's turns: tools, a user, a game (docs/environment.md)."""

    path: str | None = None
    """The function, as module:function or file.py:function, which is called with every turn that ends with a stop
    token; null: a completion is one turn."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for the function."""
    max_turns: int = 8
    """The most turns that the policy has in a completion; sampling.max_new_tokens limits the completion as a whole."""
    timeout_s: float = 30.0
    """Time limit for one call, in seconds."""
    on_error: str = "fail"
    """fail | tell: what happens when the function raises or exceeds the time limit.  fail: the run ends.  tell: the
    policy reads the error."""
    num_workers: int = 2
    """Number of processes that run the function; 0 runs it in the trainer's own process."""


@dataclass(kw_only=True)
class ReferenceConfig:
    """The reference policy, to which the KL term holds the trained one."""

    path: str | None = None
    """Another model with the policy's tokens, such as the one that an earlier run began with, or a larger one to learn
    from; null: the policy as it is at the start of the run."""
    schedule: str = "fixed"
    """fixed | refresh | ema.  refresh: the reference becomes the policy every refresh_every steps (iterative
    GRPO).  ema: it follows the policy slowly."""
    refresh_every: int = 100
    """refresh: number of steps between one reference and the next."""
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
    over the group, and summed for each token over the steps that end at or after it.  Or a function of your own,
    FILE.py:FUNCTION (docs/objective.md)."""
    advantage_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for an advantage function of your own."""
    std_ddof: int = 1
    """Delta degrees of freedom of the std: 1 is customary, 0 divides by G."""
    min_std: float = 0.0
    """A lower bound for the std, so that a nearly constant reward does not blow up the advantages."""
    aggregation: str = "sequence_mean"
    """The weight of a token: sequence_mean 1/(S*|o_i|) (GRPO) | token_mean 1/sum of tokens (DAPO) | constant
    1/(S*max_new_tokens) (Dr.GRPO)."""
    surrogate: str = "clip"
    """clip | cispo | sapo | reinforce, or a function of your own, FILE.py:FUNCTION (docs/objective.md)."""
    surrogate_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments for a surrogate of your own."""
    ratio_level: str = "token"
    """token | sequence: whether the ratio is of a token or of its whole completion (GSPO)."""
    clip_ratio_low: float = 0.2
    """epsilon: the ratio is clipped from below at 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_ratio_high; a value above clip_ratio_low is DAPO's clip-higher."""
    dual_clip: float | None = None
    """c > 1: the loss of a token with a negative advantage is at most -c*A; null: off."""
    sapo_tau_pos: float = 1.0
    """sapo: the gate's temperature where the advantage is positive."""
    sapo_tau_neg: float = 1.05
    """sapo: the gate's temperature where the advantage is not positive."""
    kl_coef: float = 0.04
    """beta, the factor of the KL term, which is in the loss and never in the reward; with 0 no reference model is
    loaded."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3: the estimator of the KL divergence."""
    kl_times_ratio: bool = False
    """Multiply the KL estimate by the ratio, which makes its gradient unbiased off-policy."""
    entropy_coef: float = 0.0
    """The factor of a bonus for entropy."""
    top_entropy_quantile: float = 1.0
    """Below 1, only this share of an update's tokens, those with the most undecided next-token distributions, learn the
    advantage (0.2 in arXiv 2506.01939). The others keep their KL and entropy terms and count in every mean."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    importance_level: str = "none"
    """none | token | sequence: importance weights from the sampler's to the learner's probabilities."""
    importance_mode: str = "truncate"
    """truncate: weights above importance_cap are set to it.  mask: weights outside [importance_floor, importance_cap]
    are set to 0, so that tokens on which sampler and learner disagree carry no loss."""
    importance_floor: float = 0.0
    """mask: smaller weights are set to 0."""
    importance_cap: float = 2.0
    """truncate: larger weights are set to this value.  mask: they are set to 0."""
    mask_truncated: bool = False
    """Completions cut at max_new_tokens keep their place in the group's baseline but carry no loss."""
    overlong_buffer: int = 0
    """DAPO's soft punishment: within this many tokens before max_new_tokens, the reward falls by up to
    overlong_penalty; 0: off."""
    overlong_penalty: float = 1.0
    """What a completion of max_new_tokens tokens loses of its reward."""
    dynamic_sampling: bool = False
    """Replace groups in which all rewards are equal by new prompts (DAPO)."""
    max_resamples: int = 4
    """dynamic_sampling: the most rounds of new prompts in a step, before it continues with what it has."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by this value, in sampling and in the objective alike."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability; 1 keeps every token."""
    top_k: int = 0
    """Draw only from this many of the likeliest tokens; 0 keeps every token."""
    max_new_tokens: int = 1024
    """A completion is cut at this many tokens, including the environment's."""
    min_new_tokens: int = 0
    """No stop token is drawn before this many tokens."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a turn; null: the end tokens of the tokenizer and of the generation configuration."""


@dataclass(kw_only=True)
class TrainConfig:
    """Training steps and their updates."""

    num_steps: int = 100
    """Number of steps of the run, each with its own rollouts."""
    prompts_per_step: int = 128
    """Questions per step, over all ranks; each is completed algorithm.group_size times."""
    updates_per_rollout: int = 1
    """mu of Algorithm 1: passes over the rollouts of a step."""
    num_minibatches: int = 1
    """Optimizer updates per pass; prompts_per_step must be divisible by it."""
    learning_rate: float = 1e-6
    """AdamW's highest learning rate."""
    lr_schedule: str = "constant"
    """constant | linear | cosine: the course of the learning rate after the warm-up, down to min_lr_ratio."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from near 0 to its highest value."""
    min_lr_ratio: float = 0.0
    """The final learning rate as a share of the highest."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only: norms and biases are left alone."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the square root in AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients with a larger L2 norm, over all parameters, are scaled down to it."""
    moe_aux_loss_coef: float = 0.0
    """The factor of the auxiliary loss that evens out the use of a mixture's experts (docs/parallelism.md); above 0 an
    update takes one more forward pass. Models are often pretrained with 0.001 (router_aux_loss_coef in config.json)."""
    time_limit_minutes: float | None = None
    """Time limit from the start of the command; null: none. The run saves and ends, as after a SIGTERM but with exit
    code 124, when another step as long as the longest so far might not finish in time with its checkpoint. One step is
    always made (docs/parallelism.md)."""
    max_nonfinite_updates: int = 3
    """An update with a non-finite loss or gradient is skipped; after this many in a row the run saves the batch and
    stops."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on the rollouts of a step."""
        return self.updates_per_rollout * self.num_minibatches

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.num_steps * self.updates_per_step


@dataclass(kw_only=True)
class LearnerConfig:
    """What computes the updates."""

    kind: str = "torch"
    """torch: one Hugging Face model on one device.  megatron: a model that is split over the processes of torchrun."""
    tp: int = 1
    """megatron: number of ranks over which every matrix and the vocabulary are split (tensor parallel)."""
    pp: int = 1
    """megatron: number of stages of consecutive layers (pipeline parallel); ranks beyond tp x cp x pp are data
    parallel."""
    vpp: int = 1
    """megatron: number of virtual stages on each pipeline rank."""
    stage_layers: list[int] | None = None
    """megatron: number of layers of each stage (of pp x vpp, in the model's order); null deals them out so that the
    stages take equally long, counting the head with the last one."""
    sp: bool = False
    """megatron: also split norms and residuals along the tokens (sequence parallel)."""
    cp: int = 1
    """megatron: split a micro-batch's rows over this many ranks (context parallel), for sequences too long for one
    rank."""
    ep: int = 1
    """megatron: deal a layer's experts over this many of a stage's tp x cp x data-parallel ranks (expert parallel)."""
    max_tokens_per_microbatch: int = 16384
    """The most packed tokens in one forward pass."""
    share_prompts: bool = True
    """Compute each group's prompt once; false packs a copy for each completion (with the same gradient)."""
    offload: str = "auto"
    """auto | always | never: move optimizer state and gradients to the host while sampling.  auto: on a GPU, if the KV
    cache would not fit beside them (`fastgrpo plan` says whether it does)."""
    activation_checkpoint: str = "none"
    """none | selective | full: what the backward pass recomputes.  selective (megatron): feed-forwards, but not
    attention.  full: whole layers, of which only the inputs are kept; takes a third more time."""
    distributed_optimizer: bool = True
    """megatron: each data-parallel rank keeps and steps its part of the optimizer's state; false: each keeps all of
    it."""
    overlap_grad_reduce: bool = False
    """megatron: sum gradients over data-parallel ranks while the backward pass is running."""
    router_replay: bool = False
    """Compute every token of a mixture of experts with the experts to which the sampler sent it, not with those that
    the learner's own routers would choose (docs/objective.md)."""

    @property
    def ranks_a_copy(self) -> int:
        """Processes that compute a micro-batch together; a run's processes beyond these are data parallel."""
        return self.tp * self.cp * self.pp


@dataclass(kw_only=True)
class SamplerConfig:
    """What draws the completions."""

    kind: str = "torch"
    """torch: the learner's own Hugging Face model.  vllm: vLLM in the learner's processes, on the learner's tensors
    (docs/colocation.md)."""
    max_sequences: int = 512
    """The most completions drawn at once; this bounds the KV cache."""
    tp: int = 1
    """vllm: number of ranks over which one engine is split; it need not equal learner.tp."""
    gpu_memory_utilization: float | None = None
    """vllm: share of the GPU's memory for weights and KV cache together; null computes the KV cache from
    max_sequences."""
    enforce_eager: bool = False
    """vllm: use no CUDA graphs (a CPU has none), which starts faster and decodes more slowly."""
    merge_adapters: bool = False
    """vllm, with model.lora: sample from merged copies W + s B A, which decodes faster but holds the adapted matrices
    twice; false computes the adapters beside W."""
    max_restarts: int = 2
    """vllm: how often in a row a failed engine is rebuilt, and the rollout drawn again with the same seeds, before the
    run stops."""
    oversample: float = 0.0
    """Have this share of a step's prompts in flight on top, continue once train.prompts_per_step groups are complete,
    and finish the others in later steps. No step waits for the longest completion, and none is thrown away; the first
    tokens of the others then come from older policies (docs/objective.md)."""
    round_tokens: int = 256
    """With oversample or an environment: the most tokens that a completion gets before the run looks at what has
    ended."""
    bucket_mb: int = 256
    """Weights that learner and sampler do not share are moved in buckets of at most this size."""
    proof: str = "sampled"
    """sampled | full: whether the checksums of copied weights read a part, a different one at each step, or all."""
    canary_tolerance: float | None = None
    """How far apart the canary's logprobs may be when weights are handed over; null: 2e-5 in float32, 0.1 in
    bfloat16."""


@dataclass(kw_only=True)
class ClusterConfig:
    """The hardware."""

    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    dtype: str = "auto"
    """auto | float32 | bfloat16: the type of the weights.  auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: str = "auto"
    """auto | torch | flash_attn | flash_attn_3: which flash attention a GPU uses (docs/kernels.md).  auto: that of the
    package flash_attn if it is installed, otherwise torch's own."""
    num_threads: int | None = None
    """CPU threads; null: all cores."""
    memory_gb: float | None = None
    """Memory of one device in 10^9 bytes, to let `fastgrpo plan` plan for a GPU that is not here; null: what this
    machine has."""
    num_ranks: int | None = None
    """`fastgrpo plan`: number of processes of the job to plan for; null: the fewest that the layout needs."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation on held-out questions."""

    every: int = 10
    """Number of steps between evaluations; the first is made before training and the last at the end. 0: never."""
    num_prompts: int | None = None
    """How many held-out questions to ask; null: all of them."""
    num_samples: int = 1
    """Completions per question; above 1, pass@k is reported as well, which needs eval.temperature > 0."""
    temperature: float = 0.0
    """The sampling temperature of evaluations; 0 is greedy."""
    top_p: float = 1.0
    """Like sampling.top_p, which evaluations do not follow."""
    top_k: int = 0
    """Like sampling.top_k, which evaluations do not follow."""
    by: str | None = None
    """A column of the data, such as data_source; each of its values gets an accuracy of its own,
    eval/accuracy/VALUE."""
    max_new_tokens: int | None = None
    """The token limit of a completion in evaluations; null: sampling.max_new_tokens."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints and exports."""

    every: int = 50
    """Number of steps between checkpoints, with one more at the end; 0: only when the run stops and at the end."""
    keep: int = 2
    """How many checkpoints are kept, the newest ones."""
    background: bool = False
    """Wait only until the state has been copied to host memory, and write it while the next steps run. A run that is
    killed before that is done continues from the previous checkpoint. The run waits for the last one."""
    export: bool = True
    """Write the final policy to run.dir/hf as a Hugging Face directory."""
    export_every: int = 0
    """Number of steps between policies that are written as Hugging Face directories, run.dir/exports/step-000050, to be
    evaluated while the run continues. Each appears whole, and all are kept. 0: none."""


@dataclass(kw_only=True)
class Config:
    """Everything `fastgrpo train` reads."""

    seed: int = 0
    """The order of prompts, the samples and everything else that is random derive from it."""
    resume: str = "no"
    """no | auto | PATH: continue from the newest complete checkpoint of run.dir, or of runs/latest (auto), or from the
    path of a run or checkpoint. Rows, checkpoints and exports of later steps are removed from run.dir."""
    deterministic: bool = False
    """On a GPU: the learner repeats a run bit for bit, which costs speed (runs on a CPU always do)."""
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
