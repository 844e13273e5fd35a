"""`fastgrpo verify`: it looks at every combination, passes what is right and finds what is not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastgrpo import verify
from fastgrpo.verify import VerifyConfig, layers, oracle
from fastgrpo.verify.cases import AGGREGATIONS, MASKS, OBJECTIVES
from fastgrpo.verify.table import Check, report

SMALL = VerifyConfig(dtypes=("float32", "bfloat16"), num_tokens=16, hidden_size=8, vocab_size=31, chunk_size=5)


def test_every_objective_aggregation_and_mask_passes(capsys):
    checks = list(verify.run(SMALL))
    policy = {(c.op, c.objective, c.aggregation, c.mask, c.dtype) for c in checks if "policy" in c.op}
    ways = 2 * 2 * 2  # two ops, on- and off-policy, two dtypes
    assert len(policy) == ways * len(OBJECTIVES) * len(AGGREGATIONS) * len(MASKS)
    assert {c.op for c in checks} == {"linear_policy_loss", "policy_loss", "linear_logprobs", "logprobs"}
    assert report(checks) == 0
    out = capsys.readouterr().out
    assert f"{len(checks)} checks, 0 failed" in out
    assert "clip, sequence (GSPO), on-policy" in out


def test_another_objective_is_found(monkeypatch, capsys):
    """A fused path that clips at 0.3 where 0.2 was asked for."""
    fused = oracle.linear_policy_loss

    def wrong(hidden, weight, batch, objective, **options):
        return fused(hidden, weight, batch, replace(objective, clip_ratio_low=0.3, clip_ratio_high=0.3), **options)

    monkeypatch.setattr(oracle, "linear_policy_loss", wrong)
    checks = list(verify.run(replace(SMALL, dtypes=("float32",)), {"clip": OBJECTIVES["clip"]}))
    assert {c.op for c in checks if not c.ok} == {"linear_policy_loss"}
    assert report(checks) == 1
    out = capsys.readouterr().out
    assert " !" in out
    assert re.search(r"FAILED Check\(op='linear_policy_loss', .* objective='clip'", out)


def test_a_layers_kernels_pass_at_even_and_odd_sizes(capsys):
    config = replace(SMALL, dtypes=("float32", "bfloat16", "float16"))
    checks = list(verify.run_layers(config))
    ops = {"rms_norm", "add_norm", "rotary", "normed rotary", "swiglu", "segment_attention"}
    assert {(c.op, c.dtype) for c in checks} == {(op, dtype) for op in ops for dtype in config.dtypes}
    assert len(checks) == 2 * 2 * 3 * len(ops)  # outputs and gradients, sizes, dtypes
    assert report(checks) == 0
    assert "dlogits" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "wrong"), [("rotary", {"rotary", "normed rotary"}), ("swiglu", {"swiglu"})])
def test_a_layers_kernel_that_is_off_is_found(name, wrong, monkeypatch):
    """By one rounding to bfloat16 too much in float32."""
    kernel = getattr(layers, name)

    def coarse(*inputs, **options):
        out = kernel(*inputs, **options)
        return out.bfloat16().float() if name == "swiglu" else (out[0].bfloat16().float(), *out[1:])

    monkeypatch.setattr(layers, name, coarse)
    checks = list(verify.everything(replace(SMALL, dtypes=("float32",))))
    assert {(c.op, c.quantity) for c in checks if not c.ok} >= {(op, "output") for op in wrong}
    assert {c.op for c in checks if not c.ok} == wrong


@pytest.mark.parametrize(("error", "ok"), [(1e-6, True), (1e-5, True), (2e-5, False), (float("nan"), False)])
def test_an_error_is_held_to_its_tolerance(error, ok):
    check = Check(
        op="logprobs",
        objective="-",
        aggregation="constant",
        mask="none",
        dtype="float32",
        quantity="logprobs",
        error=error,
        tolerance=1e-5,
    )
    assert check.ok is ok


def test_a_surrogate_of_ones_own_takes_the_place_of_ours():
    path = Path(__file__).with_name("example_objectives.py")
    config = replace(SMALL, dtypes=("float32",), surrogate=f"{path}:clip", surrogate_kwargs={"kl_coef": 0.1})
    checks = list(verify.everything(config))
    assert {c.op for c in checks} == {"linear_policy_loss", "policy_loss"}
    assert {c.objective for c in checks if "policy" in c.op} == {
        f"{level} ratio{passes}" for level in ("token", "sequence") for passes in ("", ", on-policy")
    }
    assert all(c.ok for c in checks)
