"""The GPU command runs from end to end, at sizes that measure nothing."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]


def test_gpu_command_smoke(tmp_path):
    out = tmp_path / "smoke.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = ""  # no git, as on a machine that is lent
    command = [sys.executable, str(REPOSITORY / "benchmarks/gpu.py"), "--smoke", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = list(csv.DictReader(out.open()))
    ours = {row["kernel"] for row in rows if row["provider"] == "fastgrpo"}
    assert {"linear_policy_loss", "policy_loss", "logprobs", "linear_logprobs", "group_advantages"} <= ours
    assert {"segment_attention", "rms_norm", "add_norm", "rotary", "normed rotary", "swiglu"} <= ours
    for check in ("segment_attention of a CPU", "decoder_layer"):
        assert re.search(rf"^{check} +ok$", result.stdout, re.MULTILINE), check
    ratios = {(row["kernel"], row["metric"]) for row in rows if row["unit"] == "ratio"}
    assert {
        ("policy_loss", "of_copy"),
        ("logprobs", "of_copy"),
        ("swiglu", "of_copy"),
        ("linear_policy_loss", "over_gemms"),
    } <= ratios
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    assert {row["commit"] for row in rows} == {"unknown"}
    assert {row["gpu"] for row in rows} == {"none (CPU smoke test)"}  # nobody mistakes this for a measurement
    assert out.with_suffix(".png").exists()


def test_what_the_budget_has_no_room_for_is_named(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from harness import Table, Variant, compare

    table = Table(torch.device("cpu"), deadline=0.0)
    assert compare(table, "kernel", "x", {"fastgrpo": lambda: Variant(lambda: None)}) == {}
    assert "kernel fastgrpo x: left out, the time is up" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed_and_the_rest_is(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import gpu

    timed = []
    monkeypatch.setattr(gpu, "end_at", lambda *_: None)  # it would end the tests
    for module in gpu.BENCHMARKS:
        monkeypatch.setattr(module, "bench", lambda table, smoke, name=module.KERNEL: timed.append(name))
    for wrong, left in (
        (["decoder_layer"], {"segment_attention", "policy_loss"}),
        (["segment_attention of torch"], {"decoder_layer", "policy_loss"}),
        (["oracle", "decoder_layer"], set()),
    ):
        timed.clear()
        monkeypatch.setattr(gpu, "correctness", lambda device, smoke, wrong=wrong: wrong)
        assert gpu.main(["--smoke", "--out", str(tmp_path / "x.csv")]) == 1
        names = {"segment_attention", "decoder_layer", "policy_loss"}
        assert names & set(timed) == left


def test_without_a_gpu_nothing_is_measured():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(REPOSITORY / "benchmarks/gpu.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode != 0
    assert "no CUDA device" in result.stderr


def test_a_peer_that_fails_is_left_out_and_we_are_not(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from harness import Table, Variant, compare

    def failing_at(call):
        calls = iter(range(call))

        def forward():
            if next(calls, None) is None:
                raise MemoryError("late")

        return lambda: Variant(forward)

    table = Table(torch.device("cpu"))
    variants = {"fastgrpo": failing_at(100), "early": failing_at(1), "late": failing_at(3)}
    assert compare(table, "kernel", "x", variants, rounds=4).keys() == {"fastgrpo"}
    with pytest.raises(MemoryError):
        compare(table, "kernel", "x", {"fastgrpo": failing_at(3)}, rounds=4)
