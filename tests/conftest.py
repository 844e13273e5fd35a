"""Fixtures of the whole suite."""

import os

# Tests run in several processes on few cores: threads that spin for each other would starve them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from builders import RAGGED, make_groups

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def ragged_groups():
    return make_groups(RAGGED)
