"""Fixtures of the whole suite."""

import os
import signal

# A shell that starts the suite in the background lets it ignore Ctrl-C, nohup a terminal's end, and so would the runs
# that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests run in several processes on few cores: threads that spin for each other would starve them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to stand before anything imports triton

from builders import RAGGED, make_groups, save_tiny_model

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def ragged_groups():
    return make_groups(RAGGED)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory):
    """The path of a random Qwen2 that fastgrpo trains in no time."""
    return save_tiny_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory, and a cache that is nobody's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
