"""Ahead-of-time compilation for sm_80, sm_90 and sm_100: spills, vector accesses, registers, recompilations.

A number worse than aot_resources.json fails until the table is changed on purpose (aot.py --write).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
WORSE_WHEN_LARGER = (
    "registers",
    "stack_bytes",
    "shared_bytes",
    "local_accesses",
    "walk_instructions",
    "walk_exponentials",
)
WORSE_WHEN_SMALLER = ("vector_loads", "vector_stores")


def run_offline(option):
    """aot.py in a process of its own: this one interprets its kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), option], capture_output=True, text=True, env=environment, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured():
    return run_offline("--json")


@pytest.fixture(scope="module")
def committed():
    return json.loads((HERE / "aot_resources.json").read_text())


def test_the_table_lists_every_kernel(measured, committed):
    assert measured["kernels"].keys() == committed["kernels"].keys()


def test_nothing_spills_and_shared_memory_fits(measured):
    for name, row in measured["kernels"].items():
        assert row["local_accesses"] == row["stack_bytes"] == 0, name
        assert row["shared_bytes"] <= SHARED_LIMIT[int(name.rsplit("_", 1)[1])], name


def test_row_kernels_load_16_bytes_at_a_time(measured):
    """Five blocks of loads a walk: four unmasked in a step, one in the tail. A warp's lanes read side by side."""
    for name, row in measured["kernels"].items():
        if any(f"/ {kernel} /" in name for kernel in ("statistics", "gradient", "policy")):
            assert row["vector_loads"] >= 5, name
            assert row["walk_instructions"] > 0 == row["split_lines"], name


def test_the_decoder_layers_kernels_load_and_store_16_bytes_at_a_time(measured):
    for name, row in measured["kernels"].items():
        scenario, kernel, _ = name.split(" / ")
        if kernel.removesuffix("_backward") in ("norm", "rotary", "swiglu"):
            assert min(row["vector_loads"], row["vector_stores"]) >= 2, scenario


def test_resources_are_no_worse_than_the_committed_table(measured, committed):
    if measured["triton"] != committed["triton"]:
        pytest.skip(f"the table is of Triton {committed['triton']}")
    worse = [
        f"{name}: {key} {committed['kernels'][name][key]} -> {value}"
        for name, row in measured["kernels"].items()
        for key, value in row.items()
        if (key in WORSE_WHEN_LARGER and value > committed["kernels"][name][key])
        or (key in WORSE_WHEN_SMALLER and value < committed["kernels"][name][key])
    ]
    assert not worse, "\n".join(worse)


def test_lengths_coefficients_and_group_sizes_compile_nothing_new():
    """Counts after calls 1 and 2 (the token and the sequence objective); three more calls add no kernel."""
    counts = run_offline("--variants")
    assert counts[1:] == [counts[1]] * 4, counts
