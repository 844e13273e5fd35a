"""Adapters in every layout are the torch learner's: what they compute, how they move, and what is written of them."""

import json
from dataclasses import replace

import pytest
import torch
from adapters import ADAPTED, TARGETS, torch_result, with_adapters
from oracle import error, largest_error
from scenario import NUM_STEPS, model_of, save_models
from test_learner import TOLERANCE

from fastgrpo.config import LoraConfig, UserError
from fastgrpo.learner.megatron.architecture import AdapterShape, Architecture
from fastgrpo.learner.megatron.layout import Layout, data_parallel_size
from fastgrpo.learner.megatron.lora import shape_of
from fastgrpo.models.lora import add_to_skeleton
from fastgrpo.models.shape import Shape
from fastgrpo.plan import num_adapter_parameters

NUMBERS = range(len(ADAPTED))
each_layout = pytest.mark.parametrize("number", NUMBERS, ids=lambda i: f"{i}-{ADAPTED[i].name}".replace(" ", "-"))


@pytest.fixture(scope="module")
def adapted(results_of):
    """What came out of a layout, and what the torch learner computes."""
    expected: dict = {}

    def both(number):
        model = ADAPTED[number].model
        if model not in expected:
            expected[model] = torch_result(model)
        return results_of(4)["adapters"][number], expected[model]

    return both


@each_layout
def test_logprobs_and_the_gradient_of_every_adapter(number, adapted):
    actual, expected = adapted(number)
    assert all(torch.equal(actual["start"][name], tensor) for name, tensor in expected["start"].items())
    assert error(actual["logprobs"], expected["logprobs"]) <= TOLERANCE
    worst, name = largest_error(actual["gradients"], expected["gradients"])
    assert worst <= TOLERANCE, name


@each_layout
def test_three_steps_of_the_adapters(number, adapted):
    actual, expected = adapted(number)
    for got, wanted in zip(actual["steps"], expected["steps"], strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=TOLERANCE)
        assert got["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-6)
    worst, name = largest_error(actual["adapters"], expected["adapters"])
    assert worst <= TOLERANCE, name
    movements = [{n: t - run["start"][n] for n, t in run["adapters"].items()} for run in (actual, expected)]
    worst, name = largest_error(*movements)
    assert worst <= 1e-3, f"the movement of {name}"


@each_layout
def test_a_sampler_sees_the_merged_weights_and_the_reference_is_the_base(number, adapted):
    actual, expected = adapted(number)
    worst, name = largest_error(actual["weights"], expected["weights"])
    assert worst <= TOLERANCE, name
    assert actual["slices"] == []
    assert not actual["moved"]
    assert error(actual["reference"], expected["reference"]) <= TOLERANCE


@each_layout
def test_the_adapters_alone_are_trained_and_saved_as_many_as_planned(number, adapted):
    case, (actual, _) = ADAPTED[number], adapted(number)
    assert actual["saved"] == ["lora_A", "lora_B"]
    if case.layout.num_model_ranks == case.processes and case.layout.cp == 1:  # else ranks share the state
        config, layout = model_of(case.model).config, case.layout
        num_layers = sum(layout.stages(Architecture.of(config))[:: layout.pp])  # of the first stage's ranks
        planned = num_adapter_parameters(Shape.of(config), 3, list(TARGETS[case.model]), layout.tp, num_layers)
        assert actual["trained"] == planned


@each_layout
def test_a_saved_state_goes_on_in_every_layout_and_bit_for_bit_in_its_own(number, adapted):
    first = next(i for i in NUMBERS if ADAPTED[i].model == ADAPTED[number].model)
    wanted, got = adapted(first)[0], adapted(number)[0]["resumed"]
    assert got["step"]["policy_version"] == NUM_STEPS
    worst, name = largest_error(got["weights"], wanted["weights"])
    assert worst <= (0.0 if number == first else 1e-6), name


@each_layout
def test_the_export_is_what_was_trained_and_peft_loads_it(number, adapted):
    peft = pytest.importorskip("peft")
    actual, _ = adapted(number)
    loaded = peft.PeftModel.from_pretrained(model_of(ADAPTED[number].model), actual["exported"])
    tensors = peft.get_peft_model_state_dict(loaded)
    assert {f"base_model.model.{name}" for name in actual["adapters"]} == tensors.keys()
    assert all(torch.equal(tensors[f"base_model.model.{name}"], t) for name, t in actual["adapters"].items())
    merged = dict(loaded.merge_and_unload().named_parameters())
    names = [name for name in actual["weights"] if ".experts." not in name]
    worst, name = largest_error({n: actual["weights"][n] for n in names}, {n: merged[n].detach() for n in names})
    assert worst <= TOLERANCE, name


def test_adapters_of_a_bfloat16_model_are_float32_and_their_own_masters(results_of):
    found, expected = results_of(1)["adapters"], torch_result("qwen2-tied")
    assert found["dtypes"] == [{torch.float32}, {torch.bfloat16}]
    assert found["state"] == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    for got, wanted in zip(found["steps"], expected["steps"], strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=0.02)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)


def test_adapters_of_another_rank_do_not_go_on_from_a_state(results_of):
    assert results_of(1)["adapters"]["other rank"] == (
        "resume=DIRECTORY: its policy.model.layers.0.self_attn.o_proj.lora_A.weight is (3, 64), not (2, 64); "
        "resume with the model of then"
    )


def shape_with(tmp_path, **changes):
    """What is made of saved adapters whose configuration was changed."""
    save_models(tmp_path, {"qwen2-tied"})
    with_adapters("qwen2-tied")[1].save_pretrained(tmp_path / "adapters")
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config = LoraConfig(path=str(tmp_path / "adapters"))
    adapters = add_to_skeleton(str(tmp_path / "qwen2-tied"), config, dtype=torch.float32, seed=0)
    return shape_of(adapters, Architecture.of(model_of("qwen2-tied").config))


def test_the_adapters_shape_is_read_from_what_peft_made(tmp_path):
    targets = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    assert shape_with(tmp_path) == AdapterShape(rank=3, scale=2.0, targets=targets)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"alpha_pattern": {"q_proj": 1}},
        {"layers_to_transform": [0]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_adapters_that_would_train_otherwise_than_with_peft_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"model\.lora: learner=megatron trains plain adapters .*learner=torch"):
        shape_with(tmp_path, **changes)


def test_more_ranks_than_key_heads_want_adapters_on_all_they_gather_or_none():
    architecture = Architecture.of(model_of("qwen3").config)
    for targets, is_possible in ((("q_proj",), False), (("q_proj", "k_proj", "v_proj"), True), ((), True)):
        shape = AdapterShape(rank=3, scale=1.0, targets=tuple(f"self_attn.{name}" for name in targets))
        adapted = replace(architecture, adapters=shape)
        if is_possible:
            assert data_parallel_size(Layout(tp=4), adapted, 4) == 1
        else:
            with pytest.raises(UserError, match=r"learner\.tp=4: beyond the model's 2 key/value heads"):
                data_parallel_size(Layout(tp=4), adapted, 4)
