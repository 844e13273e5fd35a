# make train   from nothing to a trained policy: .venv, install, `fastgrpo train` (ARGS="KEY=VALUE ..." for more)
# make test    the same set-up, then everything CI covers
# make lint    ruff (format and rules) and mypy
# make bench   whole steps side by side with TRL, which it installs
# make gpu     on a machine with a GPU: kernel correctness and benchmarks, written to benchmarks/results/

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tests' processes share the cores, so none may keep both busy waiting for the other.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: train test lint bench gpu clean

train: $(VENV)/.installed
	$(BIN)/fastgrpo train $(ARGS)

test: $(VENV)/.tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info runs multirun .pytest_cache .mypy_cache .ruff_cache

# A machine without a GPU gets torch's CPU build: by exact version from a local index where there is one, else from
# PyTorch's own; the default wheel would pull gigabytes of CUDA libraries.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) torch==2.13.0; \
	else \
	  $(PIP) torch==2.13.0+cpu || $(PIP) --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu; \
	fi
	$(PIP) -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(PIP) -e .[test]
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) -e .[bench]
	touch $@
