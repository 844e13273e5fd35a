"""Runs the Triton kernels of these tests in Triton's interpreter, unless there is a GPU to run them on."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

from fastgrpo.kernels.backend import interpreting

if not torch.cuda.is_available() and not interpreting():
    raise pytest.UsageError("Triton was imported before tests/kernels: set TRITON_INTERPRET=1 in front of pytest")


def _to_nearest_bfloat16(data):
    """float32 bits to bfloat16 bits, ties to even; the interpreter cuts them off where every GPU rounds."""
    import numpy as np

    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def _round_like_the_hardware(monkeypatch):
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return _to_nearest_bfloat16(data).reshape(data.shape)
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
