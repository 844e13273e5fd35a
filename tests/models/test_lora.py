"""Adapters: what they compute, what they leave alone, and that other tools read them."""

import json

import pytest
import torch
from builders import CONFIGS, RAGGED, REWARDS, make_groups, make_model, save, small_run
from transformers import AutoModelForCausalLM

from fastgrpo import commands
from fastgrpo.config import LoraConfig, TrainConfig, UserError
from fastgrpo.data.packing import Sequence, pack
from fastgrpo.kernels.objective import Objective
from fastgrpo.learner.torch_learner import TorchLearner
from fastgrpo.main import compose, with_shorthands
from fastgrpo.metrics import read_jsonl
from fastgrpo.models.hf import load_model, prepare
from fastgrpo.models.lora import add_adapters, add_to_skeleton
from fastgrpo.models.storage import fused

TARGETS = ("q_proj", "v_proj", "down_proj")
OBJECTIVE = Objective(kl_coef=0.1)


def batch_of(groups):
    sequences = [
        Sequence(
            sequence_id=10 * number + i,
            group_id=number,
            prompt_ids=group.group.prompt.token_ids,
            token_ids=rollout.token_ids,
            advantages=torch.full((len(rollout.token_ids),), float(group.advantages[i])),
            token_weights=torch.full((len(rollout.token_ids),), 0.1),
            sampler_logprobs=rollout.sampler_logprobs,
        )
        for number, group in enumerate(groups)
        for i, rollout in enumerate(group.group.rollouts)
    ]
    (batch,) = pack(sequences, max_tokens=10_000, share_prompts=True)
    return batch


def with_adapters(kind="qwen2", rank=3, random=True, **more):
    model = prepare(make_model(kind))
    adapters = add_adapters(model, LoraConfig(rank=rank, alpha=6, target_modules=list(TARGETS), **more), seed=7)
    if random:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapters


def merged_into(plain, model, scale):
    """The plain model with scale * B A added to its matrices, as LoRA's paper defines it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            plain.get_submodule(name).weight.data += scale * b.detach() @ a.detach()
    return plain


def gradients(learner, batch):
    """One update's gradients by parameter name, before the step."""
    seen = {}

    def note(rate):
        seen.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})

    learner.optimizer.step = note
    return learner.update([batch], OBJECTIVE), seen


@pytest.mark.parametrize("kind", [*CONFIGS, "mistral"])
def test_gradients_are_those_of_the_merged_matrices(kind):
    """W' = W + s B A gives dB = s dW' A^T and dA = s B^T dW'."""
    model, adapters = with_adapters(kind)
    plain = merged_into(make_model(kind), model, scale=2.0)
    batch = batch_of(make_groups(RAGGED))
    config = TrainConfig(max_grad_norm=1e9)
    reference = prepare(make_model(kind))
    learner = TorchLearner(model, config, num_updates=1, adapters=adapters)
    oracle = TorchLearner(prepare(plain), config, num_updates=1, reference=reference)
    ref_logprobs = learner.logprobs(batch, temperature=1.0, reference=True)
    torch.testing.assert_close(ref_logprobs, oracle.logprobs(batch, temperature=1.0, reference=True))
    object.__setattr__(batch, "ref_logprobs", ref_logprobs)
    result, mine = gradients(learner, batch)
    expected, whole = gradients(oracle, batch)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert mine
    assert all("lora_" in name for name in mine)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            dw = whole[f"{name}.weight"]
            torch.testing.assert_close(mine[f"{name}.lora_A.default.weight"], 2 * b.T @ dw, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(mine[f"{name}.lora_B.default.weight"], 2 * dw @ a.T, atol=2e-5, rtol=1e-4)


def test_fresh_adapters_change_nothing_and_repeat():
    batch = batch_of(make_groups(RAGGED))
    model, adapters = with_adapters(random=False)
    mine = TorchLearner(model, TrainConfig(), num_updates=1, adapters=adapters).logprobs(batch, temperature=1.0)
    plain = TorchLearner(prepare(make_model()), TrainConfig(), num_updates=1).logprobs(batch, temperature=1.0)
    assert torch.equal(mine, plain)
    again, _ = with_adapters(random=False)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_beside_a_model_without_weights_are_the_same(tmp_path, tiny_qwen2, dtype):
    config = LoraConfig(rank=3)
    adapters = add_adapters(load_model(tiny_qwen2, device="cpu", dtype=dtype), config, seed=7)
    others = add_to_skeleton(tiny_qwen2, config, dtype=dtype, seed=7)
    mine, theirs = dict(adapters.named()), {name: tensor.clone() for name, tensor in others.named()}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    others.drop()
    adapters.save_pretrained(tmp_path / "mine")
    others.save_pretrained(tmp_path / "theirs", theirs)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("mine", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_update_moves_the_adapters_alone_and_its_state_is_theirs(tmp_path):
    model, adapters = with_adapters()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = TorchLearner(model, TrainConfig(learning_rate=0.01), num_updates=2, adapters=adapters)
    batch = batch_of(make_groups(RAGGED))
    objective = Objective()
    learner.update([batch], objective)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    save(learner, tmp_path)
    assert torch.load(tmp_path / "learner.pt")["model"].keys() == moved
    other, theirs = with_adapters(random=False)
    resumed = TorchLearner(other, TrainConfig(learning_rate=0.01), num_updates=2, adapters=theirs)
    resumed.load(tmp_path)
    for each in (learner, resumed):
        each.update([batch], objective)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_every_weight_does_not_load_into_adapters(tmp_path):
    save(TorchLearner(prepare(make_model()), TrainConfig(), num_updates=1), tmp_path)
    model, adapters = with_adapters()
    with pytest.raises(UserError, match="not a state of this model"):
        TorchLearner(model, TrainConfig(), num_updates=1, adapters=adapters).load(tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_matrices_follow_the_adapters_in_fused_memory(kind):
    """W + s B A for every matrix, at addresses that stay, q/k/v and gate/up side by side where one has adapters."""
    model, adapters = with_adapters(kind)
    learner = TorchLearner(model, TrainConfig(learning_rate=0.01), num_updates=2, adapters=adapters)
    adapters.keep_merged()
    addresses = [s.tensor.data_ptr() for s in learner.weight_slices()]
    learner.update([batch_of(make_groups(RAGGED))], Objective())
    merged = {s.name: s for s in learner.weight_slices()}
    assert [s.tensor.data_ptr() for s in merged.values()] == addresses
    plain = merged_into(make_model(kind), model, scale=2.0)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(merged[name].tensor, parameter.detach(), atol=1e-6, rtol=1e-6)
    attention = "model.layers.1.self_attn"
    assert fused([merged[f"{attention}.{n}.weight"].tensor for n in ("q_proj", "k_proj", "v_proj")]) is not None


def trained(model, *more):
    config, text = compose("train", with_shorthands(small_run(model, "run.console=none", *more)))
    assert commands.train(config, text)[0] is None
    return config


def test_a_run_exports_what_peft_and_the_next_run_load(workplace, tiny_qwen2):
    trained(tiny_qwen2, "model.lora.rank=4", "train.learning_rate=0.02", "eval.every=2")
    assert json.loads((workplace / "run/hf/adapter_config.json").read_text())["base_model_name_or_path"] == tiny_qwen2
    policy = AutoModelForCausalLM.from_pretrained(workplace / "run/hf")  # transformers finds base and adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(policy(ids).logits, base(ids).logits)
    options = [f"model.path={tiny_qwen2}", f"model.lora.path={workplace}/run/hf", "data=arithmetic"]
    more = ["data.eval_size=4", "data.num_problems=40", "sampling.max_new_tokens=6", f"reward.path={REWARDS}:varied"]
    config, _ = compose("eval", with_shorthands([*options, *more]))
    found, last = commands.evaluate(config), read_jsonl("run/metrics.jsonl")[-1]
    assert found
    assert all(last[name] == value for name, value in found.items())
    second = trained(tiny_qwen2, f"model.lora.path={workplace}/run/hf", "run.dir=more", "train.num_steps=1")
    assert second.model.lora.rank == 0


def test_resumed_adapters_are_bit_identical(workplace, tiny_qwen2):
    options = ["model.lora.rank=4", "train.learning_rate=0.02", "checkpoint.every=1", "eval.every=0"]
    trained(tiny_qwen2, *options, "train.num_steps=3")
    trained(tiny_qwen2, *options, "train.num_steps=3", "run.dir=other", "checkpoint.keep=3")
    trained(tiny_qwen2, *options, "train.num_steps=3", "run.dir=other", "resume=other/checkpoints/step-000001")
    mine, theirs = (torch.load(f"{name}/checkpoints/step-000003/learner/learner.pt") for name in ("run", "other"))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in mine["model"].items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=2, target_modules=["qproj"]), "model.lora.target_modules: the model has no matrix 'qproj'"),
        (LoraConfig(path="nowhere"), "model.lora.path=nowhere: no adapter_config.json there; give a PEFT directory"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(UserError) as error:
        add_adapters(prepare(make_model()), config, seed=0)
    assert str(error.value).startswith(message)


def test_more_than_low_rank_matrices_is_refused(tmp_path):
    _, adapters = with_adapters()
    adapters.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match=r"model\.lora\.path=.*: its use_dora is more than low-rank matrices"):
        add_adapters(prepare(make_model()), LoraConfig(path=str(tmp_path)), seed=0)


def test_adapters_of_another_model_are_refused(tmp_path):
    _, adapters = with_adapters()
    adapters.save_pretrained(tmp_path)
    other = make_model()
    other.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 16)
    with pytest.raises(UserError, match=r"model\.lora\.path=.*: does not fit model\.path"):
        add_adapters(prepare(other), LoraConfig(path=str(tmp_path)), seed=0)
