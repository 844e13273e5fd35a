"""Which layouts are possible: arithmetic alone, so every refusal comes before a model is loaded."""

from dataclasses import replace

import pytest
import torch
from builders import small_run

from fastgrpo.assemble import assemble
from fastgrpo.config import UserError
from fastgrpo.learner.megatron.architecture import Architecture
from fastgrpo.learner.megatron.layout import Layout, data_parallel_size
from fastgrpo.main import compose, with_shorthands
from fastgrpo.ranks import Ranks

QWEN3_06B = Architecture(
    model_type="qwen3",
    num_layers=28,
    hidden_size=1024,
    ffn_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_size=128,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
    inv_freq=torch.zeros(64),
)

QWEN3_30B_A3B = replace(
    QWEN3_06B,
    model_type="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    num_experts=128,
    experts_per_token=8,
    ffn_size=768,
)


@pytest.mark.parametrize(
    ("layout", "world_size", "data_parallel"),
    [
        (Layout(), 1, 1),
        (Layout(), 8, 8),
        (Layout(tp=2, pp=2), 8, 2),
        (Layout(tp=8, sp=True), 8, 1),
        (Layout(tp=16), 16, 1),  # 8 key/value heads, each held twice
        (Layout(pp=7, vpp=2), 14, 2),
        (Layout(tp=2, pp=2, cp=3), 24, 2),
    ],
)
def test_possible_layouts(layout, world_size, data_parallel):
    assert data_parallel_size(layout, QWEN3_06B, world_size) == data_parallel


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            Layout(tp=3),
            6,
            "learner.tp=3: does not divide the model's 16 attention heads; "
            "possible with 6 processes: [tp=1 pp=3], [tp=2 pp=1], [tp=1 pp=2]",
        ),
        (
            Layout(pp=29),
            29,
            "learner.pp=29: more stages than the model's 28 layers; possible with 29 processes: [tp=1 pp=1]",
        ),
        (
            Layout(tp=2, pp=4),
            12,
            "learner.tp=2 x learner.pp=4 = 8 ranks a model: does not divide the 12 processes of this run; "
            "possible with 12 processes: [tp=2 pp=3], [tp=1 pp=6], [tp=2 pp=6]",
        ),
        (
            Layout(pp=4, vpp=8),
            4,
            "learner.pp=4 x learner.vpp=8: more stages than the model's 28 layers; "
            "possible with 4 processes: [tp=1 pp=4], [tp=2 pp=2 vpp=8], [tp=4 pp=1]",
        ),
        (
            Layout(pp=2, stage_layers=(14, 15)),
            2,
            "learner.stage_layers=[14, 15]: learner.pp=2 takes 2 numbers above 0 that add up to the model's 28 layers; "
            "possible with 2 processes: [tp=1 pp=2], [tp=2 pp=1], [tp=1 pp=1]",
        ),
        (
            Layout(pp=2, vpp=2, stage_layers=(14, 14)),
            2,
            "learner.stage_layers=[14, 14]: learner.pp=2 x learner.vpp=2 takes 4 numbers above 0 that add up to the "
            "model's 28 layers; possible with 2 processes: [tp=1 pp=2 vpp=2], [tp=2 pp=1], [tp=1 pp=1]",
        ),
        (
            Layout(sp=True),
            1,
            "learner.sp=true: sequence parallelism cuts tokens over tensor-parallel ranks, and learner.tp=1; "
            "possible with 1 process: [tp=1 pp=1]",
        ),
        (
            Layout(vpp=2),
            2,
            "learner.vpp=2: virtual stages need a pipeline, and learner.pp=1; "
            "possible with 2 processes: [tp=1 pp=1], [tp=2 pp=1], [tp=1 pp=2 vpp=2]",
        ),
        (
            Layout(tp=2, cp=3),
            4,
            "learner.tp=2 x learner.pp=1 x learner.cp=3 = 6 ranks a model: does not divide the 4 processes of this "
            "run; possible with 4 processes: [tp=2 pp=1 cp=2], [tp=1 pp=1 cp=4], [tp=4 pp=1]",
        ),
        (
            Layout(ep=2),
            2,
            "learner.ep=2: the model has no experts; use 1; "
            "possible with 2 processes: [tp=1 pp=1], [tp=2 pp=1], [tp=1 pp=2]",
        ),
        (
            Layout(tp=0),
            1,
            "learner.tp=0: must be at least 1; possible with 1 process: [tp=1 pp=1]",
        ),
    ],
)
def test_impossible_layouts_name_the_key_the_reason_and_the_nearest(layout, world_size, message):
    with pytest.raises(UserError) as error:
        data_parallel_size(layout, QWEN3_06B, world_size)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("layout", "world_size", "data_parallel"),
    [
        (Layout(), 2, 2),
        (Layout(tp=4, sp=True), 8, 2),  # every expert's matrices cut 4 ways
        (Layout(ep=8), 8, 8),
        (Layout(tp=4, sp=True, ep=8), 8, 2),  # whole experts, 16 on each of the 8 ranks
        (Layout(tp=2, sp=True, pp=2, ep=2), 8, 2),
    ],
)
def test_possible_layouts_of_a_mixture_of_experts(layout, world_size, data_parallel):
    assert data_parallel_size(layout, QWEN3_30B_A3B, world_size) == data_parallel


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            Layout(ep=3),
            6,
            "learner.ep=3: does not divide the model's 128 experts; "
            "possible with 6 processes: [tp=1 pp=1 ep=2], [tp=1 pp=1], [tp=2 pp=1 sp=true ep=2]",
        ),
        (
            Layout(pp=2, ep=4),
            4,
            "learner.ep=4: does not divide the 2 processes of a pipeline stage; "
            "possible with 4 processes: [tp=1 pp=2 ep=2], [tp=2 pp=1 sp=true ep=4], [tp=1 pp=2]",
        ),
        (
            Layout(tp=2, ep=2),
            2,
            "learner.tp=2: a model with experts deals tokens to them by sequence parallelism; add learner.sp=true; "
            "possible with 2 processes: [tp=2 pp=1 sp=true ep=2], [tp=2 pp=1 sp=true], [tp=1 pp=2]",
        ),
    ],
)
def test_impossible_layouts_of_a_mixture_of_experts(layout, world_size, message):
    with pytest.raises(UserError) as error:
        data_parallel_size(layout, QWEN3_30B_A3B, world_size)
    assert str(error.value) == message


def test_experts_too_narrow_to_be_cut_can_be_dealt_whole():
    narrow = replace(QWEN3_30B_A3B, ffn_size=24)
    assert data_parallel_size(Layout(tp=4, sp=True, ep=4), narrow, 4) == 1
    with pytest.raises(UserError, match="tp=4: leaves 6 of an expert's feed-forward size 24"):
        data_parallel_size(Layout(tp=4, sp=True), narrow, 4)
    with pytest.raises(UserError, match="tp=16: does not divide the feed-forward size 24 of an expert"):
        data_parallel_size(Layout(tp=16, sp=True), narrow, 16)


def test_key_value_heads_that_can_be_neither_cut_nor_replicated():
    six = Architecture(**{**vars(QWEN3_06B), "num_heads": 24, "num_kv_heads": 6})
    assert data_parallel_size(Layout(tp=12), six, 12) == 1
    with pytest.raises(UserError, match="tp=4: the model's 6 key/value heads can be neither cut nor replicated 4 ways"):
        data_parallel_size(Layout(tp=4), six, 4)


def test_a_run_refuses_a_layout_before_any_model_is_loaded(workplace, tiny_qwen2, monkeypatch):
    monkeypatch.setattr("fastgrpo.assemble.make_learner", None)
    monkeypatch.setenv("WORLD_SIZE", "6")
    asked = small_run(tiny_qwen2, "learner=megatron", "learner.tp=4", "run.console=none")
    config, _ = compose("train", with_shorthands(asked))
    expected = (
        r"^learner.tp=4 x learner.pp=1 = 4 ranks a model: does not divide the 6 processes of this run; possible with 6 "
        r"processes: \[tp=2 pp=1\], \[tp=1 pp=2\], \[tp=1 pp=1\]$"
    )
    with pytest.raises(UserError, match=expected), assemble(config, Ranks(num_ranks=6)):
        pass


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"), [(509, 2, 512), (151936, 8, 151936), (17, 1, 64), (509, 3, 576)]
)
def test_the_vocabulary_is_padded_to_equal_shards(vocab_size, tp, padded):
    architecture = Architecture(**{**vars(QWEN3_06B), "vocab_size": vocab_size})
    assert architecture.padded_vocab_size(tp) == padded
    assert padded % tp == 0
