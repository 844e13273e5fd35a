"""What a run is predicted to hold, against what models and autograd really hold."""

from dataclasses import replace

import pytest
import torch
from builders import ALL_CONFIGS, make_model, small_run, small_shape
from transformers import AutoModelForCausalLM, Qwen3Config

from fastgrpo import commands
from fastgrpo.config import LoraConfig, UserError
from fastgrpo.main import compose, with_shorthands
from fastgrpo.models.activations import Kept
from fastgrpo.models.attention import PackedAttention
from fastgrpo.models.decoder import hidden_states
from fastgrpo.models.hf import prepare
from fastgrpo.models.lora import add_adapters
from fastgrpo.models.shape import Shape
from fastgrpo.plan import Plan, advice, device_memory, device_to_plan_for, make_plan, table

NUM_TOKENS = 256
GB = 10**9


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ALL_CONFIGS)
def test_parameters_are_counted_exactly(kind, tied):
    model = make_model(kind, tied=tied)
    assert Shape.of(model.config).num_parameters() == sum(p.numel() for p in model.parameters())


def saved_bytes(model) -> int:
    """What autograd keeps of one forward pass over NUM_TOKENS packed tokens, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    half = NUM_TOKENS // 2
    segments = torch.tensor([[0, half, 0, 0], [half, NUM_TOKENS, 0, half]])
    ids = torch.randint(2, 60, (NUM_TOKENS,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, ids, torch.arange(NUM_TOKENS), PackedAttention(segments))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "targets"),  # the matrices that have adapters, where all else is frozen
    [*((kind, ()) for kind in ALL_CONFIGS), ("qwen3", ALL), ("qwen2", ("q_proj", "down_proj")), ("qwen3_moe", ALL[:4])],
)
def test_activations_are_what_autograd_saves(kind, targets, dtype):
    """Two more layers keep twice what a layer is said to; within 5 %."""
    held = []
    for num_layers in (2, 4):
        sizes = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": NUM_TOKENS}
        shape = small_shape(kind, vocab_size=61, num_hidden_layers=num_layers, **sizes)
        model = AutoModelForCausalLM.from_config(shape).to(dtype)
        if targets:
            add_adapters(prepare(model), LoraConfig(rank=4, target_modules=list(targets)), seed=0)
        held.append(saved_bytes(model))
    measured = (held[1] - held[0]) / 2 / NUM_TOKENS
    kept = Kept(shape=Shape.of(shape), size=dtype.itemsize, rank=4 if targets else 0, targets=targets)
    assert kept.per_token == pytest.approx(measured, rel=0.05)


def test_a_rank_of_a_known_model():
    """Qwen3-0.6B: 596,049,920 parameters by its model card's shape; four ranks halve twice what can be cut."""
    shape = Shape.of(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )
    assert shape.num_parameters() == 596_049_920
    matrices = 151936 * 1024 + 28 * (1024 * 128 * (16 + 16) + 16 * 128 * 1024 + 3 * 1024 * 3072)
    assert shape.num_parameters(tp=4) == matrices // 4 + 28 * (2 * 1024 + 2 * 128) + 1024
    assert shape.kv_bytes_per_token(2) == 28 * 2 * 8 * 128 * 2
    assert shape.kv_bytes_per_token(2, tp=16) == 28 * 2 * 128 * 2  # a key head cannot be cut


def config_of(*overrides):
    return compose("train", with_shorthands(["model.path=somewhere", "data=arithmetic", *overrides]))[0]


def plan_of(*overrides, model=None, gb=80.0, on_gpu=True, num_ranks=1) -> Plan:
    config = config_of(*overrides)
    model_config = model or make_model("qwen3").config
    return make_plan(
        config, model_config, device_bytes=int(gb * GB), on_gpu=on_gpu, longest_prompt=100, num_ranks=num_ranks
    )


def test_what_follows_from_the_parameters():
    """bfloat16 weights: 2 bytes, a reference 2, float32 gradients 4, masters and two moments 12."""
    count = Shape.of(make_model("qwen3").config).num_parameters()
    for plan, held in (
        (plan_of(), (2, 2, 4, 12)),
        (plan_of("cluster.dtype=float32", "algorithm.kl_coef=0"), (4, 0, 4, 8)),
    ):
        assert (plan.weights, plan.reference, plan.gradients, plan.optimizer) == tuple(count * size for size in held)


def test_adapters_are_counted_exactly():
    model = prepare(make_model("qwen3"))
    add_adapters(model, LoraConfig(rank=3), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = plan_of("model.lora.rank=3")
    assert (plan.reference, plan.gradients, plan.optimizer) == (0, 4 * trained, 8 * trained)
    assert plan.weights == plan_of().weights + 4 * trained


def test_a_samplers_own_adapters_or_merged_weights_are_counted():
    """Merged are q/k/v, which lie together: 2 layers of 32 + 2 * 16 rows of 32, once more."""
    adapted = ("model.lora.rank=3", "model.lora.target_modules=[q_proj]")
    assert plan_of(*adapted).sampler_weights == 0
    assert plan_of(*adapted, "sampler=vllm").sampler_weights == 2 * 2 * 3 * (32 + 32)
    adapted = (*adapted, "sampler.merge_adapters=true")
    assert plan_of(*adapted, "sampler=vllm").sampler_weights == 2 * 4096
    megatron = (*adapted, "learner=megatron", "learner.tp=2")
    assert plan_of(*megatron, "sampler=vllm", "sampler.tp=2").sampler_weights == 2 * 4096 // 2
    whole = Shape.of(make_model("qwen3").config).num_parameters()
    megatron = tuple(option for option in megatron if "merge" not in option)
    assert plan_of(*megatron, "learner.pp=2").sampler_weights == 2 * (4096 // 4 + whole)


def test_recomputing_and_pipelines_change_the_activations():
    plain, recomputed = plan_of(), plan_of("learner.activation_checkpoint=full")
    assert recomputed.activations < 0.7 * plain.activations
    full = ("learner=megatron", "learner.tp=2", "learner.activation_checkpoint=full")
    whole, cut = (plan_of(*full, f"learner.sp={on}", num_ranks=2).activations for on in ("false", "true"))
    assert whole - cut == 16384 * (2 * 32 + 2 * 32 + 2 * 32)  # 2 layers' inputs, and in one norms and products
    staged = plan_of("learner=megatron", "learner.pp=2")
    assert staged.activations == plan_of("learner=megatron").activations  # half the layers, two micro-batches in flight


def test_virtual_stages_begin_more_micro_batches():
    """Of two stages of two layers the first has begun two; cut in two again five halves, which are counted as three."""
    model = small_shape("qwen3", vocab_size=61, num_hidden_layers=4)
    deals = ("learner.stage_layers=[2,2]",), ("learner.vpp=2", "learner.stage_layers=[1,1,1,1]")
    plain, virtual = (plan_of("learner=megatron", "learner.pp=2", *deal, model=model) for deal in deals)
    assert 2 * virtual.activations == 3 * plain.activations


def test_a_frozen_base_keeps_less():
    """2 layers of 32 wide, feed-forwards of 48: without k's and v's adapters nothing less, for q takes the same."""
    trained, frozen, only_q = (
        plan_of("learner=megatron", *more).activations
        for more in ((), ("model.lora.rank=3",), ("model.lora.rank=3", "model.lora.target_modules=[q_proj]"))
    )
    assert frozen - only_q == 16384 * 2 * 2 * (32 + 48 + 6 * 3)  # the inputs of gate, up and down; A x of six more
    assert trained - frozen == -16384 * 2 * 2 * 7 * 3


def test_what_router_replay_holds_is_counted():
    """A kilobyte a token of a large model: of 2 layers 2 experts each, one byte an expert; of one micro-batch, or with
    activations computed again of those of all stages."""
    model = make_model("qwen3_moe").config
    for more, in_flight in (((), 1), (("learner.activation_checkpoint=full",), 2)):
        options = ("learner=megatron", "learner.pp=2", *more)
        plain, told = (plan_of(*options, f"learner.router_replay={on}", model=model) for on in ("false", "true"))
        assert told.activations - plain.activations == in_flight * 16384 * 2 * 2


def test_context_parallel_ranks_hold_the_keys_and_values_of_all_rows():
    plain, cut = (plan_of("learner=megatron", f"learner.cp={cp}", model=make_model("llama").config) for cp in (1, 4))
    keys = 2 * 8  # heads times their size
    assert cut.activations - plain.activations // 4 == 2 * (4096 * 2) * 2 * (4 * keys - keys)


def test_what_sampler_and_learner_cannot_share_is_counted():
    model = make_model("qwen3").config
    whole, half = Shape.of(model).num_parameters(), Shape.of(model).num_parameters(tp=2)
    megatron = ["learner=megatron", "learner.tp=2"]
    for options, expected in (
        (["sampler=vllm"], 0),
        ([*megatron, "sampler=vllm", "sampler.tp=2"], 0),
        ([*megatron, "sampler=vllm"], whole),
        ([*megatron, "learner.pp=2", "sampler=vllm", "sampler.tp=2"], half),
        (megatron, whole),  # a Hugging Face copy
    ):
        assert plan_of(*options, num_ranks=4).sampler_weights == 2 * expected, options


def test_data_parallel_ranks_share_the_optimizers_state_and_the_prompts():
    options = ["learner=megatron", "learner.tp=2", "train.prompts_per_step=8", "sampling.max_new_tokens=28"]
    alone, four = plan_of(*options, num_ranks=2), plan_of(*options, num_ranks=8)
    assert alone.optimizer == pytest.approx(4 * four.optimizer, abs=48)
    assert alone.kv_cache_wanted == 4 * four.kv_cache_wanted
    # 100 + 28 tokens fill a block; 2 layers of 2 key heads of 8 in bfloat16, 8 prompts of 8 completions
    assert alone.kv_cache_wanted == 8 * 8 * 128 * (2 * 2 * 2 * 8 * 2)


def test_experts_that_are_dealt_out_are_whole_and_have_few_sharers():
    """2 layers of 4 experts, each 3 matrices of 32 x 24: cut over tp, or whole ones dealt over ep whatever tp is."""
    model = make_model("qwen3_moe").config
    shape, experts = Shape.of(model), 4 * 3 * 32 * 24
    held = [shape.num_expert_parameters(tp, ep) for tp, ep in ((1, 1), (2, 1), (2, 2), (2, 4))]
    assert held == [experts, experts // 2, experts // 2, experts // 4]
    assert shape.num_layer_parameters(2, 1) - shape.num_layer_parameters(2, 4) == experts // 4
    dealt, cut = (
        plan_of("learner=megatron", *e, model=model, num_ranks=4) for e in (["learner.ep=4"], ["learner.ep=1"])
    )
    others = shape.num_parameters() - 2 * experts
    assert dealt.optimizer == 12 * (others // 4 + 2 * experts // 4)
    assert cut.optimizer == 12 * (others // 4 + 2 * experts // 4)
    pair = plan_of("learner=megatron", "learner.ep=2", model=model, num_ranks=4)
    assert pair.optimizer == 12 * (others // 4 + 2 * experts // 2 // 2)


SIZES = Plan(
    device_bytes=100,
    on_gpu=False,
    weights=10,
    reference=10,
    sampler_weights=0,
    gradients=20,
    optimizer=30,
    activations=15,
    loss_head=5,
    kv_cache_wanted=20,
)


def test_a_gpu_that_is_too_small_moves_the_optimizer_out():
    assert (SIZES.train, SIZES.rollout, SIZES.offload, SIZES.fits) == (90, 90, False, True)
    assert advice(SIZES) == ["fits, with nothing to move"]
    tight = replace(SIZES, on_gpu=True, kv_cache_wanted=60)  # 8 are reserved
    assert tight.offload
    assert (tight.kv_cache, tight.rollout) == (60, 88)
    wanting = replace(tight, kv_cache_wanted=144)
    assert wanting.kv_cache == 72
    assert advice(wanting)[0].startswith("the KV cache holds 50% of the 144 B")
    large = replace(SIZES, activations=50)
    assert not large.fits
    assert advice(large) == [
        "does not fit: training needs 25 B more; lower learner.max_tokens_per_microbatch, or set "
        "learner.activation_checkpoint=full"
    ]
    assert "OPTIMIZER" not in table(tight)


def test_a_gpu_that_is_planned_for_need_not_be_here():
    assert device_to_plan_for(config_of("cluster.memory_gb=80")) == (80 * GB, True)
    assert device_to_plan_for(config_of("cluster.memory_gb=80", "cluster.device=cpu")) == (80 * GB, False)
    size, on_gpu = device_to_plan_for(config_of("cluster.device=cpu"))
    assert size == device_memory("cpu") > GB
    assert not on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_gpu_that_is_not_here_needs_its_size():
    with pytest.raises(UserError, match=r"cluster\.device=cuda: .* set cluster\.memory_gb"):
        device_to_plan_for(config_of("cluster.device=cuda"))


def test_adapters_that_are_loaded_are_counted_as_they_were_saved(tmp_path):
    saved = tmp_path / "adapter_config.json"
    saved.write_text('{"r": 4, "target_modules": ["q_proj", "down_proj"]}')
    fresh = ("model.lora.rank=4", "model.lora.target_modules=[q_proj,down_proj]")
    assert plan_of(f"model.lora.path={tmp_path}") == plan_of(*fresh)
    saved.write_text("{}")
    with pytest.raises(UserError, match=r"model\.lora\.path=.*: no readable adapter_config\.json"):
        plan_of(f"model.lora.path={tmp_path}")


def test_the_page_tells_the_step_and_the_memory(workplace, tiny_qwen2):
    config, _ = compose("plan", with_shorthands(small_run(tiny_qwen2)))
    plan, page = commands.plan(config)
    assert plan.fits
    assert "4 prompts x 4 completions = 16 sequences" in page
    rows = [line.split()[0] for line in page.split("\n\n")[1].splitlines()]
    assert rows[:5] == ["one", "weights", "reference", "sampler's", "gradients"]
    assert not any(workplace.iterdir())
